# SPDX-License-Identifier: Apache-2.0
"""The verbs that change the machine, and those that say what would or did change.

Where infertuned runs it does them: what is needed to ask it is all that this module imports.  Where
it does not, here.py has the engine.
"""

from __future__ import annotations

from infertune.base.errors import Exit, Failed, Unreachable, UsageError
from infertune.base.locks import DAEMON_LOCK, owner
from infertune.catalogue.backends import BACKENDS
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.cli.render import (
    count,
    emit,
    print_items,
    print_report,
    say_restored,
    summary,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


PROFILE = argument("profile", metavar="PROFILE", help="name of a profile ('infertune profiles')")
BACKEND = argument(
    "--backend",
    choices=("auto", *BACKENDS),
    default="auto",
    help="variant of the profile (default: what this machine suggests)",
)
WITHOUT = argument(
    "--without",
    action="append",
    default=[],
    metavar="KNOB",
    help="apply the profile as if it did not name this knob; may be given more than once",
)


def _seconds(text: str) -> int:
    import re
    from argparse import ArgumentTypeError

    match = re.fullmatch(r"([0-9]{1,6})(s|min|h)?", text)
    if not match or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is not a time; write 60s, 5min or 1h")
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2] or "s"]


CONFIRM_WITHIN = argument(
    "--confirm-within",
    type=_seconds,
    metavar="TIME",
    help="put everything back after TIME (60s, 5min) unless 'infertune confirm' is run",
)


WHILE_SERVING = argument(
    "--while-serving",
    action="store_true",
    help="apply it whenever a model server works, and put it back when all are idle",
)
IDLE = argument(
    "--idle",
    type=_seconds,
    metavar="TIME",
    help="with --while-serving: idle for so long before it goes back (default: 60s)",
)
_IDLE_S = 60


def daemon_runs(ctx: Context) -> bool:
    """Whether infertuned is there to do it."""
    return ctx.live and owner(DAEMON_LOCK) is not None


def no_daemon(ctx: Context, what: str) -> Unreachable:
    """That something needs infertuned, which does not run; to be raised."""
    start = "systemctl start infertune"
    recorded = "--root is a recorded machine, on which nothing runs"
    return Unreachable(what, hint=start if ctx.live else recorded)


def _ask_daemon(ctx: Context, verb: str, signature: str = "", *arguments: Any) -> dict[str, Any]:
    """Let infertuned do it; raises what it answers, as the engine here would."""
    document: dict[str, Any] = _call(verb.capitalize(), signature, *arguments)
    failure, hint = document.pop("failed", None), document.pop("hint", None)
    if failure:
        emit(ctx, verb, document, failed=failure)
        raise Failed(failure, hint=hint)
    return document


def _call(member: str, signature: str = "", *arguments: Any) -> Any:
    from infertune.service.client import call

    return call(member, signature, arguments)


def _plan(ctx: Context) -> int:
    from infertune.cli import here

    return here.plan(ctx, daemon_runs(ctx))


def _verify(ctx: Context) -> int:
    from infertune.cli import here

    return here.verify(ctx, daemon_runs(ctx))


def _apply(ctx: Context) -> int:
    args = ctx.args
    limit = args.confirm_within
    if args.while_serving:
        return _apply_while_serving(ctx)
    if args.idle is not None:
        raise UsageError("--idle goes with --while-serving; nothing was touched")
    if daemon_runs(ctx):
        asked = (args.profile, args.backend, args.without, limit or 0)
        report = _ask_daemon(ctx, "apply", "ssasu", *asked)
    elif limit is not None:
        raise no_daemon(
            ctx,
            "--confirm-within needs infertuned, which reverts when nobody confirms; "
            "nothing was touched",
        )
    else:
        from infertune.cli import here

        report = here.apply(ctx)
    emit(ctx, "apply", report, failed=None)
    if not args.json:
        ctx.print(summary(report, "changed", "applied", "clamped", "restored"))
        ctx.say_rehearsed()
        if limit is not None:
            ctx.print(f"goes back in {limit} s unless you run 'infertune confirm'")
    return Exit.DONE


def _apply_while_serving(ctx: Context) -> int:
    args = ctx.args
    if args.confirm_within is not None:
        raise UsageError("--while-serving and --confirm-within exclude each other")
    from infertune.profiles.config import LONGEST_IDLE_S, SHORTEST_IDLE_S

    idle_s = args.idle or _IDLE_S
    if not SHORTEST_IDLE_S <= idle_s <= LONGEST_IDLE_S:
        longest = LONGEST_IDLE_S // 3600
        raise UsageError(f"--idle is {SHORTEST_IDLE_S}s to {longest}h; nothing was touched")
    if not daemon_runs(ctx):
        raise no_daemon(
            ctx, "--while-serving needs infertuned, which watches the servers; nothing was touched"
        )
    asked = (args.profile, args.backend, args.without, idle_s)
    report = _call("ApplyWhileServing", "ssasu", *asked)
    if args.json:
        ctx.print_json("infertune.apply/1", {**report, "failed": None})
    else:
        print_report(ctx, report, "future")
        ctx.print(summary(report, "to change while servers work", "set", "restore"))
        ctx.print(f"goes back when all have been idle for {idle_s} s; 'infertune revert' ends this")
    return Exit.DONE


def _confirm(ctx: Context) -> int:
    if not daemon_runs(ctx):
        raise Unreachable("infertuned is not running, so nothing waits for a confirmation")
    confirmed = bool(_call("Confirm"))
    if ctx.args.json:
        ctx.print_json("infertune.confirm/1", {"confirmed": confirmed})
    else:
        ctx.print("confirmed" if confirmed else "nothing waits for a confirmation")
    return Exit.DONE if confirmed else Exit.DIFFERS


def applied_now(ctx: Context) -> dict[str, Any]:
    """What is applied, as ``infertune status --json`` has it."""
    if daemon_runs(ctx):
        document: dict[str, Any] = _call("Status")
        return document
    from infertune.cli import here

    return here.status(ctx)


def _status(ctx: Context) -> int:
    document = applied_now(ctx)
    state, about, items = document["state"], document.get("applied"), document["items"]
    if ctx.args.json:
        ctx.print_json("infertune.status/1", document)
    else:
        what = about and f": {about['profile']} ({about['backend']}) {_since(about['since'])}"
        ctx.print(f"{state}{what or ''}")
        print_items(ctx, items, "present")
        if demand := document.get("demand"):
            now = "in force" if demand["in_force"] else "they are idle"
            ctx.print(f"while servers work: {demand['profile']} ({demand['backend']}); {now}")
        for sentence in sorted({_about(each) for each in document.get("drift", ())}):
            ctx.print(f"note: {sentence}")
        for note in document["notes"]:
            ctx.print(f"note: {note}")
        for path in document["damaged_journals"]:
            ctx.print(f"note: a damaged journal is kept in {path}; remove it when you have seen it")
    as_left = all(item["outcome"] == "already" for item in items)
    fine = state in ("idle", "applied", "running") and as_left
    return Exit.DONE if fine else Exit.DIFFERS


def _since(moment: str) -> str:
    """``since 2026-11-28 13:58 (2 h ago)``: local time, as a clock on the wall has it."""
    from datetime import UTC, datetime

    try:
        then = datetime.fromisoformat(moment).astimezone()
    except ValueError:
        return f"since {moment}"
    minutes = (datetime.now(UTC) - then).total_seconds() / 60
    if minutes < 1:
        age = "just now"
    elif minutes < 90:
        age = f"{minutes:.0f} min ago"
    elif minutes < 36 * 60:
        age = f"{minutes / 60:.0f} h ago"
    else:
        age = f"{minutes / 60 / 24:.0f} days ago"
    return f"since {then:%Y-%m-%d %H:%M} ({age})"


def _about(drift: Mapping[str, Any]) -> str:
    """One entry of ``drift`` for people."""
    knob, value, by = drift["knob"], drift.get("value"), drift.get("by")
    match drift["state"]:
        case "external":
            return f"{knob} is externally owned: {by or 'another program'} set it to {value}"
        case "contested":
            return f"{knob} is contested by {by or 'another program'} and left at {value}"
        case "gone":
            return f"{knob}: a file is gone; it is set again when it comes back"
    return f"{knob} was set again ({by})"


def _revert(ctx: Context) -> int:
    return _put_back(ctx, "revert")


def _recover(ctx: Context) -> int:
    return _put_back(ctx, "recover")


def _put_back(ctx: Context, verb: str) -> int:
    if daemon_runs(ctx):
        report = _ask_daemon(ctx, "revert")
    else:
        from infertune.cli import here

        report = here.put_back(ctx, verb)
    emit(ctx, verb, report, failed=None)
    if not ctx.args.json:
        say_restored(ctx, report)
        ctx.say_rehearsed()
    left = count(report, "conflict", "absent")
    return Exit.DIFFERS if left or report["notes"] else Exit.DONE


COMMANDS: tuple[Command, ...] = (
    verb(
        "plan",
        _plan,
        (PROFILE, BACKEND, WITHOUT, JSON),
        "Compares every knob of the profile with the machine and prints what 'apply' would "
        "do. Needs no privilege.",
    ),
    verb(
        "apply",
        _apply,
        (PROFILE, BACKEND, WITHOUT, CONFIRM_WITHIN, WHILE_SERVING, IDLE, JSON),
        "Writes the original values to a journal, then changes what differs. If any write "
        "fails, everything goes back and the exit code is 3. Another profile may be applied "
        "over it: only what differs is touched, and the originals stay those of the untuned "
        "machine. With --while-serving nothing is changed now: infertuned applies the profile when "
        "a server that it started or adopted begins to use CPU time, and puts the originals back "
        "when all have been idle. 'apply' and 'revert' end that.",
    ),
    verb(
        "confirm",
        _confirm,
        (JSON,),
        "Ends the time limit of 'apply --confirm-within'. Exit code 1 when nothing waits for it.",
    ),
    verb(
        "verify",
        _verify,
        (PROFILE, BACKEND, WITHOUT, JSON),
        "Plans again and expects nothing to do. Exit code 1 when something differs, is still "
        "waiting for a reboot or cannot be read.",
    ),
    verb(
        "status",
        _status,
        (JSON,),
        "Prints the applied profile, the files it changed and whether they still hold it; a value "
        "that someone else has set since is externally owned and left alone. Exit code 1 when "
        "something was interrupted, damaged or changed by someone else.",
    ),
    verb(
        "revert",
        _revert,
        (JSON,),
        "Restores the journal's originals. A value that someone else has set since is left and "
        "reported (exit code 1).",
    ),
    verb(
        "recover",
        _recover,
        (JSON,),
        "Like 'revert', for a machine on which infertune was killed or whose journal is "
        "damaged: a damaged journal is kept for inspection, and only lines with a correct "
        "checksum are restored.",
    ),
)
