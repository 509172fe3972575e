# SPDX-License-Identifier: Apache-2.0
"""The engine's documents (documents.py) as people read them, whoever made them."""

from __future__ import annotations

from itertools import groupby

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal

    from infertune.cli.base import Context

    Tense = Literal["future", "present", "past"]
    """What a table tells: what will be done (plan), how it stands (verify, status), what was done
    (apply, run, revert, recover)."""
    Document = Mapping[str, Any]

_WORDS = {
    "already": "ok",
    "held": "delegated",
    "applied": "changed",
    "pending-reboot": "at reboot",
    "rolled-back": "rolled back",
}
"""What a table says for an outcome of the engine; one that is not here is said as it is."""

_PENDING: dict[Tense, dict[str, str]] = {
    "future": {"set": "change", "restore": "put back"},
    "present": {"set": "differs", "restore": "differs"},
    "past": {"set": "not changed", "restore": "not put back"},
}
"""The same for what is still to be written: after an apply that failed it was not reached."""


def outcome_word(item: Document, tense: Tense) -> str:
    """The outcome of one item, as a table says it."""
    outcome: str = item["outcome"]
    if outcome == "refused" and item.get("path") and item.get("held"):
        return "held by run"
    return _PENDING[tense].get(outcome) or _WORDS.get(outcome, outcome)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 setting``, ``no settings``, ``3 settings``."""
    return f"{number or 'no'} {one if number == 1 else many or one + 's'}"


def print_report(ctx: Context, report: Document, tense: Tense) -> None:
    """A table with one row per knob, and the sentences below it."""
    if report.get("profile"):
        ctx.print(f"profile {report['profile']}, backend {report.get('backend')}")
    print_items(ctx, report["items"], tense)
    for note in report.get("notes", ()):
        ctx.print(f"note: {note}")


def emit(ctx: Context, verb: str, report: Document, **more: Any) -> None:
    """Print a report as the caller asked for it."""
    if ctx.args.json:
        ctx.print_json(f"infertune.{verb}/1", {**report, **more})
    else:
        print_report(ctx, report, _TENSE.get(verb, "past"))


_TENSE: Mapping[str, Tense] = {"plan": "future", "verify": "present"}


def summary(report: Document, what: str, *outcomes: str) -> str:
    """One line on a table: ``4 settings changed (35 files), 2 ok``."""
    files = [item["knob"] for item in report["items"] if item["outcome"] in outcomes]
    knobs = set(files)
    fine = {item["knob"] for item in report["items"] if item["outcome"] == "already"}
    more = f" ({len(files)} files)" if len(files) > len(knobs) else ""
    return f"{counted(len(knobs), 'setting')} {what}{more}, {len(fine - knobs)} ok"


def say_restored(ctx: Context, report: Document) -> None:
    """How much of what was changed is as it was."""
    if not report["items"]:
        ctx.print("nothing to put back")
        return
    ctx.print(f"restored: {count(report, 'restored', 'already')} of {len(report['items'])}")


def count(report: Document, *outcomes: str) -> int:
    """Items with one of these outcomes."""
    return sum(item["outcome"] in outcomes for item in report["items"])


def print_items(ctx: Context, items: Sequence[Document], tense: Tense) -> None:
    """One row per knob; files that fare the same (one per CPU policy) share it."""
    if not items:
        return
    notes = {item["knob"]: item.get("note") for item in reversed(items)}
    rows: list[tuple[str, ...]] = []
    for _, alike in groupby(items, key=_alike):
        group = list(alike)
        first = group[0]
        name = f"{first['knob']} (x{len(group)})" if len(group) > 1 else first["knob"]
        remark = "; ".join(filter(None, (first.get("reason"), notes[first["knob"]])))
        rows.append((name, *_values(first), outcome_word(first, tense), remark))
    ctx.table(("KNOB", "NOW", "WANTED", "OUTCOME", ""), rows)


def _alike(item: Document) -> tuple[Any, ...]:
    return tuple(item.get(each) for each in ("knob", "before", "want", "outcome", "reason"))


def _values(item: Document) -> tuple[str, str]:
    """What an item holds and what it should, for people."""
    raw = item.get("before"), item.get("want")
    before, want = (amount(each, item.get("unit_bytes")) for each in raw)
    if before == want and raw[0] != raw[1]:
        return amount(raw[0]), amount(raw[1])  # rounded, they would look the same
    return before, want


def amount(value: str | None, unit_bytes: int | None = None) -> str:
    """A value for people; what counts memory in units of ``unit_bytes``, as a size."""
    if value is None:
        return "-"
    if unit_bytes and value.isdecimal():
        from infertune.base.units import format_size

        return format_size(int(value) * unit_bytes)
    return value
