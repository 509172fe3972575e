# SPDX-License-Identifier: Apache-2.0
"""What is not known here, and why: one notion of it for the whole program.

``None`` is what is known to be absent.  :class:`Unknown` is what could not be found out; it is
null in a document, and never zero.
"""

from __future__ import annotations

from typing import TypeVar

from infertune.base.records import dataclass

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unknown:
    """A fact, or an answer, that is not to be had here; ``why`` completes "not known: ..."."""

    why: str


class Missing(Exception):
    """Something needs a fact that is not known, and is then unknown for the same reason."""

    def __init__(self, unknown: Unknown) -> None:
        super().__init__(unknown.why)
        self.unknown = unknown


def need(fact: T | Unknown) -> T:
    """The fact, for whoever cannot answer without it.  Raises Missing."""
    if isinstance(fact, Unknown):
        raise Missing(fact)
    return fact


def known(fact: T | Unknown) -> T | None:
    """The fact, or None where it is not known: for documents and tables that show no reason."""
    return None if isinstance(fact, Unknown) else fact
