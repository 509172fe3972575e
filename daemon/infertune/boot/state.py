# SPDX-License-Identifier: Apache-2.0
"""What has become of staged boot settings: read, never remembered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.boot import originals, record
from infertune.boot.options import Option, Parameter
from infertune.boot.originals import Original
from infertune.boot.plan import MODPROBE, OURS
from infertune.boot.record import Stage
from infertune.boot.sources import Finding, findings
from infertune.catalogue.knobs import KNOBS
from infertune.host.machine import Gpu, Machine
from infertune.host.modprobe import Sources, read_sources
from infertune.host.system import COMMAND_LINE, boot_id

NOT_LOADED = "its module is not loaded"
OptionState = Literal["pending-reboot", "active", "overridden", "failed"]
State = Literal["none", "staged", "pending-reboot", "active", "overridden", "failed"]
"""staged: not all of it is on disk yet, or it was cut short there."""


@dataclass(frozen=True, slots=True)
class OptionStatus:
    """One option: what it is now, and why that is not what was asked for."""

    option: Option
    state: OptionState
    now: str | None
    """None: not known."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class BootStatus:
    state: State
    stage: Stage | None
    options: tuple[OptionStatus, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    originals: tuple[Original, ...] = ()
    """What undo has of the images that were confirmed."""

    @property
    def fine(self) -> bool:
        return self.state in ("none", "active") and not self.findings and not self.notes


def read_status(root: Root, machine: Machine) -> BootStatus:
    """What is staged, and whether it is in force.  Changes nothing.  Raises Failed."""
    stage = record.load(root)
    sources = read_sources(root)
    notes = list(sources.problems)
    found = findings(sources)
    if stage is None or stage.phase == "undone":
        if stage and stage.tried == boot_id(root):
            notes.append("put back; the running kernel still has it until the next boot")
        return BootStatus("none", None, (), found, tuple(notes))
    if stage.phase == "failed":
        notes.append(f"'{stage.profile}' was put back: {stage.reason}")
        if stage.leftover:
            notes.append(
                "not all of it: mend what is named, and 'infertune boot undo' does the rest, or "
                "'infertune boot undo --force' forgets it"
            )
        return BootStatus("failed", stage, (), found, tuple(notes))
    if stage.phase in ("staging", "keeping", "undoing"):
        notes.append(f"{stage.phase} was cut short: 'infertune boot undo' puts everything back")
        return BootStatus("staged", stage, (), found, tuple(notes))
    options = tuple(_status(root, machine, stage, option, sources) for option in stage.options)
    if stage.phase == "trying":
        why = f" ({stage.reason})" if stage.reason else ""
        notes.append(f"not confirmed yet{why}: if it stays so, the next boot puts everything back")
    kept = stage.lasting.images if stage.phase == "confirmed" else ()
    of_images = tuple(originals.look(root, built.path) for built in kept)
    return BootStatus(_overall(options), stage, options, found, tuple(notes), of_images)


def _overall(options: Sequence[OptionStatus]) -> State:
    states = {each.state for each in options}
    worst: tuple[OptionState, ...] = ("failed", "overridden", "pending-reboot")
    for state in worst:
        if state in states:
            return state
    return "active"


def _status(
    root: Root, machine: Machine, stage: Stage, option: Option, sources: Sources
) -> OptionStatus:
    now = live(root, option)
    if stage.boot_id == boot_id(root):
        # Whatever the files say now: somebody may have written them live, and that is not it.
        return OptionStatus(option, "pending-reboot", now, "staged in this boot")
    if not option.parameters:
        kept = now == option.value
        reason = None if kept else "the firmware did not keep it; set it in the BIOS"
        return OptionStatus(option, "active" if kept else "failed", now, reason)
    for parameter in option.parameters:
        if other := overruled(sources, parameter, option):
            return OptionStatus(option, "overridden", now, other)
    knob = KNOBS.get(option.id)
    if now is not None and knob and knob.value.satisfied(now, option.value):
        if late := knob.not_in_force(machine, option.value):
            return OptionStatus(option, "failed", now, late)
        return OptionStatus(option, "active", now)
    if now is None:
        return OptionStatus(option, "pending-reboot", None, NOT_LOADED)
    return OptionStatus(option, "failed", now, "the kernel was booted with something else")


def not_in_force(root: Root, machine: Machine, stage: Stage) -> tuple[str, ...]:
    """Why what this boot tries cannot be kept, one sentence each; empty where it can.

    A black screen reaches the default target, too: so the GPU that had a driver when this was
    staged must have it now.
    """
    sources = read_sources(root)
    found = []
    for option in stage.options:
        status = _status(root, machine, stage, option, sources)
        # A module that was not loaded at stage either is no sign of anything.
        absent = status.reason == NOT_LOADED and option.id not in stage.seen
        if status.state != "active" and not absent:
            found.append(f"{option.id} is not in force: {status.reason}")
    if stage.gpu and stage.gpu not in {gpu.pci_id for gpu in machine.gpus if is_ready(gpu)}:
        found.append(f"the GPU {stage.gpu} is not ready: amdgpu did not bind it in this boot")
    return tuple(found)


def is_ready(gpu: Gpu) -> bool:
    """Whether amdgpu drives it, and got as far as its memory."""
    return gpu.driver == "amdgpu" and gpu.gtt_bytes is not None


def live(root: Root, option: Option) -> str | None:
    """What the kernel says an option is now; None where it does not say."""
    if option.file:
        return root.get(option.file)
    decode = KNOBS[option.id].value.decode if option.id in KNOBS else None
    values = []
    for parameter in option.parameters:
        with contextlib.suppress(OSError, ValueError):
            raw = root.read_value(parameter.path, 64 * 1024)
            values.append(decode(raw) if decode else raw.decode().strip())
    # Where it is not sure which module is used, the one that took the value counts.
    return option.value if option.value in values else next(iter(values), None)


def overruled(sources: Sources, parameter: Parameter, option: Option) -> str | None:
    """Who has the last word on a parameter and says something else, in one phrase."""
    winner = sources.winner(parameter.module, parameter.name)
    if winner is None or winner.value == option.value or winner.file in OURS:
        return None
    return f"{winner.source} says {winner.value or 'nothing'} and wins"


def sorts_after(sources: Sources, parameter: Parameter) -> bool:
    """Whether who has the last word now would still have it after a drop-in of ours."""
    winner = sources.winner(parameter.module, parameter.name)
    if winner is None or winner.file == COMMAND_LINE:
        return winner is not None
    return os.path.basename(winner.file) > os.path.basename(MODPROBE)
