# SPDX-License-Identifier: Apache-2.0
"""The command line as argparse reads it, and what is said where it cannot.

Imported only where there is more on it than a verb and names: argparse takes longer to import than
such a verb to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import NoReturn

from infertune import __version__
from infertune.base.errors import Exit, UsageError, did_you_mean
from infertune.cli.base import Command, Context

DESCRIPTION = "Tune this machine for local LLM inference, and put everything back."
VERSION = f"infertune {__version__}"


class _HelpWanted(Exception):
    """The text that ``--help`` asks for."""


class _Parser(argparse.ArgumentParser):
    """Raises UsageError, one sentence, where argparse would print the usage and exit."""

    verbs: Sequence[str] = ()
    """Words of which one must follow."""

    def print_help(self, file: object = None) -> NoReturn:
        """argparse would not tell that it could not print."""
        raise _HelpWanted(self.format_help())

    def error(self, message: str) -> NoReturn:
        _, _, verb = self.prog.partition(" ")
        message = message.removeprefix("argument ")
        missing = "the following arguments are required: "
        none = "VERB: invalid choice: "
        if message.startswith(none):
            word = message.removeprefix(none).partition(" (choose")[0].strip("'")
            near = did_you_mean(word, self.verbs) or f"; there are {', '.join(self.verbs)}"
            message = f"there is no '{word}'{near}"
        elif message == f"{missing}VERB":
            message = f"one of {', '.join(self.verbs)} is missing"
        elif message.startswith(missing):
            message = f"{message.removeprefix(missing)} is missing"
        raise UsageError(f"{verb}: {message}" if verb else message)


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The command line of these; completion and the man page are made from it too."""
    parser = _Parser(prog="infertune", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=VERSION)
    _add_common(parser, suppress=False)
    _add_commands(parser, commands)
    return parser


def parse(commands: Sequence[Command], words: Sequence[str]) -> SimpleNamespace:
    """The arguments of a verb that is one of these, or of showing its help.  Raises UsageError."""
    try:
        args, more = build_parser(commands).parse_known_args(words, SimpleNamespace())
    except _HelpWanted as wanted:
        show = Command("", "", partial(_show, str(wanted)), takes_command=True)
        return SimpleNamespace(root="/", debug=False, command=show)
    if more:
        known = [name for each in args.command.arguments for name in each.names]
        unknown = next((word for word in more if word.startswith("-")), None)
        if unknown is None:
            raise UsageError(f"{args.command.name}: '{more[0]}' is one word too many")
        name = unknown.partition("=")[0]
        near = did_you_mean(name, [each for each in known if each.startswith("-")])
        raise UsageError(f"{args.command.name}: there is no option '{name}'{near}")
    return args


def _show(text: str, ctx: Context) -> int:
    ctx.piece(text)
    return Exit.DONE


def _add_common(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    """Options that may stand before or after the verb."""
    parser.add_argument(
        "--root",
        metavar="PATH",
        default=argparse.SUPPRESS if suppress else "/",
        help="work on a recorded machine: a directory tree or a snapshot file",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS if suppress else False,
        help="show a traceback when something fails",
    )


def _add_commands(parser: _Parser, commands: Sequence[Command]) -> None:
    group = parser.add_subparsers(metavar="VERB", required=True)
    parser.verbs = [command.name for command in commands]
    for command in commands:
        sub = group.add_parser(
            command.name,
            help=command.help,
            description=command.description or command.help,
            allow_abbrev=False,
        )
        _add_common(sub, suppress=True)
        for item in command.arguments:
            sub.add_argument(*item.names, **item.options)
        if command.subcommands:
            _add_commands(sub, command.subcommands)
        else:
            sub.set_defaults(command=command)
