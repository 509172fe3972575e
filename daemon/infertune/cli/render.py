# SPDX-License-Identifier: Apache-2.0
"""Engine values as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

from infertune.cli.base import Context
from infertune.engine import Report
from infertune.knobs import KNOBS
from infertune.plan import Item, Outcome
from infertune.units import format_size
from infertune.values import Size

Tense = Literal["future", "present", "past"]
"""What a table tells: what will be done (plan), how it stands (verify, status), what was done
(apply, run, revert, recover)."""

_WORDS: Mapping[Outcome, str] = {
    "already": "ok",
    "applied": "changed",
    "pending-reboot": "at reboot",
    "rolled-back": "rolled back",
}
"""What a table says for an outcome of the engine; one that is not here is said as it is."""

_PENDING: Mapping[Tense, Mapping[Outcome, str]] = {
    "future": {"set": "change", "restore": "put back"},
    "present": {"set": "differs", "restore": "differs"},
    "past": {"set": "not changed", "restore": "not put back"},
}
"""The same for what is still to be written: after an apply that failed it was not reached."""


def outcome_word(item: Item, tense: Tense) -> str:
    """The outcome of one item, as a table says it."""
    if item.outcome == "refused" and item.path and item.knob in KNOBS and KNOBS[item.knob].held:
        return "held by run"
    return _PENDING[tense].get(item.outcome) or _WORDS.get(item.outcome, item.outcome)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 setting``, ``no settings``, ``3 settings``."""
    return f"{number or 'no'} {one if number == 1 else many or one + 's'}"


def print_report(ctx: Context, report: Report, tense: Tense) -> None:
    """A table with one row per knob, and the sentences below it."""
    if report.profile:
        ctx.print(f"profile {report.profile}, backend {report.backend}")
    print_items(ctx, report.items, tense)
    for note in report.notes:
        ctx.print(f"note: {note}")


def print_items(ctx: Context, items: Sequence[Item], tense: Tense) -> None:
    """One row per knob; files that fare the same (one per CPU policy) share it."""
    if not items:
        return
    rows: list[tuple[str, ...]] = []
    for _, alike in groupby(items, key=_alike):
        group = list(alike)
        first = group[0]
        name = f"{first.knob} (x{len(group)})" if len(group) > 1 else first.knob
        remark = "; ".join(filter(None, (first.reason, _note(items, first.knob))))
        before, want = (_show(first.knob, value) for value in (first.before, first.want))
        rows.append((name, before, want, outcome_word(first, tense), remark))
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
