# SPDX-License-Identifier: Apache-2.0
"""What samples of one load come to: one row of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from infertune.base.errors import Failed
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.measure.statistics import judge, smallest_effect
from infertune.measure.store import runs
from infertune.measure.trial import Load, Sample, sample_of

LEVEL = 0.05
"""Of the interval: it has what it is about in 95 of 100 cases."""


@dataclass(frozen=True, slots=True)
class Row:
    """Times in seconds, speeds in tokens per second; None where there is no figure."""

    depth: int
    slots: int
    tokens: int
    """Generated for each request."""
    kept: int
    """Samples that count."""
    discarded: int
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p99_s: float | None = None
    """Percentiles over requests; of fewer than 100, p99 is the slowest one."""
    prefill_per_s: float | None = None
    """Median over requests."""
    decode_per_s: float | None = None
    """Of all slots together, first tokens left out; median over samples."""
    decode_low: float | None = None
    decode_high: float | None = None
    """Exact interval of it over samples of this one start of the server."""
    finds: float | None = None
    """The smallest change of it that pairs of such samples can tell from none."""
    pair_s: float | None = None
    """What a pair takes."""


def row(load: Load, samples: Sequence[Sample]) -> Row:
    """The figures of those samples of a load that count."""
    kept = [each for each in samples if each.kept]
    answers = [answer for each in kept for answer in each.answers]
    ttft = [each.ttft_s for each in answers]
    tpot = [each.tpot_s for each in answers if each.tpot_s is not None]
    prefill = [each.prefill_per_s for each in answers if each.prefill_per_s is not None]
    speeds = [speed for each in kept if (speed := decode_per_s(each)) is not None]
    low, high = interval(speeds)
    return Row(
        depth=load.depth,
        slots=load.slots,
        tokens=load.tokens,
        kept=len(kept),
        discarded=len(samples) - len(kept),
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        tpot_p50_s=percentile(tpot, 50),
        tpot_p99_s=percentile(tpot, 99),
        prefill_per_s=median(prefill) if prefill else None,
        decode_per_s=median(speeds) if speeds else None,
        decode_low=low,
        decode_high=high,
        finds=finds(speeds),
        pair_s=2 * median([each.took_s for each in kept]) if kept else None,
    )


def rows_of(documents: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a stored run; what is no sample of ours is passed over."""
    found: dict[Load, list[Sample]] = {}
    for each in documents:
        try:
            sample = sample_of(each)
            found.setdefault(sample.load, []).append(sample)
        except ValueError:
            continue
    rows = []
    for load, samples in found.items():
        try:
            rows.append(row(load, samples))
        except (ValueError, ArithmeticError):
            continue
    return rows


@dataclass(frozen=True, slots=True)
class Last:
    """The newest bench of a model."""

    path: str
    about: Mapping[str, Any]
    """run.json."""
    rows: tuple[Row, ...]


def last_bench(root: Root, directories: Iterable[str], machine: str, model: str) -> Last | None:
    """The newest bench with a sample that counts, of all ``directories``; None without one."""
    found = [store for each in directories for store in runs(root, each, machine, model)]
    for store in sorted(found, key=lambda one: one.path.rpartition("/")[2], reverse=True):
        try:
            about = store.run()
        except Failed:
            continue
        rows = tuple(each for each in rows_of(store.samples()) if each.kept)
        if about.get("verb") == "bench" and rows:
            return Last(store.path, about, rows)
    return None


def percentile(values: Sequence[float], share: int) -> float | None:
    """Nearest rank: a value that was measured; None where there is none."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(len(values) * share / 100), 1) - 1]


def decode_per_s(sample: Sample) -> float | None:
    """Tokens of all requests after their first, by the time from the first one to the last."""
    tokens = sum(each.tokens - 1 for each in sample.answers)
    spent = max(each.latency_s for each in sample.answers) - min(
        each.ttft_s for each in sample.answers
    )
    return tokens / spent if tokens > 0 and spent > 0 else None


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Exact interval of the middle (signed rank, on logarithms); None where there are too few."""
    if not values:
        return None, None
    middle = median(values)
    found = judge([math.log(each / middle) for each in values], LEVEL)
    if found.low is None or found.high is None:
        return None, None
    return middle * (1 + found.low), middle * (1 + found.high)


def finds(speeds: Sequence[float]) -> float | None:
    """From one sample and the next as a pair of the same with itself."""
    pairs = zip(speeds[::2], speeds[1::2], strict=False)
    return smallest_effect([math.log(second / first) for first, second in pairs])
