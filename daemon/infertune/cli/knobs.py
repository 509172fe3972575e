# SPDX-License-Identifier: Apache-2.0
"""``infertune knobs``: what can be set, what it is now, and what is known about it."""

from __future__ import annotations

from typing import Any

from infertune.base.errors import Exit, UsageError, did_you_mean
from infertune.catalogue.knobs import KNOBS, Knob, Reading, read_live, targets
from infertune.catalogue.knobs.guards import GUARDS
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.cli.measured import Told, lines, measured_here, told
from infertune.cli.render import amount
from infertune.host.machine import Machine, read_machine
from infertune.measure.verdicts import QUIET, change


def _document(
    knob: Knob, found: dict[str, Reading], note: str | None, measured: list[Told]
) -> dict[str, Any]:
    return {
        "id": knob.id,
        "summary": knob.summary,
        "accepts": knob.value.accepts(),
        "time": knob.time,
        "risk": knob.risk,
        "evidence": {
            "label": knob.evidence.label,
            "text": knob.evidence.text,
            "source": knob.evidence.source,
        },
        "measured_here": [each.document for each in measured],
        "doc": knob.doc,
        "absent": None if found else knob.absent,
        "note": note,
        "files": [
            {
                "path": path,
                "value": reading.value,
                "choices": list(reading.choices) if reading.choices else None,
                "error": reading.error,
            }
            for path, reading in found.items()
        ],
    }


def _knobs(ctx: Context) -> int:
    machine = read_machine(ctx.root)
    wanted = ctx.args.id
    if wanted is not None and wanted not in KNOBS:
        near = did_you_mean(wanted, KNOBS) or "; 'infertune knobs' lists them all"
        raise UsageError(f"there is no knob '{wanted}'{near}")
    shown = [KNOBS[wanted]] if wanted else list(KNOBS.values())
    verdicts = measured_here(ctx, machine)
    measured = {knob.id: told(ctx, machine, verdicts, knob.id) for knob in shown}
    if ctx.args.json:
        documents = [
            _document(k, _readings(ctx, machine, k), k.note(machine), measured[k.id]) for k in shown
        ]
        ctx.print_json("infertune.knobs/1", {"knobs": documents})
    elif wanted:
        one = shown[0]
        found = _readings(ctx, machine, one)
        _describe(ctx, one, found, one.note(machine), lines(measured[one.id]))
    else:
        rows = [
            (
                knob.id,
                _now(knob, _readings(ctx, machine, knob)),
                knob.risk,
                _briefly(measured[knob.id]) or knob.evidence.label,
            )
            for knob in shown
        ]
        ctx.table(("KNOB", "NOW", "RISK", "EVIDENCE"), rows)
    return Exit.DONE


def _briefly(measured: list[Told]) -> str | None:
    """The newest verdict that still holds, of a machine where nobody else was made to work."""
    fresh = (each.measured for each in measured if not each.stale and each.measured.arm == QUIET)
    return next((f"measured here, {change(one)}" for one in fresh), None)


def _readings(ctx: Context, machine: Machine, knob: Knob) -> dict[str, Reading]:
    return read_live(ctx.root, targets(ctx.root, machine, knob))


def _now(knob: Knob, found: dict[str, Reading]) -> str:
    """What a knob holds, as ``plan`` has it."""
    if not found:
        return "absent"
    values = sorted({_value(each, knob.value.unit_bytes) for each in found.values()})
    return ", ".join(values) + (f" (x{len(found)})" if len(found) > 1 else "")


def _value(reading: Reading, unit_bytes: int | None = None) -> str:
    if reading.value is None:
        return f"unreadable ({reading.error})"
    return amount(reading.value, unit_bytes)


def _in_full(knob: Knob, reading: Reading) -> str:
    """The kernel's own number, and what that is as a size."""
    size = _value(reading, knob.value.unit_bytes)
    return size if size == _value(reading) else f"{reading.value} ({size})"


def _describe(
    ctx: Context,
    knob: Knob,
    found: dict[str, Reading],
    note: str | None,
    measured: list[str],
) -> None:
    rows = [
        ("accepts", knob.value.accepts()),
        ("takes effect", "at the next boot" if knob.time == "boot" else "at once"),
        ("risk", knob.risk),
        ("evidence", f"{knob.evidence.label}: {knob.evidence.text}"),
        ("source", knob.evidence.source),
        *(("here", line) for line in measured),
        ("defined in", knob.doc),
        *(
            ("refused", f"{', '.join(g.values)}: {g.reason} ({g.source})")
            for g in GUARDS
            if g.knob == knob.id
        ),
        *((("note", note),) if note else ()),
        *((path, _in_full(knob, reading)) for path, reading in found.items()),
        *((("here", f"absent: {knob.absent}"),) if not found else ()),
    ]
    ctx.print(f"{knob.id}: {knob.summary}")
    ctx.labelled(rows, 2)


COMMANDS: tuple[Command, ...] = (
    verb(
        "knobs",
        _knobs,
        (argument("id", nargs="?", metavar="KNOB", help="show one knob in full"), JSON),
        "Prints each knob with its present value on this machine, its risk, and what is known "
        "about its effect on inference: measured, reported, protective but unmeasured, or no "
        "effect found. What 'infertune prove' found on this machine stands before all of these.",
    ),
)
