# SPDX-License-Identifier: Apache-2.0
"""What the kernel counted by key, added up by label.  Plain data; no kernel, no Prometheus.

A counter must never go back while its label is there.  So growth is added, not sums: a control
group that is named only now counts for its name with what it counts from now on.  One that has
just lost its name, because its server ended, keeps it for what it counted since the last look.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from infertune.base.records import dataclass
from infertune.bpf.btf import Layout
from infertune.exporter.base import Histogram, Sample
from infertune.exporter.declarations import Counted, Decoder

OTHER = ""
"""The label ``server`` of all control groups that are no server's."""

Entries = Iterable[tuple[bytes, bytes]]
"""Keys of a map, each with its values on all CPUs, one after the other."""
Labels = tuple[str, ...]
Numbers = Sequence[int]
"""The fields of a value, which all have eight bytes, in their order."""
_WRAP = 1 << 64
_DEEPEST = 64
"""More than MAX_DEPTH of probe.h: groups that are in each other in a circle end, too."""


def check(counted: Counted, key: Layout, value: Layout) -> None:
    """Raise ValueError where a metric names a field that the compiled map does not have."""
    name = counted.metric.name
    for label, decoder in counted.decoders.items():
        if _key_field(key, label, decoder) not in key.fields:
            raise ValueError(f"{name}: the key of '{counted.map}' has no field '{label}'")
    parts = [part for field in counted.fields for part in _parts(counted, field)]
    for part in parts:
        if part not in value.fields:
            raise ValueError(f"{name}: the value of '{counted.map}' has no field '{part}'")
        if value.fields[part].size != 8:
            raise ValueError(f"{name}: '{part}' of '{counted.map}' is not a number of eight bytes")
    if bounds := counted.metric.bounds:
        buckets = value.fields[parts[0]].count
        if buckets != len(bounds) + 1:
            raise ValueError(
                f"{name}: {buckets} buckets in '{counted.map}', {len(bounds) + 1} between min and "
                "max"
            )


def with_those_below(names: Mapping[int, str], above: Mapping[int, int]) -> dict[int, str]:
    """Names of the groups that have one, and of all below them; ``above``: which is in which."""
    found = dict(names)
    for group in above:
        path: list[int] = []
        while group not in found and group in above and len(path) < _DEEPEST:
            path.append(group)
            group = above[group]
        if group in found:
            found.update(dict.fromkeys(path, found[group]))
    return found


@dataclass(slots=True)
class _Seen:
    """An entry of the map, as of the last look."""

    raw: bytes
    numbers: Numbers
    group: int
    labels: Labels
    """With an empty place for the server's name."""


class Totals:
    """The metrics of one map, from one collection to the next.  They have the same key labels."""

    def __init__(self, counted: Iterable[Counted], key: Layout, value: Layout) -> None:
        self._counted = tuple(counted)
        self._decoders = self._counted[0].decoders
        if any(each.decoders != self._decoders for each in self._counted):
            raise ValueError(f"the metrics of '{self._counted[0].map}' have different labels")
        self._key, self._value = key, value
        self._server = list(self._decoders.values()).index("server")
        self._seen: dict[bytes, _Seen] = {}
        self._names: Mapping[int, str] = {}
        self._totals: dict[Labels, Numbers] = {}
        self._now: dict[Labels, Numbers] = {}
        """Of gauges: what there is, not what was added."""

    def update(self, entries: Entries, names: Mapping[int, str]) -> list[bytes]:
        """Take in what the map holds now.

        ``names`` are the control groups that have one.  Returns the keys that could be removed
        from the map without being missed: without a name, unchanged, and no gauge holds them.
        """
        known = {**self._names, **names}
        self._names = names
        there = {OTHER, *known.values()}
        self._totals = {
            labels: numbers
            for labels, numbers in self._totals.items()
            if labels[self._server] in there
        }
        for labels in self._of_each_name(there):
            self._totals.setdefault(labels, (0,) * (self._value.size // 8))
        idle: list[bytes] = []
        seen: dict[bytes, _Seen] = {}
        self._now = {}
        for key, raw in entries:
            entry = self._seen.get(key)
            changed = entry is None or entry.raw != raw
            entry = entry or _Seen(b"", (), *self._labels(key))
            if changed:
                self._add(self._totals, entry, known, self._growth(entry, raw))
            held = self._held(entry, known)
            if not changed and not held and entry.group not in known:
                idle.append(key)
            seen[key] = entry
        self._seen = seen
        return idle

    def forget(self, key: bytes) -> None:
        """The key was removed from the map: when it comes back it starts at zero."""
        self._seen.pop(key, None)

    def groups(self) -> set[int]:
        """The control groups of which the map had a key at the last look."""
        return {entry.group for entry in self._seen.values()}

    def samples(self, counted: Counted) -> Iterator[Sample]:
        """One for each combination of labels."""
        metric, multiplier = counted.metric, counted.multiplier
        source = self._now if metric.kind == "gauge" else self._totals
        for key_labels, numbers in source.items():
            for field in counted.fields:
                labels = (*key_labels, field) if counted.told_apart else key_labels
                at = [self._value.fields[part] for part in _parts(counted, field)]
                first = at[0].offset // 8
                if metric.kind == "histogram":
                    buckets = tuple(numbers[first : first + at[0].count])
                    total = numbers[at[1].offset // 8] * multiplier
                    yield Sample(metric.name, labels, Histogram(buckets, total))
                else:
                    yield Sample(metric.name, labels, numbers[first] * multiplier)

    # -- inside ----------------------------------------------------------------

    def _of_each_name(self, names: Iterable[str]) -> Iterable[Labels]:
        """What is zero before it happens; nothing where a label can be anything."""
        choices = [sorted(names) if d == "server" else d for d in self._decoders.values()]
        return () if "text" in choices else itertools.product(*choices)

    def _growth(self, entry: _Seen, raw: bytes) -> Numbers:
        """By how much the fields have grown on all processors together since the last look."""
        fields = self._value.size // 8
        flat = struct.unpack(f"<{len(raw) // 8}Q", raw)
        numbers = [sum(flat[field::fields]) for field in range(fields)]
        before, entry.raw, entry.numbers = entry.numbers or (0,) * fields, raw, numbers
        growth = ((now - then) % _WRAP for now, then in zip(numbers, before, strict=True))
        # What is less than it was has been removed and counted anew since we looked.
        return [now if grown >> 63 else grown for grown, now in zip(growth, numbers, strict=True)]

    def _held(self, entry: _Seen, names: Mapping[int, str]) -> bool:
        """Add up gauges; whether one of them is not zero."""
        gauges = [each for each in self._counted if each.metric.kind == "gauge"]
        if not gauges:
            return False
        numbers = [_signed(number) for number in entry.numbers]
        self._add(self._now, entry, names, numbers)
        fields = [self._value.fields[field].offset // 8 for g in gauges for field in g.fields]
        return any(numbers[field] for field in fields)

    def _add(
        self,
        totals: dict[Labels, Numbers],
        entry: _Seen,
        names: Mapping[int, str],
        growth: Numbers,
    ) -> None:
        before, after = entry.labels[: self._server], entry.labels[self._server + 1 :]
        labels = (*before, names.get(entry.group, OTHER), *after)
        total = totals.get(labels)
        totals[labels] = [a + b for a, b in zip(total, growth, strict=True)] if total else growth

    def _labels(self, key: bytes) -> tuple[int, Labels]:
        """The control group of a key, and its labels with an empty place for the name."""
        group, found = 0, []
        for label, decoder in self._decoders.items():
            field = _key_field(self._key, label, decoder)
            if decoder == "text":
                found.append(self._key.text(key, field))
                continue
            number = self._key.read(key, field)[0]
            if decoder == "server":
                group = number
                found.append("")
            else:
                found.append(decoder[number] if number < len(decoder) else str(number))
        return group, tuple(found)


def _signed(number: int) -> int:
    """A sum of what was counted down on one processor and up on another."""
    return number % _WRAP - (_WRAP if number % _WRAP >> 63 else 0)


def _parts(counted: Counted, field: str) -> tuple[str, ...]:
    """Names of the fields that a metric's value is made of."""
    if counted.metric.kind == "histogram":
        return f"{field}.buckets".lstrip("."), f"{field}.sum".lstrip(".")
    return (field,)


def _key_field(key: Layout, label: str, decoder: Decoder) -> str:
    """The field of the key for a label; a key that is one number has no name for it."""
    if set(key.fields) == {""}:
        return ""
    return "cgroup" if decoder == "server" else label
