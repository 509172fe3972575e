# SPDX-License-Identifier: Apache-2.0
"""GPUs: DRM cards, amdgpu's memory and sensors, KFD's topology and processes, the TTM modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import MIB
from infertune.host.text import integer, pairs
from infertune.host.unknown import Unknown

TTM_MODULES = ("amdttm", "amd_ttm", "ttm")
"""Most telling first: the DKMS ones exist for amdgpu only, ``ttm`` serves other drivers too."""

_NODES = "/sys/class/kfd/kfd/topology/nodes"
_PROCESSES = "/sys/class/kfd/kfd/proc"
MAX_PROCESSES = 512
"""Bound of KFD processes looked at; a process is a program that uses compute."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU as the kernel's DRM class has it."""

    name: str
    """``card1``."""
    device: str
    """Device directory as reached from the card: ``/sys/class/drm/card1/device``."""
    driver: str | None
    pci_id: str | None
    """``vendor:device``, e.g. ``1002:1586``."""
    pci_address: str
    """``0000:c2:00.0``; empty where it is not known."""
    render_minor: int | None
    """128 of ``renderD128``."""


@dataclass(frozen=True, slots=True)
class DpmClock:
    """Clocks of a table of power levels (pp_dpm_sclk and its like)."""

    chosen_hz: int | None
    highest_hz: int | None


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """amdgpu's mem_info_* files, in bytes (Documentation/gpu/amdgpu/driver-misc.rst)."""

    vram_bytes: int | None
    """On an APU the carve-out."""
    vram_used_bytes: int | None
    visible_vram_bytes: int | None
    visible_vram_used_bytes: int | None
    gtt_bytes: int | None
    """The limit amdgpu took when it was loaded."""
    gtt_used_bytes: int | None


@dataclass(frozen=True, slots=True)
class CarveoutSize:
    """One size that the firmware can set apart for the GPU."""

    number: str
    """Its number in the firmware's list; what is written to choose it."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Carveout:
    """The firmware's memory sizes for the GPU (uma/, Linux 7.0)."""

    chosen: str | None
    """In the firmware's words; for the next boot."""
    options: tuple[str, ...]
    sizes: tuple[CarveoutSize, ...]
    """The options that name their size."""
    chosen_bytes: int | None
    """None where the chosen one does not name its size."""


@dataclass(frozen=True, slots=True)
class Ttm:
    """The memory manager module amdgpu really holds, and its limit."""

    module: str
    """Directory below /sys/module: ``ttm``, ``amdttm`` or ``amd_ttm``."""
    sure: bool
    """False where more than one is loaded and none can be ruled out."""
    pages_limit: int | None
    """Pages of 4 KiB; None where the parameter cannot be read."""


@dataclass(frozen=True, slots=True)
class KfdNode:
    """One GPU as the compute driver knows it."""

    number: str
    gpu_id: int | None
    gfx_target: str
    """110501 of gfx_target_version is ``gfx1151``."""
    render_minor: int | None
    has_save_area: bool
    """Whether it tells the size of a queue's save area (CWSR): cwsr_size and ctl_stack_size."""


@dataclass(frozen=True, slots=True)
class KfdProcess:
    """One program that opened /dev/kfd (drivers/gpu/drm/amd/amdkfd/kfd_process.c)."""

    pid: int
    queues: tuple[int, ...]
    """gpu_id of each user queue."""
    vram_bytes: Mapping[int, int]
    """Allocated by gpu_id; on an APU that prefers GTT it is GTT."""
    evicted_ms: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Hwmon:
    """The GPU's monitor, in the units of its files (Documentation/gpu/amdgpu/thermal.rst)."""

    clocks_hz: Mapping[str, int]
    power_average_uw: int | None
    power_instant_uw: int | None
    power_cap_uw: int | None
    power_cap_default_uw: int | None
    temperatures_mc: Mapping[str, int]
    """Millidegrees by label; ``temp1`` where it has none."""
    fan_rpm: int | None
    fan_by_hand: bool | None
    """pwm1_enable: 1 is by hand, 2 automatic."""


def driver_of(root: Root, device: str) -> str | None:
    """The driver that is bound to a device; None for none."""
    link = root.readlink(f"{device}/driver")
    return link.rpartition("/")[2] if link else None


def pci_id(root: Root, device: str) -> str | None:
    """``vendor:device`` of a PCI device."""
    vendor, part = root.get_int(f"{device}/vendor"), root.get_int(f"{device}/device")
    return None if vendor is None or part is None else f"{vendor:04x}:{part:04x}"


def screens(root: Root) -> tuple[str, ...] | Unknown:
    """Connectors of GPUs that have a screen: ``DP-1`` (Documentation/gpu/drm-uapi.rst)."""
    paths = root.glob("/sys/class/drm/card*-*/status")
    found = {path.split("/")[-2]: root.get(path) for path in paths}
    if not found:
        return Unknown("no GPU shows connectors for screens here")
    return tuple(
        name.partition("-")[2] for name, status in sorted(found.items()) if status == "connected"
    )


def cards(root: Root) -> tuple[Card, ...]:
    """Every DRM card, by number."""
    # The class directory also holds connectors (card1-DP-1).
    paths = [path for path in root.glob("/sys/class/drm/card*") if re.search(r"/card\d+$", path)]
    return tuple(_card(root, path) for path in paths)


def _card(root: Root, path: str) -> Card:
    device = f"{path}/device"
    nodes = (name.removeprefix("renderD") for name in root.names(f"{device}/drm"))
    return Card(
        name=path.rpartition("/")[2],
        device=device,
        driver=driver_of(root, device),
        pci_id=pci_id(root, device),
        pci_address=pairs(root.get(f"{device}/uevent"), "=").get("PCI_SLOT_NAME", ""),
        render_minor=next(filter(None, map(integer, nodes)), None),
    )


def amdgpu_cards(root: Root) -> tuple[Card, ...]:
    """The cards that amdgpu drives, by number."""
    return tuple(card for card in cards(root) if card.driver == "amdgpu")


def busy_percent(root: Root, device: str) -> int | None:
    """Load as the power firmware counts it (Documentation/gpu/amdgpu/thermal.rst)."""
    return root.get_int(f"{device}/gpu_busy_percent")


def dpm_clock(root: Root, device: str, clock: str) -> DpmClock:
    """Chosen and highest level of one clock: ``sclk``, ``mclk``, ``fclk``, ``socclk``."""
    return dpm_levels(root.get(f"{device}/pp_dpm_{clock}"))


def dpm_levels(table: str | None) -> DpmClock:
    """Of a table with lines such as ``1: 800Mhz *``; the star is at the chosen level."""
    rows = re.findall(r"^\S+:\s*(\d{1,9})Mhz ?(\*?)", table or "", re.MULTILINE | re.IGNORECASE)
    clocks = [int(mhz) * 1_000_000 for mhz, _ in rows]
    chosen = [hz for hz, (_, star) in zip(clocks, rows, strict=True) if star]
    return DpmClock(chosen[0] if chosen else None, max(clocks, default=None))


def memory_info(root: Root, device: str) -> MemoryInfo:
    """How much memory of each kind the GPU may hold, and holds."""

    def size(name: str) -> int | None:
        return root.get_int(f"{device}/mem_info_{name}")

    return MemoryInfo(
        vram_bytes=size("vram_total"),
        vram_used_bytes=size("vram_used"),
        visible_vram_bytes=size("vis_vram_total"),
        visible_vram_used_bytes=size("vis_vram_used"),
        gtt_bytes=size("gtt_total"),
        gtt_used_bytes=size("gtt_used"),
    )


def carveout(root: Root, device: str) -> Carveout:
    """The carve-out the firmware was asked for, and the sizes it offers."""
    options = pairs(root.get(f"{device}/uma/carveout_options"), ":")
    number = root.get(f"{device}/uma/carveout") or ""
    sizes = {
        each: int(found[1]) << (30 if found[2] == "GB" else 20)
        for each, text in options.items()
        if (found := re.search(r"\((\d{1,6}) (MB|GB)\)$", text))
    }
    return Carveout(
        chosen=options.get(number),
        options=tuple(options.values()),
        sizes=tuple(CarveoutSize(each, size) for each, size in sizes.items()),
        chosen_bytes=sizes.get(number),
    )


def carveout_shown_is_real(shown_bytes: int | None, vram_bytes: int | None) -> bool | None:
    """Whether uma/carveout names what the GPU has now; None where one of the sizes is not known.

    ``shown_bytes`` is Carveout.chosen_bytes, ``vram_bytes`` mem_info_vram_total.  They differ where
    the firmware's setup chose a size that is not in its list: the index shown then names some
    other size, and writing it back would not bring back this one.  They also differ from when a
    size is asked for until the boot that brings it (amdgpu_acpi.c, uma/, Linux 7.0).
    """
    return None if shown_bytes is None or vram_bytes is None else shown_bytes == vram_bytes


def performance_level(root: Root, device: str) -> str | None:
    """power_dpm_force_performance_level."""
    return root.get(f"{device}/power_dpm_force_performance_level")


def _monitor(root: Root, device: str) -> str | None:
    return next(iter(root.glob(f"{device}/hwmon/hwmon*")), None)


def has_northbridge_sensor(root: Root, device: str) -> bool | None:
    """amdgpu shows the voltage of the north bridge on APUs only (amdgpu_pm.c).

    None where the GPU has no monitor at all.
    """
    monitors = root.names(f"{device}/hwmon")
    if not monitors:
        return None
    return any(root.get(f"{device}/hwmon/{name}/in1_label") == "vddnb" for name in monitors)


def hwmon(root: Root, device: str) -> Hwmon | None:
    """What the GPU's monitor shows; None where it has none."""
    here = _monitor(root, device)
    if here is None:
        return None
    by_hand = root.get_int(f"{here}/pwm1_enable")
    return Hwmon(
        clocks_hz=_labelled(root, here, "freq", range(1, 5)),
        power_average_uw=root.get_int(f"{here}/power1_average"),
        power_instant_uw=root.get_int(f"{here}/power1_input"),
        power_cap_uw=root.get_int(f"{here}/power1_cap"),
        power_cap_default_uw=root.get_int(f"{here}/power1_cap_default"),
        temperatures_mc=_labelled(root, here, "temp", range(1, 9), unnamed=True),
        fan_rpm=root.get_int(f"{here}/fan1_input"),
        fan_by_hand=None if by_hand is None else by_hand == 1,
    )


def _labelled(
    root: Root, here: str, kind: str, numbers: range, *, unnamed: bool = False
) -> dict[str, int]:
    found: dict[str, int] = {}
    for number in numbers:
        value = root.get_int(f"{here}/{kind}{number}_input")
        label = root.get(f"{here}/{kind}{number}_label") if value is not None else None
        if value is not None and (label or unnamed):
            found[label or f"{kind}{number}"] = value
    return found


def mes_version(root: Root, device: str) -> int | Unknown:
    """Version of the GPU's MES scheduler firmware."""
    # World-readable, where the driver has it (amdgpu_ucode.c).
    version = root.get_int(f"{device}/fw_version/mes_fw_version")
    if version:
        return version
    for path in root.glob("/sys/kernel/debug/dri/*/amdgpu_firmware_info"):
        found = re.search(
            r"^MES feature version: \d+, firmware version: (0x[0-9a-fA-F]{1,8})",
            root.get(path) or "",
            re.MULTILINE,
        )
        if found:
            return int(found[1], 16)
    return Unknown("the driver does not show the MES version here (debugfs is for root)")


# -- the compute driver ---------------------------------------------------------------


def has_kfd(root: Root) -> bool:
    """Whether the compute driver is there: ROCm can run."""
    return root.exists("/sys/class/kfd/kfd")


def gfx_name(target: int) -> str:
    """``gfx1151`` for 110501: minor and stepping are one hexadecimal digit each in the name."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def kfd_nodes(root: Root) -> tuple[KfdNode, ...]:
    """The GPUs of KFD's topology; the CPU, which is a node too, is left out."""
    found = []
    for path in root.glob(f"{_NODES}/*/properties"):
        properties = pairs(root.get(path))
        target = integer(properties.get("gfx_target_version"))
        if not target:
            continue
        node = path.split("/")[-2]
        found.append(
            KfdNode(
                number=node,
                gpu_id=root.get_int(f"{_NODES}/{node}/gpu_id"),
                gfx_target=gfx_name(target),
                render_minor=integer(properties.get("drm_render_minor")),
                has_save_area="cwsr_size" in properties and "ctl_stack_size" in properties,
            )
        )
    return tuple(found)


def kfd_client_count(root: Root) -> int | Unknown:
    """How many processes have KFD open: one directory for each (kfd_process.c)."""
    if not root.exists("/sys/class/kfd"):
        return 0  # without the driver no process can
    try:
        return len(root.listed(_PROCESSES))
    except OSError:
        return Unknown("the driver does not show which processes use ROCm")


def kfd_processes(root: Root) -> tuple[KfdProcess, ...]:
    """The programs that use compute; readable by everybody."""
    return tuple(kfd_process(root, pid) for pid in kfd_pids(root)[:MAX_PROCESSES])


def kfd_pids(root: Root) -> list[int]:
    """Ids of the programs that use compute."""
    pids = (integer(name) for name in root.names(_PROCESSES))
    return [pid for pid in pids if pid is not None]


def kfd_process(root: Root, pid: int) -> KfdProcess:
    """One of them; empty where it has ended."""
    here = f"{_PROCESSES}/{pid}"
    listed = root.names(here)
    queues = (root.get_int(f"{here}/queues/{each}/gpuid") for each in root.names(f"{here}/queues"))

    def by_gpu(prefix: str, file: str) -> dict[int, int]:
        found = {}
        for each in listed:
            gpu = integer(each.removeprefix(prefix)) if each.startswith(prefix) else None
            value = None if gpu is None else root.get_int(f"{here}/{each}{file}")
            if gpu is not None and value is not None:
                found[gpu] = value
        return found

    return KfdProcess(
        pid=pid,
        queues=tuple(gpu for gpu in queues if gpu is not None),
        vram_bytes=by_gpu("vram_", ""),
        evicted_ms=by_gpu("stats_", "/evicted_ms"),
    )


# -- modules ----------------------------------------------------------------------------


def ttm(root: Root) -> Ttm | None:
    """The TTM module that amdgpu holds; None where amdgpu or every TTM module is missing."""
    if not root.exists("/sys/module/amdgpu"):
        return None
    loaded = [name for name in TTM_MODULES if root.exists(f"/sys/module/{name}")]
    held = [name for name in loaded if root.exists(f"/sys/module/{name}/holders/amdgpu")]
    candidates = held or loaded
    if not candidates:
        return None
    return Ttm(
        module=candidates[0],
        sure=len(candidates) == 1,
        pages_limit=integer(module_parameter(root, candidates[0], "pages_limit")),
    )


def gttsize_bytes(root: Root) -> int | None:
    """amdgpu.gttsize in bytes; None where it is automatic (-1) or not shown."""
    mib = integer(module_parameter(root, "amdgpu", "gttsize"))
    return mib * MIB if mib else None


def is_loaded(root: Root, module: str) -> bool:
    """Whether a module is loaded, or part of the kernel and shows parameters."""
    return root.exists(f"/sys/module/{module}")


def is_module(root: Root, name: str) -> bool:
    """Whether a module is loaded now; one that is built in is not a module, and has no refcnt."""
    return root.exists(f"/sys/module/{name}/refcnt")


def shows_parameters(root: Root, module: str) -> bool:
    """Whether a module shows its parameters."""
    return root.exists(f"/sys/module/{module}/parameters")


def module_parameter(root: Root, module: str, name: str) -> str | None:
    """What a module's parameter is now; None where it is not shown."""
    return root.get(f"/sys/module/{module}/parameters/{name}")
