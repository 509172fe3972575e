# SPDX-License-Identifier: Apache-2.0
"""``infertune prove`` on this kernel: what it leaves behind, and that it goes on after a kill.

What it finds is this machine's affair: nothing here depends on it.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infertune import run as run_module
from infertune.base.errors import Failed
from infertune.base.root import Root
from infertune.cli import proving
from infertune.cli.proving import Arm, Ours, Stand, request_of
from infertune.host.machine import read_machine
from infertune.launch.binary import ask_server
from infertune.launch.process import Signals
from infertune.measure.arms import bare
from infertune.measure.pairs import Comparison, Found, Take, Taken, order
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from run_support import Runner, alive, wait_until
from talking_server import talking

QUICK = ("--launch-only", "--busy", "--force", "--tokens", "8", "--seed", "7")
SERVER = ("--tokens", "99999", "--token-s", "0.002")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one = Runner(tmp_path)
    yield one
    one.close()


def words(runner: Runner, *more: str, budget: str = "6s") -> list[str]:
    server = runner.server(*SERVER)
    given = ["--model", str(runner.model), "--server", server, "--budget", budget]
    return ["prove", "low-latency", *more, *given, *QUICK]


def samples(runner: Runner) -> list[dict[str, Any]]:
    found = sorted(runner.directory.glob("state/infertune/measurements/*/*/*/samples.jsonl"))
    lines = [line for path in found for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def loops(runner: Runner) -> list[int]:
    """Busy neighbours that descend from a call of ours."""
    ours = {str(each.pid) for each in runner.started}
    found, parents = [], {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parents[entry.name] = stat.rpartition(")")[2].split()[1]
        if b"while first in" in command:
            found.append(entry.name)
    return [int(pid) for pid in found if {parents[pid], parents.get(parents[pid])} & ours]


def test_it_says_what_it_measured_and_what_not(runner: Runner) -> None:
    code, out, err = runner.infertune(*words(runner, "nice", "oom_score_adj"), "--json")
    assert code in (0, 1, 3), err
    found = json.loads(out)
    assert found["seed"] == 7
    assert found["tokens"] == 8
    assert found["baseline"]["setting"] == "bare against itself"
    told = {each["setting"] for each in found["verdicts"]}
    left_out = {each["id"] for each in found["left_out"]}
    if found["baseline"]["verdict"] in ("no effect shown", "cannot decide"):
        assert told | left_out >= {"nice", "oom_score_adj"}
    assert {"id": "vm.swappiness", "why": "--launch-only"} in found["left_out"]
    taken = samples(runner)
    assert taken[0]["comparison"] == "bare against itself"
    pairs = [each["arm"] for each in taken][:2]
    assert pairs == order("7", "bare against itself", 0, 2)
    assert taken[0]["taken"]["figures"].keys() == {"decode_tps", "ttft_s", "start_s"}


def test_stress_is_told_as_shares(runner: Runner) -> None:
    code, out, err = runner.infertune(
        *words(runner, "oom_score_adj", "--stress", "cpu", budget="20s"), "--json"
    )
    assert code in (0, 1, 3), err
    found = json.loads(out)
    stressed = [each for each in found["verdicts"] if each["arm"] == "cpu"]
    if stressed and stressed[0]["pairs"]:
        assert stressed[0]["keeps"] > 0
        assert stressed[0]["bare"] > 0
    assert not loops(runner)


def test_nothing_is_left_after_kill_9_and_it_goes_on(runner: Runner) -> None:
    process = runner.infertune_process(*words(runner, "oom_score_adj", budget="1h"))
    wait_until(lambda: len(samples(runner)) >= 3 or process.poll() is not None)
    process.kill()
    process.wait()
    server = runner.seen()["pid"]
    wait_until(lambda: not alive(server))
    before = samples(runner)
    assert len(before) >= 3
    [run] = runner.directory.glob("state/infertune/measurements/*/*/*-prove")
    again = ("--resume", str(run), "--json")
    code, out, err = runner.infertune(*words(runner, "oom_score_adj", *again, budget="1s"))
    assert code in (0, 1, 3), err
    assert json.loads(out)["path"] == str(run)
    assert samples(runner)[: len(before)] == before, "what was measured stays"
    code, _, err = runner.infertune(*words(runner, *again))
    assert code == 2
    assert "its settings is ['oom_score_adj'], now []" in err


def test_neighbours_end_with_it_however_it_ends(runner: Runner) -> None:
    for number, ends in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = runner.infertune_process(
            *words(runner, "oom_score_adj", "--stress", "cpu", budget="8s")
        )
        wait_until(lambda one=process: loops(runner) or one.poll() is not None)
        seen = loops(runner)
        process.send_signal(number)
        out, err = process.communicate()
        if not seen:
            continue  # it was over before it came to that
        assert process.returncode == ends, err
        wait_until(lambda pids=seen: not any(alive(pid) for pid in pids))
        if number == signal.SIGINT:
            assert re.search(r"interrupted; 'infertune prove --resume /.*' goes on", out)
            assert "Traceback" not in err


def test_the_speed_of_another_server_is_not_ours(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours cannot have the port and ends; the one that has it says that it is ready."""
    nothing = bare(resolve(load_profile(Root("/"), "low-latency"), read_machine(Root("/")), "cpu"))
    path = runner.server(*SERVER)
    request = request_of("low-latency", os.environ, str(runner.model), path, "cpu")
    ours = Ours(
        request,
        ask_server((path,), {}, os.environ, embedded=False),
        str(runner.model),
        lambda _: request,
    )
    with talking() as other, Signals() as signals:
        monkeypatch.setattr(proving, "any_port", lambda: other.server_port)
        monkeypatch.setattr(run_module, "choose_port", lambda wanted, **_: wanted)  # taken since
        other.pages["/health"] = {"status": "ok"}
        other.pages["/props"] = {"total_slots": 1}
        other.events = ({"content": "x", "tokens": [1]}, {"content": "y", "tokens": [2]})
        stand = Stand(
            root=Root("/"), machine=read_machine(Root("/")), caller=os.environ, signals=signals,
            session=None, ours=ours, running=None, seed=1, busy=True, tokens=2,
        )  # fmt: skip
        taker: list[Taken] = []

        def run(take: Take) -> Found:
            taker.append(take(Comparison("x", ("a", "b")), 0, 0))
            raise AssertionError("it was measured")

        with pytest.raises(Failed, match=r"another server|did not get ready"):
            stand.compare(run, (Arm(nothing), Arm(nothing)), starts=True)
        assert taker == []


def test_what_is_wrong_is_said(runner: Runner) -> None:
    for more, told in (
        (["nonsense"], "profile 'low-latency' has no 'nonsense' here"),
        (["--stress", "gpu"], "'gpu' is not one of cpu"),
        (["--url", "http://127.0.0.1:1"], "do not go with --url"),
        (["--resume", "/nowhere"], "/nowhere is not a measurement"),
    ):
        code, _, err = runner.infertune(*words(runner, *more))
        assert code in (2, 3), err
        assert told in err
