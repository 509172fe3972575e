# SPDX-License-Identifier: Apache-2.0
"""What the daemon keeps, without a bus: deadlines by a clock that is made here, drift, restarts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infertune.base.root import Root
from infertune.engine.state import drift
from infertune.host.machine import read_machine
from infertune.service import keeper
from infertune.service.keeper import MAX_HOLDS, Choice, Keeper
from infertune.service.timer import Deadline
from support import apply, build, desired, values

DAY_S = 24 * 3600.0
SWAPPINESS = "/proc/sys/vm/swappiness"
LOW = Choice("low", "cpu")


class Clocks:
    """The clocks of a machine that can sleep, and whose time can be set."""

    def __init__(self) -> None:
        self.boottime = 1000.0
        self.monotonic = 1000.0
        self.realtime = 1.7e9

    def pass_by(self, seconds: float) -> None:
        self.boottime += seconds
        self.monotonic += seconds
        self.realtime += seconds

    def suspend(self, seconds: float) -> None:
        """CLOCK_MONOTONIC stands still; the wall clock may not be set again for a while."""
        self.boottime += seconds

    def gettime(self, clock: int) -> float:
        return {
            time.CLOCK_BOOTTIME: self.boottime,
            time.CLOCK_MONOTONIC: self.monotonic,
            time.CLOCK_REALTIME: self.realtime,
        }[clock]


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """What the keeper is told, whichever clock it asks."""
    made = Clocks()
    names = ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC", "CLOCK_REALTIME")
    fake = SimpleNamespace(
        clock_gettime=made.gettime,
        monotonic=lambda: made.monotonic,
        time=lambda: made.realtime,
        **{name: getattr(time, name) for name in names},
    )
    monkeypatch.setattr(keeper, "time", fake)
    return made


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """With a profile that sets one value."""
    build(tmp_path)
    profiles = tmp_path / "etc/infertune/profiles"
    profiles.mkdir(parents=True)
    (profiles / "low.toml").write_text('description = "test"\n[now]\nvm.swappiness = 1\n')
    return tmp_path


# -- deadlines -----------------------------------------------------------------------


def test_a_deadline_passes_while_the_machine_sleeps(machine: Path, clocks: Clocks) -> None:
    original = values(machine)
    one = Keeper(build(machine))
    one.apply(LOW, confirm_within_s=60)
    clocks.pass_by(20)
    clocks.suspend(39)
    assert one.expire() is None
    clocks.suspend(2)
    assert one.expire() is not None
    assert (one.state, values(machine)) == ("idle", original)


@pytest.mark.parametrize("days", [1, -1])
def test_setting_the_clock_moves_no_deadline(days: int, machine: Path, clocks: Clocks) -> None:
    original = values(machine)
    one = Keeper(build(machine))
    one.apply(LOW, confirm_within_s=60)
    clocks.realtime += days * DAY_S
    assert one.expire() is None
    assert one.state == "unconfirmed"
    clocks.pass_by(61)
    assert one.expire() is not None
    assert values(machine) == original


def test_a_restart_keeps_profile_and_deadline(machine: Path, clocks: Clocks) -> None:
    original = values(machine)
    Keeper(build(machine)).apply(LOW, confirm_within_s=60)
    clocks.pass_by(30)
    later = Keeper(Root(machine))
    assert later.start(None) is None
    assert (later.state, later.choice, later.deadline) == ("unconfirmed", LOW, 1060.0)
    assert values(machine) != original
    clocks.pass_by(31)
    # Whoever comes after the deadline puts back first of all.
    last = Keeper(Root(machine))
    last.start(None)
    assert (last.state, values(machine)) == ("idle", original)


def test_the_timer_is_the_kernel_s_and_runs_through_a_suspend() -> None:
    """What the kernel says of it (proc_pid_fdinfo(5)); 7 is CLOCK_BOOTTIME, 1 an absolute time."""
    timer = Deadline()
    try:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        timer.set(now + 1000)
        told = dict(re.findall(r"^(.+?):\s*(.+)$", fdinfo(timer.fd), re.MULTILINE))
        assert (told["clockid"], told["settime flags"]) == ("7", "01")
        left = int(told["it_value"].strip("()").partition(",")[0])
        assert 0 < left <= 1000
        timer.set(None)
        assert "it_value: (0, 0)" in fdinfo(timer.fd)
    finally:
        timer.close()


def fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


# -- holds ---------------------------------------------------------------------------


def test_nobody_guesses_a_cookie(machine: Path) -> None:
    one = Keeper(build(machine))
    cookies = [one.hold(f":1.{number}", LOW, "x") for number in range(MAX_HOLDS)]
    assert all(re.fullmatch("[0-9a-f]{32}", cookie) for cookie in cookies)
    # Every digit of them is by chance.
    assert all(len(set(digits)) > 1 for digits in zip(*cookies, strict=True))
    one.stop()


# -- drift ---------------------------------------------------------------------------


def test_what_was_left_out_does_not_drift(machine: Path) -> None:
    profile = machine / "etc/infertune/profiles/low.toml"
    profile.write_text(
        'description = "test"\n[now]\nvm.swappiness = 1\nkernel.numa_balancing = 1\n'
    )
    one = Keeper(build(machine))
    one.apply(Choice("low", "cpu", ("vm.swappiness",)))
    assert values(machine)[SWAPPINESS] == "60\n"
    assert one.status()["drift"] == []
    (machine / "proc/sys/kernel/numa_balancing").write_text("0\n")
    assert [each["knob"] for each in one.status()["drift"]] == ["kernel.numa_balancing"]


def test_a_clamped_file_that_holds_what_was_wanted_after_all_is_no_drift(tmp_path: Path) -> None:
    root = build(tmp_path)
    knob = "transparent_hugepage.khugepaged.pages_to_scan"
    apply(root, "a", {knob: 8192})
    [path] = [path for path, text in values(tmp_path).items() if text == "5000\n"]
    (tmp_path / path.lstrip("/")).write_text("8192\n")
    assert drift(root, read_machine(root), desired("a", {knob: 8192})) == ()
    (tmp_path / path.lstrip("/")).write_text("77\n")
    [one] = drift(root, read_machine(root), desired("a", {knob: 8192}))
    assert (one.value, one.want) == ("77", "8192")
