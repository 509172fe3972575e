# SPDX-License-Identifier: Apache-2.0
"""What a probe declares: which programs it has, and which metrics its maps are.

One file ``probes/NAME.toml`` beside ``probes/NAME.bpf.c``.  Layouts are not repeated here: fields
are named, and found in the compiled object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from infertune.errors import DeclarationError
from infertune.tables import Table, read_table

TYPES = ("counter", "gauge", "histogram")
DECODERS = ("cgroup", "text", "cpu")
"""``cgroup``: inode number of a directory; ``text``: characters; ``cpu``: no field of the key, the
processor that counted.  A list of words instead: the field is an index into it."""
UNITS = ("seconds", "bytes")
"""Base units of Prometheus that a name may end with."""
PREFIX = "infertune_"

Decoder = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One BPF program of a probe."""

    name: str
    tracepoint: str | None
    """What it is attached to; None for one that visits all threads."""
    when: Literal["attach", "collect"] | None
    """When threads are visited: once before anything is attached, or for each collection."""
    generation: str | None
    """Programs of one generation belong together; the first that the kernel has is taken."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Upper bounds of a histogram: powers of two from 2^min to 2^max, and one for the rest."""

    min: int
    max: int

    @property
    def count(self) -> int:
        return self.max - self.min + 2


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric that a map holds."""

    name: str
    type: str
    help: str
    map: str
    labels: Mapping[str, Decoder]
    """Label, which is also the field of the key, and how it becomes text."""
    fields: tuple[str, ...]
    """Fields of the value: one, or one for each word of ``told_apart_by``."""
    told_apart_by: str | None
    """A label whose value is the name of the field."""
    buckets: Buckets | None
    multiplier: float | Literal["page"]
    """What a unit of the kernel's number is in the metric's; ``page``: bytes of a memory page."""
    cardinality: str

    @property
    def unit(self) -> str:
        """The base unit the name ends with, or nothing."""
        stem = self.name.removesuffix("_total")
        return next((unit for unit in UNITS if stem.endswith(f"_{unit}")), "")

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*self.labels, *([self.told_apart_by] if self.told_apart_by else []))


@dataclass(frozen=True, slots=True)
class Declaration:
    """A probe."""

    name: str
    title: str
    help: str
    absent: str
    """What it means that a tracepoint is missing."""
    not_applicable: str
    """What it means that a field of a kernel structure is missing."""
    module: str | None
    """The kernel module that has the tracepoints, if it is one."""
    programs: tuple[Program, ...]
    metrics: tuple[Metric, ...]

    def generations(self) -> tuple[tuple[Program, ...], ...]:
        """The alternatives, each with the programs that belong to all of them."""
        names = dict.fromkeys(p.generation for p in self.programs if p.generation)
        if not names:
            return (self.programs,)
        return tuple(
            tuple(p for p in self.programs if p.generation in (None, name)) for name in names
        )


class MetricRow(NamedTuple):
    """One line of the table of metrics."""

    name: str
    type: str
    unit: str
    labels: tuple[str, ...]
    help: str
    cardinality: str
    probe: str


def metric_rows(declarations: Iterable[Declaration]) -> tuple[MetricRow, ...]:
    """Every metric that probes declare, for documents."""
    return tuple(
        MetricRow(m.name, m.type, m.unit, m.label_names, m.help, m.cardinality, each.name)
        for each in declarations
        for m in each.metrics
    )


def load(directory: Path) -> tuple[Declaration, ...]:
    """Every probe declared in a directory, by name.  Raises DeclarationError."""
    found = [parse(path.read_text(), path.name) for path in sorted(directory.glob("*.toml"))]
    seen: dict[str, str] = {}
    for each in found:
        for metric in each.metrics:
            if metric.name in seen:
                raise DeclarationError(
                    f"{metric.name} is a metric of {seen[metric.name]} already",
                    file=f"{each.name}.toml",
                )
            seen[metric.name] = f"{each.name}.toml"
    return tuple(found)


def parse(text: str, file: str) -> Declaration:
    """The declaration in a file's text.  Raises DeclarationError with file and line."""
    table = read_table(text, file, DeclarationError)
    table.only(("title", "help", "absent", "not_applicable", "programs", "metrics"), ("module",))
    programs, metrics = table.table("programs", filled=True), table.table("metrics", filled=True)
    return Declaration(
        name=file.removesuffix(".toml"),
        title=table.text("title"),
        help=table.text("help"),
        absent=table.text("absent"),
        not_applicable=table.text("not_applicable"),
        module=table.text("module") if "module" in table else None,
        programs=tuple(_program(name, programs.table(name)) for name in programs),
        metrics=tuple(_metric(name, metrics.table(name)) for name in metrics),
    )


def _program(name: str, table: Table) -> Program:
    if "visits" in table:
        table.only(("visits", "when"))
        table.one_of("visits", ("threads",))
        when = table.one_of("when", ("attach", "collect"))
        return Program(name, None, "attach" if when == "attach" else "collect", None)
    table.only(("tracepoint",), ("generation",))
    generation = table.text("generation") if "generation" in table else None
    return Program(name, table.text("tracepoint"), None, generation)


def _metric(name: str, table: Table) -> Metric:
    kind = table.one_of("type", TYPES)
    required = ("type", "help", "map", "labels", "cardinality")
    if kind == "histogram":
        # A map whose value is the histogram and nothing else needs no `value`.
        table.only((*required, "buckets"), ("multiplier", "value"))
    else:
        table.only((*required, "value"), ("multiplier",))
    _check_name(name, kind, table)
    fields, told_apart_by = _value(table, kind)
    labels = _labels(table.table("labels"))
    if told_apart_by in labels:
        raise table.wrong("value", f"there are two labels '{told_apart_by}'")
    return Metric(
        name=name,
        type=kind,
        help=table.text("help"),
        map=table.text("map"),
        labels=labels,
        fields=fields,
        told_apart_by=told_apart_by,
        buckets=_buckets(table.table("buckets")) if kind == "histogram" else None,
        multiplier=_multiplier(table),
        cardinality=table.text("cardinality"),
    )


def _check_name(name: str, kind: str, table: Table) -> None:
    if not re.fullmatch(PREFIX + r"[a-z][a-z0-9_]*", name):
        raise table.wrong(None, f"'{name}' is not a valid metric name; one starts with {PREFIX}")
    if name.endswith("_total") != (kind == "counter"):
        raise table.wrong(None, f"'{name}': a counter ends with _total, and nothing else does")
    if kind == "histogram" and not name.endswith(tuple(f"_{unit}" for unit in UNITS)):
        raise table.wrong(None, f"'{name}': a histogram ends with its unit: {', '.join(UNITS)}")


def _value(table: Table, kind: str) -> tuple[tuple[str, ...], str | None]:
    value = table.values.get("value", "")
    if isinstance(value, str):
        return (value,), None
    if kind != "histogram" and isinstance(value, dict) and len(value) == 1:
        [(label, fields)] = value.items()
        if _is_words(fields):
            _check_label(label, table.table("value"))
            return tuple(fields), label
    raise table.wrong("value", "'value' is a field, or one label with a list of fields")


def _labels(table: Table) -> dict[str, Decoder]:
    found: dict[str, Decoder] = {}
    for label, decoder in table.values.items():
        _check_label(label, table)
        if _is_words(decoder):
            found[label] = tuple(decoder)
        elif decoder in DECODERS:
            found[label] = decoder
        else:
            known = ", ".join(DECODERS)
            raise table.wrong(label, f"a label is decoded as one of {known}, or as a list of words")
    return found


def _check_label(name: str, table: Table) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("le", "quantile"):
        raise table.wrong(name, f"'{name}' is not a valid label name")


def _buckets(limits: Table) -> Buckets:
    limits.only(("min", "max"))
    low, high = limits.values["min"], limits.values["max"]
    if not (type(low) is type(high) is int and 0 <= low < high < 64):
        raise limits.wrong(None, "buckets are powers of two: 0 <= min < max < 64")
    return Buckets(low, high)


def _multiplier(table: Table) -> float | Literal["page"]:
    value = table.values.get("multiplier", 1)
    if value == "page":
        return "page"
    if type(value) not in (int, float) or not value > 0:
        raise table.wrong("multiplier", "'multiplier' is a number above 0, or \"page\"")
    return float(value)


def _is_words(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
