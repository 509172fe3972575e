# SPDX-License-Identifier: Apache-2.0
"""``bench --against``: two servers in pairs, by rule S (docs/measuring.md).

The unit is a start: each half of a pair starts its server, whatever its profile sets is set and
taken back, and the order within a pair is a coin's.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from infertune.base.errors import Exit, Failed, UsageError
from infertune.base.records import replace
from infertune.base.root import Root, full_path
from infertune.cli.base import Context
from infertune.cli.benching import (
    FOREIGN_CORES,
    Arm,
    Measured,
    Remarks,
    about_ours,
    begin,
    minutes,
    say,
    start,
)
from infertune.host.machine import Machine
from infertune.launch.process import Child
from infertune.launch.ready import Progress
from infertune.measure.client import find_out
from infertune.measure.figures import decode_per_s
from infertune.measure.pairs import Comparison, Found, Runner, Taken, gains, line_of
from infertune.measure.pairs import Sample as Half
from infertune.measure.prompts import Prompts
from infertune.measure.statistics import HARMS, HELPS, LOOKS, UNDECIDED, Verdict, smallest_effect
from infertune.measure.store import SCHEMA
from infertune.measure.trial import (
    MOST_TOKENS,
    Bench,
    Load,
    enough_tokens,
    faults,
    refuse_a_busy_machine,
)
from infertune.profiles.profile import NOTHING, load_profile
from infertune.run import Audience, Job, Result

_RUN = re.compile(r"\d{8}T\d{6}Z-\w+|.*/.*")
_MAX_RUN = 1024 * 1024
_ITSELF, _OTHER = "itself", "other"
_INTERRUPTED = 128


def compare(ctx: Context, measured: Measured, machine: Machine, ours: Arm) -> int:
    """The baseline against itself, then what was asked for against the baseline."""
    args = ctx.args
    base = _baseline(ctx, ours)
    if base == ours:
        raise UsageError("both are the same", hint="name another profile, or other settings")
    [depth], [slots] = args.depths, args.parallel
    arms = [each.with_room(ctx, machine, depth, slots, args.tokens) for each in (base, ours)]
    if not args.busy:
        refuse_a_busy_machine(ctx.root, (), FOREIGN_CORES)
    measured.about |= {"against": args.against, "profile": ours.profile}
    halves = _Halves(ctx, measured, machine, (base, ours), arms, depth, slots)
    runner = Runner(str(measured.about["seed"]), halves.take, halves.keep, busy=args.busy)
    found = {_ITSELF: runner.run(Comparison(_ITSELF, ("A", "A"), most=LOOKS[0]), halves.go_on)}
    runner.learn(found[_ITSELF])
    _tell(ctx, measured, found, args.against)
    if found[_ITSELF].verdict.word in (HELPS, HARMS):
        measured.undecided = True
        say(ctx, measured, "cannot decide: the same server differs from itself on this machine")
        return Exit.DONE
    if len(found[_ITSELF].blocks) < LOOKS[0]:
        measured.undecided = True
        say(ctx, measured, f"cannot decide: {found[_ITSELF].reason}")
        return Exit.DONE
    halves.usual_s = found[_ITSELF].seconds / LOOKS[0]
    found[_OTHER] = runner.run(Comparison(_OTHER, ("A", "B")), halves.go_on)
    _tell(ctx, measured, found, args.against)
    word = found[_OTHER].verdict.word
    measured.undecided = word == UNDECIDED
    return Exit.DIFFERS if word == HARMS else Exit.DONE


# -- what is compared with ---------------------------------------------------------------


def _baseline(ctx: Context, ours: Arm) -> Arm:
    """The arm that ``--against`` names.  Raises UsageError."""
    named: str = ctx.args.against
    if not _RUN.fullmatch(named):
        profile = None if named == NOTHING.name else load_profile(ctx.root, named).name
        return replace(ours, profile=profile)  # the same in all but that
    path = named if "/" in named else _found(ctx, named)
    asked = _read(ctx.root, path)
    try:
        return Arm(
            profile=_text_or_none(asked["profile"]),
            model=_text_or_none(asked["model"]),
            server=_text_or_none(asked["server"]),
            backend=str(asked["backend"]),
            settings={str(name): str(value) for name, value in asked["settings"].items()},
            launch_only=asked["launch_only"] is True,
        )
    except (AttributeError, KeyError, TypeError):
        raise UsageError(
            f"{path}: it cannot be measured again",
            hint="that was a server which was running already",
        ) from None


def _text_or_none(found: object) -> str | None:
    if found is None or isinstance(found, str):
        return found
    raise TypeError


def _read(root: Root, path: str) -> dict[str, Any]:
    try:
        data, status = root.read_file(f"{full_path(path)}/run.json", _MAX_RUN)
        found = json.loads(data)
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(f"--against {path}: not a run of 'infertune bench'")
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"--against {path}: it is another user's, and names the program to start",
            hint="measure the baseline yourself, and name that run",
        )
    asked = found.get("asked")
    return asked if isinstance(asked, dict) else {}


def _found(ctx: Context, name: str) -> str:
    from infertune.cli.measured import directories

    for directory in directories():
        for path in ctx.root.glob(f"{directory}/*/*/{name}"):
            return path
    raise UsageError(f"--against {name}: there is no such run", hint="give the path of one")


# -- half a pair --------------------------------------------------------------------------


class _Halves:
    """Starts, measures and ends the server of one arm, as often as the runner asks."""

    def __init__(
        self,
        ctx: Context,
        measured: Measured,
        machine: Machine,
        asked: tuple[Arm, Arm],
        arms: list[Arm],
        depth: int,
        slots: int,
    ) -> None:
        self._ctx, self._measured, self._machine = ctx, measured, machine
        self._asked, self._arms = asked, arms
        self._depth, self._slots = depth, slots
        self._tokens: int | None = ctx.args.tokens
        self._progress = Progress(sys.stderr if sys.stderr.isatty() else None)
        self._told: set[int] = set()
        self.usual_s: float | None = None
        """What a pair took so far."""

    def go_on(self) -> bool:
        return True

    def take(self, comparison: Comparison, block: int, place: int) -> Taken:
        """Raises Failed; KeyboardInterrupt where a signal ended it."""
        which = 1 if comparison.arms[place] == "B" else 0
        began = time.monotonic()
        found: list[Taken] = []
        result = Result(self._arms[which].profile or "none")

        def then(job: Job, child: Child) -> None:
            found.append(self._measure(which, block, job, child, result))

        # What is remarkable about an arm is said once.
        quiet = self._ctx.args.json or which in self._told
        self._told.add(which)
        audience = Audience() if quiet else Remarks(self._ctx)
        self._show(comparison, block)
        code = start(self._ctx, self._arms[which], result, audience, then)
        self._progress.done()
        if not found:
            raise KeyboardInterrupt if code > _INTERRUPTED else Failed("nothing was measured")
        start_s = {} if result.ready_s is None else {"start_s": result.ready_s}
        figures = {**found[0].figures, **start_s}
        return replace(found[0], figures=figures, seconds=time.monotonic() - began)

    def keep(self, half: Half) -> None:
        assert self._measured.store is not None
        self._measured.store.add(line_of(half))

    def _measure(self, which: int, block: int, job: Job, child: Child, result: Result) -> Taken:
        target = find_out(job.url)
        if self._measured.store is None:
            self._measured.about |= about_ours(self._ctx, self._asked[which], result, job)
            begin(self._ctx, self._measured, self._machine, target, result.version)
        # Both halves of a pair have the same prompts: each server is new.
        prompts = Prompts(self._measured.about["seed"], block * (self._slots + 1))
        bench = Bench(self._ctx.root, target, (child.pid,), prompts, self._ctx.args.busy)
        asked = Load(self._depth, self._slots, self._tokens or MOST_TOKENS)
        first = bench.warm_up(asked)
        self._tokens = self._tokens or enough_tokens(first.tpot_s)
        load = Load(self._depth, self._slots, self._tokens)
        sample = bench.sample(load)
        speed = decode_per_s(sample)
        if speed is None:
            raise Failed("no speed: the answers came in one piece")
        ttft = median([each.ttft_s for each in sample.answers])
        figures = {"decode_tps": speed, "ttft_s": ttft}
        wrong = tuple(faults(sample.answers, load))
        return Taken(figures, sample.between, sample.took_s, wrong)

    def _show(self, comparison: Comparison, block: int) -> None:
        what = "against itself" if comparison.name == _ITSELF else "in pairs"
        left = ""
        if self.usual_s is not None:
            least = next(each for each in (*LOOKS, block + 1) if each > block) - block
            left = f", the next look in about {minutes(least * self.usual_s)}"
        self._progress.show(f"{what}: pair {block + 1}{left}")


# -- output ------------------------------------------------------------------------------


def _tell(ctx: Context, measured: Measured, found: Mapping[str, Found], against: str) -> None:
    """What the last comparison came to, also for the document."""
    measured.comparison = {
        "against": against,
        "itself": _document(found[_ITSELF]),
        "other": _document(found[_OTHER]) if _OTHER in found else None,
    }
    if ctx.args.json:
        return
    if _OTHER not in found:
        same = found[_ITSELF]
        least = smallest_effect(gains(same.blocks))
        finds = ""
        if least is not None:
            finds = f"; can find >= {least:.0%} in {minutes(same.seconds)}"
        ctx.sentence(f"{against} against itself: {_words(same.verdict)}, {_counts(same)}{finds}")
        return
    other = found[_OTHER]
    why = f": {other.reason}" if other.reason else ""
    ctx.sentence(f"against {against}: {_words(other.verdict)}, {_counts(other)}{why}")
    for name, what in (("ttft_s", "TTFT"), ("start_s", "start")):
        if name in other.others:
            ctx.sentence(f"  {what}: {_change(other.others[name])}, without a verdict")


def _words(verdict: Verdict) -> str:
    return f"{verdict.word}: decode {_change(verdict)}"


def _change(verdict: Verdict) -> str:
    """Better is positive, also of times."""
    if verdict.estimate is None:
        return "unknown"
    if verdict.low is None or verdict.high is None:
        return f"{verdict.estimate * 100:+.1f} %"
    return (
        f"{verdict.estimate * 100:+.1f} % ({verdict.low * 100:+.1f} to {verdict.high * 100:+.1f})"
    )


def _counts(found: Found) -> str:
    pairs = len(found.blocks)
    thrown = f", {found.discarded} thrown away" if found.discarded else ""
    return f"{pairs} {'pair' if pairs == 1 else 'pairs'}{thrown}"


def _document(found: Found) -> dict[str, Any]:
    return {
        **_verdict(found.verdict),
        "pairs": len(found.blocks),
        "discarded": found.discarded,
        "seconds": found.seconds,
        "finds": smallest_effect(gains(found.blocks)),
        "reason": found.reason,
        "others": {name: _verdict(each, word=False) for name, each in found.others.items()},
    }


def _verdict(verdict: Verdict, *, word: bool = True) -> dict[str, Any]:
    told = {"word": verdict.word} if word else {}
    return {**told, "estimate": verdict.estimate, "low": verdict.low, "high": verdict.high}
