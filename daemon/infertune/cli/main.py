# SPDX-License-Identifier: Apache-2.0
"""Entry point: parse, run the verb, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from infertune import __version__
from infertune.cli.base import Command, Context, printable
from infertune.errors import Exit, InfertuneError, describe
from infertune.snapshot import open_root

VERBS: Mapping[str, tuple[str, ...]] = {
    "machine": ("machine", "snapshot"),
    "knobs": ("knobs",),
    "doctor": ("doctor",),
    "profile": ("profiles", "profile"),
    "engine": ("plan", "apply", "confirm", "verify", "status", "revert", "recover"),
    "boot": ("boot",),
    "fit": ("fit", "expect"),
    "run": ("run",),
    "serve": ("serve", "start", "servers", "stop", "logs"),
    "adopt": ("adopt", "release"),
    "setup": ("setup",),
    "probes": ("probes",),
}
"""Modules of this package and the verbs in each.  Only the module of the verb is imported: all of
them take longer than most verbs do."""

ACTING = frozenset(
    [
        "adopt",
        "apply",
        "confirm",
        "recover",
        "release",
        "revert",
        "run",
        "serve",
        "setup",
        "snapshot",
        "stage",
        "start",
        "stop",
        "undo",
    ]
)
"""Verbs that do more than print: their exit code says how that went, whoever hears of it.  Of every
other verb the output is all there is, and without it the verb has failed."""


def commands(verb: str | None = None) -> tuple[Command, ...]:
    """Those of the module that has this verb; all where none has, to say what there is."""
    modules = [name for name, verbs in VERBS.items() if verb in verbs] or VERBS
    found = (import_module(f"infertune.cli.{name}").COMMANDS for name in modules)
    return tuple(command for group in found for command in group)


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The command line of these; completion and the man page are made from it too."""
    parser = argparse.ArgumentParser(
        prog="infertune",
        description="Tune this machine for local LLM inference, and put everything back.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"infertune {__version__}")
    _add_common(parser, suppress=False)
    _add_commands(parser, commands)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    """Options that may stand before or after the verb."""
    default = argparse.SUPPRESS if suppress else None
    parser.add_argument(
        "--root",
        metavar="PATH",
        default=default if suppress else "/",
        help="work on a recorded machine: a directory tree or a snapshot file",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=default if suppress else False,
        help="show a traceback when something fails",
    )


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command]) -> None:
    group = parser.add_subparsers(metavar="VERB", required=True)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse cannot tell options after "--" from ours when there are options before it.
    cut = words.index("--") if "--" in words else len(words)
    parser = build_parser(commands(_verb(words[:cut])))
    args = parser.parse_args(words[:cut])
    command = tuple(words[cut + 1 :])
    if cut < len(words) and not (args.command.takes_command and command):
        parser.error("this verb takes no '--', or nothing follows it")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # "µ" on an ASCII terminal
    context = None
    try:
        with open_root(args.root) as root:
            context = Context(root, args, command=command)
            code = int(args.command.run(context))
        return int(Exit.FAILED) if _failed_to_say(args.command, context) else code
    except InfertuneError as error:
        if args.debug:
            raise
        _complain(error.message, error.hint)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if args.debug:
            raise
        _complain(describe(error))
        refused = isinstance(error, PermissionError)
        return int(Exit.NOT_PERMITTED if refused else Exit.FAILED)
    except Exception as error:
        if args.debug:
            raise
        _complain(f"a bug: {type(error).__name__}: {error}", "'--debug' shows where; please report")
        return int(Exit.FAILED)
    finally:
        if context and context.unheard:
            _not_heard(context.unheard)
        try:
            if sys.stderr:
                sys.stderr.flush()
        except (OSError, ValueError):
            _let_go_of(2)


def _verb(words: Sequence[str]) -> str | None:
    """The first word that is not an option or the value of one."""
    rest = iter(words)
    for word in rest:
        if word == "--root":
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return None


def _complain(message: str, hint: str | None = None) -> None:
    """One line, and a second that says what would be right."""
    with contextlib.suppress(OSError, AttributeError):  # standard error may be full or closed
        print(f"infertune: {printable(message, lines=False)}", file=sys.stderr)
        if hint:
            print(f"  {printable(hint)}", file=sys.stderr)


def _failed_to_say(command: Command, context: Context) -> bool:
    """Whether the output was the verb's only work, and is lost."""
    # A reader that goes away (`infertune machine | head`) has seen what it wanted.
    lost = context.unheard is not None and not isinstance(context.unheard, BrokenPipeError)
    return lost and command.name not in ACTING


def _not_heard(error: OSError) -> None:
    """Say that output is lost, to whoever still listens."""
    if not isinstance(error, BrokenPipeError):
        _complain(f"the output could not be written: {describe(error)}")
    _let_go_of(1)


def _let_go_of(descriptor: int) -> None:
    """What is still buffered must not fail once more when the interpreter ends: it would then end
    with 120, seen with Python 3.13."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
