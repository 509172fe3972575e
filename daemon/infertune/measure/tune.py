# SPDX-License-Identifier: Apache-2.0
"""The search for better server settings: phases, each with a check, and a log to go on from.

    0 reference  what the baseline answers, kept under a seal
    1 parts      does a candidate's server start, and give a token
    2 answers    the gate (compare.py), one request at a time and at the served number of slots
    3 noise      the baseline against itself: must show no effect, and says what can be found
    5 speed      pairs against the baseline; what is slower is dropped early
    6 proposal   the best, or the best together: a profile, and its evidence under a seal
    7 check      by another process (check.py), which believes none of it

The gate comes before speed: what changes the answers is never timed.  Names are those of the eight
phases of arXiv 2606.07586; its 4 (prefill) is one with 5 here, where a whole answer is timed.

Every step and every sample is in the store before the next begins.  A run that was killed does not
repeat what is there, and the same seed gives the same order.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.records import asdict, dataclass, field
from infertune.base.root import Root
from infertune.catalogue.server_settings import change_numbers
from infertune.measure import answers, gate
from infertune.measure.arm import Arm, Starter
from infertune.measure.client import find_out
from infertune.measure.compare import Ground, Outcome, judge, lay, with_floor, with_items
from infertune.measure.gate import Drift
from infertune.measure.kept import made_of
from infertune.measure.pairs import (
    Comparison,
    Found,
    Runner,
    Sample,
    Taken,
    gains,
    line_of,
    sample_of,
)
from infertune.measure.prompts import Prompts
from infertune.measure.space import Candidate, Configured, candidates, canonical, together
from infertune.measure.statistics import (
    HARMS,
    HELPS,
    LOOKS,
    MINIMUM_EFFECT,
    smallest_effect,
)
from infertune.measure.store import Store
from infertune.measure.trial import WARMUP_S, Bench, Load, faults

GOALS = ("latency", "throughput")
"""Seconds to a whole answer: of one request, or of as many at once as there are slots."""
FIGURE = "answer_s"
SCREEN = 2
"""Pairs of the first look at a candidate, and of the second."""
SLOWER = 0.10
"""A candidate that is so much slower in every pair of the first look is dropped."""
DEADLINE = 3.0
"""A candidate may take so many times as long as the baseline."""
_LEAST_DEADLINE_S = 20.0
GATE_SHARE, SPEED_SHARE, CHECK_SHARE = 0.4, 0.7, 0.5
"""Of the time: after which no further candidate is judged, and timed, and what the check gets."""
_GROUND = "reference.json"


@dataclass(frozen=True, slots=True)
class Job:
    """What is tuned.  With the log it is all that a run needs to go on."""

    model: str
    baseline: Configured
    goal: str
    seed: int
    cores: int
    tokens: int
    """Generated for each timed answer."""
    prompt: int
    """Tokens of the prompt before it."""
    busy: bool
    """Whether others may use the CPUs meanwhile."""
    tries: Sequence[Configured] = ()
    """What to try instead of the list of space.py."""

    @property
    def arm(self) -> Arm:
        return Arm(self.model, canonical(self.baseline))

    def with_(self, candidate: Candidate) -> Arm:
        return Arm(self.model, canonical({**self.baseline, **candidate.settings}))

    @property
    def slots(self) -> int:
        """Requests that are timed together."""
        return int(self.arm.settings.get("parallel", "1")) if self.goal == "throughput" else 1


def job_of(document: Any) -> Job:
    """A job that was kept.  Raises ValueError for what none can be."""
    job = made_of(Job, document)
    sane = job.tokens > 0 and job.prompt > 0 and job.cores > 0 and job.goal in GOALS
    if not sane or not job.model.startswith("/") or not job.model.isprintable():
        raise ValueError("no job of a search")
    for each in (job.baseline, *job.tries):
        canonical(each)
    return job


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one candidate."""

    name: str
    word: str
    """``applied``, ``reverted`` (it was tried), ``skipped`` (it was not)."""
    why: str
    change: float | None = None
    """Of the seconds of an answer, relative, positive is better; None where it was not timed."""


@dataclass(slots=True)
class Timer:
    """Takes timed samples of arms, each of a server that was started for it."""

    root: Root
    starter: Starter
    job: Job
    arms: dict[str, Arm] = field(default_factory=dict)
    """By their names in comparisons."""
    deadline_s: float | None = None
    """For a whole answer; None while that of the baseline is not known."""

    def take(self, comparison: Comparison, block: int, at: int) -> Taken:
        """One sample.  Raises Failed, also where it takes too long."""
        began = time.monotonic()
        arm = self.arms[comparison.arms[at]]
        load = Load(0, self.job.slots, self.job.tokens, self.job.prompt)
        # Both arms have the same prompts; each is new to its server, which was just started.
        first = block * (1 + self.job.slots)
        seed = zlib.crc32(f"{self.job.seed}/{comparison.name}".encode())
        with self.starter.start(arm) as running:
            ready = time.monotonic() - began
            target = find_out(running.url)
            bench = Bench(self.root, target, (running.pid,), Prompts(seed, first), self.job.busy)
            bench.warm_up(load, self.deadline_s or WARMUP_S)
            if self.deadline_s is not None:
                bench.deadline_s = self.deadline_s
            sample = bench.sample(load)
        speeds = [1 / each.tpot_s for each in sample.answers if each.tpot_s]
        return Taken(
            figures={
                "answer_s": max(each.latency_s for each in sample.answers),
                "ttft_s": max(each.ttft_s for each in sample.answers),
                "start_s": ready,
                **({"decode_tps": sum(speeds)} if speeds else {}),
            },
            between=sample.between,
            seconds=time.monotonic() - began,
            faults=tuple(faults(sample.answers, load)),
        )


_STEPS: Mapping[str, Mapping[str, Any]] = {
    "0 reference": {"verdict": gate.Verdict, "took_s": float},
    "1 parts": {"why": str | None},
    "2 answers": {"accepted": bool, "gates": Sequence[gate.Verdict], "why": str},
    "5 speed": {"gains": Sequence[float], "why": str | None},
    "6 finalists": {"word": str},
    "7 check": {"failed": str | None, "refused": str | None},
    "rows": {"rows": Sequence[Row]},
}
"""What each step leaves in the log.  A line that is none of these was not written by a search, and
its step is done again."""


def _is_a_step(line: Mapping[str, Any]) -> bool:
    name = line["step"]
    kind = next((each for each in _STEPS if name == each or name.startswith(f"{each} ")), None)
    if kind is None:
        return False
    try:
        for part, told in _STEPS[kind].items():
            made_of(told, line[part])
    except (KeyError, ValueError):
        return False
    return True


@dataclass(slots=True)
class Log:
    """The store of one run as what it has come to so far."""

    store: Store
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def read(self) -> None:
        """Take in what a run has left."""
        for line in self.store.samples():
            if isinstance(name := line.get("step"), str):
                if _is_a_step(line):
                    self.steps[name] = line
            elif (sample := sample_of(line)) is not None:
                self.samples.append(sample)

    def step(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What a step has come to: from the log, or else by doing it."""
        if name not in self.steps:
            line = {"step": name, **work()}
            self.store.add(line)
            self.steps[name] = line
        return self.steps[name]

    def keep(self, sample: Sample) -> None:
        self.store.add(line_of(sample))


@dataclass(slots=True)
class Tuning:
    """One run."""

    root: Root
    starter: Starter
    timer: Timer
    job: Job
    log: Log
    say: Callable[[str], None]
    time_left: Callable[[float], bool]
    """Whether less than this share of the time is over."""
    rows: list[Row] = field(default_factory=list)
    ground: Ground | None = None
    runner: Runner | None = None

    def run(self) -> Candidate | None:
        """Phases 0 to 6: what is proposed, which is not believed yet.

        Raises Failed where nothing can be said on this machine.
        """
        self.phase_0()
        tried = [Candidate(each) for each in self.job.tries]
        tried = tried or candidates(self.job.baseline, self.job.cores)
        tried = [each for each in tried if self.phase_1(each)]
        tried = [each for each in tried if self.phase_2(each)]
        if not tried:
            self.say("nothing is left to be timed")
            return None
        self.phase_3(tried)
        return self.phase_6(self.phase_5(tried))

    # -- 0: the reference --------------------------------------------------------------

    def phase_0(self) -> None:
        """What the baseline answers, and whether it agrees with itself."""
        self.say("0 reference")
        path = f"{self.log.store.path}/{_GROUND}"

        def work() -> Mapping[str, Any]:
            began = time.monotonic()
            ground = lay(self.starter.serve, self.job.arm, self._aside)
            took = (time.monotonic() - began) / (1 + len(ground.again))
            self._keep(ground)
            verdict = gate.itself(ground.reference, ground.again)
            return {"verdict": asdict(verdict), "took_s": round(took, 3)}

        found = self.log.step("0 reference", work)
        self.ground = read_ground(self.root, path, self.job.arm)
        self.say(f"  {found['verdict']['why']}")
        if found["verdict"]["word"] != "pass":
            raise Failed(
                "the baseline's answers are no reference: " + found["verdict"]["why"],
                hint="something makes them differ from start to start; 'infertune doctor' may know",
            )

    def _keep(self, ground: Ground) -> None:
        self.ground = ground
        self.log.store.write_json(_GROUND, ground_document(ground))

    # -- 1: parts ----------------------------------------------------------------------

    def phase_1(self, candidate: Candidate) -> bool:
        """Whether the server takes a candidate, starts with it, and gives a token."""

        def work() -> Mapping[str, Any]:
            self.say(f"1 parts: {candidate.name}")
            try:
                with self.starter.serve(self.job.with_(candidate)) as ask:
                    answers.one_token(ask)
            except InfertuneError as error:
                return {"why": error.message}
            return {"why": None}

        why = self.log.step(f"1 parts {candidate.name}", work)["why"]
        if why is not None:
            self.rows.append(Row(candidate.name, "skipped", why))
            self.say(f"  {why}")
        return why is None

    # -- 2: answers --------------------------------------------------------------------

    def phase_2(self, candidate: Candidate) -> bool:
        """Whether a candidate's answers are still the baseline's."""
        assert self.ground is not None
        ground = self.ground
        took: float = self.log.steps["0 reference"]["took_s"]
        patience = DEADLINE * took / len(ground.reference.answers)

        if self._too_late(f"2 answers {candidate.name}", GATE_SHARE):
            self.rows.append(Row(candidate.name, "skipped", "no time was left to judge it"))
            return False

        def work() -> Mapping[str, Any]:
            self.say(f"2 answers: {candidate.name}")
            numbers = change_numbers(candidate.settings)
            try:
                if numbers:
                    # Before the candidate, so that who is killed in between has them.
                    ready = with_items(self.starter.serve, ground, self._aside)
                    self._keep(with_floor(self.starter.serve, ready, self._aside))
                assert self.ground is not None
                outcome = judge(
                    self.starter.paced(_LEAST_DEADLINE_S, patience),
                    self.ground,
                    self.job.with_(candidate),
                    numbers=numbers,
                    say=self._aside,
                )
            except Failed as error:
                return {"accepted": False, "gates": [], "why": error.message}
            return {
                "accepted": outcome.accepted,
                "gates": [asdict(each) for each in outcome.verdicts],
                "why": why(outcome),
            }

        found = self.log.step(f"2 answers {candidate.name}", work)
        if not found["accepted"]:
            self.rows.append(Row(candidate.name, "reverted", found["why"]))
        self.say(f"  {found['why']}")
        return bool(found["accepted"])

    # -- 3: noise ----------------------------------------------------------------------

    def phase_3(self, tried: Sequence[Candidate]) -> None:
        """The baseline against itself."""
        self.say("3 noise: the baseline against itself")
        self.timer.arms |= {"baseline": self.job.arm, "again": self.job.arm}
        self.timer.arms |= {each.name: self.job.with_(each) for each in tried}
        self.runner = Runner(
            str(self.job.seed), self.timer.take, self.log.keep, self.log.samples, self.job.busy
        )
        found = self.runner.run(
            Comparison("noise", ("baseline", "again"), most=LOOKS[0], figure=FIGURE), lambda: True
        )
        if found.verdict.word in (HELPS, HARMS) or len(found.blocks) < LOOKS[0]:
            raise Failed(
                "this machine cannot measure now: "
                + (found.reason or "the baseline differs from itself"),
                hint="try again when it is quiet, or measure among others with --busy",
            )
        self.runner.learn(found)
        took = median(each.figures[FIGURE] for block in found.blocks for each in block)
        self.timer.deadline_s = max(DEADLINE * took, _LEAST_DEADLINE_S)
        least = smallest_effect(gains(found.blocks, FIGURE))
        self.say(f"  an answer takes {took:.2f} s; {LOOKS[0]} pairs find {least or 1:.0%} or more")

    # -- 5: speed ----------------------------------------------------------------------

    def phase_5(self, tried: Sequence[Candidate]) -> list[Candidate]:
        """Those that look faster than the baseline, the fastest first."""
        faster = [(change, each) for each in tried if (change := self._screen(each)) is not None]
        faster.sort(key=lambda pair: -pair[0])
        return [each for _, each in faster]

    def _screen(self, candidate: Candidate) -> float | None:
        """How much faster a candidate looks; None where it does not."""
        name = candidate.name
        if self._too_late(f"5 speed {name}", SPEED_SHARE):
            self.rows.append(Row(name, "skipped", "no time was left to measure it"))
            return None

        def work() -> Mapping[str, Any]:
            self.say(f"5 speed: {name}")
            found = self._pairs(f"speed {name}", ("baseline", name))
            if isinstance(found, str):
                return {"gains": [], "why": found}
            first = gains(found.blocks, FIGURE)
            if len(first) == SCREEN and max(first) < math.log(1 - SLOWER):
                return {"gains": first, "why": f"slower by more than {SLOWER:.0%} in each pair"}
            found = self._pairs(f"speed again {name}", ("baseline", name))
            if isinstance(found, str):
                return {"gains": first, "why": found}
            return {"gains": first + gains(found.blocks, FIGURE), "why": None}

        step = self.log.step(f"5 speed {name}", work)
        change = change_of(step["gains"])
        wrong = step["why"] or (None if change is not None else "the machine was too busy")
        if wrong is None and change is not None and change >= MINIMUM_EFFECT:
            self.say(f"  {change:+.0%}")
            return change
        wrong = wrong or f"no gain of {MINIMUM_EFFECT:.0%} or more"
        self.rows.append(Row(name, "reverted", wrong, change))
        self.say(f"  {wrong}" if change is None else f"  {change:+.0%}: {wrong}")
        return None

    def _pairs(self, name: str, arms: tuple[str, str], most: int = SCREEN) -> Found | str:
        """A few pairs, or why there are none."""
        assert self.runner is not None
        comparison = Comparison(name, arms, most=most, figure=FIGURE)
        try:
            return self.runner.run(comparison, lambda: True)
        except Failed as error:
            return error.message

    # -- 6: the proposal ---------------------------------------------------------------

    def phase_6(self, faster: Sequence[Candidate]) -> Candidate | None:
        """The best one, or the winners together where that is faster still."""
        self.say("6 proposal")
        if not faster:
            self.say("  nothing was faster than the baseline")
            return None
        best, joint = faster[0], together(faster)
        if joint.settings != best.settings and self._better_together(best, joint):
            best = joint
        assert self.ground is not None
        for each in faster:
            taken = each.settings.items() <= best.settings.items()
            seen = self.log.steps[f"5 speed {each.name}"]["gains"]
            self.rows.append(
                Row(
                    each.name,
                    "applied" if taken else "reverted",
                    "faster" if taken else f"not together with {best.name}",
                    change_of(seen),
                )
            )
        self.say(f"  {best.name}")
        return best

    def _better_together(self, best: Candidate, joint: Candidate) -> bool:
        if not (self.phase_1(joint) and self.phase_2(joint)):
            return False
        self.timer.arms[joint.name] = self.job.with_(joint)

        def work() -> Mapping[str, Any]:
            # By the rule of the last phase, which is about both together: what is mere noise must
            # not get in beside what helps.
            found = self._pairs("finalists", (best.name, joint.name), LOOKS[0])
            word = found if isinstance(found, str) else found.verdict.word
            return {"word": word}

        return bool(self.log.step("6 finalists", work)["word"] == HELPS)

    def _too_late(self, step: str, share: float) -> bool:
        return step not in self.log.steps and not self.time_left(share)

    def _aside(self, text: str) -> None:
        self.say(f"  {text}")


def why(outcome: Outcome) -> str:
    """The verdict that decided, in a line."""
    last = next(
        (each for each in outcome.verdicts if each.word in ("refused", "cannot judge")),
        outcome.verdicts[-1],
    )
    return f"{last.gate}: {last.word}: {last.why}"


def change_of(seen: Sequence[float]) -> float | None:
    """The median gain of pairs as a relative change; None where no pair counted."""
    return math.expm1(median(seen)) if seen else None


# -- the reference on disk ---------------------------------------------------------------


def ground_document(ground: Ground) -> dict[str, Any]:
    """What candidates are judged by, under a seal."""
    return answers.seal(
        {
            "reference": answers.to_document(ground.reference, asdict(ground.arm)),
            "again": [answers.followed_document(each) for each in ground.again],
            "harmless": asdict(ground.harmless) if ground.harmless else None,
        }
    )


def read_ground(root: Root, path: str, arm: Arm) -> Ground:
    """The way back.  Raises UsageError for a file that was changed, or is of another server."""
    document = read_document(root, path)
    answers.check_seal(document)
    try:
        reference = answers.from_document(document["reference"])
        about = document["reference"]["about"]
        again = tuple(map(answers.followed_from, document["again"]))
        harmless = made_of(_MAYBE_DRIFT, document["harmless"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path} is no reference of 'infertune tune'") from None
    if about != asdict(arm):
        raise UsageError(f"{path} is the reference of another server")
    if not all(answers.fits(reference, each) for each in again):
        raise UsageError(f"{path}: what was said again is not to its prompts")
    return Ground(arm, reference, again, harmless)


_MAYBE_DRIFT: Any = Drift | None


def read_document(root: Root, path: str) -> dict[str, Any]:
    """A JSON object of a run.  Raises UsageError."""
    try:
        found = json.loads(root.read_file(path, 64 * 1024 * 1024)[0])
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not there, or is no document of 'infertune tune'")
    return found
