# SPDX-License-Identifier: Apache-2.0
"""The YAML that people write into llama-swap's and compose files, and no more of it.

Block mappings and sequences, plain and quoted scalars, block scalars (``|`` and ``>``), flow
sequences and mappings of scalars, anchors and aliases.  PyYAML comes only with the extra
``exporter``: with it there, the doctor would see other servers than without it.  Whatever is
not of this subset is an error that names the line; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from infertune.base.records import dataclass

Node = str | list["Node"] | dict[str, "Node"] | None

DEPTH_LIMIT = 20
_LINES_LIMIT = 5000
_NODES_LIMIT = 20_000
"""Entries of all mappings and sequences, merged ones counted each time: a file of 250 KiB could
otherwise merge one mapping into thousands of others, and take gigabytes."""
_TEXT_LIMIT = 16 * 1024
"""Characters of one value that goes over several lines."""

_QUOTED_KEY = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')[ ]*:(?:[ \t]+(.*))?""")
_BLOCK = re.compile(r"([|>])([+-]?)(\d?)([+-]?)(?:\s+#.*)?")
_ANCHOR = re.compile(r"&([\w.-]{1,80})(?:\s+(.*))?", re.ASCII)
_ALIAS = re.compile(r"\*([\w.-]{1,80})", re.ASCII)
_ESCAPES: Mapping[str, str] = {"n": "\n", "t": "\t", "r": "\r", "0": "", "/": "/"}


class NotUnderstood(Exception):
    """What a file holds cannot be taken apart; the text says where and why."""


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    indent: int
    text: str
    """Without indentation and trailing space; "" for an empty line."""
    raw: str


def load(text: str) -> Node:
    """The document as dicts, lists and strings; every scalar is a string.  Raises NotUnderstood."""
    lines = []
    for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if number > _LINES_LIMIT:
            raise NotUnderstood(f"more than {_LINES_LIMIT} lines")
        body = raw.lstrip(" ")
        lines.append(_Line(number, len(raw) - len(body), body.rstrip(), raw))
    return _Loader(lines).document()


class _Loader:
    def __init__(self, lines: list[_Line]) -> None:
        self.lines = lines
        self.at = 0
        self.anchors: dict[str, Node] = {}
        self.room = _NODES_LIMIT

    def spend(self, entries: int) -> None:
        self.room -= entries
        if self.room < 0:
            raise NotUnderstood(f"more than {_NODES_LIMIT} entries")

    def fail(self, why: str, line: _Line | None = None) -> NotUnderstood:
        number = line.number if line else self.lines[min(self.at, len(self.lines) - 1)].number
        return NotUnderstood(f"line {number}: {why}")

    def document(self) -> Node:
        first = self.peek()
        if first is not None and first.text == "---":
            self.at += 1
            first = self.peek()
        if first is None:
            return None
        node = self.block(first.indent, 0)
        if (line := self.peek()) is not None and line.text != "...":
            raise self.fail("this is not indented as what is above it", line)
        return node

    def peek(self) -> _Line | None:
        """The next line that says something."""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.text and not line.text.startswith("#"):
                if line.text.startswith("\t"):
                    raise self.fail("a tab for indentation", line)
                return line
            self.at += 1
        return None

    def block(self, indent: int, depth: int) -> Node:
        if depth > DEPTH_LIMIT:
            raise self.fail(f"nested more than {DEPTH_LIMIT} deep")
        line = self.peek()
        assert line is not None
        if line.text == "-" or line.text.startswith("- "):
            return self.sequence(indent, depth)
        if _key(line.text):
            return self.mapping(indent, depth)
        self.at += 1
        return self.scalar(line.text, line, indent)

    def sequence(self, indent: int, depth: int) -> Node:
        found: list[Node] = []
        while (line := self.peek()) is not None and line.indent == indent:
            if not (line.text == "-" or line.text.startswith("- ")):
                break
            self.spend(1)
            rest = line.text[1:].lstrip()
            if rest and not rest.startswith("#") and _key(rest):
                # "- key: value" opens a mapping whose keys stand under that key.
                inner = indent + len(line.text) - len(rest)
                self.lines[self.at] = _Line(line.number, inner, rest, " " * inner + rest)
                found.append(self.mapping(inner, depth + 1))
                continue
            self.at += 1
            found.append(self.value(rest, line, indent, depth))
        return found

    def mapping(self, indent: int, depth: int) -> Node:
        found: dict[str, Node] = {}
        while (line := self.peek()) is not None and line.indent == indent:
            entry = _key(line.text)
            if entry is None:
                if line.text.startswith("- "):
                    break
                raise self.fail("neither 'key: value' nor '- item'", line)
            self.at += 1
            self.spend(1)
            key = self.plain(entry[0], line)
            value = self.value(entry[1], line, indent, depth, in_mapping=True)
            if key == "<<":
                for merged in value if isinstance(value, list) else [value]:
                    upper = merged if isinstance(merged, dict) else {}
                    self.spend(len(upper) + len(found))
                    found = {**upper, **found}
            else:
                found[key] = value
        if (line := self.peek()) is not None and line.indent > indent:
            raise self.fail("this is not indented as what is above it", line)
        return found

    def value(
        self, rest: str, line: _Line, indent: int, depth: int, *, in_mapping: bool = False
    ) -> Node:
        """What stands after ``key:`` or ``-``, on this line and below it."""
        if anchor := _ANCHOR.fullmatch(rest):
            if depth > DEPTH_LIMIT:
                raise self.fail(f"nested more than {DEPTH_LIMIT} deep", line)
            node = self.value(anchor[2] or "", line, indent, depth + 1, in_mapping=in_mapping)
            self.anchors[anchor[1]] = node
            return node
        if block := _BLOCK.fullmatch(rest):
            return self.block_scalar(block, indent)
        if rest and not rest.startswith("#"):
            return self.scalar(rest, line, indent)
        following = self.peek()
        if following is None or following.indent < indent:
            return None
        deeper = following.indent > indent
        # A sequence may stand as far left as the key it belongs to.
        level = in_mapping and following.indent == indent and following.text.startswith("- ")
        return self.block(following.indent, depth + 1) if deeper or level else None

    def block_scalar(self, header: re.Match[str], indent: int) -> str:
        body: list[str] = []
        inner: int | None = indent + int(header[3]) if header[3] else None
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.text and inner is None and line.indent > indent:
                inner = line.indent
            if line.text and (inner is None or line.indent < inner):
                break
            body.append(line.raw[inner or 0 :].rstrip("\n"))
            self.at += 1
        # Folding keeps no line that matters here: a command is split at white space.
        return ("\n" if header[1] == "|" else " ").join(body).rstrip() + "\n"

    def scalar(self, text: str, line: _Line, indent: int) -> Node:
        if alias := _ALIAS.fullmatch(text):
            if alias[1] not in self.anchors:
                raise self.fail("an alias without an anchor above it", line)
            return self.anchors[alias[1]]
        if text[0] in "[{":
            return self.flow(text, line)
        if text[0] in "\"'":
            while not _closed(text) and self.at < len(self.lines) and len(text) < _TEXT_LIMIT:
                text += " " + self.lines[self.at].text
                self.at += 1
            return self.plain(text, line)
        # A plain scalar goes on where the next lines are indented further.
        parts = [_uncommented(text)]
        while (following := self.peek()) is not None and following.indent > indent:
            if _key(following.text):
                raise self.fail("a key where a text goes on", following)
            parts.append(_uncommented(following.text))
            self.at += 1
        return self.plain(" ".join(parts), line)

    def plain(self, text: str, line: _Line) -> str:
        if text[0] == "'":
            closed = re.fullmatch(r"'((?:[^']|'')*)'(?:\s+#.*)?", text)
            if closed is None:
                raise self.fail("a quote that is not closed", line)
            return closed[1].replace("''", "'")
        if text[0] == '"':
            closed = re.fullmatch(r'"((?:[^"\\]|\\.)*)"(?:\s+#.*)?', text)
            if closed is None:
                raise self.fail("a quote that is not closed", line)
            return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), closed[1])
        if text[0] in "!%@`&*":
            raise self.fail(f"'{text[0]}' is not understood here", line)
        return text

    def flow(self, text: str, line: _Line) -> Node:
        """``[a, "b", c]`` or ``{a: b}``, of scalars only, perhaps over several lines."""
        closing = "]" if text[0] == "[" else "}"
        text = _uncommented(text)
        while not text.endswith(closing) and self.at < len(self.lines) and len(text) < _TEXT_LIMIT:
            text += " " + _uncommented(self.lines[self.at].text)
            self.at += 1
        items = _items(text[1:-1]) if text.endswith(closing) else None
        if items is None:
            raise self.fail(
                f"only plain items are understood between {text[0]} and {closing}", line
            )
        self.spend(len(items))
        if closing == "]":
            return [self.plain(each, line) for each in items]
        found: dict[str, Node] = {}
        for each in items:
            entry = _key(each)
            if entry is None:
                raise self.fail("'key: value' expected between { and }", line)
            found[self.plain(entry[0], line)] = self.plain(entry[1], line) if entry[1] else None
        return found


def _key(text: str) -> tuple[str, str] | None:
    """Key and what follows it, as written; None where the line is no entry of a mapping."""
    if text[0] in "\"'":
        found = _QUOTED_KEY.fullmatch(text)
        return (found[1], found[2] or "") if found else None
    if text[0] in "#[]{},&*!|>%@`":
        return None
    at = text.find(": ")
    if at < 0 and text.endswith(":"):
        at = len(text) - 1
    if at <= 0 or " #" in text[:at]:
        return None
    return text[:at].rstrip(), text[at + 1 :].strip()


def _items(text: str) -> list[str] | None:
    """What stands between commas; None where there is a bracket in it."""
    items, start, quote = [], 0, ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[]{}":
            return None
        elif char == ",":
            items.append(text[start:at].strip())
            start = at + 1
    items.append(text[start:].strip())
    return None if quote else [each for each in items if each]


def _closed(text: str) -> bool:
    pattern = r"'(?:[^']|'')*'(?:\s+#.*)?|\"(?:[^\"\\]|\\.)*\"(?:\s+#.*)?"
    return re.fullmatch(pattern, text) is not None


def _uncommented(text: str) -> str:
    """Without a comment; a ``#`` in a word or in quotes is none."""
    quote = ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#" and (at == 0 or text[at - 1].isspace()):
            return text[:at].rstrip()
    return text
