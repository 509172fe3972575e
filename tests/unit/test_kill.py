# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every step of apply, switch, revert and recovery: the originals come back.

SIGKILL proves nothing about power loss (the page cache survives it); what a
power cut may leave is tested in test_power_cut.py and in the guests.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.root import Root, Step
from infertune.engine.session import session
from support import (
    LONG,
    QUIET,
    At,
    Counter,
    FakeKernel,
    apply,
    build,
    in_child,
    kill,
    recover,
    reset,
    revert,
    values,
    with_hook,
)

pytestmark = pytest.mark.usefixtures("unflushed")

Verb = Callable[[Root], None]


def _nothing(root: Root) -> None:
    return None


def _long(root: Root) -> None:
    apply(root, "long", LONG)


def _quiet(root: Root) -> None:
    apply(root, "quiet", QUIET)


def _switched(root: Root) -> None:
    _long(root)
    _quiet(root)


def _interrupted_apply(root: Root) -> None:
    """A machine on which ``apply`` was killed half way."""
    base = root.base
    in_child(lambda: _long(with_hook(base, At(20, kill))))


SCENARIOS: dict[str, tuple[Verb, Verb]] = {
    # name: (what happened before, what is killed)
    "apply": (_nothing, _long),
    "switch": (_long, _quiet),
    "switch back": (_quiet, _long),
    "revert": (_long, revert),
    "revert after switch": (_switched, revert),
    "recover": (_interrupted_apply, recover),
}


def _steps(base: Path, before: Verb, verb: Verb) -> int:
    reset(base)
    before(build(base))
    counter = Counter()
    verb(with_hook(base, counter))
    reset(base)
    return len(counter.steps)


@pytest.mark.parametrize("lost", [None, "run/infertune", "var/lib/infertune"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_step(
    name: str, lost: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And then one of the two places of the journal is lost."""
    before, verb = SCENARIOS[name]
    build(tmp_path)
    original = values(tmp_path)
    total = _steps(tmp_path, before, verb)
    assert total > 5
    for number in range(1, total + 1):
        reset(tmp_path)
        before(build(tmp_path))
        hook = At(number, kill)
        status = in_child(lambda hook=hook: verb(with_hook(tmp_path, hook)))  # type: ignore[misc]
        assert status == 9, f"step {number} did not kill"
        if lost:
            shutil.rmtree(tmp_path / lost, ignore_errors=True)
        recover(build_root(tmp_path))
        assert values(tmp_path) == original, f"killed at step {number}"
        assert not list((tmp_path / "run/infertune").glob("journal*"))
        assert not list((tmp_path / "var/lib/infertune").glob("journal*"))
    with capsys.disabled():
        also = f" and without {lost}" if lost else ""
        print(f"\n  kill -9 during {name}{also}: originals back at {total} of {total} points")


def test_killed_again_while_recovering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step of a recovery, for every third point at which the apply was killed."""
    build(tmp_path)
    original = values(tmp_path)
    points = 0
    for first in range(1, _steps(tmp_path, _nothing, _long) + 1, 3):
        second = 0
        while True:
            second += 1
            reset(tmp_path)
            in_child(lambda n=first: _long(with_hook(tmp_path, At(n, kill))))  # type: ignore[misc]
            hook = At(second, kill)
            status = in_child(lambda hook=hook: recover(with_hook(tmp_path, hook)))  # type: ignore[misc]
            if status == 0:
                break
            assert status == 9
            recover(build_root(tmp_path))
            assert values(tmp_path) == original, f"killed at step {first}, then at {second}"
            points += 1
    assert points > 30
    with capsys.disabled():
        print(f"\n  kill -9 during recovery: originals back at {points} of {points} points")


def build_root(base: Path) -> Root:
    """The machine as it is, without the fault."""
    return with_hook(base, Counter())


def test_whoever_comes_next_finds_it_put_right(tmp_path: Path) -> None:
    """Before it does anything of its own, whatever that is; also where its own apply fails."""
    original = values(build(tmp_path).base)
    _interrupted_apply(build_root(tmp_path))
    assert values(tmp_path) != original
    with session(build_root(tmp_path), "confirm") as ours:
        assert values(tmp_path) == original
        assert ours.recovered is not None
        assert ours.recovered.count("restored") > 0
        assert ours.applied is None


class ThirdValue(FakeKernel):
    """The way back of the governor moves the hint to a value that was nobody's."""

    def write_value(self, path: str, text: str) -> None:
        super().write_value(path, text)
        if path.endswith("scaling_governor") and text != "performance":
            (self.at(path).parent / "energy_performance_preference").write_text("default\n")


class FullVar(At):
    """/var takes nothing more, and then something happens."""

    def __call__(self, step: Step) -> int | None:
        super().__call__(step)
        if step.path.startswith("/var") and step.action in ("create", "write"):
            raise OSError(errno.ENOSPC, "as if", step.path)
        return None


@pytest.mark.parametrize("at", [At, FullVar], ids=["well", "with a full /var"])
def test_killed_between_a_knob_and_what_it_moves(at: type[At], tmp_path: Path) -> None:
    """Nothing but the journal knows then that the third value is nobody's."""
    original = values(build(tmp_path).base)

    def performance() -> None:
        reset(tmp_path)
        apply(ThirdValue(tmp_path), "a", {"cpufreq.scaling_governor": "performance"})

    performance()
    steps = at(10_000, kill)
    revert(ThirdValue(tmp_path, hook=steps))
    for number in range(1, 10_000 - steps.left + 1):
        performance()
        hook = at(number, kill)
        assert in_child(lambda hook=hook: revert(ThirdValue(tmp_path, hook=hook))) == 9  # type: ignore[misc]
        revert(ThirdValue(tmp_path))
        assert values(tmp_path) == original, f"killed at step {number}"
