# SPDX-License-Identifier: Apache-2.0
"""One sample: requests to a server, timed, and the machine before and after them.

What makes a sample unfit is decided by conditions.py, which cannot see the times.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from infertune.base.errors import Failed
from infertune.base.records import asdict, dataclass, replace
from infertune.base.root import Root
from infertune.host.processes import comm, descriptors, open_file, pids
from infertune.host.sockets import listeners
from infertune.measure.client import Target, Timed, busy_slots, generate, ids_of
from infertune.measure.conditions import (
    Baseline,
    Between,
    Clocks,
    between,
    clocks,
    contamination,
    family,
    look_at,
    usual,
)
from infertune.measure.kept import made_of
from infertune.measure.prompts import Prompts, text

PROMPT = 512
"""Tokens of a prompt at depth 0."""
WARMUP_TOKENS = 16
FEWEST_TOKENS, MOST_TOKENS = 64, 512
ENOUGH_S = 2.0
"""How long a decode is to take, for a clock to read."""
WARMUP_S = 600.0
"""Patience with the first answer of a server."""
FACTOR, LEAST_S = 10.0, 60.0
"""Patience with the others: so many times as long as the first, and never less than this."""
_CLOCKS_S = 0.25
_USUAL = 4
"""Samples that say what is usual; later ones are held against them."""
_WORDS_FOR_A_TOKEN = 0.75
"""Where the engine does not say what its tokens are."""
_CACHED = 0.01
"""Share of a prompt that may come from a cache: what every prompt begins with."""
_FORWARDERS = ("docker-proxy", "rootlessport", "conmon", "slirp4netns", "pasta", "pasta.avx2")
"""Listen in place of a server in a container."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one sample asks of a server."""

    depth: int
    """Tokens in the context before the prompt; all of them are new to the server."""
    slots: int
    """Requests at once."""
    tokens: int
    """Generated for each."""
    prompt: int = PROMPT
    """Tokens behind the depth."""

    @property
    def context(self) -> int:
        """Tokens of context that one slot needs."""
        return self.depth + self.prompt + self.tokens


@dataclass(frozen=True, slots=True)
class Sample:
    load: Load
    prompts: tuple[int, ...]
    """Numbers of the prompts (prompts.py)."""
    answers: tuple[Timed, ...]
    took_s: float
    between: Between
    reasons: tuple[str, ...]
    """Why it does not count; empty where it does."""

    @property
    def kept(self) -> bool:
        return not self.reasons

    def document(self) -> dict[str, Any]:
        """As it is stored (docs/measuring.md)."""
        return {
            "load": asdict(self.load),
            "prompts": list(self.prompts),
            "answers": [_answer(each) for each in self.answers],
            "took_s": round(self.took_s, 4),
            "conditions": asdict(self.between),
            "kept": self.kept,
            "reasons": list(self.reasons),
        }


def sample_of(document: Mapping[str, Any]) -> Sample:
    """What ``document`` was made of.  Raises ValueError for what it was not."""
    told = {"between" if name == "conditions" else name: each for name, each in document.items()}
    found = made_of(Sample, {name: each for name, each in told.items() if name != "kept"})
    load = found.load
    if min(load.depth, load.slots - 1, load.tokens - 1, load.prompt) < 0:
        raise ValueError("no load")
    if not found.answers or not all(each.times_s for each in found.answers):
        raise ValueError("no time")
    return found


def _answer(timed: Timed) -> dict[str, Any]:
    return {**asdict(timed), "times_s": [round(each, 6) for each in timed.times_s]}


@dataclass(slots=True)
class Bench:
    """A server that is measured, and how."""

    root: Root
    target: Target
    servers: Collection[int]
    """Ids of its processes; empty where they are not known, and then nobody can say what others
    took."""
    prompts: Prompts
    busy: bool = False
    """Whether the user measures among others on purpose."""
    deadline_s: float = WARMUP_S

    def warm_up(self, load: Load, patience_s: float = WARMUP_S) -> Timed:
        """One request that does not count, for this load; sets the deadline of the next ones.

        Raises Failed.
        """
        [number] = self.prompts.take()
        start = time.monotonic()
        found = generate(
            self.target, self._prompt(number, load), min(load.tokens, WARMUP_TOKENS), patience_s
        )
        once = time.monotonic() - start + (found.tpot_s or 0.0) * load.tokens
        self.deadline_s = max(FACTOR * once * load.slots, LEAST_S)
        return found

    def sample(self, load: Load, baseline: Baseline | None = None) -> Sample:
        """Raises Failed."""
        numbers = self.prompts.take(load.slots)
        prompts = [self._prompt(number, load) for number in numbers]
        own = os.getpid()
        before = look_at(self.root, self.servers, own, busy_slots(self.target))
        start = time.monotonic()
        answers, seen = self._ask(prompts, load.tokens)
        took = time.monotonic() - start
        after = look_at(self.root, self.servers, own, busy_slots(self.target))
        found = between(self.root, before, after, seen)
        if not self.servers:
            found = replace(found, foreign_cpu=None)
        reasons = contamination(found, baseline, busy=self.busy or not self.servers)
        reasons += faults(answers, load)
        return Sample(load, tuple(numbers), tuple(answers), took, found, tuple(reasons))

    def _prompt(self, number: int, load: Load) -> str | list[int]:
        size = load.depth + load.prompt
        ids = ids_of(self.target, text(self.prompts.seed, number, size))
        if ids is not None:
            return ids[:size]
        return text(self.prompts.seed, number, int(size * _WORDS_FOR_A_TOKEN))

    def _ask(
        self, prompts: Sequence[str | list[int]], tokens: int
    ) -> tuple[list[Timed], list[Clocks]]:
        """All at once, each by a thread, so that the clocks can be looked at meanwhile."""
        answers: dict[int, Timed] = {}
        failures: list[Exception] = []

        def ask(at: int) -> None:
            try:
                answers[at] = generate(self.target, prompts[at], tokens, self.deadline_s)
            except Exception as error:
                failures.append(error)

        # Not waited for where the user has had enough.
        threads = [
            threading.Thread(target=ask, args=(at,), daemon=True) for at in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        seen = []
        for thread in threads:
            while thread.is_alive():
                thread.join(_CLOCKS_S)
                if thread.is_alive():
                    seen.append(clocks(self.root))
        if failures:
            raise failures[0]
        return [answers[at] for at in range(len(prompts))], seen


def collect(
    bench: Bench, load: Load, wanted: int, told: Callable[[Sequence[Sample]], None]
) -> tuple[list[Sample], str | None]:
    """Samples of one load until ``wanted`` count; ``told`` is called after each.

    The second is why it was given up: as many had to be thrown away.  Raises Failed.
    """
    samples: list[Sample] = []
    baseline = None
    while (good := sum(each.kept for each in samples)) < wanted:
        if len(samples) - good >= wanted:
            reasons = Counter(each.reasons[0] for each in samples if each.reasons)
            [(most, _)] = reasons.most_common(1)
            thrown = len(samples) - good
            return samples, f"cannot decide: {thrown} samples did not count, most as {most}"
        if baseline is None and good >= _USUAL:
            baseline = usual([each.between for each in samples if each.kept])
        samples.append(bench.sample(load, baseline))
        told(samples)
    return samples, None


def faults(answers: Sequence[Timed], load: Load) -> list[str]:
    """Why answers are not those that were asked for; their times are not looked at."""
    found = []
    for each in answers:
        if each.cached_tokens and each.cached_tokens > _CACHED * (each.prompt_tokens or 0):
            found.append(f"the server had {each.cached_tokens} tokens of the prompt in its cache")
        if each.tokens != load.tokens:
            found.append(f"{each.tokens} tokens came, {load.tokens} were asked for")
    return found[:1]


def enough_tokens(tpot_s: float | None) -> int:
    """How many tokens to generate, for ENOUGH_S of decode; the same for every sample."""
    if not tpot_s:
        return FEWEST_TOKENS
    return min(max(FEWEST_TOKENS, round(ENOUGH_S / tpot_s)), MOST_TOKENS)


def servers_at(root: Root, address: str, port: int) -> frozenset[int]:
    """Processes that listen there.

    Empty where none is seen: it is another machine's, a container's behind a forwarder, or another
    user's.
    """
    try:
        sockets = {f"socket:[{each.inode}]" for each in listeners(root, port, address)}
    except OSError:  # a name, not an address
        return frozenset()
    return frozenset(
        pid
        for pid in (pids(root) if sockets else ())
        if comm(root, pid) not in _FORWARDERS and _has(root, pid, sockets)
    )


def somebody_else_answers(root: Root, address: str, port: int, pid: int) -> bool:
    """Whether who listens there is seen, and is neither ``pid`` nor started by it."""
    found = servers_at(root, address, port)
    return bool(found) and not found & family(root, {pid})


def _has(root: Root, pid: int, sockets: set[str]) -> bool:
    try:
        numbers = descriptors(root, pid)
    except PermissionError:
        return False
    return any(open_file(root, pid, each) in sockets for each in numbers)


def foreign_cores(root: Root, servers: Collection[int], seconds: float = 1.0) -> Between:
    """What others do now: looked at for so long."""
    own = os.getpid()
    before = look_at(root, servers, own)
    time.sleep(seconds)
    return between(root, before, look_at(root, servers, own))


def refuse_a_busy_machine(root: Root, servers: Collection[int], most: float) -> None:
    """Raise Failed where others take more than ``most`` CPUs."""
    cpus = look_at(root, (), os.getpid()).cpus
    found = foreign_cores(root, servers)
    if found.foreign_cpu is not None and found.foreign_cpu * cpus > most:
        who = f" ({', '.join(found.busiest)})" if found.busiest else ""
        raise Failed(
            f"others take {found.foreign_cpu * cpus:.1f} of {cpus} CPUs{who}: the figures would "
            "be theirs, too",
            hint="stop them, or measure among them with --busy",
        )
