# SPDX-License-Identifier: Apache-2.0
"""Runs collectors: one after the other, each with a time limit, none able to stop the rest.

A read of sysfs can hang in the driver, where no signal reaches it.  So collectors run in a worker
thread; one that exceeds its time is left behind with the collector it hangs in, and a new worker
goes on with the others.  Until it comes back the collector is not run again, so there is never
more than one lost thread per collector.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Sample, take_left_out

BUDGET_S = 8.0
"""All collectors together, where the scraper does not say how long it waits (10 s by default)."""

STATES = ("ok", "absent", "timeout", "failed")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one collector."""

    state: str
    """One of STATES."""
    samples: tuple[Sample, ...] = ()
    why: str = ""
    """Reason in words, for everything but ``ok``."""
    duration_s: float = 0.0
    left_out: int | None = None
    """Things that got no samples, because there are too many; None where it is not known."""

    @property
    def success(self) -> bool:
        """Absent hardware is a success: the answer is known."""
        return self.state in ("ok", "absent")


class Runner:
    """Runs collectors on one machine.  Called by one thread at a time."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._worker: _Worker | None = None
        self._lost: dict[str, _Worker] = {}

    def run(self, collectors: Iterable[Collector], budget_s: float = BUDGET_S) -> dict[str, Result]:
        """Result by collector id."""
        end = time.monotonic() + budget_s
        return {each.id: self._run(each, end - time.monotonic()) for each in collectors}

    def close(self) -> None:
        """Let the idle worker end; one that hangs is left behind."""
        if self._worker:
            self._worker.stop()
            self._worker = None

    def _run(self, collector: Collector, left_s: float) -> Result:
        lost = self._lost.get(collector.id)
        if lost and not lost.idle.is_set():
            return Result("timeout", why="an earlier read has not come back yet")
        self._lost.pop(collector.id, None)
        if left_s <= 0:
            return Result("timeout", why="the others took all the time of this page")
        self._worker = self._worker or _Worker()
        start = time.monotonic()
        limit = min(collector.timeout_s, left_s)
        result = self._worker.do(lambda: collect(collector, self._root), limit)
        took = time.monotonic() - start
        if result is None:
            self._worker.let_go()
            self._lost[collector.id], self._worker = self._worker, None
            return Result("timeout", why=f"no answer within {limit:g} s", duration_s=took)
        return result


def collect(collector: Collector, root: Root) -> Result:
    """Run one collector here and now.  Never raises."""
    start = time.monotonic()
    take_left_out()  # what a collector that failed has left behind

    def result(state: str, why: str, samples: Iterable[Sample] = ()) -> Result:
        left_out = take_left_out() if state == "ok" else None
        return Result(state, tuple(samples), why, time.monotonic() - start, left_out)

    try:
        samples = tuple(collector.read(root))
        check(collector, samples)
    except Absent as absent:
        return result("absent", str(absent))
    except OSError as error:
        return result("failed", f"{error.strerror}: {error.filename}")
    except Exception as error:
        # Of one collector; the page has the others.
        return result("failed", f"a bug: {type(error).__name__}: {error}")
    return result("ok", "", samples)


def check(collector: Collector, samples: Iterable[Sample]) -> None:
    """Raises ValueError for a sample that is not declared, or is there twice."""
    labels = {metric.name: len(metric.labels) for metric in collector.metrics}
    seen = set()
    for sample in samples:
        if labels.get(sample.metric) != len(sample.labels):
            raise ValueError(f"{sample.metric}{sample.labels} is not declared")
        if sample[:2] in seen:
            raise ValueError(f"{sample.metric}{sample.labels} is there twice")
        seen.add(sample[:2])


class _Worker:
    """A thread that does one thing at a time, and sleeps in between."""

    def __init__(self) -> None:
        self.idle = threading.Event()
        self._work: queue.SimpleQueue[Callable[[], Result] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Result] = queue.SimpleQueue()
        # A daemon: one that hangs in the kernel must not hold up the end of the process.
        self._thread = threading.Thread(target=self._loop, name="collect", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], Result], timeout_s: float) -> Result | None:
        """The result, or None where it did not come in time; then use another worker."""
        self.idle.clear()
        self._work.put(work)
        try:
            return self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def let_go(self) -> None:
        """End when what is being done has come back."""
        self._work.put(None)

    def stop(self) -> None:
        """End, and wait for it: it does nothing now."""
        self.let_go()
        self._thread.join(timeout=1.0)

    def _loop(self) -> None:
        while work := self._work.get():
            result = work()
            self.idle.set()
            self._done.put(result)
