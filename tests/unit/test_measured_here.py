# SPDX-License-Identifier: Apache-2.0
"""`knobs` and `profile explain` show what was measured on this machine, and when it is stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import support
from infertune.base.root import Root
from infertune.cli.main import main
from infertune.exporter.base import Absent
from infertune.exporter.collectors.measured import MEASURED
from infertune.host.machine import read_machine
from infertune.measure.statistics import HELPS
from infertune.measure.store import OF_ROOT, machine_key
from infertune.measure.verdicts import QUIET, WHOLE, Measured, Thing, save

GEMMA = Thing(name="gemma-3-270m", path=None, stamp=None)


@pytest.fixture
def where(tmp_path: Path) -> list[str]:
    """The words for a machine on which something was measured."""
    root = support.build(tmp_path)
    machine = read_machine(root)
    verdicts = [
        Measured(
            profile="low-latency", setting=setting, value=value, arm=arm, word=HELPS,
            estimate=0.041, low=0.02, high=0.06, pairs=8, day="2026-11-28", kernel=kernel,
            backend="vulkan", model=GEMMA, server=Thing(name="b1", path=None, stamp=None),
            keeps=keeps, bare=bare,
        )
        for setting, value, arm, kernel, keeps, bare in (
            ("vm.swappiness", "10", QUIET, str(machine.kernel), None, None),
            ("kernel.numa_balancing", "0", QUIET, "6.1.0", None, None),
            ("nice", "-5", QUIET, str(machine.kernel), None, None),
            (WHOLE, None, "cpu", str(machine.kernel), 0.85, 0.31),
        )
    ]  # fmt: skip
    save(root, OF_ROOT, machine_key(machine), verdicts)
    return ["--root", str(tmp_path)]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_knobs_show_it(where: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    table = {line.split()[0]: line for line in shown(capsys, *where, "knobs").splitlines()}
    assert table["vm.swappiness"].endswith("measured here, +4 %")
    assert "measured here" not in table["kernel.numa_balancing"]  # it does not hold any more
    one = shown(capsys, *where, "knobs", "vm.swappiness")
    assert "measured here 2026-11-28: +4 % (2..6), quiet, gemma-3-270m\n" in one
    old = shown(capsys, *where, "knobs", "kernel.numa_balancing")
    assert "gemma-3-270m; stale: the kernel was 6.1.0\n" in old


def test_explain_shows_it(where: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *where, "profile", "explain", "low-latency")
    assert "keeps 0.85x of the quiet machine's tokens/s, without it 0.31x, busy neigh" in text
    assert "gemma-3-270m; stale: the value was -5\n" in text
    assert "measured here" not in shown(capsys, *where, "profile", "explain", "long-context")


def test_documents_have_it(where: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, *where, "profile", "explain", "low-latency", "--json"))
    [whole] = document["measured_here"]
    assert (whole["arm"], whole["keeps"], whole["stale"]) == ("cpu", 0.85, [])
    [nice] = [each for each in document["settings"] if each["id"] == "nice"]
    assert nice["measured_here"][0]["stale"] == ["the value was -5"]
    document = json.loads(shown(capsys, *where, "knobs", "vm.swappiness", "--json"))
    assert document["knobs"][0]["measured_here"][0]["estimate"] == 0.041


def test_the_exporter_has_it(where: list[str], tmp_path: Path) -> None:
    found = {(each.metric, *each.labels): each.value for each in MEASURED.read(Root(tmp_path))}
    assert found["infertune_measured_kept_ratio", "low-latency", "cpu", GEMMA.name, "bare"] == 0.31
    change = "infertune_measured_change_ratio"
    about = (HELPS, "2026-11-28")
    assert found[change, "low-latency", "vm.swappiness", QUIET, GEMMA.name, *about, "no"] == 0.041
    assert found[change, "low-latency", "kernel.numa_balancing", QUIET, GEMMA.name, *about, "yes"]
    assert len(found) == 6


def test_a_machine_on_which_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="infertune prove"):
        list(MEASURED.read(support.build(tmp_path)))
