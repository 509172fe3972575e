# SPDX-License-Identifier: Apache-2.0
"""What a verb of the command line is, and what it is given.

Every verb has this module, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys

from infertune.base.records import dataclass
from infertune.cli import lines
from infertune.cli.verbs import VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import SimpleNamespace
    from typing import Any

    from infertune.base.root import Root


@dataclass(frozen=True)
class Argument:
    """One argument of a verb, in argparse's own terms."""

    names: tuple[str, ...]
    options: dict[str, Any]


def whole(what: str, low: int, high: int) -> Callable[[str], int]:
    """How a whole number is read, for argparse."""

    def read(text: str) -> int:
        # isdecimal() is true of the digits of every script.
        plain = text.isascii() and text.isdecimal() and len(text) <= len(str(high))
        if not plain or not low <= int(text) <= high:
            from argparse import ArgumentTypeError

            raise ArgumentTypeError(f"{text!r} is not {what}; write {low} to {high}")
        return int(text)

    return read


def size(what: str) -> Callable[[str], int]:
    """How an amount of memory is read, for argparse; bytes, and some."""

    def read(text: str) -> int:
        from argparse import ArgumentTypeError

        from infertune.base.units import parse_size

        try:
            found = parse_size(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        if not found:
            raise ArgumentTypeError(f"{text!r} is not {what}: nothing")
        return found

    return read


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def printable(text: str, *, lines: bool = True) -> str:
    """Text that cannot drive a terminal: control characters are shown as ``\\x1b``.

    Names and values may come from somebody else's machine or profile.
    """
    harmless = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in harmless else each.encode("unicode_escape").decode()
        for each in text
    )


JSON = argument("--json", action="store_true", help="print one JSON document (docs/json.md)")


class Context:
    """What every verb is given: the machine's files and where to print."""

    def __init__(
        self,
        root: Root | None,
        args: SimpleNamespace,
        stdout: Any = None,
        command: tuple[str, ...] = (),
    ) -> None:
        """``root`` is None for this machine, which a verb of the daemon's does not even open."""
        self._root = root
        self.args = args
        self.stdout = stdout or sys.stdout
        self.command = command
        """What stood after ``--``."""
        self.width = lines.width_of(self.stdout, os.environ)
        """Columns there are; None for a pipe, which has room for everything."""
        self._paint = lines.paint_for(self.stdout, os.environ)
        self.unheard: OSError | None = None
        """Why output could not be written.  What a verb does to the machine does not depend on
        it."""

    @property
    def root(self) -> Root:
        if self._root is None:
            from infertune.base.root import Root

            self._root = Root("/")
        return self._root

    @root.setter
    def root(self, root: Root) -> None:
        self._root = root

    @property
    def lost(self) -> bool:
        """Whether output is lost that somebody waits for."""
        # A reader that goes away (`infertune machine | head`) has seen what it wanted.
        return self.unheard is not None and not isinstance(self.unheard, BrokenPipeError)

    @property
    def live(self) -> bool:
        """Whether this is about the machine it runs on, not a recorded one."""
        return self._root is None or self._root.live

    def print(self, text: str = "", hang: int | None = None) -> None:
        """Lines of text.  On a terminal a longer one goes on under itself, at column ``hang``."""
        self._say(
            [
                line
                for each in printable(text).split("\n")
                for line in lines.sentence(each, self.width, hang, self._paint)
            ]
        )

    def sentence(self, text: str, indent: int = 4) -> None:
        self.print(text, indent)

    def say_rehearsed(self) -> None:
        """That what was done was done to a recorded machine."""
        if not self.live:
            self.print(f"a rehearsal on {self.args.root}: this machine was not touched")

    def verbatim(self, text: str) -> None:
        """What is to be copied, or read by a program: its lines are left as they are."""
        self._write(printable(text))

    def piece(self, text: str) -> None:
        """What goes on where the last piece ended."""
        self._write(printable(text), end="")

    def labelled(self, pairs: Sequence[tuple[str, str]], indent: int = 0, column: int = 0) -> None:
        """Labels in a column of so many at least, and what belongs to each beside it."""
        cells = [(label, printable(text, lines=False)) for label, text in pairs]
        self._say(lines.labelled(cells, self.width, indent, column))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Left-aligned columns; what of the last one has no room goes under its row."""
        cells = [[printable(cell, lines=False) for cell in row] for row in rows]
        self._say(lines.table(header, cells, self.width, self._paint))

    def _say(self, laid_out: list[str]) -> None:
        self._write("\n".join(laid_out))

    def print_json(self, schema: str, document: dict[str, Any]) -> None:
        """Print one document; ``schema`` is its versioned name, e.g. ``infertune.plan/1``."""
        import json

        self._write(json.dumps({"schema": schema, **document}, indent=2))

    def _write(self, text: str, end: str = "\n") -> None:
        if self.stdout is None or self.unheard:
            return
        try:
            # Flushed: `run` lasts for days, and its output may go to a pipe or a log.
            print(text, file=self.stdout, end=end, flush=True)
        except OSError as error:
            self.unheard = error


@dataclass(frozen=True)
class Command:
    """One verb.  ``run`` returns the exit code; errors are raised (errors.py)."""

    name: str
    help: str
    run: Callable[[Context], int] | None = None
    arguments: tuple[Argument, ...] = ()
    description: str = ""
    """The man page's paragraph on the verb."""
    subcommands: tuple[Command, ...] = ()
    takes_command: bool = False
    """Whether ``-- COMMAND...`` may follow; the words are in ``Context.command``."""
    acts: bool = False
    """Whether it does more than print: see Verb in verbs.py, which says so for verbs."""


def verb(
    name: str,
    run: Callable[[Context], int] | None = None,
    arguments: tuple[Argument, ...] = (),
    description: str = "",
    *,
    subcommands: tuple[Command, ...] = (),
    takes_command: bool = False,
) -> Command:
    """A verb that stands in VERBS, which has its help."""
    told = VERBS[name]
    return Command(
        name, told.help, run, arguments, description, subcommands, takes_command, told.acts
    )
