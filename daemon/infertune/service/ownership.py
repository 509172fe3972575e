# SPDX-License-Identifier: Apache-2.0
"""Whose a value is that infertune set and that is different now.  Pure: no file, no bus.

An admin who changes a value after us is right: it is left alone and reported.
Two exceptions.  What was reset (resume, a CPU or a driver that came back) was
nobody's decision, and is set again.  With ``enforce`` somebody's value is set
again too, but never in a ping-pong: after a few times that file is contested
and left alone until the next apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from infertune.base.records import dataclass
from infertune.engine.state import Difference

WINDOW_S = 600.0
SIGNAL_S = 5.0
"""Longest time from a tuner's write to its signal."""
MOST = 3
"""Times a value that somebody set is set again within WINDOW_S; once where a tuner did it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about the differences found after an event."""

    reset: frozenset[str]
    """Paths to set again; their originals stay."""
    retake: frozenset[str]
    """Paths to set again although somebody set them; their values become the originals."""
    leave: frozenset[str]
    """Paths that are somebody else's."""


@dataclass(frozen=True, slots=True)
class _External:
    difference: Difference
    by: str | None
    seen_s: float
    """When it was found first."""


class Ownership:
    """What is known about the files that differ, from event to event."""

    def __init__(self, *, enforce: bool, now: Callable[[], float]) -> None:
        self.enforce = enforce
        self._now = now
        self._external: dict[str, _External] = {}
        self._gone: dict[str, Difference] = {}
        self._restored: dict[str, tuple[str, str]] = {}
        self._retaken: dict[str, list[float]] = {}
        self._contested: set[str] = set()

    def forget(self) -> None:
        """Something was applied or reverted: everything is ours, or nothing."""
        self._external.clear()
        self._gone.clear()
        self._restored.clear()
        self._retaken.clear()
        self._contested.clear()

    def decide(
        self,
        found: Sequence[Difference],
        *,
        was_reset: Callable[[str], bool] = lambda _: False,
        by: str | None = None,
        delegated: str | None = None,
        to: Callable[[str], bool] = lambda _: False,
    ) -> Decision:
        """Sort what differs now.

        ``was_reset``: whether the event may have started a path anew.  ``by``: who
        changed it, where the event tells.  ``delegated``: another service that sets
        the knobs for which ``to`` is true; those are never set again here.
        """
        before, self._external = self._external, {}
        self._gone = {each.path: each for each in found if each.value is None}
        reset, retake = set(), set()
        for each in found:
            if each.value is None:
                continue
            known = before.get(each.path)
            theirs = delegated is not None and to(each.knob)
            if known is None and not theirs and was_reset(each.path):
                reset.add(each.path)
                continue
            same = known is not None and known.difference.value == each.value
            who, seen_s = delegated if theirs else by, self._now()
            if known and same:
                # Somebody may have asked between a tuner's write and the signal that tells of it.
                fresh = seen_s - known.seen_s < SIGNAL_S
                who, seen_s = known.by or (who if fresh else None), known.seen_s
            self._external[each.path] = _External(each, who, seen_s)
            if (
                self.enforce
                and each.want is not None
                and not theirs
                and self._may_retake(each.path, who)
            ):
                retake.add(each.path)
        for path in (*self._external, *self._gone):
            self._restored.pop(path, None)
        return Decision(
            frozenset(reset), frozenset(retake), frozenset(self._external.keys() - retake)
        )

    def _may_retake(self, path: str, by: str | None) -> bool:
        if path in self._contested:
            return False
        recent = [at for at in self._retaken.get(path, ()) if self._now() - at < WINDOW_S]
        self._retaken[path] = recent
        if len(recent) < (1 if by else MOST):
            return True
        self._contested.add(path)
        return False

    def set_again(self, decision: Decision, knobs: dict[str, str], why: str) -> None:
        """A decision was carried out.  ``knobs``: knob by path of what was written."""
        for path in decision.retake:
            self._retaken.setdefault(path, []).append(self._now())
            self._external.pop(path, None)
        for path, knob in knobs.items():
            self._restored[path] = (knob, "enforced" if path in decision.retake else why)

    @property
    def knobs(self) -> list[str]:
        """Ids of the knobs that are not as infertune set them."""
        differing = [each.difference for each in self._external.values()]
        return sorted(
            {each.knob for each in (*differing, *self._gone.values()) if each.want is not None}
        )

    def document(self) -> list[dict[str, Any]]:
        """One entry per file that is not simply ours (docs/json.md, ``drift``)."""
        entries = [
            _entry(
                each.difference.knob,
                path,
                "contested" if path in self._contested else "external",
                each.difference.value,
                each.by,
            )
            for path, each in self._external.items()
            if each.difference.want is not None
        ]
        entries += [
            _entry(each.knob, path, "gone")
            for path, each in self._gone.items()
            if each.want is not None
        ]
        entries += [
            _entry(knob, path, "restored", None, why)
            for path, (knob, why) in self._restored.items()
        ]
        return sorted(entries, key=lambda entry: (entry["knob"], entry["path"]))


def _entry(
    knob: str, path: str, state: str, value: str | None = None, by: str | None = None
) -> dict[str, Any]:
    return {"knob": knob, "path": path, "state": state, "value": value, "by": by}
