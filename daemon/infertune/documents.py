# SPDX-License-Identifier: Apache-2.0
"""Engine values as plain data: what ``--json`` prints and what crosses the bus (docs/json.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infertune.engine import Report, Status
from infertune.host.unknown import Unknown
from infertune.plan import Item
from infertune.records import asdict, fields

if TYPE_CHECKING:
    from infertune.pools.judge import Picture, Pool


def report_document(report: Report) -> dict[str, Any]:
    """A report; the inverse of :func:`report_from`."""
    outcomes = sorted({item.outcome for item in report.items})
    return {
        "profile": report.profile,
        "backend": report.backend,
        "differs": report.differs,
        "counts": {outcome: report.count(outcome) for outcome in outcomes},
        "notes": list(report.notes),
        "items": [asdict(item) for item in report.items],
    }


def report_from(document: Mapping[str, Any]) -> Report:
    """The report a document was made from; fields that are missing are unknown (None)."""
    return Report(
        document.get("profile"),
        document.get("backend"),
        items_from(document),
        tuple(document.get("notes", ())),
    )


def status_document(status: Status) -> dict[str, Any]:
    """What is applied, by whom, and whether the files still hold it."""
    journal = status.journal
    about = None
    if journal:
        about = {
            "profile": journal.profile,
            "backend": journal.backend,
            "owner": journal.owner,
            "since": journal.since,
            "held": journal.held,
            "confirm_by_s": journal.confirm_by,
        }
    return {
        "state": status.state,
        "applied": about,
        "notes": list(status.notes),
        "damaged_journals": list(status.damaged),
        "items": [asdict(item) for item in status.items],
        "drift": [_drift(item) for item in status.items if item.outcome in _DRIFT],
    }


_DRIFT = {"conflict": "external", "absent": "gone"}


def _drift(item: Item) -> dict[str, Any]:
    """What a journal alone can tell of a file that is not ours any more."""
    state = _DRIFT[item.outcome]
    return {"knob": item.knob, "path": item.path, "state": state, "value": item.before, "by": None}


def items_from(document: Mapping[str, Any]) -> tuple[Item, ...]:
    """The items of a report's or a status' document."""
    return tuple(map(_item, document.get("items", ())))


def _item(document: Mapping[str, Any]) -> Item:
    return Item(**{field.name: document.get(field.name) for field in fields(Item)})  # type: ignore[arg-type]


def picture_document(found: Picture) -> dict[str, Any]:
    """The GPU's memory now and after the next boot; a pool that is not known is missing."""
    pools = {"now": found.now, "now, ROCm": found.rocm, "next boot": found.next_boot}
    unknown = {each.why for each in pools.values() if isinstance(each, Unknown)}
    return {
        "pools": [
            _pool(when, each) for when, each in pools.items() if not isinstance(each, Unknown)
        ],
        "unknown": sorted(unknown),
    }


def _pool(when: str, pool: Pool) -> dict[str, Any]:
    return {
        "when": when,
        "name": pool.name,
        "bytes": pool.bytes,
        "held_bytes": pool.held,
        "free_bytes": None if pool.held is None else pool.free,
        "limits": [asdict(each) for each in pool.limits],
        "holders": [asdict(each) for each in pool.holders],
    }
