# SPDX-License-Identifier: Apache-2.0
"""Entry point: parse, run the verb, turn errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

from infertune import __version__
from infertune.base.errors import Exit, InfertuneError, UsageError, describe, did_you_mean
from infertune.cli import lines
from infertune.cli.base import Command, Context, printable
from infertune.cli.verbs import GROUPS, MODULES, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def commands(verb: str | None = None) -> tuple[Command, ...]:
    """Those of the module that has this verb; all where none is given."""
    modules = MODULES if verb is None else [VERBS[verb].module]
    return tuple(command for module in modules for command in _commands_of(module))


def _commands_of(module: str) -> tuple[Command, ...]:
    found: tuple[Command, ...] = __import__(
        f"infertune.cli.{module}", fromlist=["COMMANDS"]
    ).COMMANDS
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"infertune {__version__}")
        return Exit.DONE
    if not sys.stderr:
        # Closed (2>&-): print() would say on standard output what is meant for it.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # "µ" on an ASCII terminal
    context = Context(None, SimpleNamespace(debug=False))
    try:
        context.args, context.command = _parsed(words)
        code = _run(context)
        # Where the output was the verb's only work, it has failed.
        return Exit.FAILED if context.lost and not context.args.command.acts else code
    except InfertuneError as error:
        if context.args.debug:
            raise
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if context.args.debug:
            raise
        _complain(describe(error))
        refused = isinstance(error, PermissionError)
        return Exit.NOT_PERMITTED if refused else Exit.FAILED
    except Exception as error:
        if context.args.debug:
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

    from infertune.cli.parser import parse

    args = parse(commands(words[0]), [*words, "--json"])
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
    """The arguments of a command line, and what stands after ``--``.  Raises UsageError."""
    # argparse cannot tell options after "--" from ours when there are options before it.
    cut = words.index("--") if "--" in words else len(words)
    ours, command = words[:cut], tuple(words[cut + 1 :])
    verb = _verb(ours)
    if verb is None:
        if {"-h", "--help"} & set(ours):
            return SimpleNamespace(root="/", debug=False, command=Command("", "", _help)), ()
        return _parsed(["overview", *words])
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or "; 'infertune --help' lists them"
        raise UsageError(f"there is no verb '{verb}'{near}")
    known = commands(verb)
    if words[0] == verb and (plain := _plain(known, words)):
        return plain, ()
    from infertune.cli.parser import parse

    args = parse(known, ours)
    if cut < len(words) and not (args.command.takes_command and command):
        raise UsageError(f"{verb}: this verb takes no '--', or nothing follows it")
    for option in _empty(args):
        raise UsageError(f"{verb}: {option}: it is empty")
    return args, command


def _help(ctx: Context) -> int:
    """Every verb, in the order in which a person works; no verb's module is needed for it."""
    ctx.print("Tune this machine for local LLM inference, and put everything back.")
    ctx.print("usage: infertune [--root PATH] [--debug] VERB ...")
    for group, title in GROUPS.items():
        ctx.print(f"\n{title}")
        told = [(each.name, each.help) for each in VERBS.values() if each.group == group]
        ctx.labelled(told, 2, _NAMES)
    ctx.print("\nOptions")
    ctx.labelled(_OPTIONS, 2, _NAMES)
    ctx.print("\n'infertune' alone says how this machine stands, 'infertune VERB --help' more.")
    return Exit.DONE


_OPTIONS = (
    ("--root PATH", "rehearse on a recorded machine: a directory tree or a snapshot file"),
    ("--debug", "show a traceback when something fails"),
    ("--version", "show the version"),
)
_NAMES = max(map(len, (*VERBS, *dict(_OPTIONS))))


def _empty(args: SimpleNamespace) -> list[str]:
    """Options that were given without a value: a variable of a script was not set.

    Nothing is done as if they had not been given.
    """
    names = [each.names[-1] for each in args.command.arguments if each.names[0].startswith("-")]
    return [each for each in names if getattr(args, each.lstrip("-").replace("-", "_")) == ""]


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
        width = lines.width_of(sys.stderr, os.environ)
        told = lines.fold(f"infertune: {printable(message, lines=False)}", width, 2)
        told += lines.fold(f"  {printable(hint)}", width, 2) if hint else []
        print("\n".join(told), file=sys.stderr)
    except (OSError, AttributeError):
        pass  # standard error may be full or closed


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
