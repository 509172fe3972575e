# SPDX-License-Identifier: Apache-2.0
"""Keeps a bad boot setting from keeping the machine: sizes before, one try after.

A staged change is tried at one start.  Two units ask for what is here: one early in each start
(``at_start``), one when the default target is reached (``at_target``).  A start that finds the one
before it unconfirmed has missed the confirm point for the second time: it puts the old settings
back, and starts the machine once more where the running kernel still has the new ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from infertune.boot import record, staging
from infertune.boot.commands import Ran, Runner, find, runner
from infertune.boot.record import Stage
from infertune.boot.state import live
from infertune.errors import InfertuneError, UsageError, describe
from infertune.host.system import boot_id, command_line, parameters
from infertune.root import Root


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a start found."""

    what: str
    """nothing, tried, kept, put-back, or reboot: put back, and it has to start once more."""
    said: str = ""


def at_start(root: Root, run: Runner) -> Verdict:
    """Count this start, or put back what the one before did not confirm.  Raises Failed.

    The caller holds the lock.  A second call in one boot changes nothing.
    """
    stage = record.load(root)
    if stage is None or stage.phase == "confirmed":
        return Verdict("nothing")
    here = boot_id(root)
    if stage.phase == "undone":
        if stage.tried != here:
            staging.undo(root, run)
        return Verdict("nothing")
    if stage.phase == "failed":
        return Verdict("nothing")
    if stage.phase in ("staging", "undoing"):
        if stage.boot_id == here and stage.phase == "staging":
            return Verdict("nothing", "somebody is at it")
        if stage.phase == "undoing" and stage.reason is None:
            undone = staging.undo(root, run)
            said = [f"the undo of '{stage.profile}' was cut short, and is done now"]
            return Verdict("put-back", "; ".join([*said, *(undone.left if undone else ())]))
        return _put_back(root, stage, run, stage.reason or "staging was cut short")
    if here in (stage.boot_id, stage.tried):
        return Verdict("nothing")
    if stage.phase == "trying":
        return _put_back(root, stage, run, "the start before this one was not confirmed")
    if stage.counted and _dropped(root, stage):
        reason = "this start was without the options, as GRUB's is after one that was not confirmed"
        return _put_back(root, stage, run, reason)
    with staging.failing("this start is not counted"):
        record.save(root, replace(stage, phase="trying", tried=here))
    return Verdict("tried", f"'{stage.profile}' is tried: unconfirmed, it goes back")


def _dropped(root: Root, stage: Stage) -> bool:
    """Whether this start was without some of the options that the boot loader was to give it."""
    given = parameters(command_line(root) or "")
    words = [(p.word, o.value) for o in stage.options if o.on_command_line for p in o.parameters]
    return not set(words) <= set(given)


def _put_back(root: Root, stage: Stage, run: Runner, reason: str) -> Verdict:
    stage = replace(stage, reason=reason)
    left = staging.put_back(root, stage, run, leave=True)
    # Asked only now: a module that is loaded from here on reads the old files.
    has_it = stage.boot_id != boot_id(root) and any(
        live(root, option) == option.value for option in stage.options if option.parameters
    )
    failed = replace(
        stage,
        phase="failed",
        reason="; ".join([reason, *left]),
        files=(),
        directories=(),
        settings=(),
        steps=(),
        tried=boot_id(root),
        rebooted=has_it,
    )
    with staging.failing("everything is back, but that could not be noted"):
        record.conclude(root, failed)
    said = f"'{stage.profile}' was put back: {failed.reason}"
    return Verdict("reboot" if has_it else "put-back", said)


def confirm(root: Root, run: Runner, *, by_unit: bool = False) -> bool:
    """Keep what this start tries; False where there is nothing to keep.  Raises Failed, UsageError.

    The unit keeps only what the guard has counted in this boot.  The caller holds the lock.
    """
    stage = record.load(root)
    if stage is None or stage.phase not in ("staged", "trying"):
        return False
    if by_unit and (stage.by_hand or stage.tried != boot_id(root)):
        return False
    if stage.boot_id == boot_id(root):
        raise UsageError(
            "the staged settings take effect at the next boot; there is nothing to confirm yet"
        )
    if stage.counted and _dropped(root, stage):
        # Confirmed, the loader would use them for good: options with which nothing has started.
        raise UsageError(
            "this start was without the options; there is nothing to confirm",
            hint="infertune boot undo",
        )
    with staging.failing("it is not confirmed"):
        for step in stage.steps:
            if step.confirm:
                staging.run_step(run, step.confirm)
        record.save(root, replace(stage, phase="confirmed", tried=boot_id(root)))
    return True


def at_target(root: Root, run: Runner) -> Verdict:
    """The default target is reached: keep what this start tries.  Raises Failed.

    First of all what the guard could not do early: rpm-ostree, for one, answers only once D-Bus
    is there, and a disk that was full may have room now.
    """
    verdict = at_start(root, run)
    if verdict.what in ("nothing", "tried") and confirm(root, run, by_unit=True):
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
        return int(error.exit_code)
    except OSError as error:
        print(describe(error), file=sys.stderr)
        return 3
    return 0


def _reboot(root: Root, run: Runner) -> None:
    """Start again, once: the running kernel still has what was put back."""
    systemctl = find(root, "systemctl")
    ran = run((systemctl, "--no-block", "reboot")) if systemctl else Ran(1, "no systemctl")
    if ran.code:
        print(f"the running kernel keeps the settings until a reboot: {ran.said}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
