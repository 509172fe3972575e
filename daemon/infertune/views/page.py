# SPDX-License-Identifier: Apache-2.0
"""A page before it has a format: sections of sentences, tables, bars and findings.

Nothing in it is trusted, and nothing in it is marked up: html.py and markdown.py escape every text.
"""

from __future__ import annotations

from collections.abc import Sequence

from infertune.base.records import dataclass
from infertune.base.units import printable_line

CELL = 600
"""Characters of one text: names come from other people's files and programs."""
ROWS = 400
"""Rows of one table."""


@dataclass(frozen=True, slots=True)
class Table:
    header: tuple[str, ...]
    """Empty for a list of labels and what they mean."""
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """How much of something is taken."""

    label: str
    share: float | None
    """0 to 1; None where it is not known."""
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that was found, and what there is to say about it."""

    word: str
    """How bad it is: ``error``, ``warning``, ``info``."""
    title: str
    lines: tuple[tuple[str, str], ...]
    """Label and text."""
    links: tuple[tuple[str, str], ...] = ()
    """Text and address."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    sentences: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    table: Table | None = None
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    about: tuple[str, ...]
    """What it is and what is in it: the first thing that is read."""
    sections: tuple[Section, ...]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table | None:
    """A table of bounded length; None where there is nothing in it."""
    if len(rows) > ROWS:
        left = (f"... and {len(rows) - ROWS} more", *[""] * (len(rows[0]) - 1))
        rows = [*rows[:ROWS], left]
    return Table(header, tuple(rows)) if rows else None


def plain(text: str) -> str:
    """Text that drives neither a terminal nor the direction of writing, and has an end."""
    return printable_line(text, CELL)


def counted(number: int, noun: str) -> str:
    """``no errors``, ``1 error``, ``2 errors``."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
