# SPDX-License-Identifier: Apache-2.0
"""`prove`: what is compared with what, that the machine goes back, and how often it is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infertune.base.errors import Failed, UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.cli import prove, proving
from infertune.cli.base import Context
from infertune.cli.prove import BASELINE, Proof, Step, steps_of
from infertune.cli.proving import Arm, NotHere, Stand
from infertune.engine.session import session
from infertune.host.machine import read_machine
from infertune.launch.place import Placed
from infertune.launch.process import Signals
from infertune.measure.arms import bare, parts, risky, without
from infertune.measure.client import Target
from infertune.measure.conditions import Between
from infertune.measure.pairs import PRIMARY, Comparison, Found, Runner, Take, Taken
from infertune.measure.prompts import Prompts
from infertune.measure.statistics import HARMS, HELPS, NO_EFFECT, UNDECIDED
from infertune.measure.store import Store
from infertune.measure.trial import Bench
from infertune.measure.verdicts import QUIET, WHOLE, load
from infertune.profiles.resolve import Desired, Setting
from infertune.run import Result
from support import build, desired, in_child, values
from talking_server import Canned, talking

CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={}, major_faults=0, cpu_khz=None, gpu_hz=None,
    throttled=None, others_on_gpu=0, others_in_server=0, busiest=(),
)  # fmt: skip
KNOBS = {"vm.swappiness": 10, "transparent_hugepage.enabled": "always"}


def with_launch(one: Desired, **settings: str) -> Desired:
    like = one.now[0]
    given = {name: replace(like, id=name, canonical=value) for name, value in settings.items()}
    launch: dict[str, Setting] = given
    return replace(one, launch=launch)


# -- what is compared -------------------------------------------------------------------------


def test_each_setting_is_held_against_the_profile_without_it() -> None:
    profile = with_launch(desired("test", KNOBS), nice="-10")
    whole, thp, swappiness, nice, stress = _by_setting(steps_of(profile, [], ["cpu"]))
    assert [arm.desired for arm in whole.arms] == [bare(profile), profile]
    assert whole.starts, "some of it is had at the start only"
    assert not swappiness.starts
    assert thp.starts
    assert nice.starts
    assert nice.arms[0].desired.launch == {}
    assert nice.arms[1].needs == "nice"
    assert [each.id for each in swappiness.arms[0].desired.now] == ["transparent_hugepage.enabled"]
    assert [arm.stress for arm in stress.arms] == [None, "cpu", "cpu"]
    assert (stress.comparison.against, stress.comparison.on_purpose) == (1, {"cpu"})
    assert len({step.comparison.name for step in steps_of(profile, [], ["cpu"])}) == 5


def _by_setting(steps: Sequence[Step]) -> list[Step]:
    order = (WHOLE, "transparent_hugepage.enabled", "vm.swappiness", "nice")
    quiet = [
        step for name in order for step in steps if (step.setting, step.stress) == (name, QUIET)
    ]
    return [*quiet, *(step for step in steps if step.stress != QUIET)]


def test_named_settings_are_measured_alone() -> None:
    profile = with_launch(desired("test", KNOBS), nice="-10")
    assert [step.setting for step in steps_of(profile, ["nice"], [])] == ["nice"]
    # One setting is the whole profile, and is not measured twice.
    alone = desired("test", {"vm.swappiness": 10})
    assert [step.setting for step in steps_of(alone, [], [])] == [WHOLE]
    assert steps_of(bare(alone), [], []) == []


def test_risky_knobs_are_left_out_of_all_arms() -> None:
    profile = desired("test", {"vm.swappiness": 10, "cpufreq.scaling_governor": "performance"})
    [left] = risky(profile)
    assert left.id == "cpufreq.scaling_governor"
    assert "--allow-risk" in left.why
    safe = without(profile, {left.id})
    assert [part.id for part in parts(safe)] == ["vm.swappiness"]


def test_what_the_machine_has_already_is_not_measured(tmp_path: Path) -> None:
    root = build(tmp_path)
    profile = desired("test", {"vm.swappiness": 10, "kernel.numa_balancing": 0})
    proof = Proof({})
    context = Context(root, SimpleNamespace(json=True))
    left = prove._measurable(context, read_machine(root), profile, proof)
    assert [each.id for each in left.now] == ["vm.swappiness"]
    assert [(each.id, each.why) for each in proof.left_out] == [
        ("kernel.numa_balancing", "the machine has this value already")
    ]


def test_a_setting_that_is_not_given_is_not_measured() -> None:
    arm = Arm(desired("test", {}), needs="memory_min")
    absent = Placed("memory_min", "1", "absent", None, why="cgroup v2 is not what this system uses")
    with pytest.raises(NotHere, match="absent: cgroup v2"):
        proving._refuse_what_is_not_given(arm, Result("test", placed=(absent,)))
    proving._refuse_what_is_not_given(replace(arm, needs="nice"), Result("test", placed=(absent,)))


def test_another_server_on_the_port_is_not_measured() -> None:
    """The one of ours that could not have the port is gone, and somebody else says it is ready."""
    with talking() as other, subprocess.Popen(["sleep", "600"]) as ours:
        try:
            proving._refuse_another_server(Root("/"), other.url, os.getpid())
            with pytest.raises(Failed, match=f"another server has taken port {other.server_port}"):
                proving._refuse_another_server(Root("/"), other.url, ours.pid)
        finally:
            ours.kill()


# -- the machine goes back -------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Canned]:
    with talking() as one:
        tokens = [{"content": "x", "tokens": [n]} for n in range(4)]
        timings = {"cache_n": 0, "prompt_n": 512, "prompt_ms": 5.0}
        one.events = (*tokens, {"content": "", "tokens": [], "stop": True, "timings": timings})
        one.pages["/tokenize"] = {"tokens": list(range(2000))}
        one.pause_s = 0.001
        yield one


def stand_on(root: Root, server: Canned, signals: Signals, held: Any) -> Stand:
    target = Target(server.url, "llama-server", slots=1)
    running = Bench(root, target, (1,), Prompts(1), busy=True)
    return Stand(
        root=root, machine=read_machine(root), caller={}, signals=signals, session=held, ours=None,
        running=running, seed=1, busy=True, tokens=4,
    )  # fmt: skip


def changing(
    root: Root, server: Canned, seen: Callable[[Comparison, int, int], None], signals: Signals
) -> Found:
    """One comparison of the bare machine with one on which swappiness is 10."""
    profile = desired("test", {"vm.swappiness": 10})
    context = Context(root, SimpleNamespace(json=True))
    with prove._machine(context, read_machine(root), profile) as held:
        stand = stand_on(root, server, signals, held)

        def run(take: Take) -> Found:
            def watched(comparison: Comparison, block: int, arm: int) -> Taken:
                taken = take(comparison, block, arm)
                seen(comparison, block, arm)
                return taken

            runner = Runner("1", watched, lambda _: None, busy=True)
            return runner.run(Comparison("x", ("without", "with"), most=8), lambda: True)

        arms = (Arm(bare(profile)), Arm(profile))
        return stand.compare(run, arms, starts=False)


def test_each_arm_is_in_force_while_it_is_measured(tmp_path: Path, server: Canned) -> None:
    root = build(tmp_path)
    before = values(tmp_path)
    seen = []

    def look(_: Comparison, __: int, arm: int) -> None:
        seen.append((arm, root.read("/proc/sys/vm/swappiness")))

    with Signals() as signals:
        found = changing(root, server, look, signals)
    assert found.verdict.pairs + found.discarded >= 8
    assert set(seen) == {(0, "60"), (1, "10")}
    assert values(tmp_path) == before


def test_a_failure_puts_it_back(tmp_path: Path, server: Canned) -> None:
    root = build(tmp_path)
    before = values(tmp_path)

    def fail(*_: object) -> None:
        if root.read("/proc/sys/vm/swappiness") == "10":
            raise Failed("for once")

    with Signals() as signals, pytest.raises(Failed, match="for once"):
        changing(root, server, fail, signals)
    assert values(tmp_path) == before


def test_ctrl_c_puts_it_back(tmp_path: Path, server: Canned) -> None:
    root = build(tmp_path)
    before = values(tmp_path)

    def interrupt(*_: object) -> None:
        if root.read("/proc/sys/vm/swappiness") == "10":
            os.kill(os.getpid(), 2)

    with Signals() as signals, pytest.raises(Failed, match="interrupted"):
        changing(root, server, interrupt, signals)
    assert values(tmp_path) == before


def test_after_kill_9_the_next_call_puts_it_back(tmp_path: Path, server: Canned) -> None:
    root = build(tmp_path)
    before = values(tmp_path)

    def killed() -> None:
        def kill(*_: object) -> None:
            if root.read("/proc/sys/vm/swappiness") == "10":
                os.kill(os.getpid(), 9)

        with Signals() as signals:
            changing(root, server, kill, signals)

    assert in_child(killed) & 127 == 9
    assert root.read("/proc/sys/vm/swappiness") == "10"
    with session(root, "whatever comes next") as ours:
        assert ours.recovered is not None
    assert values(tmp_path) == before


def test_what_was_applied_is_applied_again(tmp_path: Path, server: Canned) -> None:
    root = build(tmp_path)
    with session(root, "apply quiet") as ours:
        ours.apply(desired("long-context", {"vm.swappiness": 30}))
    assert root.read("/proc/sys/vm/swappiness") == "30"
    with Signals() as signals:
        changing(root, server, lambda *_: None, signals)
    with session(root, "look") as ours:
        assert ours.applied is not None
        assert (ours.applied.profile, ours.applied.held) == ("long-context", False)


# -- how often it is wrong ----------------------------------------------------------------------

NOISE = [
    tuple(pair)
    for pair in json.loads(
        (Path(__file__).parents[1] / "fixtures/noise-of-a-busy-machine.json").read_text()
    )
]
"""Tokens per second of one server that was asked the same again and again on two CPUs among other
programs, and the share of the CPUs that those took."""
DUMMY = with_launch(desired("test", {"vm.swappiness": 10}), oom_score_adj="0")


class Recorded:
    """In place of the machine: what it said once, from some moment on; an arm may be slower."""

    ours = running = None

    def __init__(self, seed: int, noise: Sequence[tuple[float, float]], slower: float) -> None:
        self.seed = seed
        self._noise, self._slower = noise, slower
        self._next = random.Random(seed).randrange(len(noise))

    def interrupted(self) -> None: ...

    def compare(self, run: Callable[[Take], Found], arms: Sequence[Arm], *, starts: bool) -> Found:
        def take(_: Comparison, __: int, at: int) -> Taken:
            assert starts
            speed, foreign = self._noise[self._next % len(self._noise)]
            self._next += 1
            speed *= 1 - self._slower * ("oom_score_adj" in arms[at].desired.launch)
            between = replace(CALM, foreign_cpu=foreign)
            return Taken({PRIMARY: speed, "ttft_s": 10 / speed}, between, 3.0)

        return run(take)


def proved(
    where: Path, seed: int, *, noise: Sequence[tuple[float, float]] = NOISE, slower: float = 0.0,
    busy: bool = True,
) -> Proof:  # fmt: skip
    """One run of ``prove PROFILE oom_score_adj``, as the verb does it."""
    args = SimpleNamespace(
        json=True, knob=["oom_score_adj"], stress=[], budget=10**6, busy=busy, profile="test"
    )
    proof = Proof(
        {
            "profile": "test", "backend": "cpu", "kernel": "7.1.3", "machine": "m", "busy": busy,
            "build": "b1", "model": {"name": "g", "key": "k", "files": []},
        },
        Store(Root(where), "/measured"),
    )  # fmt: skip
    assert proof.store is not None
    where.mkdir(exist_ok=True)
    proof.store.begin(proof.about)
    stand: Any = Recorded(seed, noise, slower)
    prove._run(Context(Root(where), args), proof, stand, DUMMY)
    return proof


def words(found: Sequence[Proof]) -> list[str]:
    """The verdicts; a run that was stopped by its baseline gave none."""
    return [step_found.verdict.word for one in found for _, step_found in one.found]


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    return tmp_path


def test_forty_proofs_of_a_dummy_are_seldom_wrong(where: Path) -> None:
    found = [proved(where / str(seed), seed) for seed in range(40)]
    said = words(found)
    assert sum(word in (HELPS, HARMS) for word in said) <= 2
    assert len(said) >= 36, "the baseline differs from itself seldom"


def test_forty_proofs_of_a_dummy_on_a_calm_machine(where: Path) -> None:
    found = [proved(where / str(seed), seed, noise=calm(seed), busy=False) for seed in range(40)]
    said = words(found)
    assert sum(word in (HELPS, HARMS) for word in said) <= 2
    assert said.count(NO_EFFECT) >= 30, "it is not only that nothing can be decided"


def calm(seed: int, spread: float = 0.02) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(50 * rng.gauss(1, spread), 0.01) for _ in range(400)]


def test_ten_percent_less_is_found_on_a_calm_machine(where: Path) -> None:
    found = [
        proved(where / str(seed), seed, noise=calm(seed), slower=0.1, busy=False)
        for seed in range(40)
    ]
    assert words(found).count(HARMS) >= 38
    assert [prove._exit_code(one) for one in found].count(1) >= 38


def test_a_busy_machine_decides_nothing(where: Path) -> None:
    loud = [(speed, 0.9) for speed, _ in calm(1)]
    found = proved(where, 1, noise=loud, slower=0.1, busy=False)
    assert words([found]) == [UNDECIDED]
    assert prove._exit_code(found) == 3
    assert (found.found[0][1].reason or "").startswith("the machine was too busy: others took 90%")


def test_a_baseline_that_differs_stops_it(where: Path) -> None:
    def worse(_: object) -> bool:
        return True

    odd = [(50.0, 0.0), (50.0, 0.0)]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(prove, "_differs", worse)
    try:
        found = proved(where, 1, noise=odd)
        assert found.found == []
        assert prove._exit_code(found) == 3
    finally:
        monkey.undo()


def test_its_verdict_is_kept_and_its_samples_too(where: Path) -> None:
    found = proved(where, 3, noise=calm(3), busy=False)
    [one] = load(Root(where), ["/state/infertune/measurements"], "m")
    assert (one.setting, one.value, one.arm, one.word) == ("oom_score_adj", "0", QUIET, NO_EFFECT)
    assert prove._exit_code(found) == 0
    assert found.store is not None
    assert len(found.store.samples()) == len(found.samples) >= 32
    assert found.samples[0].comparison == BASELINE


def test_a_failing_arm_is_no_verdict(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Recorded.compare

    def compare(self: Any, run: Any, arms: Any, *, starts: bool) -> Found:
        if arms[0] != arms[1]:
            raise Failed("the server did not get ready")
        return plain(self, run, arms, starts=starts)

    monkeypatch.setattr(Recorded, "compare", compare)
    found = proved(where, 1, noise=calm(1), busy=False)
    assert words([found]) == [UNDECIDED]
    assert found.found[0][1].reason == "the server did not get ready"


def test_shares_of_the_quiet_machine() -> None:
    speeds = (50.0, 10.0, 45.0)
    found = Runner(
        "1", lambda _, __, arm: Taken({PRIMARY: speeds[arm]}, CALM, 1.0), lambda _: None
    ).run(Comparison("s", ("bare, quiet", "bare", "profile"), 1), lambda: True)
    assert prove._kept_share(found, 2) == pytest.approx(0.9)
    assert prove._kept_share(found, 1) == pytest.approx(0.2)
    assert found.verdict.word == HELPS


def test_a_run_of_something_else_is_not_gone_on_with(where: Path) -> None:
    store = Store(Root(where), "/old")
    about = {"profile": "a", "machine": "m", "model": {"key": "k"}}
    store.begin({**about, "seed": 5, "tokens": 64, "began": "then"})
    stand: Any = SimpleNamespace()
    args = SimpleNamespace(resume="/old", seed=None, tokens=None)
    prove._store(Context(Root(where), args), Proof(dict(about)), stand)
    assert (stand.seed, stand.tokens) == (5, 64)
    with pytest.raises(UsageError, match="its profile is 'a', now 'b'"):
        prove._store(Context(Root(where), args), Proof({**about, "profile": "b"}), stand)
