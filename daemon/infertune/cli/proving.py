# SPDX-License-Identifier: Apache-2.0
"""The machine and a server, put under one arm of a comparison after the other."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from infertune.base.errors import Failed
from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.budget.admission import Admission, release
from infertune.engine.session import Session
from infertune.host.machine import Machine
from infertune.launch.binary import Server
from infertune.launch.process import Child, Signals
from infertune.launch.ready import any_port
from infertune.measure.client import find_out
from infertune.measure.conditions import family
from infertune.measure.pairs import PRIMARY, Comparison, Found, Take, Taken
from infertune.measure.prompts import Prompts
from infertune.measure.stress import busy_neighbours
from infertune.measure.trial import (
    MOST_TOKENS,
    WARMUP_S,
    Bench,
    Load,
    enough_tokens,
    faults,
    servers_at,
)
from infertune.profiles.resolve import Desired
from infertune.run import Audience, Job, Request, Result, Run, job_of, serve

T = TypeVar("T")


class NotHere(Failed):
    """A setting has no effect on this machine, so that there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What is in force while a sample is taken."""

    desired: Desired
    stress: str | None = None
    """What neighbours of ours take meanwhile (verdicts.STRESS)."""
    needs: str | None = None
    """A launch setting that must really be given, or there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What starts servers of ours."""

    request: Request
    server: Server
    model: str
    admit: Callable[[list[Admission]], Request]
    """The request with a check that the model fits, which notes what it was promised."""


@dataclass(slots=True)
class Stand:
    root: Root
    machine: Machine
    caller: Mapping[str, str]
    signals: Signals
    session: Session | None
    """None where the kernel's settings are left alone."""
    ours: Ours | None
    """None where a server is measured that runs already."""
    running: Bench | None
    """That one."""
    seed: int
    busy: bool
    tokens: int | None
    """Generated for each sample; None until the first answer has told how fast that goes."""
    learned: Callable[[int], None] = lambda _: None
    """Told when it is known."""

    def compare(self, run: Callable[[Take], Found], arms: Sequence[Arm], *, starts: bool) -> Found:
        """Have ``run`` take its samples; ``starts``: of a new server each time.

        Raises Failed, also where a signal asked for the end.
        """
        if starts:
            return run(self._fresh(arms))
        self._apply(arms[0].desired)
        if self.running is not None:
            self._warm_up(self.running, "running")
            return run(self._changing(self.running, arms))

        def serving(bench: Bench, _: float) -> Found:
            self._warm_up(bench, "serving")
            return run(self._changing(bench, arms))

        return self._with_server(arms[0], serving)

    def interrupted(self) -> None:
        """Raise Failed where a signal has asked for the end."""
        if self.signals.received():
            raise Failed("interrupted")

    def _fresh(self, arms: Sequence[Arm]) -> Take:
        """Samples of a server that was started for each."""

        def take(comparison: Comparison, block: int, at: int) -> Taken:
            began = time.monotonic()
            self.interrupted()
            arm = arms[at]
            # Both arms have the same prompts: no server has seen them, each is new.
            key = f"{comparison.name}/{block}"

            def measure(bench: Bench, ready_s: float) -> Taken:
                self._warm_up(bench, f"{key}/first")
                return self._sample(bench, key, began, {"start_s": ready_s})

            with self._neighbours(arm):
                self._apply(arm.desired)
                return self._with_server(arm, measure)

        return take

    def _changing(self, bench: Bench, arms: Sequence[Arm]) -> Take:
        """Samples of one server, under which the machine is changed."""

        def take(comparison: Comparison, block: int, at: int) -> Taken:
            began = time.monotonic()
            self.interrupted()
            arm = arms[at]
            self._apply(arm.desired)
            with self._neighbours(arm):
                return self._sample(bench, f"{comparison.name}/{block}/{at}", began, {})

        return take

    def _with_server(self, arm: Arm, work: Callable[[Bench, float], T]) -> T:
        """Start a server under an arm, do ``work`` with it and the seconds its start took."""
        assert self.ours is not None
        result = Result(arm.desired.profile)
        done: list[T] = []

        def then(job: Job, child: Child) -> int:
            _refuse_what_is_not_given(arm, result)
            _refuse_another_server(self.root, job.url, child.pid)
            bench = Bench(
                self.root, find_out(job.url), (child.pid,), Prompts(self.seed), busy=self.busy
            )
            done.append(work(bench, result.ready_s or 0.0))
            return 0

        promised: list[Admission] = []
        try:
            request = replace(self.ours.admit(promised), then=then, port=any_port())
            one = Run(self.root, self.machine, request, result, Audience())
            job = job_of(one, self.ours.server, self.ours.model, arm.desired)
            _refuse_what_is_not_given(arm, result)
            serve(one, job, arm.desired, self.signals)
        finally:
            for each in promised:
                release(self.root, each)
        self.interrupted()
        if not done:
            raise Failed("the server ended while it started")
        return done[0]

    def _apply(self, desired: Desired) -> None:
        if self.session is None:
            return
        if desired.now:
            self.session.apply(desired, hold=True)
        else:
            self.session.revert()

    @contextlib.contextmanager
    def _neighbours(self, arm: Arm) -> Iterator[None]:
        if arm.stress is None:
            yield
            return
        with busy_neighbours(self.root, self.machine.cgroup, self.caller):
            yield

    def _warm_up(self, bench: Bench, key: str) -> None:
        bench.prompts = self._prompts(key)
        first = bench.warm_up(Load(0, 1, self.tokens or MOST_TOKENS))
        if self.tokens is None:
            self.tokens = enough_tokens(first.tpot_s)
            self.learned(self.tokens)
        # To give up what is slow, and go on, would be to choose samples by their speed.
        bench.deadline_s = WARMUP_S

    def _sample(self, bench: Bench, key: str, began: float, figures: Mapping[str, float]) -> Taken:
        assert self.tokens is not None
        bench.prompts = self._prompts(key)
        load = Load(0, 1, self.tokens)
        sample = bench.sample(load)
        [answer] = sample.answers
        told = {**figures, "ttft_s": answer.ttft_s}
        why = faults(sample.answers, load)
        if answer.tpot_s is None:
            why.append("all tokens came at once")
        else:
            told[PRIMARY] = 1 / answer.tpot_s
        return Taken(told, sample.between, time.monotonic() - began, tuple(why))

    def _prompts(self, key: str) -> Prompts:
        """Prompts of their own for each sample, the same in a run that is resumed."""
        digest = hashlib.sha256(key.encode()).digest()
        return Prompts(self.seed, int.from_bytes(digest[:6]))


def _refuse_what_is_not_given(arm: Arm, result: Result) -> None:
    """Raise NotHere where the server does not get the setting that is in question."""
    if arm.needs is None:
        return
    for refused in result.refused:
        if refused.setting == arm.needs:
            raise NotHere(refused.reason)
    for placed in result.placed:
        if placed.id == arm.needs and placed.outcome in ("absent", "rejected"):
            raise NotHere(f"{placed.outcome}: {placed.why}")


def _refuse_another_server(root: Root, url: str, pid: int) -> None:
    """Raise Failed where somebody else answers: a port proves nothing."""
    there = urlsplit(url)
    listening = servers_at(root, there.hostname or "", there.port or 0)
    if listening and not listening & family(root, [pid]):
        raise Failed(f"another server has taken port {there.port}")


def request_of(
    profile: str, caller: Mapping[str, str], model: str | None, server: str | None, backend: str
) -> Request:
    """What is the same for every start."""
    return Request(
        profile=profile,
        caller=caller,
        backend=backend,
        model=model,
        server=server,
        launch_only=True,
        reported=True,
        shown=False,
        patience_s=START_S,
        grace_s=GRACE_S,
    )


START_S = 900.0
"""Patience with a server's start: 100 GB from a slow disk."""
GRACE_S = 2.0
