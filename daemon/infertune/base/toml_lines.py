# SPDX-License-Identifier: Apache-2.0
"""On which line of a TOML document each key stands.

``tomllib`` gives values without positions.  This scanner walks a document that
``tomllib`` has already accepted, so it checks nothing: it only has to know
where keys and values begin and end (TOML 1.0, and the line breaks in inline
tables of 1.1).
"""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]
"""Keys from the top; an index for each item of an array: ``("backend", "rocm", "list", 0)``."""

# No possessive quantifiers: in Python 3.11.0 to 3.11.4 they miss matches around a look-ahead.
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_KEY = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'""")
# Up to two quotes may stand at the end of a multi-line string, before its own three.
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r"""|"(?:[^"\\]|\\.)*"|'[^']*'""",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}#\n]+")


def key_lines(text: str) -> dict[Path, int]:
    """Line number (from 1) of the first mention of each key path and array item.

    ``text`` must be a document that ``tomllib.loads`` accepts.
    """
    return _Scanner(text).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        # As tomllib does; every other line break is part of a string or an error.
        self.text = text.replace("\r\n", "\n")
        self.pos = 0
        self.lines: dict[Path, int] = {}
        self._line = 1
        self._counted = 0

    def document(self) -> dict[Path, int]:
        table: Path = ()
        last_item: dict[Path, int] = {}
        while self.blank() < len(self.text):
            if self.text[self.pos] != "[":
                self.pair(table)
                continue
            array = self.text.startswith("[[", self.pos)
            self.pos += 2 if array else 1
            line, keys = self.key()
            self.pos += 2 if array else 1
            table = ()
            for depth, key in enumerate(keys):
                table = (*table, key)
                self.lines.setdefault(table, line)
                if array and depth == len(keys) - 1:
                    last_item[table] = last_item.get(table, -1) + 1
                if table in last_item:
                    # A header below an array of tables speaks of its latest item.
                    table = (*table, last_item[table])
                    self.lines.setdefault(table, line)
        return self.lines

    def pair(self, table: Path) -> None:
        """``key = value``, in a table or an inline table."""
        line, keys = self.key()
        for depth in range(len(keys)):
            self.lines.setdefault((*table, *keys[: depth + 1]), line)
        self.blank()
        self.pos += 1  # the equals sign
        self.blank()
        self.value((*table, *keys))

    def key(self) -> tuple[int, list[str]]:
        """A dotted key and its line."""
        keys: list[str] = []
        self.blank()
        line = self.line()
        while True:
            if match := _BARE_KEY.match(self.text, self.pos):
                keys.append(match[0])
            else:
                match = self.match(_QUOTED_KEY)
                keys.append(tomllib.loads(f"key = {match[0]}")["key"])
            self.pos = match.end()
            self.blank()
            if self.text[self.pos] != ".":
                return line, keys
            self.pos += 1
            self.blank()

    def value(self, path: Path) -> None:
        opening = self.text[self.pos]
        if opening == "[":
            self.items(path, "]")
        elif opening == "{":
            self.items(path, "}")
        else:
            self.pos = self.match(_STRING if opening in "\"'" else _PLAIN).end()

    def items(self, path: Path, closing: str) -> None:
        """What stands between the brackets of an array or the braces of an inline table."""
        self.pos += 1
        index = 0
        while True:
            self.blank()
            if self.text[self.pos] == closing:
                self.pos += 1
                return
            if closing == "]":
                self.lines[(*path, index)] = self.line()
                self.value((*path, index))
                index += 1
            else:
                self.pair(path)
            self.blank()
            if self.text[self.pos] == ",":
                self.pos += 1

    def blank(self) -> int:
        """Skip white space, line breaks and comments; the new position."""
        self.pos = self.match(_BLANK).end()
        return self.pos

    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos
        return self._line

    def match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self.text, self.pos)
        if match is None:
            raise ValueError(f"not a TOML document at character {self.pos}")
        return match
