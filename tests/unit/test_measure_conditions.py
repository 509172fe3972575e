# SPDX-License-Identifier: Apache-2.0
"""What makes a sample unfit, on a machine made of a few files."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

from infertune.base.records import fields, replace
from infertune.base.root import Root
from infertune.measure.conditions import (
    Baseline,
    Between,
    Clocks,
    Conditions,
    between,
    contamination,
    look_at,
    usual,
)

CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={"cpu": 0.02, "io": 0.0}, major_faults=0,
    cpu_khz=4_000_000, gpu_hz=None, throttled=False, others_on_gpu=0, others_in_server=0,
    busiest=(),
)  # fmt: skip
USUAL = Baseline(stalled={"cpu": 0.02, "io": 0.0}, cpu_khz=4_000_000, gpu_hz=None)


def test_a_calm_sample_counts() -> None:
    assert contamination(CALM, USUAL) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"foreign_cpu": 0.4, "busiest": ("make 0.80",)}, "others took 40% of the CPUs (make 0.8"),
        ({"stolen": 0.05}, "5% of the CPU time was stolen"),
        ({"major_faults": 7}, "read 7 pages from a disk"),
        ({"throttled": True}, "throttled by heat"),
        ({"others_on_gpu": 1}, "1 other programs had the GPU open"),
        ({"others_in_server": 2}, "2 requests of others"),
        ({"stalled": {"cpu": 0.07}}, "cpu pressure 7%"),
        ({"stalled": {"io": 0.06}}, "io pressure 6%"),
        ({"cpu_khz": 3_000_000}, "the CPU's clock was at 75%"),
    ],
)
def test_each_cause_is_one_reason(change: dict[str, object], reason: str) -> None:
    [found] = contamination(replace(CALM, **change), USUAL)
    assert reason in found


def test_what_is_not_told_is_no_reason() -> None:
    unknown = replace(CALM, foreign_cpu=None, stolen=None, stalled={}, cpu_khz=None, throttled=None)
    assert contamination(replace(unknown, others_in_server=None), USUAL) == []


def test_busy_forgives_cpu_alone() -> None:
    loud = replace(CALM, foreign_cpu=0.9, stalled={"cpu": 0.9})
    assert contamination(loud, USUAL, busy=True) == []
    assert contamination(replace(loud, major_faults=1), USUAL, busy=True)
    assert contamination(replace(loud, stalled={"memory": 0.9}), USUAL, busy=True)


def test_what_is_made_scarce_on_purpose_is_no_reason() -> None:
    waiting = replace(CALM, stalled={"cpu": 0.9})
    assert contamination(waiting, USUAL, on_purpose={"cpu"}) == []
    assert contamination(waiting, USUAL, on_purpose={"memory"})
    assert contamination(replace(waiting, foreign_cpu=0.5), USUAL, on_purpose={"cpu"})
    starved = replace(CALM, major_faults=4000, stalled={"memory": 0.9, "io": 0.9})
    assert contamination(starved, USUAL, on_purpose={"memory"}) == []
    assert contamination(starved, USUAL, on_purpose={"cpu"})


def test_usual_is_the_median() -> None:
    odd = replace(CALM, stalled={"cpu": 0.9, "io": 0.9}, cpu_khz=1)
    assert usual([CALM, odd, CALM]) == USUAL


def test_it_is_blind_to_speed() -> None:
    """No speed or time of an answer comes in; that none can be imported is a contract."""
    told = {"found", "baseline", "busy", "on_purpose"}
    assert set(inspect.signature(contamination).parameters) == told
    names = {each.name for record in (Between, Baseline, Conditions) for each in fields(record)}
    assert not [name for name in names if any(word in name for word in ("tok", "tft", "tpot"))]
    assert "seconds" not in {each.name for each in fields(Between)}


# -- a machine made of files ----------------------------------------------------------


def machine(base: Path, busy: int, server: int, other: int, faults: int = 0) -> Root:
    files = {
        "/proc/stat": f"cpu  {busy} 0 0 {1000 - busy} 0 0 0 0 0 0\n",
        "/sys/devices/system/cpu/online": "0-1\n",
        "/proc/10/stat": stat(10, "server", server, faults),
        "/proc/10/comm": "server\n",
        "/proc/10/task/10/children": "",
        "/proc/20/stat": stat(20, "cc 1) x", other, 0),
        "/proc/20/comm": "cc1\n",
    }
    for path, text in files.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Root(base)


def stat(pid: int, name: str, ticks: int, faults: int) -> str:
    return f"{pid} ({name}) S 1 1 1 0 -1 0 5 0 {faults} 0 {ticks} 0 0 0 20 0 1 0 777 0 0\n"


def test_what_is_not_the_servers_is_foreign(tmp_path: Path) -> None:
    before = look_at(machine(tmp_path, 100, 50, 10), {10}, own=1)
    root = machine(tmp_path, 400, 250, 110, faults=3)
    after = replace(look_at(root, {10}, own=1), total_ticks=2000, at=before.at + 5)
    found = between(root, before, after)
    assert found.foreign_cpu == pytest.approx(0.1)  # 300 busy, 200 of the server, of 1000
    assert found.major_faults == 3
    assert found.busiest == ("cc1 0.20",)
    assert found.cpu_khz is None
    assert found.stalled == {}


def test_a_clock_that_falls_when_the_work_is_done_is_no_reason(tmp_path: Path) -> None:
    root = machine(tmp_path, 100, 50, 10)
    look = replace(look_at(root, {10}, own=1), cpu_khz=800_000.0)
    during = [Clocks(4_000_000, None), Clocks(3_990_000, 2_000), Clocks(4_010_000, None)]
    found = between(root, look, replace(look, at=look.at + 1), during)
    assert (found.cpu_khz, found.gpu_hz) == (4_000_000, 2_000)
    assert between(root, look, look).cpu_khz == 800_000


def test_a_request_of_others_counts_before_and_after(tmp_path: Path) -> None:
    root = machine(tmp_path, 100, 50, 10)
    before = look_at(root, {10}, own=1, slots=2)
    after = look_at(root, {10}, own=1, slots=0)
    assert between(root, before, after).others_in_server == 2
    assert between(root, replace(before, slots=None), after).others_in_server == 0
    unknown = replace(before, slots=None)
    assert between(root, unknown, unknown).others_in_server is None


def test_a_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    before = look_at(machine(tmp_path, 100, 50, 500), {10}, own=1)
    root = machine(tmp_path, 100, 50, 20)
    after = look_at(root, {10}, own=1)
    reborn = replace(after.processes[20], started=999)
    after = replace(after, processes={**after.processes, 20: reborn}, at=before.at + 1)
    assert between(root, before, after).busiest == ("cc1 0.20",)


def test_what_we_started_is_ours(tmp_path: Path) -> None:
    """The busy neighbours of a stress arm are children of this program."""
    root = machine(tmp_path, busy=0, server=0, other=0)
    task = tmp_path / "proc/1/task/1"
    task.mkdir(parents=True)
    (task / "children").write_text("20 ")
    before = look_at(root, [10], 1)
    machine(tmp_path, busy=60, server=10, other=50)
    found = between(root, before, replace(look_at(root, [10], 1), total_ticks=2000))
    assert found.foreign_cpu == 0


def test_this_machine_tells(tmp_path: Path) -> None:
    found = look_at(Root("/"), (), os.getpid())
    assert found.busy_ticks
    assert os.getpid() in found.processes
