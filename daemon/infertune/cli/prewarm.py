# SPDX-License-Identifier: Apache-2.0
"""The verb ``prewarm``."""

from __future__ import annotations

import argparse
import os

from infertune.base.errors import Exit, UsageError
from infertune.base.records import asdict
from infertune.base.units import format_size, parse_size, printable_line
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.launch.prewarm import Warmed, prewarm, share
from infertune.launch.residency import model_files
from infertune.run import refuse_other_files
from infertune.servers.models import model_path


def _size(text: str) -> int:
    try:
        return parse_size(int(text) if text.isdecimal() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{printable_line(text, 40)!r} is not a size; write '8GiB', or bytes"
        ) from None


def _prewarm(ctx: Context) -> int:
    if not ctx.root.live:
        raise UsageError("prewarm works on this machine only")
    models = [model_path(each, os.environ) for each in ctx.args.model]
    for path in models:
        refuse_other_files("model", path)
    left = ctx.args.max
    done: list[tuple[str, list[str], Warmed]] = []
    for path in models:
        files = model_files(path)
        try:
            each = prewarm(ctx.root, files, most=left)
        except OSError as error:
            name = printable_line(error.filename or path, 200)
            raise UsageError(f"{name}: {error.strerror}") from None
        left = None if left is None else left - each.read
        done.append((path, files, each))
    if ctx.args.json:
        found = [{"model": path, "files": files, **asdict(each)} for path, files, each in done]
        ctx.print_json("infertune.prewarm/1", {"models": found})
    else:
        _show(ctx, done)
    missed = any(each.outcome in ("skipped", "stopped") for _, _, each in done)
    return Exit.DIFFERS if missed else Exit.DONE


def _show(ctx: Context, done: list[tuple[str, list[str], Warmed]]) -> None:
    rows = [
        (
            format_size(each.bytes),
            share(each.before, each.bytes),
            share(each.after, each.bytes),
            format_size(each.read),
            f"{each.seconds:.1f} s",
            printable_line(os.path.basename(path), 200),
        )
        for path, _, each in done
    ]
    ctx.table(("SIZE", "BEFORE", "AFTER", "READ", "TIME", "MODEL"), rows)
    for path, _, each in done:
        if each.why:
            ctx.sentence(f"{printable_line(os.path.basename(path), 200)}: {each.why}")


COMMANDS: tuple[Command, ...] = (
    verb(
        "prewarm",
        _prewarm,
        (
            argument("model", nargs="+", metavar="MODEL", help="a GGUF file, or a model's name"),
            argument("--max", type=_size, metavar="BYTES", help="read no more than this: '8GiB'"),
            JSON,
        ),
        "Has the kernel read the files of models into memory (all parts, in their order), as the "
        "user who calls: the next start of a server finds them there. Reads nothing of a model "
        "that is there already, or that does not fit into free memory beside a reserve for the "
        "system, and nothing from a disk that turns while others read from it; stops when memory "
        "gets short. What was read stays until something else needs the memory. Exit code 1: some "
        "of it was left out. A server does it beside its own start with 'prewarm = \"auto\"' in "
        "[server].",
    ),
)
