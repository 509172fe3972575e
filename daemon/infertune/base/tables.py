# SPDX-License-Identifier: Apache-2.0
"""TOML files as tables of typed values, each of which knows its line.

Every file that people write for infertune is read through this: a mistake is one sentence with
file and line, and says what would be right.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from infertune.base import toml_lines
from infertune.base.errors import FileError, did_you_mean
from infertune.base.names import NAME, NAME_RULE
from infertune.base.records import dataclass

MAX_LINE = 1000
"""Characters of a line: a key of very many parts takes a TOML parser minutes."""
_MAX_SHOWN = 80
"""Characters of a name or value that is shown back."""


def parse_toml(
    text: str, file: str, kind: type[FileError]
) -> tuple[dict[str, Any], dict[toml_lines.Path, int]]:
    """A document and the line of each of its keys.  Raises ``kind`` with file and line."""
    for number, row in enumerate(text.split("\n"), 1):
        if len(row) > MAX_LINE:
            raise kind(f"is longer than {MAX_LINE} characters", file=file, line=number)
    try:
        return tomllib.loads(text), toml_lines.key_lines(text)
    except RecursionError as error:
        raise kind("is nested too deeply", file=file) from error
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).partition(" (at ")
        if found := re.match(r"line (\d+), column (\d+)", where):
            line, column = int(found[1]), f" (column {found[2]})"
        else:
            line, column = text.rstrip().count("\n") + 1, ""
        if what == "Cannot overwrite a value":
            what = "this key is given twice"
        raise kind(f"not valid TOML: {what}{column}", file=file, line=line) from error
    except ValueError as error:  # a number of 5000 digits
        raise kind(f"not valid TOML: {error}", file=file) from error


def read_table(text: str, file: str, kind: type[FileError]) -> Table:
    """The top table of a file's text.  Raises ``kind``, as all that is asked of the table does."""
    values, lines = parse_toml(text, file, kind)
    return Table(values, file, kind, lines, ())


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a file that people write, as its document has it (docs/profiles.md)."""

    name: str
    accepts: str
    """What may stand there, in words."""
    what: str
    default: str
    """What holds without it, in words."""
    kinds: tuple[str, ...] = ()
    """The kinds of table that may have it, where a file has several."""


class Table:
    """One table of a file."""

    def __init__(
        self,
        values: Mapping[str, Any],
        file: str,
        kind: type[FileError],
        lines: Mapping[toml_lines.Path, int],
        at: toml_lines.Path,
    ) -> None:
        self.values = values
        self._file = file
        self._kind = kind
        self._lines = lines
        self._at = at

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def wrong(self, key: str | None, what: str) -> FileError:
        """The error that ``what`` is wrong with a key, or with the table itself; to be raised."""
        at = self._at if key is None else (*self._at, key)
        while at and at not in self._lines:
            at = at[:-1]
        return self._kind(what, file=self._file, line=self._lines.get(at))

    def only(self, required: Collection[str], optional: Collection[str] = ()) -> None:
        """Nothing but these keys, and all that are required."""
        known = [*required, *optional]
        for key in self.values:
            if key not in known:
                near = did_you_mean(key, known) or f"; known: {', '.join(known)}"
                raise self.wrong(key, f"unknown key {shown(key)}{near}")
        for key in required:
            if key not in self.values:
                raise self.wrong(None, f"'{key}' is missing")

    def text(self, key: str) -> str:
        """Some text, without the blanks around it."""
        value = self.values[key]
        if isinstance(value, str) and not value.strip():
            raise self.wrong(key, f"'{key}' is empty")
        if not isinstance(value, str):
            raise self.wrong(key, f"'{key}' is a text in quotes, not {shown(value)}")
        return value.strip()

    def name(self, key: str, what: str) -> str:
        """The name of ``what``: a profile, a server."""
        value = self.values[key]
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise self.wrong(
                key, f"'{key}': {shown(value)} is not a valid {what} name: {NAME_RULE}"
            )
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number."""
        value = self.values[key]
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"'{key}' is a number from {low} to {high}, not {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"'{key}' is true or false, not {shown(value)}")
        return value

    def one_of(self, key: str, words: Collection[str], default: str | None = None) -> str:
        """One of some words."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in words:
            near = did_you_mean(value, words) if isinstance(value, str) else ""
            raise self.wrong(key, f"'{key}' is one of {', '.join(words)}, not {shown(value)}{near}")
        return value

    def table(self, key: str, *, filled: bool = False) -> Table:
        """A table in this one; ``filled``: with something in it."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, f"'{key}' is a table: [{'.'.join(map(str, (*self._at, key)))}]")
        if filled and not value:
            raise self.wrong(key, f"'{key}' is a table with something in it")
        return Table(value, self._file, self._kind, self._lines, (*self._at, key))


def shown(value: object) -> str:
    """A name or value from a file as people write it, control characters escaped, not too long."""
    words = {True: "true", False: "false"}
    text = words[value] if isinstance(value, bool) else repr(value)
    return clipped(text, _MAX_SHOWN)


def clipped(text: str, length: int) -> str:
    """``text`` without its middle where it is too long."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 3]}...{text[-tail:]}"
