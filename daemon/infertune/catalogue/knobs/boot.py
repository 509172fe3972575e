# SPDX-License-Identifier: Apache-2.0
"""Settings that take effect at the next boot: compared by ``plan``, staged by ``infertune boot``.

``ttm.pages_limit`` can be written while the machine runs, but amdgpu took its
GTT size from it at its own start: only a reboot changes what a model may use.
"""

from __future__ import annotations

from functools import partial

from infertune.base.records import dataclass
from infertune.base.units import GIB, format_size, parse_cpulist, parse_size
from infertune.catalogue.cpuset import CpuSet
from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Choice, Integer, Size, Value
from infertune.host.machine import Machine
from infertune.host.memory import PAGE
from infertune.host.system import parameters

DEFAULT = "default"
"""A kernel parameter that is not on the command line: the kernel's own value."""


@dataclass(frozen=True)
class KernelParameter(Value):
    """A parameter on the kernel command line; the last one of a name counts."""

    name: str
    inner: Value

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        return self.inner.parse(configured, machine)

    def decode(self, raw: bytes) -> str:
        given = dict(parameters(raw.decode("utf-8", "replace").replace("\0", " ")))
        return given.get(self.name, DEFAULT)

    def accepts(self) -> str:
        return self.inner.accepts()


@dataclass(frozen=True)
class IsolatedCpus(CpuSet):
    """CPUs to take from the scheduler.  CPU 0 stays: the kernel needs one, and boots on it."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        cpus = super().parse(configured, machine)
        if machine is not None and 0 in parse_cpulist(cpus):
            raise ValueError(f"'{configured}' holds CPU 0 here, which stays for everything else")
        return cpus


@dataclass(frozen=True)
class Timeout(Integer):
    """Milliseconds after which a GPU job counts as hung, for all four kinds of job.

    One number means different things to old and new kernels (until 6.18 compute was left out),
    four numbers mean the same to all.
    """

    low: int = 1000
    high: int = 600_000
    unit: str = "ms"

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        return ",".join([super().parse(configured, machine)] * 4)

    def decode(self, raw: bytes) -> str:
        return raw.decode("ascii").strip() or DEFAULT


@dataclass(frozen=True)
class Carveout(Value):
    """Memory that the firmware gives to the GPU alone; canonical is the number in its list."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if not isinstance(configured, str) or "%" in configured:
            raise ValueError(f"{configured!r} is not a size; {self.accepts()}")
        wanted = parse_size(configured)
        if machine is None:
            return configured
        gpu = machine.inference_gpu
        options = gpu.carveout_sizes if gpu else ()
        if not options:
            raise ValueError(
                "this kernel or firmware offers no carve-out to the system (it takes Linux 7.0 and "
                "a BIOS with ATCS function 0xA): set it in the BIOS, to its minimum"
            )
        for option in options:
            if option.size_bytes == wanted:
                return option.number
        offer = ", ".join(format_size(option.size_bytes) for option in options)
        raise ValueError(f"the firmware has no carve-out of '{configured}'; it offers {offer}")

    def decode(self, raw: bytes) -> str:
        return str(int(raw.decode("ascii").strip(), 10))

    def accepts(self) -> str:
        return "a size the firmware offers, such as '512MiB' (uma/carveout_options)"


def _gtt_is_older(machine: Machine, pages: str) -> str | None:
    gpu, wanted = machine.inference_gpu, int(pages) * PAGE
    # A larger GTT (amdgpu.gttsize) is bounded by the TTM limit all the same.
    if gpu is None or gpu.gtt_bytes is None or gpu.gtt_bytes >= wanted:
        return None
    taken = format_size(gpu.gtt_bytes)
    if gpu.gttsize_bytes is not None and gpu.gttsize_bytes < wanted:
        return f"amdgpu.gttsize holds GTT at {taken}: take it away"
    if machine.memory.total_bytes and abs(gpu.gtt_bytes - machine.memory.total_bytes) < GIB // 16:
        return f"the driver caps GTT at RAM, {taken}"
    return f"the limit is written, but amdgpu took a GTT of {taken} when it was loaded"


def _price_of_no_iommu(machine: Machine) -> str:
    npu = f"NPU (there is one: {machine.npu})" if machine.npu else "NPU"
    return f"price: no {npu}, no VFIO, and no protection against DMA of a hostile device"


_at_boot = partial(Knob, time="boot", risk="boot")

KNOBS: tuple[Knob, ...] = (
    _at_boot(
        id="ttm.pages_limit",
        paths=("{ttm}/parameters/pages_limit",),
        # Whole GiB: a share that is no round number is nothing anybody could have tried before.
        value=Size(PAGE, low_bytes=GIB // 4, high_bytes=1024 * GIB, unit="pages", step_bytes=GIB),
        summary="Most memory the GPU may take for GTT; half of RAM by default.",
        evidence=Evidence(
            "reported",
            "25165824 pages gave mem_info_gtt_total 96 GiB exactly (Linux 7.1); from 108 GiB on "
            "some 128 GB machines fail at load.",
            "field reports collected 2026-11; drivers/gpu/drm/ttm/ttm_tt.c",
        ),
        doc="drivers/gpu/drm/ttm/ttm_tt.c",
        absent="no TTM module is loaded",
        not_in_force=_gtt_is_older,
    ),
    _at_boot(
        id="ttm.page_pool_size",
        paths=("{ttm}/parameters/page_pool_size",),
        # 0 would be the kernel's own choice (ttm_pool_mgr_init), and never be seen in force.
        value=Size(unit_bytes=PAGE, low_bytes=PAGE, high_bytes=1024 * GIB, unit="pages"),
        summary="Most freed pages that TTM keeps for the GPU instead of giving them back.",
        evidence=Evidence(
            "no effect found",
            "Nothing is allocated ahead, whatever guides say; it bounds a cache of freed pages.",
            "drivers/gpu/drm/ttm/ttm_pool.c",
        ),
        doc="drivers/gpu/drm/ttm/ttm_pool.c",
        absent="no TTM module is loaded",
    ),
    _at_boot(
        id="amdgpu.uma_carveout",
        paths=("{gpu}/uma/carveout",),
        value=Carveout(),
        summary="Memory the firmware sets apart for the GPU; beside GTT the least of it is best.",
        evidence=Evidence(
            "reported",
            "From 32 GB to 512 MB small models lost 3 to 8 % and a model of 37 GB more fitted.",
            "field reports collected 2026-11",
        ),
        doc="Documentation/gpu/amdgpu/driver-misc.rst (Linux 7.0)",
        absent="this kernel or firmware offers no carve-out: it is set in the BIOS",
    ),
    _at_boot(
        id="amdgpu.lockup_timeout",
        paths=("/sys/module/amdgpu/parameters/lockup_timeout",),
        value=Timeout(),
        summary="How long a GPU job may take before it counts as hung.",
        evidence=Evidence(
            "reported",
            "20000 ended false 'device lost' on long prompts.",
            "LLMKube pull request 886",
        ),
        doc="Documentation/gpu/amdgpu/module-parameters.rst",
        absent="amdgpu is not loaded",
    ),
    _at_boot(
        id="amd_iommu",
        paths=("/proc/cmdline",),
        value=KernelParameter("amd_iommu", Choice(("off",))),
        summary="Switches the IOMMU off.",
        evidence=Evidence(
            "reported",
            "+5 to 19 % prefill, 0 to 4 % decode in published A/B runs; iommu=pt gave nothing.",
            "kyuz0/amd-strix-halo-toolboxes issue 66; nix-amd-ai pull request 132",
        ),
        doc="Documentation/admin-guide/kernel-parameters.txt",
        absent="there is no kernel command line to read",
        note=_price_of_no_iommu,
    ),
    _at_boot(
        id="isolcpus",
        paths=("/proc/cmdline",),
        value=KernelParameter("isolcpus", IsolatedCpus()),
        summary="CPUs the scheduler leaves alone; cpus_partition does it without a boot.",
        evidence=Evidence(
            "protective, unmeasured",
            "No gain found for GPU inference; [launch] cpus_partition is the reversible way.",
            "field reports collected 2026-11",
        ),
        doc="Documentation/admin-guide/kernel-parameters.txt",
        absent="there is no kernel command line to read",
    ),
    _at_boot(
        id="transparent_hugepage",
        paths=("/proc/cmdline",),
        value=KernelParameter("transparent_hugepage", Choice(("always", "madvise", "never"))),
        summary="Huge pages from the first process on; transparent_hugepage.enabled needs no boot.",
        evidence=Evidence(
            "protective, unmeasured",
            "Only for what starts before infertune; GPU memory is not affected.",
            "Documentation/admin-guide/mm/transhuge.rst",
        ),
        doc="Documentation/admin-guide/mm/transhuge.rst",
        absent="there is no kernel command line to read",
    ),
)
