# SPDX-License-Identifier: Apache-2.0
"""How text is laid out in the columns there are: sentences, tables, labels, and colour.

Plain text in, lines out.  ``width`` is the number of columns, or None for a pipe: it has room for
everything, and gets one line for each thing, so that a search finds the whole of it.

Every verb has this module, so it imports next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Paint = Callable[[str], str]

_NARROWEST = 40
"""Columns that are written for in any case: a narrower terminal breaks the lines itself."""

_FIRST = 16
"""Columns that the first column of a table needs to have the others beside it."""

_ROOM = 30
"""Columns in which the last column of a table still goes on beside the others."""

_VERDICTS = ("OUTCOME", "STATE", "FITS", "SEVERITY", "STATUS", "VERDICT")
"""Columns of a table that hold nothing but verdicts."""

_COLOURS = {
    colour: words
    for colour, *words in (
        ("2", "ok", "absent"),
        ("32", "accepted", "active", "applied", "changed", "fits", "in force", "pass", "restored",
         "running"),
        ("33", "at reboot", "at restart", "change", "clamped", "degraded", "delegated", "differs",
         "differ", "held by run", "interrupted", "likely", "missing", "tight", "warning"),
        ("31", "conflict", "contested", "does not fit", "error", "fail", "failed", "gone",
         "not changed", "not put back", "refused", "rejected", "rolled back", "unreadable"),
    )
}  # fmt: skip
"""What a verdict's colour says: dim as it should be, green done, yellow look here, red wrong."""


def width_of(stream: Any, environ: Mapping[str, str]) -> int | None:
    """Columns of what ``stream`` writes to; ``COLUMNS`` counts for a pipe as well."""
    told = environ.get("COLUMNS", "")
    if told.isascii() and told.isdecimal() and int(told[:6]) > 0:
        return max(int(told[:6]), _NARROWEST)
    if stream is None or not stream.isatty():
        return None
    import os

    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max(columns or 80, _NARROWEST)


def paint_for(stream: Any, environ: Mapping[str, str]) -> Paint:
    """What colours a verdict: nothing does where no terminal shows it, or nobody wants it
    (https://no-color.org)."""
    plain = environ.get("NO_COLOR") or environ.get("TERM", "dumb") == "dumb"
    return str if plain or stream is None or not stream.isatty() else _painted


def _painted(word: str) -> str:
    colour = next((colour for colour, words in _COLOURS.items() if word in words), None)
    return f"\x1b[{colour}m{word}\x1b[0m" if colour else word


def fold(text: str, width: int | None, hang: int | None = None) -> list[str]:
    """Lines of one line of text, broken between words; those after the first begin at ``hang``.

    A word is never cut: a name or an address is there to be copied.
    """
    if width is None or len(text) <= width:
        return [text]
    indent = len(text) - len(text.lstrip(" "))
    hang = max(indent, 4) if hang is None else hang
    lines, line, empty = [], " " * indent, True
    for word in text[indent:].split(" "):
        if not empty and len(line) + 1 + len(word) > width:
            lines.append(line.rstrip())
            line, empty = " " * hang, True
        if word or not empty:  # no line begins with the second of two spaces
            line, empty = (line + word if empty else f"{line} {word}"), False
    return [*lines, line.rstrip()]


def sentence(
    text: str, width: int | None, hang: int | None = None, paint: Paint = str
) -> list[str]:
    """``fold``, with a verdict before the first colon in its colour."""
    lines = fold(text, width, hang)
    head, colon, rest = lines[0].partition(":")
    return [f"{paint(head)}{colon}{rest}", *lines[1:]] if colon else lines


def labelled(
    pairs: Sequence[tuple[str, str]], width: int | None, indent: int = 0, column: int = 0
) -> list[str]:
    """A column of labels, ``column`` wide at least, and what belongs to each beside it.  A long
    label (a path) has no part in how wide the column is."""
    column = max(column, *(len(label) for label, _ in pairs if len(label) < 20), 0)
    lines = []
    for label, text in pairs:
        line = f"{' ' * indent}{label:<{column}}  {text}".rstrip()
        lines += fold(line, width, indent + column + 2)
    return lines


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, paint: Paint = str
) -> list[str]:
    """Left-aligned columns.

    What of the last one has no room beside its row goes under it; and where the others are too
    wide for one line as well, the first has a line of its own.
    """
    return [line for block in _blocks([header, *rows], width, paint) for line in block]


def _blocks(
    rows: Sequence[Sequence[str]], width: int | None, paint: Paint, indent: int = 0
) -> list[list[str]]:
    """The lines of each row, the header's first."""
    margin, header = " " * indent, rows[0]
    if len(header) == 1:
        return [fold(margin + row[0], width, indent + 2) for row in rows]
    *widths, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heads = indent + sum(widths) + 2 * (len(widths) - 1)
    if width is not None and heads > width:
        column = width - sum(widths[1:]) - 2 * (len(widths) - 1) - last
        column = column if column >= indent + _FIRST else indent + 4
        others = _blocks([row[1:] for row in rows], width, paint, column)
        return [
            _beside(margin + row[0], other, column, width)
            for row, other in zip(rows, others, strict=True)
        ]
    found = []
    for row in rows:
        cells = [
            (paint(cell) if title in _VERDICTS else cell) + " " * (wide - len(cell))
            for cell, title, wide in zip(row, header, [*widths, 0], strict=True)
        ]
        if width is None or heads + 2 + len(row[-1]) <= width:
            found.append([(margin + "  ".join(cells)).rstrip()])
            continue
        line, room = margin + "  ".join(cells[:-1]), width - heads - 2
        beside = room >= _ROOM and all(len(word) <= room for word in row[-1].split(" "))
        first, *more = fold(" " * (heads + 2 if beside else indent + 4) + row[-1], width)
        found.append([line + first[heads:], *more] if beside else [line.rstrip(), first, *more])
    return found


def _beside(first: str, others: list[str], column: int, width: int) -> list[str]:
    """What begins at ``column``, on the line of ``first`` where that ends before it."""
    if len(first) + 2 > column:
        return [*fold(first, width), *others]
    return [f"{first:<{column}}{others[0][column:]}", *others[1:]]
