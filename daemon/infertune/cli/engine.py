# SPDX-License-Identifier: Apache-2.0
"""The verbs that change the machine, and those that say what would or did change."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

from infertune.cli.base import JSON, Command, Context, argument
from infertune.cli.render import Tense, counted, print_items, print_report
from infertune.documents import items_from, report_document, report_from, status_document
from infertune.engine import (
    DAEMON_LOCK,
    ApplyFailed,
    Report,
    Session,
    make_plan,
    session,
    status,
)
from infertune.errors import Exit, Unreachable, UsageError
from infertune.knobs import KNOBS
from infertune.machine import Machine, read_machine
from infertune.plan import Outcome
from infertune.profile import BACKENDS, load_profile
from infertune.resolve import Desired, assume_backend, resolve

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


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,6})(s|min|h)?", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 60s, 5min or 1h")
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2] or "s"]


CONFIRM_WITHIN = argument(
    "--confirm-within",
    type=_seconds,
    metavar="TIME",
    help="put everything back after TIME (60s, 5min) unless 'infertune confirm' is run",
)


def desired(ctx: Context, machine: Machine) -> Desired:
    """The profile that the command line names, resolved for this machine."""
    backend = ctx.args.backend
    if backend == "auto":
        backend, _ = assume_backend(machine)
    return resolve(load_profile(ctx.root, ctx.args.profile), machine, backend)


def without(ctx: Context) -> list[str]:
    """The knobs to leave alone; raises UsageError for one that does not exist."""
    for knob in ctx.args.without:
        if knob not in KNOBS:
            raise UsageError(
                f"--without {knob}: there is no such knob", hint="see 'infertune knobs'"
            )
    return list(ctx.args.without)


def emit(ctx: Context, verb: str, report: Report, **more: Any) -> None:
    """Print a report as the caller asked for it."""
    if ctx.args.json:
        ctx.print_json(f"infertune.{verb}/1", {**report_document(report), **more})
    else:
        print_report(ctx, report, _TENSE.get(verb, "past"))


_TENSE: Mapping[str, Tense] = {"plan": "future", "verify": "present"}


def _summary(report: Report, what: str, *outcomes: Outcome) -> str:
    """One line on a table: ``4 settings changed (35 files), 2 ok``."""
    files = [item.knob for item in report.items if item.outcome in outcomes]
    knobs, fine = set(files), {item.knob for item in report.items if item.outcome == "already"}
    more = f" ({len(files)} files)" if len(files) > len(knobs) else ""
    return f"{counted(len(knobs), 'setting')} {what}{more}, {len(fine - knobs)} ok"


def _plan(ctx: Context) -> Exit:
    machine = read_machine(ctx.root)
    wanted = desired(ctx, machine)
    report = make_plan(ctx.root, machine, wanted, without=without(ctx), may_hold=daemon_runs(ctx))
    launch = {
        section: {setting.id: setting.canonical for setting in settings.values()}
        for section, settings in (
            ("launch", wanted.launch),
            ("env", wanted.env),
            ("server", wanted.server),
        )
    }
    emit(ctx, "plan", report, **launch)
    if not ctx.args.json:
        for section, title in (("launch", "process"), ("env", "environment"), ("server", "server")):
            pairs = "  ".join(f"{name}={value}" for name, value in launch[section].items())
            ctx.print(f"at launch, {title}: {pairs or '-'}")
        ctx.print(f"{_summary(report, 'to change', 'set', 'restore')}; nothing was written")
        for item in report.items:
            if item.blocks:
                ctx.print(f"'apply' will refuse: {item.source} requires {item.knob}")
    return Exit.DONE


def _apply(ctx: Context) -> Exit:
    left_out = without(ctx)
    wanted = desired(ctx, read_machine(ctx.root))
    limit = ctx.args.confirm_within
    if daemon_runs(ctx):
        backend = ctx.args.backend
        report = _ask_daemon(
            ctx, "apply", "ssasu", wanted.profile, backend, left_out, math.ceil(limit or 0)
        )
    elif limit is not None:
        raise Unreachable(
            "--confirm-within needs infertuned, which reverts when nobody confirms; "
            "nothing was touched",
            hint="systemctl start infertune",
        )
    else:
        with session(ctx.root, f"apply {wanted.profile}") as held:
            _say_recovered(ctx, held)
            try:
                report = held.apply(wanted, without=left_out)
            except ApplyFailed as failed:
                emit(ctx, "apply", failed.report, failed=failed.message)
                raise
    emit(ctx, "apply", report, failed=None)
    if not ctx.args.json:
        ctx.print(_summary(report, "changed", "applied", "clamped", "restored"))
        if not ctx.root.live:
            ctx.print(f"a rehearsal on {ctx.args.root}: this machine was not touched")
        if limit is not None:
            ctx.print(f"goes back in {limit:g} s unless you run 'infertune confirm'")
    return Exit.DONE


def _confirm(ctx: Context) -> Exit:
    if not daemon_runs(ctx):
        raise Unreachable("infertuned is not running, so nothing waits for a confirmation")
    from infertune.service.client import call

    confirmed = bool(call("Confirm"))
    if ctx.args.json:
        ctx.print_json("infertune.confirm/1", {"confirmed": confirmed})
    else:
        ctx.print("confirmed" if confirmed else "nothing waits for a confirmation")
    return Exit.DONE if confirmed else Exit.DIFFERS


def daemon_runs(ctx: Context) -> bool:
    """Whether infertuned is there to do it."""
    return ctx.root.live and ctx.root.lock_owner(DAEMON_LOCK) is not None


def _ask_daemon(ctx: Context, verb: str, signature: str = "", *arguments: Any) -> Report:
    """Let infertuned do it; raises what it answers, as the engine here would."""
    # Imported here: dbus-fast is an extra, and takes longer to load than all the rest.
    from infertune.service.client import call

    document = call(verb.capitalize(), signature, arguments)
    report = report_from(document)
    if failure := document.get("failed"):
        emit(ctx, verb, report, failed=failure)
        raise ApplyFailed(failure, report, hint=document.get("hint"))
    return report


def _verify(ctx: Context) -> Exit:
    machine = read_machine(ctx.root)
    report = make_plan(
        ctx.root, machine, desired(ctx, machine), without=without(ctx), may_hold=daemon_runs(ctx)
    )
    emit(ctx, "verify", report)
    if not ctx.args.json:
        differing = {item.knob for item in report.items if item.differs}
        if differing:
            count = counted(len(differing), "setting differs", "settings differ")
            ctx.print(f"{count} from the profile")
        else:
            ctx.print("this machine is what the profile says")
    return Exit.DIFFERS if report.differs else Exit.DONE


def _status(ctx: Context) -> Exit:
    if daemon_runs(ctx):
        from infertune.service.client import call

        document = call("Status")
    else:
        document = status_document(status(ctx.root, read_machine(ctx.root)))
    state, about, items = document["state"], document.get("applied"), items_from(document)
    if ctx.args.json:
        ctx.print_json("infertune.status/1", document)
    else:
        what = f": {about['profile']} ({about['backend']}) since {about['since']}" if about else ""
        ctx.print(f"{state}{what}")
        print_items(ctx, items, "present")
        for sentence in sorted({_about(each) for each in document.get("drift", ())}):
            ctx.print(f"note: {sentence}")
        for note in document["notes"]:
            ctx.print(f"note: {note}")
        for path in document["damaged_journals"]:
            ctx.print(f"note: a damaged journal is kept in {path}; remove it when you have seen it")
    fine = state in ("idle", "applied", "running") and all(i.outcome == "already" for i in items)
    return Exit.DONE if fine else Exit.DIFFERS


def _about(drift: Mapping[str, Any]) -> str:
    """One entry of ``drift`` for people."""
    knob, value, by = drift["knob"], drift.get("value"), drift.get("by")
    match drift["state"]:
        case "external":
            return f"{knob} is externally owned: {by or 'somebody'} set it to {value}"
        case "contested":
            return f"{knob} is contested by {by or 'somebody'} and left at {value}"
        case "gone":
            return f"{knob}: a file is gone; it is set again when it comes back"
    return f"{knob} was set again ({by})"


def _revert(ctx: Context) -> Exit:
    return _put_back(ctx, "revert")


def _recover(ctx: Context) -> Exit:
    return _put_back(ctx, "recover")


def _put_back(ctx: Context, verb: str) -> Exit:
    if daemon_runs(ctx):
        report = _ask_daemon(ctx, "revert")
    else:
        with session(ctx.root, verb) as held:
            try:
                if held.unrecovered:
                    raise held.unrecovered
                report = held.recovered or held.revert()
            except ApplyFailed as failed:
                emit(ctx, verb, failed.report, failed=failed.message)
                raise
    emit(ctx, verb, report, failed=None)
    if not ctx.args.json:
        _say_restored(ctx, report)
    left = report.count("conflict", "absent")
    return Exit.DIFFERS if left or report.notes else Exit.DONE


def _say_restored(ctx: Context, report: Report) -> None:
    if not report.items:
        ctx.print("nothing to put back")
        return
    good = report.count("restored", "already")
    ctx.print(f"restored: {good} of {len(report.items)}")


def _say_recovered(ctx: Context, held: Session) -> None:
    if held.recovered is None or ctx.args.json:
        return
    ctx.print("an earlier run was cut short; its values were put back first:")
    print_report(ctx, held.recovered, "past")
    if held.unrecovered:
        ctx.print(f"note: {held.unrecovered.message}")
    else:
        _say_restored(ctx, held.recovered)


COMMANDS: tuple[Command, ...] = (
    Command(
        "plan",
        "show what a profile would change; change nothing",
        _plan,
        (PROFILE, BACKEND, WITHOUT, JSON),
        "Compares every knob of the profile with the machine and prints what 'apply' would "
        "do. Needs no privilege.",
    ),
    Command(
        "apply",
        "make the machine what a profile says",
        _apply,
        (PROFILE, BACKEND, WITHOUT, CONFIRM_WITHIN, JSON),
        "Writes the original values to a journal, then changes what differs. If any write "
        "fails, everything goes back and the exit code is 3. Another profile may be applied "
        "over it: only what differs is touched, and the originals stay those of the untuned "
        "machine.",
    ),
    Command(
        "confirm",
        "keep what was applied with --confirm-within",
        _confirm,
        (JSON,),
        "Ends the time limit of 'apply --confirm-within'. Exit code 1 when nothing waits for it.",
    ),
    Command(
        "verify",
        "check that the machine is what a profile says",
        _verify,
        (PROFILE, BACKEND, WITHOUT, JSON),
        "Plans again and expects nothing to do. Exit code 1 when something differs, is still "
        "waiting for a reboot or cannot be read.",
    ),
    Command(
        "status",
        "show what is applied now",
        _status,
        (JSON,),
        "Prints the applied profile, the files it changed and whether they still hold it; a value "
        "that someone else has set since is externally owned and left alone. Exit code 1 when "
        "something was interrupted, damaged or changed by someone else.",
    ),
    Command(
        "revert",
        "put every original value back",
        _revert,
        (JSON,),
        "Restores the journal's originals. A value that someone else has set since is left and "
        "reported (exit code 1).",
    ),
    Command(
        "recover",
        "put every original value back after a crash",
        _recover,
        (JSON,),
        "Like 'revert', for a machine on which infertune was killed or whose journal is "
        "damaged: a damaged journal is kept for inspection, and only lines with a correct "
        "checksum are restored.",
    ),
)
