# SPDX-License-Identifier: Apache-2.0
"""What a probe declares: which programs it has, and which metrics its maps are.

One file ``probes/NAME.toml`` beside ``probes/NAME.bpf.c``.  Layouts are not repeated here: fields
are named, and found in the compiled object.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from infertune.base.errors import DeclarationError
from infertune.base.records import dataclass
from infertune.base.tables import Table, read_table
from infertune.exporter.base import Kind, Metric

TYPES = ("counter", "gauge", "histogram")
DECODERS = ("server", "text")
"""``server``: the field ``cgroup``, inode number of a directory, becomes the server's name, or
nothing; ``text``: characters.  A list of words instead: the field is an index into it."""
NEEDS = ("pressure",)
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
class Counted:
    """A metric, and where in a map its values are."""

    metric: Metric
    map: str
    decoders: Mapping[str, Decoder]
    """How a label becomes text, for each that is a field of the key."""
    fields: tuple[str, ...]
    """Fields of the value: one, or one for each word of the last label."""
    told_apart: bool
    """Whether there is such a label: its value is the name of the field."""
    multiplier: float
    """What a unit of the kernel's number is in the metric's."""


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
    needs: str | None
    """One of NEEDS: what the programs read is kept only where the kernel has that."""
    programs: tuple[Program, ...]
    counted: tuple[Counted, ...]

    def generations(self) -> tuple[tuple[Program, ...], ...]:
        """The alternatives, each with the programs that belong to all of them."""
        names = dict.fromkeys(p.generation for p in self.programs if p.generation)
        if not names:
            return (self.programs,)
        return tuple(
            tuple(p for p in self.programs if p.generation in (None, name)) for name in names
        )


def load(directory: Path) -> tuple[Declaration, ...]:
    """Every probe declared in a directory, by name.  Raises DeclarationError."""
    found = [parse(path.read_text(), path.name) for path in sorted(directory.glob("*.toml"))]
    seen: dict[str, str] = {}
    for each in found:
        for name in (counted.metric.name for counted in each.counted):
            if name in seen:
                raise DeclarationError(
                    f"{name} is a metric of {seen[name]} already", file=f"{each.name}.toml"
                )
            seen[name] = f"{each.name}.toml"
    return tuple(found)


def parse(text: str, file: str) -> Declaration:
    """The declaration in a file's text.  Raises DeclarationError with file and line."""
    table = read_table(text, file, DeclarationError)
    required = ("title", "help", "absent", "not_applicable", "programs", "metrics")
    table.only(required, ("module", "needs"))
    programs, metrics = table.table("programs", filled=True), table.table("metrics", filled=True)
    name = file.removesuffix(".toml")
    return Declaration(
        name=name,
        title=table.text("title"),
        help=table.text("help"),
        absent=table.text("absent"),
        not_applicable=table.text("not_applicable"),
        module=table.text("module") if "module" in table else None,
        needs=table.one_of("needs", NEEDS) if "needs" in table else None,
        programs=tuple(_program(each, programs.table(each)) for each in programs),
        counted=tuple(_counted(each, metrics.table(each), name) for each in metrics),
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


def _counted(name: str, table: Table, probe: str) -> Counted:
    kind = _kind(table)
    required = ("type", "help", "map", "labels", "series")
    if kind == "histogram":
        # A map whose value is the histogram and nothing else needs no `value`.
        table.only((*required, "buckets"), ("multiplier", "value"))
    else:
        table.only((*required, "value"), ("multiplier",))
    _check_name(name, kind, table)
    fields, told_apart_by = _value(table, kind)
    decoders = _decoders(table.table("labels", filled=True))
    if told_apart_by in decoders:
        raise table.wrong("value", f"there are two labels '{told_apart_by}'")
    multiplier = _multiplier(table)
    powers = _buckets(table.table("buckets")) if kind == "histogram" else ()
    metric = Metric(
        name=name,
        kind=kind,
        unit=next((u for u in UNITS if name.removesuffix("_total").endswith(f"_{u}")), "items"),
        help=table.text("help"),
        labels=(*decoders, *([told_apart_by] if told_apart_by else ())),
        source=f"probes/{probe}.bpf.c",
        series=table.text("series"),
        # Twelve digits: 1.024e-06 and not 1.0240000000000001e-06.
        bounds=tuple(float(f"{2**power * multiplier:.12g}") for power in powers),
    )
    return Counted(
        metric=metric,
        map=table.text("map"),
        decoders=decoders,
        fields=fields,
        told_apart=told_apart_by is not None,
        multiplier=multiplier,
    )


def _kind(table: Table) -> Kind:
    kind = table.one_of("type", TYPES)
    return "counter" if kind == "counter" else "gauge" if kind == "gauge" else "histogram"


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


def _decoders(table: Table) -> dict[str, Decoder]:
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


def _buckets(limits: Table) -> range:
    """The powers of two that bounds are."""
    limits.only(("min", "max"))
    low, high = limits.values["min"], limits.values["max"]
    if not (type(low) is type(high) is int and 0 <= low < high < 64):
        raise limits.wrong(None, "buckets are powers of two: 0 <= min < max < 64")
    return range(low, high + 1)


def _multiplier(table: Table) -> float:
    value = table.values.get("multiplier", 1)
    if value == "page":
        return os.sysconf("SC_PAGE_SIZE")
    if type(value) not in (int, float) or not value > 0:
        raise table.wrong("multiplier", "'multiplier' is a number above 0, or \"page\"")
    return float(value)


def _is_words(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
