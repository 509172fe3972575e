# SPDX-License-Identifier: Apache-2.0
"""Engine values as plain data: what ``--json`` and tables show and what crosses the bus
(docs/json.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infertune.base.records import asdict
from infertune.catalogue.knobs import KNOBS
from infertune.engine.plan import Item
from infertune.engine.state import Report, Status
from infertune.host.unknown import Unknown

if TYPE_CHECKING:
    from infertune.pools.judge import Picture, Pool


def report_document(report: Report) -> dict[str, Any]:
    """What a verb found or did."""
    outcomes = sorted({item.outcome for item in report.items})
    return {
        "profile": report.profile,
        "backend": report.backend,
        "differs": report.differs,
        "counts": {outcome: report.count(outcome) for outcome in outcomes},
        "notes": list(report.notes),
        "items": [_item(item) for item in report.items],
    }


def _item(item: Item) -> dict[str, Any]:
    """An item, and what of its knob is needed to show it without the catalogue."""
    knob = KNOBS.get(item.knob)  # a journal of another version may name one that is not there
    return {
        **asdict(item),
        "unit_bytes": knob.value.unit_bytes if knob else None,
        "held": knob is not None and knob.while_open,
    }


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
        "items": [_item(item) for item in status.items],
        "demand": None,
        "drift": [_drift(item) for item in status.items if item.outcome in _DRIFT],
    }


_DRIFT = {"conflict": "external", "absent": "gone"}


def _drift(item: Item) -> dict[str, Any]:
    """What a journal alone can tell of a file that is not ours any more."""
    state = _DRIFT[item.outcome]
    return {"knob": item.knob, "path": item.path, "state": state, "value": item.before, "by": None}


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
