# SPDX-License-Identifier: Apache-2.0
"""What the judge of GPU memory needs to know, read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from infertune.base.records import dataclass, field
from infertune.base.root import Root
from infertune.base.units import GIB, MIB
from infertune.host.cgroup import group_limit
from infertune.host.gpu import (
    KfdProcess,
    MemoryInfo,
    Ttm,
    cards,
    carveout,
    kfd_nodes,
    kfd_processes,
    memory_info,
    module_parameter,
)
from infertune.host.machine import Gpu, Machine
from infertune.host.modprobe import Assignment, read_sources
from infertune.host.processes import Process, drm_clients, opens_gpu, pids, process
from infertune.host.text import integer

GTT_COMPUTE = (6, 10)
"""First Linux whose KFD allocates from GTT on an APU (commit 89773b85599a)."""
_NOISE = 32 * MIB
"""A program that holds less than this is not named: a compositor's cursor, an idle client."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A program that holds memory of the GPU."""

    pid: int
    name: str
    owner: str | None
    """Its unit or container; None where its group names neither."""
    gtt_bytes: int
    vram_bytes: int
    source: str
    """What says so: ``KFD``, ``fdinfo`` or both."""

    def __str__(self) -> str:
        return (
            f"{self.owner} ({self.name}, pid {self.pid})"
            if self.owner
            else (f"{self.name} (pid {self.pid})")
        )

    @property
    def bytes(self) -> int:
        """Of all pools."""
        return self.gtt_bytes + self.vram_bytes


@dataclass(frozen=True, slots=True)
class Configured:
    """What is asked for at the next boot, and where it stands."""

    pages_limit: Assignment | None = None
    """Of the TTM module amdgpu holds; None: the kernel's default, half of RAM."""
    gttsize: Assignment | None = None
    """amdgpu.gttsize; None: GTT follows the TTM limit."""
    carveout_bytes: int | None = None
    """A larger carve-out that the firmware was asked for (uma/carveout) and has not made yet.

    One that is said to be smaller is not known to come: firmware shows "512 MB" beside 4 GiB that
    are there (ROG Flow Z13).
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """One machine's memory as its GPU sees it; bytes.  None: not told."""

    kernel: tuple[int, ...] = ()
    ram: int | None = None
    """MemTotal: all that the firmware left to Linux; in some containers the container's share."""
    available: int | None = None
    cma: int = 0
    """CmaTotal: lends itself only to pages that can be moved, which the GPU's cannot."""
    cma_free: int = 0
    swap: int = 0
    group_limit: int | None = None
    """memory.max of the group this whole system is in; the GPU's memory is not charged to it."""
    driver: str | None = None
    integrated: bool | None = None
    memory: MemoryInfo = field(default_factory=lambda: MemoryInfo(*[None] * 6))
    ttm: Ttm | None = None
    gttsize: int | None = None
    """amdgpu.gttsize in force; None where GTT follows the TTM limit."""
    no_system_limit: bool = False
    """amdgpu.no_system_mem_limit: KFD has no limit of its own."""
    configured: Configured = field(default_factory=Configured)
    holders: tuple[Holder, ...] = ()
    """Largest first; those that may not be looked at are missing."""
    unseen: bool = False
    """Whether there are programs with the GPU open whose memory cannot be read."""
    reserved: int = 0
    """GPU memory promised to servers that are still loading (budget/admission.py)."""
    reserved_ram: int = 0
    """The same of RAM, their part of the GPU's memory included where that is RAM."""
    loading: tuple[str, ...] = ()
    """Who they are."""

    @property
    def ram_is_the_hosts(self) -> bool:
        """Whether MemTotal is this machine's: lxcfs shows a container its own limit instead."""
        if self.ram is None or self.group_limit is None:
            return True
        return self.ram > 1.02 * self.group_limit

    @property
    def computes_in_carveout(self) -> bool:
        """Whether ROCm allocates from the carve-out, however large GTT is."""
        return _computes_in_carveout(self.kernel, self.ttm)


def _computes_in_carveout(kernel: tuple[int, ...], ttm: Ttm | None) -> bool:
    # AMD's own driver (DKMS) is newer than its kernel: the first one with this GPU has GTT for
    # compute.  Its TTM module has a name of its own.
    in_tree = ttm is None or ttm.module == "ttm"
    return in_tree and () < kernel < GTT_COMPUTE


def read_facts(root: Root, machine: Machine) -> PoolFacts:
    """Everything, once.  Never raises: what cannot be read is None or missing."""
    gpu = machine.inference_gpu
    memory = machine.memory
    sources = read_sources(root)
    module = machine.ttm.module if machine.ttm else "ttm"
    info = memory_info(root, gpu.path) if gpu else MemoryInfo(*[None] * 6)
    in_carveout = _computes_in_carveout(machine.kernel_version, machine.ttm)
    holders, unseen = _holders(root, gpu, info, in_carveout) if gpu else ((), False)
    if gpu:  # once more: no holder may have more than the sum, which grows while they are read
        info = memory_info(root, gpu.path)
    return PoolFacts(
        kernel=machine.kernel_version,
        ram=memory.total_bytes,
        available=memory.available_bytes,
        cma=memory.cma_total_bytes or 0,
        cma_free=memory.cma_free_bytes or 0,
        swap=memory.swap_bytes or 0,
        group_limit=group_limit(root),
        driver=gpu.driver if gpu else None,
        integrated=gpu.integrated if gpu else None,
        memory=info,
        ttm=machine.ttm,
        gttsize=gpu.gttsize_bytes if gpu else None,
        no_system_limit=module_parameter(root, "amdgpu", "no_system_mem_limit") in ("1", "Y"),
        configured=Configured(
            pages_limit=_size(sources.winner(module, "pages_limit")),
            gttsize=_size(sources.winner("amdgpu", "gttsize")),
            carveout_bytes=_pending_carveout(root, gpu, info) if gpu else None,
        ),
        holders=holders,
        unseen=unseen,
    )


def _size(found: Assignment | None) -> Assignment | None:
    """An assignment of a size; the kernel's own word for "automatic" (-1, 0) is none."""
    return found if found and (integer(found.value) or 0) > 0 else None


def _pending_carveout(root: Root, gpu: Gpu, info: MemoryInfo) -> int | None:
    asked, there = carveout(root, gpu.path).chosen_bytes, info.vram_bytes
    return asked if asked and there is not None and asked > there + GIB else None


# -- who holds it ----------------------------------------------------------------------


def _holders(
    root: Root, gpu: Gpu, info: MemoryInfo, in_carveout: bool
) -> tuple[tuple[Holder, ...], bool]:
    card = next((each for each in cards(root) if each.device == gpu.path), None)
    if card is None:
        return (), False
    ids = {n.gpu_id for n in kfd_nodes(root) if n.render_minor == card.render_minor}
    gtt, vram = info.gtt_bytes or 0, info.vram_bytes or 0
    # amdkfd, apu_prefer_gtt: on an APU it allocates from the larger of the two, and only there.
    in_gtt = gpu.integrated is True and gtt > vram and not in_carveout
    compute = {each.pid: _of_kfd(each, ids) for each in kfd_processes(root)}
    found, unseen = _of_fdinfo(root, card.pci_address, compute)
    holders = []
    for pid in sorted(compute.keys() | found.keys()):
        kfd, (drm_gtt, drm_vram) = compute.get(pid, 0), found.get(pid, (0, 0))
        held = (max(drm_gtt, kfd if in_gtt else 0), max(drm_vram, 0 if in_gtt else kfd))
        if sum(held) < _NOISE:
            continue
        who = process(root, pid)
        if pid not in found and opens_gpu(root, pid) is False:
            # KFD counts in the host's ids: in a container another program has this one.
            who = Process(pid, f"process {pid} of the host", None)
        source = " and ".join([*(["KFD"] if kfd else []), *(["fdinfo"] if pid in found else [])])
        holders.append(Holder(pid, who.name, who.owner, *held, source))
    return tuple(sorted(holders, key=lambda each: -each.bytes)), unseen


def _of_kfd(one: KfdProcess, ids: set[int | None]) -> int:
    # A topology that names no GPU (a container) must not hide what is held.
    return sum(size for gpu, size in one.vram_bytes.items() if gpu in ids or not ids)


def _of_fdinfo(
    root: Root, pci_address: str, compute: Mapping[int, int]
) -> tuple[dict[int, tuple[int, int]], bool]:
    """GTT and VRAM by process, and whether some process could not be looked at."""
    found: dict[int, tuple[int, int]] = {}
    seen: set[str] = set()
    unseen = False
    for pid in pids(root):
        opened = opens_gpu(root, pid)
        if opened is None and pid in compute:
            unseen = unseen or not compute[pid]
        if not opened:
            continue
        try:
            gtt, vram = _sums(_clients(root, pid, pci_address, seen))
        except OSError:
            unseen = True
            continue
        if gtt or vram:
            found[pid] = gtt, vram
    return found, unseen


def _clients(root: Root, pid: int, pci_address: str, seen: set[str]) -> Iterator[Mapping[str, int]]:
    """Each client once, though several processes may have it open."""
    for client in drm_clients(root, pid):
        if client.number in seen or (pci_address and client.pci_address != pci_address):
            continue
        seen.add(client.number)
        yield client.resident_bytes


def _sums(clients: Iterator[Mapping[str, int]]) -> tuple[int, int]:
    gtt = vram = 0
    for regions in clients:
        gtt, vram = gtt + regions.get("gtt", 0), vram + regions.get("vram", 0)
    return gtt, vram
