# SPDX-License-Identifier: Apache-2.0
"""How fast a model can be here: the roofline of memory bandwidth.

For each token the weights it uses, and what is kept of all tokens before it, are read once.  A
server cannot be faster than memory; what others measured says how near it comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from infertune.base.records import dataclass
from infertune.budget.kv import kv_bytes, pad
from infertune.budget.measured import CHIPS, Chip, Speed, speeds_of
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape
from infertune.host.machine import Machine


@dataclass(frozen=True, slots=True)
class Roofline:
    """Most tokens per second that one reader of memory allows."""

    reader: str
    bandwidth: tuple[float, float]
    """Bytes per second, lowest and highest known."""
    tokens_per_second: tuple[float, float]
    """At an empty context."""
    tokens_per_second_deep: tuple[float, float] | None
    """At ``depth`` tokens; None where it is not known what those take."""
    source: str


@dataclass(frozen=True, slots=True)
class Expectation:
    active_bytes: int
    active_parameters: int
    depth: int
    """Tokens of context at which the second figure is."""
    depth_bytes: int | None
    """Read for each token beside the weights, at this depth."""
    rooflines: tuple[Roofline, ...]
    measured_by_others: tuple[Speed, ...]
    notes: tuple[str, ...]


def expect(shape: Shape, machine: Machine, cpu_read: float | None, depth: int) -> Expectation:
    """The rooflines of this machine; ``cpu_read`` is what was measured now, in bytes per second."""
    read = None
    if shape.known:
        one = ServerMemory(ctx=pad(depth), slots=1, unified=False)
        read = sum(kv_bytes(shape, one)) if depth else 0
        # States are read and written whole, whatever the depth.
        read += 2 * 4 * sum(layer.state_values for layer in shape.layers)
    chip = chip_of(machine)
    gpu = machine.inference_gpu
    notes = []
    if gpu and not chip:
        notes.append("the memory bandwidth of this GPU is not known here")
    if chip and chip.note:
        notes.append(chip.note)
    if cpu_read is None:
        notes.append("memory bandwidth was not measured on this machine")
    return Expectation(
        active_bytes=shape.active_bytes,
        active_parameters=shape.active_parameters,
        depth=depth,
        depth_bytes=read,
        rooflines=tuple(_rooflines(shape, chip, cpu_read, read)),
        measured_by_others=speeds_of(shape, chip.gfx_target if chip else None),
        notes=tuple(notes),
    )


def chip_of(machine: Machine) -> Chip | None:
    """The entry of the GPU that a server would use.

    The name of the processor decides where there is one: the GPU's own ids do not tell chips apart
    that differ in their memory.
    """
    gpu = machine.inference_gpu
    if gpu is None:
        return None
    same = [c for c in CHIPS if gpu.gfx_target == c.gfx_target or gpu.pci_id == c.pci_id]
    named = [c for c in CHIPS if gpu.integrated and c.cpu_model.search(machine.cpu.model or "")]
    return next(iter(named or same), None)


def _rooflines(
    shape: Shape, chip: Chip | None, cpu_read: float | None, read: int | None
) -> Iterator[Roofline]:
    if not shape.active_bytes:
        return
    if chip:
        yield _roofline(shape, "GPU", chip.gpu_read, read, chip.gpu_source)
    if cpu_read:
        yield _roofline(shape, "CPU", (cpu_read, cpu_read), read, "measured now, all cores")
    elif chip:
        yield _roofline(shape, "CPU", chip.cpu_read, read, chip.cpu_source)


def _roofline(
    shape: Shape, reader: str, bandwidth: tuple[float, float], read: int | None, source: str
) -> Roofline:
    low, high = bandwidth
    active = shape.active_bytes
    deep = None if read is None else (low / (active + read), high / (active + read))
    return Roofline(reader, bandwidth, (low / active, high / active), deep, source)
