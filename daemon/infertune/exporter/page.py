# SPDX-License-Identifier: Apache-2.0
"""The page of metrics: one snapshot that parallel scrapes share.

A scrape reads what is older than its collector's max_age_s and takes the rest as it is.  Whoever
comes while a collection runs waits for it, so nothing is read twice at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.utils import floatToGoString

from infertune import __version__
from infertune.exporter.base import Collector, Metric, Sample, one_of, present
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.probing import PROBE_METRICS, Probing
from infertune.exporter.runner import STATES, Result, Runner
from infertune.records import dataclass
from infertune.root import Root

_PER_COLLECTOR = f"one per collector ({len(COLLECTORS)})"
_OURS = "the exporter itself"

RUNNER_METRICS = (
    Metric(
        name="infertune_collector_success",
        unit="1",
        help="1 where the answer is known, which includes 'this machine has none'.",
        labels=("collector",),
        source=_OURS,
        series=_PER_COLLECTOR,
    ),
    Metric(
        name="infertune_collector_state",
        unit="1",
        help="1 for what came of the collector: ok, absent, timeout or failed. The page / has the "
        "reason in words.",
        labels=("collector", "state"),
        source=_OURS,
        series=f"{len(STATES)} per collector",
    ),
    Metric(
        name="infertune_collector_duration_seconds",
        unit="seconds",
        help="How long its last reading took.",
        labels=("collector",),
        source=_OURS,
        series=_PER_COLLECTOR,
    ),
    Metric(
        name="infertune_collector_age_seconds",
        unit="seconds",
        help="Age of its reading when this page was made.",
        labels=("collector",),
        source=_OURS,
        series=_PER_COLLECTOR,
    ),
    Metric(
        name="infertune_collector_left_out",
        unit="items",
        help="Servers, CPUs, GPUs or other things that have no series, because there are more than "
        "the bound of this collector.",
        labels=("collector",),
        source=_OURS,
        series=_PER_COLLECTOR,
    ),
)
EXPORTER_METRICS = (
    Metric(
        name="infertune_exporter_info",
        unit="1",
        help="Version of this exporter.",
        labels=("version",),
        source=_OURS,
        series="1",
    ),
    Metric(
        name="infertune_exporter_collections_total",
        kind="counter",
        unit="items",
        help="Collections so far: scrapes that could not be answered from the snapshot.",
        source=_OURS,
        series="1",
    ),
    Metric(
        name="infertune_exporter_collection_duration_seconds",
        unit="seconds",
        help="How long the last collection took, with making its text.",
        source=_OURS,
        series="1",
    ),
    Metric(
        name="infertune_exporter_threads",
        unit="items",
        help="Threads of the exporter. One is left behind for each read that hangs.",
        source=_OURS,
        series="1",
    ),
)
"""Beside these the page has the client library's process_* metrics."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The last result of one collector, and its text."""

    result: Result
    text: bytes
    at: float
    """CLOCK_MONOTONIC in seconds."""


class Page:
    """All collectors of one machine, read when somebody asks."""

    def __init__(
        self,
        root: Root,
        probing: Probing | None = None,
        *,
        collectors: Mapping[str, Collector] = COLLECTORS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._collectors = collectors
        self._runner = Runner(root)
        self._probing = probing
        self._clock = clock
        self._lock = threading.Lock()
        self._readings: dict[str, Reading] = {}
        self._collections = 0
        self._took_s = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """What ``collect[]`` may name."""
        return (*self._collectors, "probes")

    def text(self, wanted: Collection[str] = ()) -> bytes:
        """The page; only the collectors ``wanted`` where any are named."""
        chosen = [each for name, each in self._collectors.items() if not wanted or name in wanted]
        with self._lock:
            self._refresh(chosen)
            readings = {each.id: self._readings[each.id] for each in chosen}
            parts = [reading.text for reading in readings.values()]
            if self._probing and (not wanted or "probes" in wanted):
                parts.append(self._probes(self._probing))
            parts += [self._about(readings), process_text()]
        return b"".join(parts)

    def results(self) -> dict[str, Result]:
        """The last results, for people."""
        with self._lock:
            return {name: reading.result for name, reading in self._readings.items()}

    def close(self) -> None:
        with self._lock:
            self._runner.close()

    def _refresh(self, chosen: Iterable[Collector]) -> None:
        start = self._clock()
        old = [each for each in chosen if self._too_old(each, start)]
        if not old:
            return
        for name, result in self._runner.run(old).items():
            text = render(self._collectors[name].metrics, result.samples)
            self._readings[name] = Reading(result, text, self._clock())
        self._collections += 1
        self._took_s = self._clock() - start

    def _too_old(self, collector: Collector, now: float) -> bool:
        reading = self._readings.get(collector.id)
        return reading is None or now - reading.at > collector.max_age_s

    def _probes(self, probing: Probing) -> bytes:
        return render(PROBE_METRICS, probing.samples()) + render_families(probing.families())

    def _about(self, readings: Mapping[str, Reading]) -> bytes:
        now = self._clock()
        samples: list[Sample] = []
        for name, reading in readings.items():
            result = reading.result
            samples += [
                Sample("infertune_collector_success", (name,), float(result.success)),
                Sample("infertune_collector_duration_seconds", (name,), result.duration_s),
                Sample("infertune_collector_age_seconds", (name,), now - reading.at),
                *present("infertune_collector_left_out", (name,), result.left_out),
                *one_of("infertune_collector_state", (name,), STATES, result.state),
            ]
        samples += [
            Sample("infertune_exporter_info", (__version__,), 1),
            Sample("infertune_exporter_collections_total", (), self._collections),
            Sample("infertune_exporter_collection_duration_seconds", (), self._took_s),
            Sample("infertune_exporter_threads", (), threading.active_count()),
        ]
        return render((*RUNNER_METRICS, *EXPORTER_METRICS), samples)


def render(metrics: Iterable[Metric], samples: Iterable[Sample]) -> bytes:
    """Samples as text, in the order of the declarations; a metric without samples is left out.

    Byte for byte what the library makes of the same (tested), in a third of the time: what the
    samples of a metric have in common is put together once.
    """
    by_metric: dict[str, list[Sample]] = {}
    for sample in samples:
        by_metric.setdefault(sample.metric, []).append(sample)
    parts: list[str] = []
    for metric in metrics:
        found = by_metric.get(metric.name)
        if found:
            text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
            parts.append(f"# HELP {metric.name} {text}\n# TYPE {metric.name} {metric.kind}\n")
            # The library sorts labels by name.
            order = sorted(range(len(metric.labels)), key=metric.labels.__getitem__)
            names = [f'{metric.labels[at]}="' for at in order]
            for _, labels, value in found:
                pairs = ",".join(
                    f'{name}{_escaped(labels[at])}"' for name, at in zip(names, order, strict=True)
                )
                inside = f"{{{pairs}}}" if pairs else ""
                parts.append(f"{metric.name}{inside} {_number(value)}\n")
    return "".join(parts).encode()


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escaped(text: str) -> str:
    if "\\" in text or "\n" in text or '"' in text:
        return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return text


def render_families(families: Iterable[Family]) -> bytes:
    """The library's text of the library's metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(tuple(families)))
    return generate_latest(registry)


class _Families:
    """A collector, as the library has it, of metrics that are there already."""

    def __init__(self, families: tuple[Family, ...]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def process_text() -> bytes:
    """The client library's process_* metrics of this process."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    return generate_latest(registry)
