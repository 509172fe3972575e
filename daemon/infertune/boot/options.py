# SPDX-License-Identifier: Apache-2.0
"""What a profile's [boot] comes to on one machine: parameters of modules, of the kernel, firmware.

One entry of PLACES for each boot knob of the catalogue.  Pages are 4 KiB, so a GiB is exactly
262144 of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from infertune.base.errors import UsageError
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import format_size
from infertune.catalogue.knobs import KNOBS
from infertune.host.gpu import TTM_MODULES, carveout_shown_is_real, is_loaded
from infertune.host.machine import Gpu, Machine
from infertune.host.modprobe import Sources
from infertune.host.system import COMMAND_LINE
from infertune.profiles.resolve import Desired, Setting

SAFE_VALUE = re.compile(r"[A-Za-z0-9_.,:-]{1,200}")
"""What may go into configuration files of boot loaders, which shells and GRUB read."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter as modprobe and the kernel know it; no module is the kernel itself."""

    module: str
    name: str

    @property
    def word(self) -> str:
        """Its name on the command line."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def path(self) -> str:
        """Where the kernel shows what it is now."""
        if not self.module:
            return COMMAND_LINE
        return f"/sys/module/{self.module}/parameters/{self.name}"


@dataclass(frozen=True, slots=True)
class Option:
    """One boot setting, resolved."""

    id: str
    value: str
    parameters: tuple[Parameter, ...]
    """Where it goes; more than one where it is not sure which module is used.  Empty: firmware."""
    file: str | None
    """For the firmware: the file of sysfs that takes the value."""
    on_command_line: bool
    """Modules that are part of the kernel, and the kernel itself, know no other place."""
    source: str
    note: str | None = None


TTM = "{ttm}"

PLACES: dict[str, tuple[str, str] | None] = {
    # knob: module (TTM: the one amdgpu uses, "": the kernel) and parameter; None: firmware
    "ttm.pages_limit": (TTM, "pages_limit"),
    "ttm.page_pool_size": (TTM, "page_pool_size"),
    "amdgpu.lockup_timeout": ("amdgpu", "lockup_timeout"),
    "amd_iommu": ("", "amd_iommu"),
    "isolcpus": ("", "isolcpus"),
    "transparent_hugepage": ("", "transparent_hugepage"),
    "amdgpu.uma_carveout": None,
}


def options(
    root: Root, machine: Machine, desired: Desired, sources: Sources, ours: Iterable[Option] = ()
) -> tuple[tuple[Option, ...], tuple[str, ...]]:
    """The options to stage, and one sentence for each setting that is left out.

    ``ours`` are options that infertune has put in force: they are not somebody else's.
    Raises UsageError for a required setting that has no place here.
    """
    found: list[Option] = []
    left = [f"{each.id} is left out: {each.reason}" for each in desired.unresolved if _boot(each)]
    mine = {(option.id, option.value) for option in ours}
    for setting in desired.boot:
        option = _option(root, machine, setting, (setting.id, setting.canonical) in mine)
        if isinstance(option, str) and setting.required:
            raise UsageError(
                f"{setting.id}: {option}, but {setting.source} requires it; nothing was touched"
            )
        if isinstance(option, str):
            left.append(f"{setting.id} is left out: {option}")
        elif (option.id, option.value) not in mine and _is_there(root, option, sources):
            left.append(f"{setting.id} is {option.value} already, set by another program")
        else:
            found.append(option)
    return tuple(found), tuple(left)


def _boot(each: object) -> bool:
    return getattr(each, "id", "") in PLACES


def _option(root: Root, machine: Machine, setting: Setting, staged: bool) -> Option | str:
    knob, place = KNOBS[setting.id], PLACES[setting.id]
    note = knob.note(machine)
    source = str(setting.source)
    if not SAFE_VALUE.fullmatch(setting.canonical):
        return f"'{setting.canonical}' cannot stand in a boot loader's file"
    if place is None:
        gpu = machine.inference_gpu
        if gpu is None or not gpu.carveout_sizes:
            return knob.absent
        if not staged and not carveout_shown_is_real(gpu.carveout_bytes, gpu.vram_bytes):
            return _not_in_the_list(gpu)
        file = f"{gpu.path}/uma/carveout"
        return Option(setting.id, setting.canonical, (), file, False, source, note)
    module, name = place
    modules = ttm_modules(root, machine) if module == TTM else (module,)
    if module and not modules:
        return knob.absent
    if module and not any(_exists(root, machine, each) for each in modules):
        return knob.absent
    parameters = tuple(Parameter(each, name) for each in modules)
    built_in = any(is_built_in(root, machine, each) for each in modules)
    return Option(
        setting.id, setting.canonical, parameters, None, not module or built_in, source, note
    )


def _not_in_the_list(gpu: Gpu) -> str:
    """The kernel would take the index back, and the firmware would make another size of it."""
    there = "of unknown size" if gpu.vram_bytes is None else format_size(gpu.vram_bytes)
    return (
        f"the carve-out is {there}, and {gpu.path}/uma/carveout shows "
        f"'{gpu.carveout or 'nothing'}': it could not be put back, so set it in the BIOS"
    )


def ttm_modules(root: Root, machine: Machine) -> tuple[str, ...]:
    """The TTM modules whose limit may be the GPU's: the one that is sure, or all there are."""
    if machine.ttm and machine.ttm.sure:
        return (machine.ttm.module,)
    loaded = tuple(m for m in TTM_MODULES if is_loaded(root, m))
    return loaded or tuple(m for m in TTM_MODULES if _exists(root, machine, m))


def _exists(root: Root, machine: Machine, module: str) -> bool:
    """Whether a module is loaded or could be."""
    if is_loaded(root, module):
        return True
    listed = _list(root, machine, "modules.dep") + _list(root, machine, "modules.builtin")
    return _file(module) in {_file(each.partition(":")[0]) for each in listed}


def is_built_in(root: Root, machine: Machine, module: str) -> bool:
    """Whether a module is part of the kernel itself: modprobe.d does not reach it."""
    builtin = _list(root, machine, "modules.builtin")
    return _file(module) in {_file(each) for each in builtin}


def _list(root: Root, machine: Machine, name: str) -> list[str]:
    if not machine.kernel or "/" in machine.kernel:
        return []
    return (root.get(f"/lib/modules/{machine.kernel}/{name}") or "").splitlines()


def _file(path: str) -> str:
    """``amd_ttm`` of ``updates/dkms/amd-ttm.ko.zst``, and of itself."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _is_there(root: Root, option: Option, sources: Sources) -> bool:
    """Whether somebody else's line already says exactly this at every boot."""
    if not option.parameters:
        return option.file is not None and root.get(option.file) == option.value
    winners = [sources.winner(p.module, p.name) for p in option.parameters]
    return all(winner is not None and winner.value == option.value for winner in winners)
