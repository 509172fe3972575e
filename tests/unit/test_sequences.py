# SPDX-License-Identifier: Apache-2.0
"""Random sequences of apply, switch, revert, foreign changes, crashes and losses, against a model.

The model is one sentence: the machine holds the applied profile's values where
they were the last to be written, and what it would hold without infertune
everywhere else.

Which steps a call is made of depends on the calls before it and on nothing else: else a kill at
the n-th step would hit another one at the next try.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import infertune.engine.session as engine
from infertune.base.root import Step
from infertune.engine.journal import PERSISTENT, RUNTIME, Loaded
from infertune.engine.session import session
from infertune.engine.state import status
from infertune.engine.store import Journals
from support import (
    LONG,
    QUIET,
    At,
    Clock,
    Counter,
    apply,
    build,
    desired,
    revert,
    with_hook,
)

pytestmark = pytest.mark.usefixtures("unflushed")

PATHS = {
    "vm.swappiness": "/proc/sys/vm/swappiness",
    "kernel.numa_balancing": "/proc/sys/kernel/numa_balancing",
    "transparent_hugepage.khugepaged.pages_to_scan": "/sys/kernel/mm/transparent_hugepage/"
    "khugepaged/pages_to_scan",
}

# What profiles write is even and what others write is odd: who wrote a value is then visible in
# it.  (Somebody who writes exactly our value cannot be told from us; nothing can.)
OURS = {
    "vm.swappiness": [2, 4, 100],
    "kernel.numa_balancing": [0, 2],
    # The test kernel clamps this one to 5000.
    "transparent_hugepage.khugepaged.pages_to_scan": [1000, 2000, 8192],
}
FOREIGN = {
    "vm.swappiness": [1, 3, 99],
    "kernel.numa_balancing": [1, 3],
    "transparent_hugepage.khugepaged.pages_to_scan": [1001, 2001],
}

profiles = st.fixed_dictionaries(
    {}, optional={knob: st.sampled_from(values) for knob, values in OURS.items()}
)
foreign = st.sampled_from([(knob, value) for knob, values in FOREIGN.items() for value in values])


class Killed(BaseException):
    """Ends the process's work at a step, as kill -9 would: no handler for errors catches it."""


def die(step: Step) -> None:
    raise Killed


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(engine, "datetime", Clock())
        self.base = Path(tempfile.mkdtemp(prefix="infertune-sequences-"))
        self.root = build(self.base)
        self.without = {knob: self.live(knob) for knob in PATHS}
        """What the machine would hold if infertune had never run."""
        self.tuned: dict[str, str] = {}
        """What infertune wrote last and nobody changed since."""
        self.crashed = False

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.base)

    def live(self, knob: str) -> str:
        return (self.base / PATHS[knob].lstrip("/")).read_text().strip()

    def tree(self) -> tuple[dict[Path, bytes], set[Path]]:
        """All files and directories of the machine."""
        found = [*self.base.rglob("*")]
        return (
            {path: path.read_bytes() for path in found if path.is_file()},
            {path for path in found if path.is_dir()},
        )

    def written(self, wanted: dict[str, int]) -> dict[str, str]:
        """What the files hold after these writes, where that is not what they hold anyway."""
        taken = {knob: str(min(value, 5000) if "pages" in knob else value)
                 for knob, value in wanted.items()}  # fmt: skip
        return {knob: value for knob, value in taken.items() if value != self.without[knob]}

    @rule(wanted=profiles)
    def apply(self, wanted: dict[str, int]) -> None:
        with session(self.root, "apply p") as ours:
            assert (ours.recovered is not None) == self.crashed
            ours.apply(desired("p", wanted))
        self.tuned = self.written(wanted)
        self.crashed = False

    @rule()
    def revert(self) -> None:
        with session(self.root, "revert") as ours:
            ours.revert()
        self.tuned = {}
        self.crashed = False

    @rule(change=foreign)
    def somebody_changes(self, change: tuple[str, int]) -> None:
        if self.crashed:
            return  # not a precondition: what is drawn must not depend on where a kill hit
        knob, value = change
        (self.base / PATHS[knob].lstrip("/")).write_text(f"{value}\n")
        self.without[knob] = str(value)
        self.tuned.pop(knob, None)

    @rule(wanted=profiles, at=st.integers(1, 30))
    def killed_in_apply(self, wanted: dict[str, int], at: int) -> None:
        hook = At(at, die)
        try:
            with session(with_hook(self.base, hook), "apply p") as ours:
                ours.apply(desired("p", wanted))
        except Killed:
            self.after_a_crash()
        else:
            self.tuned = self.written(wanted)
            self.crashed = False

    @rule(at=st.integers(1, 20))
    def killed_in_revert(self, at: int) -> None:
        hook = At(at, die)
        try:
            with session(with_hook(self.base, hook), "revert") as ours:
                ours.revert()
        except Killed:
            self.after_a_crash()
        else:
            self.tuned = {}
            self.crashed = False

    def after_a_crash(self) -> None:
        """The next call must notice; whether there is anything to do depends on the step."""
        loaded = Journals(self.root).load()
        assert not loaded.damage
        self.crashed = loaded.journal is not None and not loaded.journal.settled
        if not self.crashed:
            # Killed before the first or after the last word of the journal.
            self.tuned = {
                knob: self.live(knob) for knob in PATHS if self.live(knob) != self.without[knob]
            }

    @rule(directory=st.sampled_from(["run/infertune", "var/lib/infertune"]))
    def a_place_is_lost(self, directory: str) -> None:
        """One of the two holds everything: nothing changes but who is asked."""
        journals = Journals(self.root)
        noted = journals.load()
        stale = journals.persistent.load() != noted
        if directory == "run/infertune" and stale and not self.crashed:
            return  # killed between the two writes, before a change: then both places are needed
        other = journals.persistent if directory.startswith("run") else journals.runtime
        if other.load() == Loaded(None):
            return
        shutil.rmtree(self.base / directory, ignore_errors=True)
        if self.crashed:
            self.after_a_crash()
        else:
            assert Journals(self.root).load() == noted

    @rule()
    def look(self) -> None:
        now = status(self.root)
        assert (now.state == "interrupted") == self.crashed
        drifted = {item.knob for item in now.items if item.outcome == "conflict"}
        if not self.crashed:
            assert not drifted & set(self.tuned)

    @invariant()
    def machine_is_as_the_model_says(self) -> None:
        for knob in PATHS:
            if self.crashed:
                continue
            assert self.live(knob) == self.tuned.get(knob, self.without[knob]), knob

    @invariant()
    def everything_can_go_back(self) -> None:
        """Revert now, and it is as if infertune had never run; then all is put there again."""
        files, directories = self.tree()
        with session(self.root, "recover") as ours:
            ours.revert()
        for knob in PATHS:
            assert self.live(knob) == self.without[knob], knob
        now, made = self.tree()
        for path in now.keys() - files.keys():
            path.unlink()
        for path in sorted(made - directories, reverse=True):
            path.rmdir()
        for path, content in files.items():
            if content != now.get(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        assert self.tree() == (files, directories)


Machine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSequences = Machine.TestCase


CHOICES = {
    knob: [values[knob] for values in (LONG, QUIET) if knob in values] for knob in {**LONG, **QUIET}
}


def walk(seed: int) -> list[str]:
    """The steps of ten random calls on a fresh machine: with side effects, kills and losses."""
    draw = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="infertune-sequences-"))
    build(base)
    steps: list[str] = []
    try:
        for call in draw.choices(("apply", "revert", "lost", "changed"), (6, 2, 1, 1), k=10):
            chosen = sorted(draw.sample(sorted(CHOICES), draw.randrange(len(CHOICES))))
            values = {knob: draw.choice(CHOICES[knob]) for knob in chosen}
            directory = draw.choice(("run/infertune", "var/lib/infertune"))
            fatal = At(draw.randrange(1, 80), die)

            def hook(step: Step, fatal: At = fatal) -> int | None:
                steps.append(f"{step.action} {step.path.removeprefix(str(base))}")
                return fatal(step)

            with contextlib.suppress(Killed):
                if call == "apply":
                    apply(with_hook(base, hook), draw.choice("pq"), values)
                elif call == "revert":
                    revert(with_hook(base, hook))
                elif call == "lost":
                    shutil.rmtree(base / directory, ignore_errors=True)
                else:
                    (base / PATHS["vm.swappiness"].lstrip("/")).write_text("7\n")
    finally:
        shutil.rmtree(base)
    return steps


def walks() -> list[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "datetime", Clock())
        patch.setattr(os, "fsync", lambda descriptor: None)
        return [walk(seed) for seed in range(12)]


def test_the_same_calls_are_the_same_steps() -> None:
    """Twice in one process, and in another one where sets are in another order."""
    once = walks()
    assert sum(map(len, once)) > 1500
    assert walks() == once
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": other}
    command = [sys.executable, "-B", __file__]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == once


@pytest.mark.parametrize("step_s", [0, 1])
def test_a_copy_that_is_only_later_becomes_the_journal(
    step_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An apply with nothing to change is killed between the two places, in the same second or not.

    Whether there is anything to write then is the one thing that steps owe to the clock.
    """

    def killed(step: Step) -> None:
        if (step.action, step.path) == ("create", RUNTIME):
            raise Killed

    monkeypatch.setattr(engine, "datetime", Clock(step_s))
    root, counter = build(tmp_path), Counter()
    apply(root, "long", LONG)
    with pytest.raises(Killed):
        apply(with_hook(tmp_path, killed), "long", LONG)
    journals = Journals(root)
    noted, copy = journals.runtime.load(), journals.persistent.load()
    assert (noted == copy) == (step_s == 0)
    with session(with_hook(tmp_path, counter), "start") as ours:
        assert ours.recovered is None
    journals = Journals(root)
    assert journals.runtime.load() == journals.persistent.load() == noted
    written = {step.path for step in counter.steps if step.action == "write"}
    assert written == ({PERSISTENT} if step_s else set())


if __name__ == "__main__":
    print(json.dumps(walks()))
