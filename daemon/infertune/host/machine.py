# SPDX-License-Identifier: Apache-2.0
"""What this machine is: facts chosen from what :mod:`infertune.host` reads, once.

Unknown is None, never zero.  A fact that can be absent is absent (None or an
empty tuple), not an error.
"""

from __future__ import annotations

import re

from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.host import cgroup, cpu, devices, gpu, memory, system, tuners
from infertune.host.boot_loader import boot_loader
from infertune.host.cgroup import Cgroup
from infertune.host.cpu import Cpu
from infertune.host.gpu import Card, CarveoutSize, Ttm
from infertune.host.memory import Memory
from infertune.host.processes import comms
from infertune.host.swap import Swaps, swaps
from infertune.host.system import Dmi
from infertune.host.tuners import Tuner


@dataclass(frozen=True, slots=True)
class Gpu:
    path: str
    """Device directory as reached from the card: ``/sys/class/drm/card1/device``."""
    pci_id: str | None
    """``vendor:device``, e.g. ``1002:1586``."""
    driver: str | None
    name: str | None
    gfx_target: str | None
    """From KFD's gfx_target_version: 110501 is ``gfx1151``."""
    integrated: bool | None
    vram_bytes: int | None
    """mem_info_vram_total: on an APU the carve-out."""
    visible_vram_bytes: int | None
    gtt_bytes: int | None
    """mem_info_gtt_total: the limit amdgpu took when it was loaded."""
    gttsize_bytes: int | None
    """amdgpu.gttsize in force; None where GTT follows the TTM limit."""
    carveout: str | None
    """Chosen entry of uma/carveout, in the firmware's words (Linux >= 7.0)."""
    carveout_options: tuple[str, ...]
    carveout_sizes: tuple[CarveoutSize, ...] = ()
    """The options that name their size."""
    carveout_bytes: int | None = None
    """Size of the chosen one; None where it names none.  See gpu.carveout_shown_is_real."""


@dataclass(frozen=True, slots=True)
class Machine:
    kernel: str | None
    """Release, e.g. ``7.1.3-200.fc44.x86_64``."""
    cmdline: str | None
    distro: str | None
    distro_id: str | None
    boot_style: str | None
    """How a kernel parameter gets to the command line here: an id of boot_loader.STACKS."""
    dmi: Dmi
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    kfd: bool
    npu: str | None
    """Name of the NPU driver's device (``amdxdna``), None where there is none."""
    ttm: Ttm | None
    cgroup: Cgroup
    tuners: tuple[Tuner, ...]
    swap: Swaps | None = None
    boot_evidence: tuple[str, ...] = ()
    """What says so of boot_style: who booted, and what else was seen."""

    @property
    def kernel_version(self) -> tuple[int, ...]:
        """Leading numbers of the release: (7, 1, 3); empty where it is not known."""
        match = re.match(r"\d{1,9}(?:\.\d{1,9}){0,9}(?!\d)", self.kernel or "")
        return tuple(int(part) for part in match[0].split(".")) if match else ()

    @property
    def inference_gpu(self) -> Gpu | None:
        """The GPU whose knobs a profile means: an amdgpu APU first, else the only amdgpu."""
        ours = [gpu for gpu in self.gpus if gpu.driver == "amdgpu"]
        integrated = [gpu for gpu in ours if gpu.integrated]
        for choice in (integrated, ours):
            if len(choice) == 1:
                return choice[0]
        return None


# -- tables: what is known by name ---------------------------------------------

GPU_NAMES: dict[str, str] = {
    # The revision of the part decides between the three; the PCI ID does not.
    "1002:1586": "Strix Halo (Radeon 8060S, 8050S or 8040S)",
    "1002:150e": "Strix Point (Radeon 890M or 880M)",
}
"""Names by PCI ID, of integrated GPUs only.  Source: pci.ids."""

GPU_MODELS = re.compile(r"w/ (Radeon \S+)")
"""AMD writes the graphics part into the processor's name: ``... MAX+ 395 w/ Radeon 8060S``."""

# -- reading ---------------------------------------------------------------------


def read_machine(
    root: Root, known: Machine | None = None, names: frozenset[str] | None = None
) -> Machine:
    """Choose every fact once.

    Never raises for what is absent, unreadable or makes no sense: that fact is None.

    ``known`` is the machine as it was a while ago, where no device has come, gone or changed since:
    what the kernel tells nobody of is read again, and the rest is taken from it.  ``names``: those
    of processes, for whoever has them.
    """
    if known is None or known.cpu.online != cpu.online_cpus(root):
        known = _read_hardware(root)
    else:
        driver, mode = cpu.scaling_driver(root), cpu.amd_pstate(root)
        known = replace(known, cpu=replace(known.cpu, scaling_driver=driver, amd_pstate=mode))
    return replace(
        known,
        memory=memory.memory(root, known.memory.numa_nodes),
        gpus=tuple(_with_carveout(root, each) for each in known.gpus),
        ttm=gpu.ttm(root),
        tuners=tuners.tuners(root, known.cgroup, comms(root) if names is None else names),
        swap=swaps(root),
    )


def _read_hardware(root: Root) -> Machine:
    """The machine, but for what changes without a word of the kernel."""
    processor = cpu.cpu(root)
    release = system.os_release(root)
    loader = boot_loader(root)
    targets = {node.render_minor: node.gfx_target for node in gpu.kfd_nodes(root)}
    return Machine(
        kernel=system.release(root),
        cmdline=system.command_line(root),
        distro=release.get("PRETTY_NAME") or release.get("NAME"),
        distro_id=release.get("ID"),
        boot_style=loader.id,
        dmi=system.dmi(root),
        cpu=processor,
        memory=Memory(None, None, None, None, None, None, cpu.numa_nodes(root)),
        gpus=tuple(_gpu(root, card, targets, processor) for card in gpu.cards(root)),
        kfd=gpu.has_kfd(root),
        npu=next((each.driver for each in devices.accelerators(root) if each.driver), None),
        ttm=None,
        cgroup=cgroup.cgroup(root),
        tuners=(),
        boot_evidence=loader.evidence,
    )


def _with_carveout(root: Root, one: Gpu) -> Gpu:
    carveout = gpu.carveout(root, one.path)
    return replace(
        one,
        carveout=carveout.chosen,
        carveout_options=carveout.options,
        carveout_sizes=carveout.sizes,
        carveout_bytes=carveout.chosen_bytes,
    )


def _gpu(root: Root, card: Card, targets: dict[int | None, str], processor: Cpu) -> Gpu:
    name = GPU_NAMES.get(card.pci_id or "")
    if name and (model := GPU_MODELS.search(processor.model or "")):
        name = model[1]
    sizes = gpu.memory_info(root, card.device)
    return Gpu(
        path=card.device,
        pci_id=card.pci_id,
        driver=card.driver,
        name=name,
        gfx_target=targets.get(card.render_minor) if card.render_minor else None,
        integrated=_is_integrated(root, card),
        vram_bytes=sizes.vram_bytes,
        visible_vram_bytes=sizes.visible_vram_bytes,
        gtt_bytes=sizes.gtt_bytes,
        gttsize_bytes=gpu.gttsize_bytes(root) if card.driver == "amdgpu" else None,
        carveout=None,
        carveout_options=(),
    )


def _is_integrated(root: Root, card: Card) -> bool | None:
    if card.pci_id in GPU_NAMES:
        return True
    return gpu.has_northbridge_sensor(root, card.device) if card.driver == "amdgpu" else None
