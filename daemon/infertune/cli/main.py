# SPDX-License-Identifier: Apache-2.0
"""Entry point: parse, run the verb, turn errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

from infertune import __version__
from infertune.base.errors import Exit, InfertuneError, describe
from infertune.cli.base import Command, Context, printable
from infertune.cli.verbs import MODULES, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

_VERSION = f"infertune {__version__}"


def commands(verb: str | None = None) -> tuple[Command, ...]:
    """Those of the module that has this verb; all where none is given."""
    modules = MODULES if verb is None else [VERBS[verb].module]
    return tuple(command for module in modules for command in _commands_of(module))


def _commands_of(module: str) -> tuple[Command, ...]:
    found: tuple[Command, ...] = __import__(
        f"infertune.cli.{module}", fromlist=["COMMANDS"]
    ).COMMANDS
    return found


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The command line of these; completion and the man page are made from it too."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="infertune",
        description="Tune this machine for local LLM inference, and put everything back.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_VERSION)
    _add_common(parser, suppress=False)
    _add_commands(parser, commands)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    """Options that may stand before or after the verb."""
    from argparse import SUPPRESS

    parser.add_argument(
        "--root",
        metavar="PATH",
        default=SUPPRESS if suppress else "/",
        help="work on a recorded machine: a directory tree or a snapshot file",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=SUPPRESS if suppress else False,
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
    if words == ["--version"]:
        print(_VERSION)
        return Exit.DONE
    if not sys.stderr:
        # Closed (2>&-): print() would say on standard output what is meant for it.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    args, command = _parsed(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # "µ" on an ASCII terminal
    context = Context(None, args, command=command)
    try:
        code = _run(context)
        return Exit.FAILED if _failed_to_say(args.command, context) else code
    except InfertuneError as error:
        if args.debug:
            raise
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if args.debug:
            raise
        _complain(describe(error))
        refused = isinstance(error, PermissionError)
        return Exit.NOT_PERMITTED if refused else Exit.FAILED
    except Exception as error:
        if args.debug:
            raise
        _complain(f"a bug: {type(error).__name__}: {error}", "'--debug' shows where; please report")
        return Exit.FAILED
    finally:
        if context.unheard:
            _not_heard(context.unheard)
        try:
            if sys.stderr:
                sys.stderr.flush()
        except (OSError, ValueError):
            _let_go_of(2)


def said(context: Context, *words: str) -> dict[str, Any]:
    """The document that another verb prints of the same machine.  Raises what that verb does."""
    import json

    args = build_parser(commands(words[0])).parse_args([*words, "--json"], SimpleNamespace())
    args.root = context.args.root
    output = io.StringIO()
    args.command.run(Context(None if context.live else context.root, args, output))
    document: dict[str, Any] = json.loads(output.getvalue())
    del document["schema"]
    return document


def _run(context: Context) -> int:
    """The verb, on the machine that was asked for."""
    if context.args.root == "/":
        return int(context.args.command.run(context))
    from infertune.host.snapshot import open_root

    with open_root(context.args.root) as root:
        context.root = root
        return int(context.args.command.run(context))


def _parsed(words: Sequence[str]) -> tuple[SimpleNamespace, tuple[str, ...]]:
    """The arguments of a command line, and what stands after ``--``.  Exits with what is wrong."""
    # argparse cannot tell options after "--" from ours when there are options before it.
    cut = words.index("--") if "--" in words else len(words)
    ours, command = words[:cut], tuple(words[cut + 1 :])
    verb = _verb(ours)
    known = commands(verb) if verb in VERBS else ()
    if known and words[0] == verb and (plain := _plain(known, words)):
        return plain, ()
    # Help, and the answer to a verb that there is not, are had without any verb's module.
    parser = build_parser(known or _named())
    args = parser.parse_args(ours, SimpleNamespace())
    if cut < len(words) and not (args.command.takes_command and command):
        parser.error("this verb takes no '--', or nothing follows it")
    for option in _empty(args):
        parser.error(f"argument {option}: it is empty")
    return args, command


def _empty(args: SimpleNamespace) -> list[str]:
    """Options that were given without a value: a variable of a script was not set.

    Nothing is done as if they had not been given.
    """
    names = [each.names[-1] for each in args.command.arguments if each.names[0].startswith("-")]
    return [each for each in names if getattr(args, each.lstrip("-").replace("-", "_")) == ""]


def _named() -> tuple[Command, ...]:
    """Every verb, by name and help alone."""
    return tuple(Command(each.name, each.help) for each in VERBS.values())


def _plain(known: Sequence[Command], words: Sequence[str]) -> SimpleNamespace | None:
    """The arguments of a verb with nothing but names after it; None for others.

    What argparse says of them, which takes longer to import than such a verb to run.
    """
    verb, *names = words
    command = next(each for each in known if each.name == verb)
    wanted = [each for each in command.arguments if not each.names[0].startswith("-")]
    if command.subcommands or len(names) != len(wanted) or any(w.startswith("-") for w in names):
        return None
    if any(each.options.keys() & {"nargs", "choices", "type"} for each in wanted):
        return None
    args = {
        each.names[-1].lstrip("-").replace("-", "_"): each.options.get(
            "default", False if each.options.get("action") == "store_true" else None
        )
        for each in command.arguments
    }
    args |= zip((each.names[0] for each in wanted), names, strict=True)
    return SimpleNamespace(root="/", debug=False, command=command, **args)


def _verb(words: Sequence[str]) -> str | None:
    """The first word that is not an option or the value of one; None where help comes before."""
    rest = iter(words)
    for word in rest:
        if word == "--root":
            next(rest, None)
        elif word in ("-h", "--help"):
            return None
        elif not word.startswith("-"):
            return word
    return None


def _complain(message: str, hint: str | None = None) -> None:
    """One line, and a second that says what would be right."""
    try:
        print(f"infertune: {printable(message, lines=False)}", file=sys.stderr)
        if hint:
            print(f"  {printable(hint)}", file=sys.stderr)
    except (OSError, AttributeError):
        pass  # standard error may be full or closed


def _failed_to_say(command: Command, context: Context) -> bool:
    """Whether the output was the verb's only work, and is lost."""
    # A reader that goes away (`infertune machine | head`) has seen what it wanted.
    lost = context.unheard is not None and not isinstance(context.unheard, BrokenPipeError)
    return lost and not command.acts


def _not_heard(error: OSError) -> None:
    """Say that output is lost, to whoever still listens."""
    if not isinstance(error, BrokenPipeError):
        _complain(f"the output could not be written: {describe(error)}")
    _let_go_of(1)


def _let_go_of(descriptor: int) -> None:
    """What is still buffered must not fail once more when the interpreter ends: it would then end
    with 120, seen with Python 3.13."""
    import contextlib

    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
