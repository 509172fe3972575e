# SPDX-License-Identifier: Apache-2.0
"""The same verbs where no daemon runs: the engine in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infertune.base.errors import Exit, UsageError, did_you_mean
from infertune.catalogue.knobs import KNOBS
from infertune.cli.base import Context
from infertune.cli.render import amount, counted, emit, print_report, say_restored, summary
from infertune.engine.documents import report_document, status_document
from infertune.engine.session import ApplyFailed, Session, session
from infertune.engine.state import Report, make_plan
from infertune.engine.state import status as applied_now
from infertune.host.machine import Machine, read_machine
from infertune.profiles.profile import Section, load_profile, value_type
from infertune.profiles.resolve import Desired, Setting, resolve


def without(ctx: Context) -> list[str]:
    """The knobs to leave alone; raises UsageError for one that does not exist."""
    for knob in ctx.args.without:
        if knob not in KNOBS:
            near = did_you_mean(knob, KNOBS) or "; see 'infertune knobs'"
            raise UsageError(f"--without {knob}: there is no such knob{near}")
    return list(ctx.args.without)


def _desired(ctx: Context, machine: Machine) -> Desired:
    """The profile that the command line names, resolved for this machine."""
    return resolve(load_profile(ctx.root, ctx.args.profile), machine, ctx.args.backend)


def _planned(ctx: Context, may_keep: bool) -> tuple[Desired, Report]:
    """What is wanted and what would change; ``may_keep``: see the engine's plan."""
    machine = read_machine(ctx.root)
    wanted = _desired(ctx, machine)
    return wanted, make_plan(ctx.root, machine, wanted, without=without(ctx), may_keep=may_keep)


_AT_LAUNCH: Mapping[Section, str] = {
    "launch": "process",
    "env": "environment",
    "server": "server",
}


def _written(section: Section, setting: Setting) -> str:
    """A setting's value as a profile may have it."""
    if isinstance(setting.configured, bool):
        return str(setting.configured).lower()
    return amount(setting.canonical, value_type(section, setting.id).unit_bytes)


def plan(ctx: Context, may_keep: bool) -> int:
    """What ``apply`` would do."""
    wanted, report = _planned(ctx, may_keep)
    document = report_document(report)
    sections: dict[Section, Mapping[str, Setting]] = {
        "launch": wanted.launch,
        "env": wanted.env,
        "server": wanted.server,
    }
    launch = {
        section: {setting.id: setting.canonical for setting in settings.values()}
        for section, settings in sections.items()
    }
    emit(ctx, "plan", document, **launch)
    if not ctx.args.json:
        for section, settings in sections.items():
            pairs = (f"{name}={_written(section, each)}" for name, each in settings.items())
            ctx.print(f"at launch, {_AT_LAUNCH[section]}: {'  '.join(pairs) or '-'}")
        ctx.print(f"{summary(document, 'to change', 'set', 'restore')}; nothing was written")
        for item in report.items:
            if item.blocks:
                ctx.print(f"'apply' will refuse: {item.source} requires {item.knob}")
    return Exit.DONE


def verify(ctx: Context, may_keep: bool) -> int:
    """Whether there is nothing for ``apply`` to do."""
    _, report = _planned(ctx, may_keep)
    emit(ctx, "verify", report_document(report))
    if not ctx.args.json:
        differing = {item.knob for item in report.items if item.differs}
        if differing:
            count = counted(len(differing), "setting differs", "settings differ")
            ctx.print(f"{count} from the profile")
        else:
            ctx.print("this machine is what the profile says")
    return Exit.DIFFERS if report.differs else Exit.DONE


def apply(ctx: Context) -> dict[str, Any]:
    """Make the machine what the profile says.  Raises what the engine does."""
    left_out = without(ctx)
    machine = read_machine(ctx.root)
    wanted = _desired(ctx, machine)
    with session(ctx.root, f"apply {wanted.profile}", lambda: machine) as ours:
        _say_recovered(ctx, ours)
        try:
            return report_document(ours.apply(wanted, without=left_out))
        except ApplyFailed as failed:
            emit(ctx, "apply", report_document(failed.report), failed=failed.message)
            raise


def status(ctx: Context) -> dict[str, Any]:
    """What is applied now."""
    return status_document(applied_now(ctx.root))


def put_back(ctx: Context, verb: str) -> dict[str, Any]:
    """Put every original back, also after a crash.  Raises what the engine does."""
    with session(ctx.root, verb) as ours:
        try:
            if ours.unrecovered:
                raise ours.unrecovered
            return report_document(ours.recovered or ours.revert())
        except ApplyFailed as failed:
            emit(ctx, verb, report_document(failed.report), failed=failed.message)
            raise


def _say_recovered(ctx: Context, ours: Session) -> None:
    if ours.recovered is None or ctx.args.json:
        return
    recovered = report_document(ours.recovered)
    ctx.print("an earlier run was cut short; its values were put back first:")
    print_report(ctx, recovered, "past")
    if ours.unrecovered:
        ctx.print(f"note: {ours.unrecovered.message}")
    else:
        say_restored(ctx, recovered)
