# SPDX-License-Identifier: Apache-2.0
"""``infertune boot``: settings that take effect at the next boot."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from infertune.base.errors import Exit, UsageError
from infertune.base.records import dataclass
from infertune.base.units import format_size
from infertune.boot import guard, record, staging, words
from infertune.boot.change import Change, Edit, NewFile, Part
from infertune.boot.commands import Runner, runner
from infertune.boot.options import Option, options
from infertune.boot.originals import STORE, Original, no_room
from infertune.boot.plan import plan
from infertune.boot.sizes import SIZES, after_staging, check_sizes, remarks
from infertune.boot.sources import Finding, findings
from infertune.boot.state import OptionStatus, is_ready, overruled, read_status, sorts_after
from infertune.cli.base import JSON, Command, Context, argument, printable, verb
from infertune.cli.engine import PROFILE
from infertune.cli.render import amount
from infertune.engine.documents import picture_document
from infertune.host.machine import read_machine
from infertune.host.measured_boot import measured
from infertune.host.memory import PAGE
from infertune.host.modprobe import Sources, read_sources
from infertune.host.system import boot_id
from infertune.host.unknown import Unknown
from infertune.pools.facts import read_facts
from infertune.pools.judge import Picture, picture
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, assume_backend, resolve

GUARD = "/etc/systemd/system/sysinit.target.wants/infertune-boot-guard.service"
"""There where the guard is installed and enabled."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What staging a profile takes, and what there is to say about it."""

    wanted: Desired
    change: Change
    memory: Picture
    """The GPU's memory now, and after a boot with the change."""
    notes: tuple[str, ...]
    wrong: tuple[Finding, ...]
    measured: tuple[str, ...]
    """What says that a disk is unlocked by what is measured at boot."""


def _prepared(ctx: Context) -> _Prepared:
    """What staging the profile takes, what is left out, and what is wrong already."""
    machine = read_machine(ctx.root)
    # [boot] is for the whole machine: every backend has the same.
    wanted = resolve(load_profile(ctx.root, ctx.args.profile), machine)
    sources = read_sources(ctx.root)
    old = record.load(ctx.root)
    ours = old.options if old and (old.in_force or old.tried == boot_id(ctx.root)) else ()
    found, left = options(ctx.root, machine, wanted, sources, ours)
    change = plan(ctx.root, machine, found)
    facts, asked = read_facts(ctx.root, machine), (*change.options, *change.by_hand)
    check_sizes(facts, machine, asked)
    then = after_staging(facts, machine, change.options)
    memory = picture(facts, then, assume_backend(machine)[0])
    notes = [*left, *change.notes, *sources.problems, *_rivals(change.options, sources)]
    notes += remarks(facts, machine, asked)
    if ctx.root.live and change.options and not ctx.root.exists(GUARD):
        notes.append(
            "the guard is not enabled ('infertune setup'): nothing is put back automatically"
        )
    notes += _not_kept(ctx, change)
    unlocked = measured(ctx.root) if change.now else ()
    return _Prepared(wanted, change, memory, tuple(notes), findings(sources), unlocked)


def _not_kept(ctx: Context, change: Change) -> list[str]:
    """Images whose original undo would not have after the confirmation."""
    found = []
    for image in change.now.images:
        with contextlib.suppress(OSError):  # a boot partition that only root may look into
            if why := no_room(ctx.root, image.path):
                found.append(
                    f"no room in {STORE} for the original of {image.path} ({why}): once it is "
                    "confirmed, undo rebuilds it"
                )
    return found


def _rivals(found: Sequence[Option], sources: Sources) -> list[str]:
    """Who will win over what is to be staged."""
    return [
        f"{option.id} will be overridden: {other}; remove it there"
        for option in found
        for parameter in option.parameters
        if (other := overruled(sources, parameter, option))
        and not option.on_command_line  # there ours is put last
        and sorts_after(sources, parameter)
    ]


def _plan(ctx: Context) -> int:
    prepared = _prepared(ctx)
    if ctx.args.json:
        ctx.print_json("infertune.boot-plan/1", _plan_document(ctx, prepared))
        return Exit.DONE
    _print_plan(ctx, prepared)
    if prepared.change.options:
        ctx.print(f"nothing was written; 'infertune boot stage {prepared.wanted.profile}' does it")
    return Exit.DONE


def _stage(ctx: Context) -> int:
    with staging.lock(ctx.root, "boot stage"):
        prepared = _prepared(ctx)
        wanted, change = prepared.wanted, prepared.change
        document = _plan_document(ctx, prepared)
        if not ctx.args.json:
            _print_plan(ctx, prepared)
        if prepared.measured and not ctx.args.force:
            raise UsageError(
                f"{MEASURED} ({prepared.measured[0]}); nothing was touched",
                hint="have the passphrase or recovery key at hand, and stage it with --force",
            )
        if change.options:
            by_hand = ctx.args.confirm_by_hand
            gpu = read_machine(ctx.root).inference_gpu
            ready = gpu.pci_id if gpu and is_ready(gpu) else None
            run = _runner(ctx)
            staging.stage(ctx.root, wanted.profile, change, run, by_hand=by_hand, gpu=ready)
    if ctx.args.json:
        ctx.print_json("infertune.boot-stage/1", {**document, "staged": bool(change.options)})
    elif change.options:
        ctx.print("staged: tried at the next boot; 'infertune boot undo' takes it back")
        ctx.say_rehearsed()
    return Exit.DIFFERS if change.by_hand else Exit.DONE


def _status(ctx: Context) -> int:
    found = read_status(ctx.root, read_machine(ctx.root))
    stage = found.stage
    if ctx.args.json:
        document = {
            "state": found.state,
            "phase": stage.phase if stage else None,
            "profile": stage.profile if stage else None,
            "since": stage.since if stage else None,
            "options": [_option_state(each) for each in found.options],
            "findings": [{"what": each.what, "fix": each.fix} for each in found.findings],
            "notes": list(found.notes),
            "one_try": stage.one_try if stage else None,
            "comes_back": stage.rescue if stage else None,
            "originals": [_original(each) for each in found.originals],
        }
        ctx.print_json("infertune.boot-status/1", document)
    else:
        about = f": {stage.profile} ({stage.phase}) since {stage.since}" if stage else ""
        ctx.print(f"{found.state}{about}")
        if found.options:
            rows = [
                (
                    each.option.id,
                    _shown(each.option, each.now),
                    _shown(each.option, each.option.value),
                    each.state,
                    each.reason or "",
                )
                for each in found.options
            ]
            ctx.table(("SETTING", "NOW", "WANTED", "STATE", ""), rows)
        if stage and stage.phase in ("staged", "trying"):
            ctx.print(f"tried once: enforced by {ONE_TRY[stage.one_try]}")
            if stage.rescue:
                ctx.print(f"if the kernel does not boot: {stage.rescue}")
        for each in found.originals:
            ctx.print(_shown_original(each))
        for finding in found.findings:
            ctx.print(f"finding: {finding}")
        for note in found.notes:
            ctx.print(f"note: {note}")
    return Exit.DONE if found.fine else Exit.DIFFERS


def _confirm(ctx: Context) -> int:
    with staging.lock(ctx.root, "boot confirm"):
        confirmed = guard.confirm(ctx.root, _runner(ctx))
    if ctx.args.json:
        ctx.print_json("infertune.boot-confirm/1", {"confirmed": confirmed})
    else:
        ctx.print("confirmed" if confirmed else "nothing waits for a confirmation")
        ctx.say_rehearsed()
    return Exit.DONE if confirmed else Exit.DIFFERS


def _undo(ctx: Context) -> int:
    with staging.lock(ctx.root, "boot undo"):
        done = staging.undo(ctx.root, _runner(ctx), force=ctx.args.force)
    left = done.left if done else ()
    if ctx.args.json:
        document = {
            "undone": done is not None,
            "profile": done.profile if done else None,
            "left": list(left),
            "anew": list(done.anew) if done else [],
        }
        ctx.print_json("infertune.boot-undo/1", document)
    elif done is None:
        ctx.print("nothing to put back")
    else:
        ctx.print(f"'{done.profile}' is put back; the next boot has what was there before it")
        ctx.say_rehearsed()
        for each in (*left, *done.anew):
            ctx.print(f"note: {each}")
    return Exit.DIFFERS if left else Exit.DONE


def _runner(ctx: Context) -> Runner:
    # Progress of a rebuild that takes minutes; standard output is for the result.
    def say(text: str) -> None:
        with contextlib.suppress(OSError, AttributeError):
            print(printable(f"... {text}"), file=sys.stderr, flush=True)

    return runner(ctx.root, say)


def _shown(option: Option, value: str | None) -> str:
    return amount(value, PAGE if option.id in SIZES else None)


def _option_state(each: OptionStatus) -> dict[str, Any]:
    return {
        "id": each.option.id,
        "value": each.option.value,
        "now": each.now,
        "state": each.state,
        "reason": each.reason,
    }


def _original(each: Original) -> dict[str, Any]:
    size = each.size
    is_known = not isinstance(size, Unknown)
    return {
        "path": each.path,
        "kept": size is not None if is_known else None,
        "copy": each.copy if size is not None else None,
        "bytes": size if is_known else None,
    }


def _shown_original(each: Original) -> str:
    """What undo does about an image that was confirmed, in one sentence."""
    if each.size is None:
        return f"undo rebuilds {each.path}: its original is not kept"
    if isinstance(each.size, Unknown):
        return f"not known: whether the original of {each.path} is kept ({each.size.why})"
    return (
        f"undo puts back the original of {each.path}, unless another program builds it meanwhile: "
        f"{each.copy} ({format_size(each.size)})"
    )


def _plan_document(ctx: Context, prepared: _Prepared) -> dict[str, Any]:
    wanted, change = prepared.wanted, prepared.change
    return {
        "profile": wanted.profile,
        "style": change.stack,
        "evidence": list(change.evidence),
        "one_try": change.one_try,
        "options": [
            {
                "id": option.id,
                "value": option.value,
                "places": [option.file] if option.file else [p.word for p in option.parameters],
                "source": option.source,
                "note": option.note,
            }
            for option in change.options
        ],
        "trial": _part_document(ctx, change.trial),
        "lasting": _part_document(ctx, change.lasting),
        "comes_back": change.rescue,
        "by_hand": list(change.manual),
        "gpu_memory": picture_document(prepared.memory),
        "findings": [{"what": each.what, "fix": each.fix} for each in prepared.wrong],
        "measured": list(prepared.measured),
        "notes": list(prepared.notes),
    }


def _part_document(ctx: Context, part: Part) -> dict[str, Any]:
    return {
        "files": [{"path": each.path, "diff": _diff(ctx, each)} for each in part.texts],
        "images": [{"path": i.path, "argv": list(i.build)} for i in part.images],
        "commands": [
            {"argv": list(c.argv), "why": c.why, "undo": list(c.undo)} for c in part.commands
        ],
    }


MEASURED = (
    "a disk is unlocked by the TPM, which measures the command line and the initramfs: the next "
    "boot may ask for a passphrase before anything can put this back"
)
ONE_TRY = {
    "loader": "the boot loader or the firmware: the boot after the trial is without the options",
    "guard": "infertune's guard, early in the boot: the kernel must get that far",
    "nobody": "nobody: what is done by hand comes back by hand",
}
"""Who enforces that a change is tried once."""


def _print_plan(ctx: Context, prepared: _Prepared) -> None:
    wanted, change = prepared.wanted, prepared.change
    ctx.print(f"profile {wanted.profile}, boot loader {change.stack or 'unknown'}")
    for each in change.evidence:
        ctx.print(f"    {each}")
    for option in change.options:
        places = option.file or ", ".join(p.word for p in option.parameters)
        ctx.print(f"set {option.id} = {_shown(option, option.value)}  ({places}; {option.source})")
        if option.note:
            ctx.print(f"    {option.note}")
        if option.file:
            ctx.print(f"    written to {option.file}: the firmware takes it at the next boot")
    if change.trial:
        ctx.print("for one boot, beside the default entry:")
        _print_part(ctx, change.trial)
        ctx.print("when that boot is confirmed:")
    _print_part(ctx, change.lasting)
    if change.now:
        ctx.print(f"tried once: enforced by {ONE_TRY[change.one_try]}")
    if change.rescue:
        ctx.print(f"if the kernel does not boot: {change.rescue}")
    for instruction in change.manual:
        ctx.print(f"by hand: {instruction}")
    if memory := _memory(prepared.memory):
        ctx.print(memory)
    for finding in prepared.wrong:
        ctx.print(f"finding: {finding}")
    if prepared.measured:
        ctx.print(f"measured boot: {MEASURED}; 'infertune boot stage' needs --force")
        for each in prepared.measured:
            ctx.print(f"    {each}")
    for note in prepared.notes:
        ctx.print(f"note: {note}")
    if not change.options and not change.manual:
        ctx.print("nothing to stage")


def _print_part(ctx: Context, part: Part) -> None:
    for file in part.texts:
        ctx.verbatim(_diff(ctx, file).rstrip("\n"))
        if file.briefly:
            ctx.print("    there only while the image is built")
    for image in part.images:
        ctx.print(f"build {image.path}: {shlex.join(image.build)}")
        ctx.print("    the old image stays beside it until the new one is confirmed,")
        ctx.print(f"    then in {STORE} until undo")
    for command in part.commands:
        ctx.print(f"run {shlex.join(command.argv)}")
        ctx.print(f"    {command.why}")
        for pattern in command.touches:
            ctx.print(f"    edits {pattern}; what is there is kept")


def _memory(found: Picture) -> str | None:
    """How much the GPU may hold now and after the boot; None where one of them is not known."""
    now, then = found.now, found.next_boot
    if isinstance(now, Unknown) or isinstance(then, Unknown):
        return None
    return (
        f"GPU memory: {format_size(now.bytes)} ({now.name}) now, "
        f"{format_size(then.bytes)} ({then.name}) after the next boot"
    )


def _diff(ctx: Context, file: NewFile | Edit) -> str:
    before = ctx.root.get(file.path) if ctx.root.exists(file.path) else None
    old = [] if before is None else (before + "\n").splitlines(keepends=True)
    if isinstance(file, Edit):
        text = words.add(file.place, file.base if before is None else before + "\n", file.words)
    else:
        text = file.data.decode("utf-8", "replace")
    origin = "/dev/null" if before is None else file.path
    new = text.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, origin, file.path))


COMMANDS: tuple[Command, ...] = (
    verb(
        "boot",
        subcommands=(
            Command(
                "plan",
                "show what a profile's [boot] would write and run; change nothing",
                _plan,
                (PROFILE, JSON),
                "Prints the diff of every file, every command, and what to do if the machine does "
                "not boot with them. Needs no privilege.",
            ),
            Command(
                "stage",
                "write a profile's [boot] for the next boot",
                _stage,
                (
                    PROFILE,
                    argument(
                        "--confirm-by-hand",
                        action="store_true",
                        help="keep it only after 'infertune boot confirm', not as soon as the "
                        "machine has booted",
                    ),
                    argument(
                        "--force",
                        action="store_true",
                        help="even if a disk is unlocked by what the TPM measures at boot",
                    ),
                    JSON,
                ),
                "Records what is there, writes the files and rebuilds what is read at boot. If "
                "anything fails, everything is put back. The next boot is the trial: if it "
                "reaches the default target, the settings are kept; if not, the boot after it "
                "puts the old ones back. Exit code 1 if something is left to do by hand.",
                acts=True,
            ),
            Command(
                "status",
                "show whether staged settings are in force",
                _status,
                (JSON,),
                "Compares what was staged with what the running kernel says; reports parameters "
                "that are deprecated, misspelt or overridden. Exit code 1 unless all is well.",
            ),
            Command(
                "confirm",
                "keep the settings that this boot tries",
                _confirm,
                (JSON,),
                "Ends the trial by hand. Exit code 1 when nothing waits for it.",
                acts=True,
            ),
            Command(
                "undo",
                "put boot settings back as they were",
                _undo,
                (
                    argument(
                        "--force",
                        action="store_true",
                        help="name what cannot be put back, and forget it",
                    ),
                    JSON,
                ),
                "Restores content, mode and owner of every file, removes what was not there, and "
                "rebuilds what is read at boot. Finishes what was cut short, too.",
                acts=True,
            ),
        ),
    ),
)
