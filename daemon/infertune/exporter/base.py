# SPDX-License-Identifier: Apache-2.0
"""What a metric and a collector are: entries of data, and a function that reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

from infertune.base.records import dataclass
from infertune.base.root import Root

Kind = Literal["gauge", "counter", "histogram"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric, as it is documented and exposed."""

    name: str
    """Full name with prefix and base unit; ends in ``_total`` exactly where it is a counter."""
    kind: Kind = "gauge"
    unit: str = "1"
    """What one is: ``bytes``, ``seconds``; ``1`` for a fact, ``items`` for a count."""
    help: str
    labels: tuple[str, ...] = ()
    source: str
    """The document, or file of the kernel's source, that defines what is read."""
    series: str
    """Bound of the number of series: every label takes its values from a closed or small set."""
    bounds: tuple[float, ...] = ()
    """Of a histogram: upper bounds of its buckets, inclusive; one more holds the rest."""


class Histogram(NamedTuple):
    """The value of a histogram."""

    counts: tuple[int, ...]
    """By bucket, not cumulated; the last is the rest."""
    sum: float
    """Of everything that was recorded, in the metric's unit."""


class Sample(NamedTuple):
    """One value of a declared metric."""

    metric: str
    labels: tuple[str, ...]
    """Label values, in the order of the declaration."""
    value: float | Histogram


class Absent(Exception):
    """The machine does not have what a collector reads.  An outcome, not an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Something that is read as a whole."""

    id: str
    summary: str
    metrics: tuple[Metric, ...]
    read: Callable[[Root], Iterable[Sample]]
    """Raises Absent with the reason, or OSError as the kernel gave it."""
    timeout_s: float = 1.0
    """How long a read may take before the page is answered without it."""
    max_age_s: float = 1.0
    """How long a reading may be used again; larger where reading costs the machine something."""

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)


MAX_GPUS = 16
"""Bound of the label ``gpu``."""


class _LeftOut(threading.local):
    count = 0


_left_out = _LeftOut()
"""Of the collector that runs in this thread; a thread runs one at a time."""


def leave_out(number: int) -> None:
    """Things that get no series are told: a page that is cut must not look whole."""
    _left_out.count += number


def take_left_out() -> int:
    """How many were left out since this was last asked."""
    count, _left_out.count = _left_out.count, 0
    return count


def bounded(items: Sequence[T], bound: int) -> Sequence[T]:
    """The first ``bound`` of the items; the others are left out."""
    leave_out(max(0, len(items) - bound))
    return items[:bound]


def present(
    metric: str, labels: Sequence[str], value: float | None, *, scale: int = 1, per: int = 1
) -> Iterable[Sample]:
    """One sample, or none where the value is not known.

    ``scale`` base units are one unit of what was read (kHz: 1000), or ``per`` units of it are one
    base unit (mW: 1000): dividing keeps 81.007 what a factor of 0.001 would not.
    """
    if value is not None:
        yield Sample(metric, tuple(labels), value * scale / per)


def one_of(metric: str, labels: Sequence[str], states: Sequence[str], now: str) -> Iterable[Sample]:
    """A state as one series per state it could have: 1 for the one it is, 0 for the others."""
    for state in states:
        yield Sample(metric, (*labels, state), float(state == now))
