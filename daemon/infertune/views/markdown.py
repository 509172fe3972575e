# SPDX-License-Identifier: Apache-2.0
"""A page as Markdown, for an issue on GitHub."""

from __future__ import annotations

import re
from collections.abc import Iterator

from infertune.views.page import Entry, Page, Section, Table, plain

_SIGNS = re.compile(r"([\\`*_\[\]<>#|~&$])")
_BEGINS = re.compile(r"^(\d{0,9})([-+=.)])(?= |$)")


def markdown(page: Page) -> str:
    """The whole text."""
    lines = [f"# {_text(page.title)}", "", *(_text(each) for each in page.about)]
    for section in page.sections:
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """The only way for a text into it: no sign marks anything up, and no name calls anybody."""
    escaped = _BEGINS.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", plain(text)))
    return escaped.replace("@", "@<!-- -->")


def _section(section: Section) -> Iterator[str]:
    yield f"## {_text(section.title)}"
    said = [f"- {_text(each)}" for each in section.sentences]
    said += [f"- {_text(each.label)}: {_text(each.text)}" for each in section.bars]
    said += [line for entry in section.entries for line in _entry(entry)]
    if said:
        yield from ("", *said)
    if section.table:
        yield from ("", *_table(section.table))


def _table(found: Table) -> Iterator[str]:
    width = len(found.rows[0])
    yield _row(found.header or ("",) * width)
    yield _row(("---",) * width, escaped=True)
    for row in found.rows:
        yield _row(row)


def _row(cells: tuple[str, ...], *, escaped: bool = False) -> str:
    shown = cells if escaped else [_text(each) for each in cells]
    return f"| {' | '.join(shown)} |"


def _entry(entry: Entry) -> Iterator[str]:
    yield f"- **{_text(entry.word)}**: {_text(entry.title)}"
    yield from (f"  - {_text(label)}: {_text(text)}" for label, text in entry.lines)
    for text, address in entry.links:
        is_plain = re.fullmatch(r"https://[\w./#?=&%~:,+-]{1,400}", address, re.ASCII)
        where = f"<{address}>" if is_plain else _text(address)
        yield f"  - see: {_text(text)}, {where}"
