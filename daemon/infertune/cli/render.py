# SPDX-License-Identifier: Apache-2.0
"""Engine values as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from infertune.cli.base import Context
from infertune.engine import Report
from infertune.knobs import KNOBS
from infertune.plan import Item
from infertune.units import format_size
from infertune.values import Size


def print_report(ctx: Context, report: Report) -> None:
    """A table with one row per knob, and the sentences below it."""
    if report.profile:
        ctx.print(f"profile {report.profile}, backend {report.backend}")
    print_items(ctx, report.items)
    for note in report.notes:
        ctx.print(f"note: {note}")


def print_items(ctx: Context, items: Sequence[Item]) -> None:
    """One row per knob; files that fare the same (one per CPU policy) share it."""
    if not items:
        return
    rows: list[tuple[str, ...]] = []
    for (knob, before, want, outcome, reason), group in groupby(items, key=_alike):
        count = len(list(group))
        name = f"{knob} (x{count})" if count > 1 else knob
        remark = "; ".join(filter(None, (reason, _note(items, knob))))
        rows.append((name, _show(knob, before), _show(knob, want), outcome, remark))
    ctx.table(("KNOB", "NOW", "WANTED", "OUTCOME", ""), rows)


def _alike(item: Item) -> tuple[str, str | None, str | None, str, str | None]:
    return item.knob, item.before, item.want, item.outcome, item.reason


def _note(items: Sequence[Item], knob: str) -> str | None:
    return next((item.note for item in items if item.knob == knob), None)


def _show(knob: str, value: str | None) -> str:
    """A value for people: sizes in GiB beside the kernel's own number."""
    if value is None:
        return "-"
    kind = KNOBS[knob].value if knob in KNOBS else None
    if isinstance(kind, Size) and value.isdigit():
        return f"{value} ({format_size(int(value) * kind.unit_bytes)})"
    return value
