# SPDX-License-Identifier: Apache-2.0
"""What the kernel counted by key, added up by label.  Plain data; no kernel, no Prometheus.

A counter must never go back while its label is there.  So growth is added, not sums: a control
group that is named only now moves from ``other`` to its name with what it counts from now on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from infertune.bpf.btf import Layout
from infertune.exporter.declarations import Metric
from infertune.records import dataclass

OTHER = "other"
"""The label of all control groups that have no name."""

Entries = Iterable[tuple[bytes, tuple[bytes, ...]]]
"""Keys of a map, each with a value for every CPU."""
Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by bucket, not cumulated, and the sum of what was recorded."""

    buckets: tuple[int, ...]
    sum: int


Number = int | Histogram


def check(metric: Metric, key: Layout, value: Layout) -> None:
    """Raise ValueError where a metric names a field that the compiled map does not have."""
    for label, decoder in metric.labels.items():
        if decoder != "cpu" and _key_field(metric, key, label) not in key.fields:
            raise ValueError(f"{metric.name}: the key of '{metric.map}' has no field '{label}'")
    wanted = [name for field in metric.fields for name in _parts(metric, field)]
    for name in wanted:
        if name not in value.fields:
            raise ValueError(f"{metric.name}: the value of '{metric.map}' has no field '{name}'")
    if metric.buckets and value.fields[wanted[0]].count != metric.buckets.count:
        raise ValueError(
            f"{metric.name}: {value.fields[wanted[0]].count} buckets in '{metric.map}', "
            f"{metric.buckets.count} between min and max"
        )


class Totals:
    """The metrics of one map, from one collection to the next."""

    def __init__(self, metrics: Iterable[Metric], key: Layout, value: Layout) -> None:
        self._metrics = tuple(metrics)
        self._key = key
        self._value = value
        self._seen: dict[bytes, tuple[bytes, ...]] = {}
        self._totals: dict[str, dict[Labels, Number]] = {}

    def update(self, entries: Entries, names: Mapping[int, str]) -> list[bytes]:
        """Take in what the map holds now.

        ``names`` are the control groups that have one.  Returns the keys that could be removed
        from the map without being missed: without a name, unchanged, and no gauge holds them.
        """
        idle: list[bytes] = []
        now: dict[bytes, tuple[bytes, ...]] = {}
        gauges: dict[str, dict[Labels, Number]] = {}
        for key, values in entries:
            before = self._seen.get(key)
            now[key] = values
            for metric in self._metrics:
                if metric.type == "gauge":
                    _add_all(
                        gauges.setdefault(metric.name, {}), self._of(metric, key, values, names)
                    )
                elif values != before:
                    growth = self._growth(metric, key, values, before, names)
                    _add_all(self._totals.setdefault(metric.name, {}), growth)
            if values == before and self._is_idle(key, values, names):
                idle.append(key)
        self._seen = now
        self._totals.update(gauges)
        self._drop_names_that_are_gone(names)
        return idle

    def forget(self, key: bytes) -> None:
        """The key was removed from the map: when it comes back it starts at zero."""
        self._seen.pop(key, None)

    def values(self, metric: Metric) -> Mapping[Labels, Number]:
        """By the values of the metric's labels, in kernel units."""
        return self._totals.get(metric.name, {})

    # -- inside ----------------------------------------------------------------

    def _growth(
        self,
        metric: Metric,
        key: bytes,
        values: tuple[bytes, ...],
        before: tuple[bytes, ...] | None,
        names: Mapping[int, str],
    ) -> dict[Labels, Number]:
        if before is None:
            return self._of(metric, key, values, names)
        # Most groups run on few processors between two looks; the others need no decoding.
        changed = [cpu for cpu, value in enumerate(values) if value != before[cpu]]
        now = self._of(metric, key, values, names, changed)
        then = self._of(metric, key, before, names, changed)
        if any(labels not in now or _less(now[labels], then[labels]) for labels in then):
            return self._of(metric, key, values, names)  # removed and counted anew since we looked
        return {
            labels: _subtract(number, then[labels]) if labels in then else number
            for labels, number in now.items()
        }

    def _of(
        self,
        metric: Metric,
        key: bytes,
        values: tuple[bytes, ...],
        names: Mapping[int, str],
        cpus: Sequence[int] | None = None,
    ) -> dict[Labels, Number]:
        """What one key says about a metric, on all processors or on these."""
        cpus = range(len(values)) if cpus is None else cpus
        labels = self._labels(metric, key, names)
        if "cpu" not in metric.labels.values():
            return dict(self._fields(metric, labels, [values[cpu] for cpu in cpus]))
        at = list(metric.labels.values()).index("cpu")
        nothing = bytes(len(values[0]))
        found: dict[Labels, Number] = {}
        for cpu in cpus:
            if values[cpu] != nothing:  # a CPU on which nothing was counted gets no line
                there = (*labels[:at], str(cpu), *labels[at + 1 :])
                found.update(self._fields(metric, there, (values[cpu],)))
        return found

    def _fields(
        self, metric: Metric, labels: Labels, values: Sequence[bytes]
    ) -> Iterable[tuple[Labels, Number]]:
        for field in metric.fields:
            number: Number
            parts = _parts(metric, field)
            if metric.buckets:
                rows = [self._value.read(value, parts[0]) for value in values]
                total = sum(self._value.read(value, parts[1])[0] for value in values)
                number = Histogram(tuple(map(sum, zip(*rows, strict=True))), total)
            else:
                number = sum(self._value.read(value, parts[0])[0] for value in values)
            yield (*labels, field) if metric.told_apart_by else labels, number

    def _labels(self, metric: Metric, key: bytes, names: Mapping[int, str]) -> Labels:
        """From the key alone: a processor is not in it, and left empty."""
        found = []
        for label, decoder in metric.labels.items():
            if decoder == "cpu":
                found.append("")
                continue
            field = _key_field(metric, self._key, label)
            if decoder == "text":
                found.append(self._key.text(key, field))
                continue
            number = self._key.read(key, field)[0]
            if decoder == "cgroup":
                found.append(names.get(number, OTHER))
            else:
                found.append(decoder[number] if number < len(decoder) else str(number))
        return tuple(found)

    def _is_idle(self, key: bytes, values: tuple[bytes, ...], names: Mapping[int, str]) -> bool:
        for metric in self._metrics:
            if metric.type == "gauge" and any(self._of(metric, key, values, names).values()):
                return False
            for label, decoder in metric.labels.items():
                if decoder == "cgroup":
                    field = _key_field(metric, self._key, label)
                    if self._key.read(key, field)[0] in names:
                        return False
        return True

    def _drop_names_that_are_gone(self, names: Mapping[int, str]) -> None:
        there = {OTHER, *names.values()}
        for metric in self._metrics:
            places = [n for n, d in enumerate(metric.labels.values()) if d == "cgroup"]
            kept = self._totals.get(metric.name, {})
            for labels in [each for each in kept if any(each[n] not in there for n in places)]:
                del kept[labels]


def _parts(metric: Metric, field: str) -> tuple[str, ...]:
    """Names of the fields that a metric's value is made of."""
    if metric.buckets:
        return f"{field}.buckets".lstrip("."), f"{field}.sum".lstrip(".")
    return (field,)


def _key_field(metric: Metric, key: Layout, label: str) -> str:
    """The field of the key for a label; a key that is one number has no name for it."""
    return "" if set(key.fields) == {""} else label


def _add_all(total: dict[Labels, Number], growth: Mapping[Labels, Number]) -> None:
    for labels, number in growth.items():
        total[labels] = _add(total[labels], number) if labels in total else number


def _add(a: Number, b: Number) -> Number:
    if isinstance(a, Histogram) and isinstance(b, Histogram):
        pairs = zip(a.buckets, b.buckets, strict=True)
        return Histogram(tuple(x + y for x, y in pairs), a.sum + b.sum)
    assert isinstance(a, int)
    assert isinstance(b, int)
    return a + b


def _subtract(a: Number, b: Number) -> Number:
    if isinstance(b, Histogram):
        return _add(a, Histogram(tuple(-x for x in b.buckets), -b.sum))
    return _add(a, -b)


def _less(a: Number, b: Number) -> bool:
    if isinstance(a, Histogram) and isinstance(b, Histogram):
        return a.sum < b.sum or sum(a.buckets) < sum(b.buckets)
    assert isinstance(a, int)
    assert isinstance(b, int)
    return a < b
