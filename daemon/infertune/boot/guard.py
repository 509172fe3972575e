# SPDX-License-Identifier: Apache-2.0
"""Keeps a bad boot setting from keeping the machine: one try, and what is kept is in force.

A staged change is tried at one boot.  Two units ask for what is here: one early in each boot
(``at_start``), one when the default target is reached (``at_target``).  A boot that finds the one
before it unconfirmed puts the old settings back, and reboots the machine once where the running
kernel still has the new ones.  Where the boot loader itself starts the change only once, what is
put back here is only what lies beside the default entry.
"""

from __future__ import annotations

import sys

from infertune.base.errors import Failed, InfertuneError, UsageError, describe
from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.boot import originals, record, staging
from infertune.boot.commands import Ran, Runner, find, runner
from infertune.boot.record import Stage
from infertune.boot.state import live, not_in_force
from infertune.host.machine import read_machine
from infertune.host.system import boot_id, command_line, parameters


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a boot found."""

    what: str
    """nothing, tried, kept, open, put-back, or reboot: put back, and it has to boot once more."""
    said: str = ""


def at_start(root: Root, run: Runner) -> Verdict:
    """Count this boot, or put back what the one before did not confirm.  Raises Failed.

    The caller holds the lock.  A second call in one boot changes nothing.
    """
    stage = record.load(root)
    if stage is None or stage.phase in ("confirmed", "failed"):
        for built in stage.lasting.images if stage else ():
            if staging.is_gone(root, built.path):
                originals.drop(root, built.path)  # it went with its kernel
        return Verdict("nothing")
    here = boot_id(root)
    if stage.phase == "undone":
        if stage.tried != here:
            staging.undo(root, run)
        return Verdict("nothing")
    if stage.tries >= staging.TRIES:
        return Verdict("nothing")
    if stage.phase == "undoing" and stage.reason is None:
        undone = staging.undo(root, run)
        said = [f"the undo of '{stage.profile}' was cut short, and is finished now"]
        more = (*undone.left, *undone.anew) if undone else ()
        return Verdict("put-back", "; ".join([*said, *more]))
    if stage.phase == "undoing":
        return _put_back(root, stage, run, stage.reason or "")
    if stage.phase == "staging":
        if stage.boot_id == here:
            return Verdict("nothing", "another infertune is at it")
        return _put_back(root, stage, run, "staging was cut short")
    if here in (stage.boot_id, stage.tried):
        return Verdict("nothing")
    if stage.phase == "keeping":
        return _put_back(root, stage, run, "keeping it was cut short; stage it again")
    if stage.phase == "trying":
        reason = stage.reason or "the boot before this one was not confirmed"
        return _put_back(root, stage, run, reason)
    if stage.one_try == "loader" and _without(root, stage):
        reason = (
            "this boot is without the options: the boot that tried them did not get far enough to "
            "be counted, or another entry was chosen"
        )
        return _put_back(root, stage, run, reason)
    with staging.failing("this boot is not counted"):
        record.save(root, replace(stage, phase="trying", tried=here))
    return Verdict("tried", f"'{stage.profile}' is tried: unconfirmed, it goes back")


def _without(root: Root, stage: Stage) -> bool:
    """Whether this boot lacks some of the options that the boot loader was to give it."""
    given = parameters(command_line(root) or "")
    wanted = [(p.word, o.value) for o in stage.options if o.on_command_line for p in o.parameters]
    return not set(wanted) <= set(given)


def _put_back(root: Root, stage: Stage, run: Runner, reason: str) -> Verdict:
    tried = replace(stage, reason=reason)
    now, left, anew = staging.put_back(root, tried, run, leave=True)
    if now.leftover and now.tries < staging.TRIES:
        raise Failed(f"{'; '.join(left)}; the next boot tries again, once")
    # Asked only now: a module that is loaded from here on reads the old files.
    has_it = stage.boot_id != boot_id(root) and any(
        live(root, option) == option.value for option in stage.options if option.parameters
    )
    failed = replace(
        now,
        phase="failed",
        reason="; ".join([reason, *left, *anew]),
        tried=boot_id(root),
        rebooted=has_it,
    )
    with staging.failing("everything is back, but that could not be noted"):
        record.conclude(root, failed)
    said = f"'{stage.profile}' was put back: {failed.reason}"
    # What could not be put back would be there after the reboot as well.
    reboots = has_it and not now.leftover
    return Verdict("reboot" if reboots else "put-back", said)


def confirm(root: Root, run: Runner, *, by_unit: bool = False) -> bool:
    """Keep what this boot tries; False where there is nothing to keep.  Raises Failed, UsageError.

    Only what is in force is kept, on a machine whose GPU is there as it was at stage.  The unit
    keeps only what the guard has counted in this boot.  The caller holds the lock.
    """
    stage = record.load(root)
    if stage is None or stage.phase not in ("staged", "trying", "keeping"):
        return False
    if by_unit and (stage.by_hand or stage.tried != boot_id(root)):
        return False
    if stage.boot_id == boot_id(root):
        raise UsageError(
            "the staged settings take effect at the next boot; there is nothing to confirm yet"
        )
    if stage.one_try == "loader" and _without(root, stage):
        # Confirmed, the loader would use them for good: options with which nothing has booted.
        raise UsageError(
            "this boot is without the options; there is nothing to confirm",
            hint="infertune boot undo",
        )
    if reasons := not_in_force(root, read_machine(root), stage):
        raise UsageError(
            f"not kept: {'; '.join(reasons)}",
            hint="the next boot puts the old settings back; 'infertune boot undo' does it now",
        )
    with staging.failing("it is not confirmed"):
        staging.keep(root, stage, run)
    return True


def at_target(root: Root, run: Runner) -> Verdict:
    """The default target is reached: keep what this boot tries.  Raises Failed.

    First of all what the guard could not do early: rpm-ostree, for one, answers only once D-Bus
    is there, and a disk that was full may have room now.
    """
    verdict = at_start(root, run)
    if verdict.what not in ("nothing", "tried"):
        return verdict
    try:
        kept = confirm(root, run, by_unit=True)
    except UsageError as error:
        stage = record.load(root)
        if stage and stage.phase == "trying":
            with staging.failing("the reason could not be noted"):
                record.save(root, replace(stage, reason=error.message))
        return Verdict("open", error.message)
    if kept:
        return Verdict("kept", "the default target is reached: the boot settings are kept")
    return verdict


def main() -> int:
    """What the units run: ``start`` or ``confirm``."""
    root = Root("/")
    run = runner(root, lambda text: print(text, flush=True))
    try:
        with staging.lock(root, "boot guard"):
            verdict = (at_target if sys.argv[1:] == ["confirm"] else at_start)(root, run)
            if verdict.said:
                print(verdict.said, flush=True)
            if verdict.what == "reboot":
                _reboot(root, run)
    except InfertuneError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(describe(error), file=sys.stderr)
        return 3
    return 0


def _reboot(root: Root, run: Runner) -> None:
    """Reboot, once: the running kernel still has what was put back."""
    systemctl = find(root, "systemctl")
    ran = run((systemctl, "--no-block", "reboot")) if systemctl else Ran(1, "no systemctl")
    if ran.code:
        print(f"the running kernel keeps the settings until a reboot: {ran.said}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
