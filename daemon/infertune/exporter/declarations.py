# SPDX-License-Identifier: Apache-2.0
"""What a probe declares: which programs it has, and which metrics its maps are.

One file ``probes/NAME.toml`` beside ``probes/NAME.bpf.c``.  Layouts are not repeated here: fields
are named, and found in the compiled object.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from infertune import toml_lines
from infertune.errors import DeclarationError
from infertune.records import dataclass

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
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise DeclarationError(str(error), file=file, line=int(line[1]) if line else None) from None
    return _Reader(file, toml_lines.key_lines(text)).declaration(table)


class _Reader:
    """Turns tables into dataclasses; knows where each key stands."""

    def __init__(self, file: str, lines: Mapping[toml_lines.Path, int]) -> None:
        self._file = file
        self._lines = lines

    def declaration(self, table: dict[str, Any]) -> Declaration:
        required = ("title", "help", "absent", "not_applicable", "programs", "metrics")
        self._keys(table, (), required, ("module",))
        programs = self._table(table, ("programs",))
        metrics = self._table(table, ("metrics",))
        return Declaration(
            name=self._file.removesuffix(".toml"),
            title=self._text(table, ("title",)),
            help=self._text(table, ("help",)),
            absent=self._text(table, ("absent",)),
            not_applicable=self._text(table, ("not_applicable",)),
            module=self._text(table, ("module",)) if "module" in table else None,
            programs=tuple(self._program(programs, name) for name in programs),
            metrics=tuple(self._metric(metrics, name) for name in metrics),
        )

    def _program(self, programs: dict[str, Any], name: str) -> Program:
        at = ("programs", name)
        table = self._table(programs, at)
        if "visits" in table:
            self._keys(table, at, ("visits", "when"))
            self._one_of(table, (*at, "visits"), ("threads",))
            when = self._one_of(table, (*at, "when"), ("attach", "collect"))
            return Program(name, None, "attach" if when == "attach" else "collect", None)
        self._keys(table, at, ("tracepoint",), ("generation",))
        generation = self._text(table, (*at, "generation")) if "generation" in table else None
        return Program(name, self._text(table, (*at, "tracepoint")), None, generation)

    def _metric(self, metrics: dict[str, Any], name: str) -> Metric:
        at = ("metrics", name)
        table = self._table(metrics, at)
        kind = self._one_of(table, (*at, "type"), TYPES)
        required = ["type", "help", "map", "labels", "cardinality"]
        if kind == "histogram":
            # A map whose value is the histogram and nothing else needs no `value`.
            self._keys(table, at, (*required, "buckets"), ("multiplier", "value"))
        else:
            self._keys(table, at, (*required, "value"), ("multiplier",))
        self._name(name, kind, at)
        fields, told_apart_by = self._value(table, (*at, "value"), kind)
        labels = self._labels(table, (*at, "labels"))
        if told_apart_by in labels:
            raise self._error(f"there are two labels '{told_apart_by}'", (*at, "value"))
        return Metric(
            name=name,
            type=kind,
            help=self._text(table, (*at, "help")),
            map=self._text(table, (*at, "map")),
            labels=labels,
            fields=fields,
            told_apart_by=told_apart_by,
            buckets=self._buckets(table, (*at, "buckets")) if kind == "histogram" else None,
            multiplier=self._multiplier(table, (*at, "multiplier")),
            cardinality=self._text(table, (*at, "cardinality")),
        )

    def _name(self, name: str, kind: str, at: toml_lines.Path) -> None:
        if not re.fullmatch(PREFIX + r"[a-z][a-z0-9_]*", name):
            raise self._error(f"'{name}' is no name of a metric; it starts with {PREFIX}", at)
        if name.endswith("_total") != (kind == "counter"):
            raise self._error(f"'{name}': a counter ends with _total, and nothing else does", at)
        if kind == "histogram" and not name.endswith(tuple(f"_{unit}" for unit in UNITS)):
            raise self._error(f"'{name}': a histogram ends with its unit: {', '.join(UNITS)}", at)

    def _value(
        self, table: dict[str, Any], at: toml_lines.Path, kind: str
    ) -> tuple[tuple[str, ...], str | None]:
        value = table.get("value", "")
        if isinstance(value, str):
            return (value,), None
        if kind != "histogram" and isinstance(value, dict) and len(value) == 1:
            [(label, fields)] = value.items()
            if _is_words(fields):
                self._label(label, (*at, label))
                return tuple(fields), label
        raise self._error("'value' is a field, or one label with a list of fields", at)

    def _labels(self, table: dict[str, Any], at: toml_lines.Path) -> dict[str, Decoder]:
        found: dict[str, Decoder] = {}
        for label, decoder in self._table(table, at).items():
            self._label(label, (*at, label))
            if _is_words(decoder):
                found[label] = tuple(decoder)
            elif decoder in DECODERS:
                found[label] = decoder
            else:
                raise self._error(
                    f"a label is decoded as one of {', '.join(DECODERS)}, or as a list of words",
                    (*at, label),
                )
        return found

    def _label(self, name: str, at: toml_lines.Path) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("le", "quantile"):
            raise self._error(f"'{name}' is no name of a label", at)

    def _buckets(self, table: dict[str, Any], at: toml_lines.Path) -> Buckets:
        limits = self._table(table, at)
        self._keys(limits, at, ("min", "max"))
        low, high = limits["min"], limits["max"]
        if not (type(low) is type(high) is int and 0 <= low < high < 64):
            raise self._error("buckets are powers of two: 0 <= min < max < 64", at)
        return Buckets(low, high)

    def _multiplier(self, table: dict[str, Any], at: toml_lines.Path) -> float | Literal["page"]:
        value = table.get("multiplier", 1)
        if value == "page":
            return "page"
        if type(value) not in (int, float) or not value > 0:
            raise self._error("'multiplier' is a number above 0, or \"page\"", at)
        return float(value)

    # -- the parts of a table ----------------------------------------------------

    def _keys(
        self,
        table: dict[str, Any],
        at: toml_lines.Path,
        required: Iterable[str],
        optional: Iterable[str] = (),
    ) -> None:
        allowed = [*required, *optional]
        for key in table:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise self._error(f"'{key}' is not known here{hint}", (*at, key))
        for key in required:
            if key not in table:
                raise self._error(f"'{key}' is missing", at)

    def _table(self, parent: dict[str, Any], at: toml_lines.Path) -> dict[str, Any]:
        value = parent.get(str(at[-1]))
        if not isinstance(value, dict) or not value:
            raise self._error(f"'{at[-1]}' is a table with something in it", at)
        return value

    def _text(self, table: dict[str, Any], at: toml_lines.Path) -> str:
        value = table[str(at[-1])]
        if not isinstance(value, str) or not value.strip():
            raise self._error(f"'{at[-1]}' is a text", at)
        return value.strip()

    def _one_of(self, table: dict[str, Any], at: toml_lines.Path, words: Collection[str]) -> str:
        value: object = table.get(str(at[-1]))
        if value not in words:
            raise self._error(f"'{at[-1]}' is one of: {', '.join(words)}", at)
        return str(value)

    def _error(self, message: str, at: toml_lines.Path) -> DeclarationError:
        while at and at not in self._lines:
            at = at[:-1]
        return DeclarationError(message, file=self._file, line=self._lines.get(at))


def _is_words(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
