# SPDX-License-Identifier: Apache-2.0
"""One reading of everything the rules need.

Each reading is bounded, none of them raises, and what cannot be read is :class:`Unknown` with the
reason.  ``None`` is what is known to be absent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import KIB
from infertune.boot.sizes import next_boot, outlooks
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import LlamaServer, Staged, Surroundings
from infertune.host import kernel_log
from infertune.host.boot_writes import BootWrite, boot_writes
from infertune.host.cgroup import group_limit
from infertune.host.container import container_kind
from infertune.host.coredump import CoreDumps, core_dumps
from infertune.host.cpu import boost, platform_profile, policies
from infertune.host.devices import XDNA_IDS, on_mains, pci_devices, read_ahead_kib
from infertune.host.gpu import (
    hwmon,
    is_loaded,
    kfd_nodes,
    mes_version,
    module_parameter,
    performance_level,
    shows_parameters,
)
from infertune.host.machine import Gpu, Machine, read_machine
from infertune.host.memory import free_huge_blocks, meminfo, overcommit, pressure, vmstat
from infertune.host.modprobe import Assignment, Sources, read_sources
from infertune.host.nodes import Node
from infertune.host.packages import packages, python_programs, rocm_version, vulkan_drivers
from infertune.host.power_at_boot import PowerAtBoot, power_at_boot
from infertune.host.redaction import GPU_MODULES
from infertune.host.servers import Declared, read_servers
from infertune.host.swap import swappiness
from infertune.host.system import COMMAND_LINE, booted, locked_limit, parameters
from infertune.host.thp import huge_pages
from infertune.host.tuners import Tuned, tuned
from infertune.host.unknown import Unknown, need
from infertune.host.version import Version
from infertune.pools.boot import Outlook
from infertune.pools.facts import PoolFacts
from infertune.pools.facts import read_facts as read_pool_facts

T = TypeVar("T")

_LOG_LIMIT = 4 * 1024 * KIB
_POLICIES = 1024
_SANE = 1 << 50
"""No size in bytes, pages or microwatts of these machines is larger."""


@dataclass(frozen=True, slots=True)
class OptionFile:
    """A file of modprobe.d with options of the GPU's modules."""

    path: str
    modified: int | None


@dataclass(frozen=True, slots=True)
class Initramfs:
    path: str
    modified: int


@dataclass(frozen=True, slots=True)
class Sensors:
    """Of the inference GPU; None where it has no such file."""

    cap_watts: float | None
    cap_default_watts: float | None
    temperature_c: float | None
    fan_rpm: int | None
    fan_by_hand: bool | None
    level: str | None
    """power_dpm_force_performance_level."""


@dataclass(frozen=True, slots=True)
class Processor:
    governors: frozenset[str]
    preferences: frozenset[str]
    lowest_limit: float | None
    """Least scaling_max_freq over cpuinfo_max_freq of all policies; 1.0 is uncapped."""
    boost: bool | None
    platform_profile: str | None
    mains: bool | None
    """Whether a power supply is plugged in; None where there is none to ask (a desktop)."""


@dataclass(frozen=True, slots=True)
class Paging:
    thp: str | None
    meminfo: Mapping[str, int]
    """/proc/meminfo, in bytes; counts as they are."""
    overcommit: int | None
    stalled_percent: float | None
    """PSI: share of the last 300 s in which everything waited for memory."""
    free_huge_blocks: int | None
    """Free blocks of 2 MiB and more, all zones; None where buddyinfo is not there."""
    oom_kills: int | None
    compaction_failures: int | None
    locked_limit: int | None
    """RLIMIT_MEMLOCK (hard) of the caller in bytes; None for no limit."""
    group_limit: int | None
    """memory.max of the control group this system is in: a container; None for no limit."""
    read_ahead: Mapping[str, int]
    """KiB, by NVMe disk."""


@dataclass(frozen=True, slots=True)
class Smoke:
    """What came of asking a server for one token."""

    outcome: str
    """``answered``, ``illegal-instruction``, ``died``, ``silent`` or ``not-run``."""
    detail: str


@dataclass(frozen=True, slots=True)
class Facts:
    machine: Machine
    live: bool
    parameters: tuple[tuple[str, str], ...] | Unknown
    """The kernel command line, in order; a word without ``=`` has the value ""."""
    options: tuple[Assignment, ...] | Unknown
    """Options of the GPU's modules: of files first, then of the command line."""
    option_files: tuple[OptionFile, ...] | Unknown
    odd_files: tuple[str, ...]
    """What is odd about files of modprobe.d, one sentence each."""
    live_options: Mapping[str, str | None] | Unknown
    """``module.name`` of what is configured or matters: value in force, None where not shown."""
    initramfs: Initramfs | Unknown
    booted: int | Unknown
    """Seconds since 1970."""
    mes: int | Unknown
    """Version of the GPU's MES scheduler firmware."""
    packages: Mapping[str, str] | Unknown
    """Versions of packages that matter; absent ones are left out."""
    rocm: Version | Unknown | None
    vulkan: tuple[str, ...] | Unknown
    """Names of installed ICD manifests."""
    kfd_context: bool | Unknown | None
    """Whether KFD tells the size of its save area (CWSR); None without a GPU in its topology."""
    npu_device: bool | Unknown
    """Whether there is an XDNA NPU on the bus, with or without a driver."""
    undriven_gpus: tuple[str, ...] | Unknown
    """PCI ids of AMD display devices without a driver."""
    modules: frozenset[str] | Unknown
    """Of the GPU's modules, those that are loaded."""
    sensors: Sensors | Unknown
    processor: Processor | Unknown
    paging: Paging | Unknown
    tuned: Tuned | Unknown | None
    log: tuple[str, ...] | Unknown
    declared: tuple[Declared, ...] | Unknown
    memory: PoolFacts
    """Of the GPU, as :mod:`infertune.pools` judges it."""
    next_boot: PoolFacts | Unknown
    """The same after the next boot."""
    outlooks: tuple[Outlook, ...]
    """Ways to more memory for the GPU that 'infertune boot' accepts here."""
    python: frozenset[str] | Unknown
    """Of vllm and llmlingua, those in the system's Python."""
    environment: Mapping[str, str] | Unknown
    server: LlamaServer | Unknown | None
    devices: Mapping[str, Node] | Unknown
    staged: Staged | Unknown
    compute_clients: int | Unknown
    """Processes that have ROCm open."""
    container: str | Unknown | None
    """Kind of the container this system is; None for none."""
    power_at_boot: tuple[PowerAtBoot, ...] | Unknown
    boot_writes: tuple[BootWrite, ...] | Unknown
    core_dumps: CoreDumps | Unknown | None
    swappiness: int | Unknown
    smoke: Smoke | None = None

    # -- what many rules ask ---------------------------------------------------

    @property
    def kernel(self) -> Version:
        """Raises Missing where the release is not known."""
        # A release of thousands of digits is no release, and int() would refuse it.
        known = self.machine.kernel is not None and len(self.machine.kernel) < 200
        version = self.machine.kernel_version if known else ()
        return need(version or Unknown("the kernel's release cannot be read"))

    @property
    def gpu(self) -> Gpu:
        """Raises Missing where no GPU stands out."""
        return need(self.machine.inference_gpu or Unknown("no GPU to run models on was found"))

    @property
    def build(self) -> int:
        """Number of llama-server's build.  Raises Missing."""
        server = need(self.llama)
        unnumbered = Unknown(f"llama-server was built without a build number ({server.version})")
        return need(server.build or unnumbered)

    @property
    def llama(self) -> LlamaServer | Unknown:
        return self.server or Unknown("there is no llama-server on the search path")

    def parameter(self, name: str) -> str | None:
        """The last value of a kernel parameter; None where it is not given.  Raises Missing."""
        values = [value for key, value in need(self.parameters) if key == name]
        return values[-1] if values else None

    def configured(self, module: str, name: str) -> list[Assignment]:
        """What is configured for one parameter of a module.  Raises Missing."""
        return [each for each in need(self.options) if (each.module, each.name) == (module, name)]

    @property
    def loaded(self) -> frozenset[str]:
        """Of the GPU's modules, those that are loaded.  Raises Missing."""
        modules = need(self.modules)
        hidden = not modules and any(gpu.driver == "amdgpu" for gpu in self.machine.gpus)
        return need(Unknown("the kernel's modules are not shown here") if hidden else modules)

    def shows(self, module: str) -> bool:
        """Whether any parameter of a module can be read here.  Raises Missing."""
        live = need(self.live_options)
        return any(live[key] is not None for key in live if key.startswith(f"{module}."))

    def option(self, module: str, name: str) -> str | Unknown:
        """The value of a module's parameter: the one in force, else the one configured.

        A file that is not there says nothing of its value.  Raises Missing.
        """
        live = need(self.live_options).get(f"{module}.{name}")
        configured = self.configured(module, name)
        if live is not None or not configured:
            return live if live is not None else Unknown(f"{module}.{name} is not shown here")
        return configured[-1].value

    def variables(self, name: str) -> list[tuple[str, str]]:
        """Values of a variable and who has it: the caller, declared servers.  Raises Missing."""
        found = [
            (each.environment[name], each.origins.get(name, each.path))
            for each in need(self.declared)
            if name in each.environment
        ]
        if found and isinstance(self.environment, Unknown):
            return list(dict.fromkeys(found))  # what is known is known without the caller
        caller = need(self.environment)
        own = [(caller[name], "your environment")] if name in caller else []
        return list(dict.fromkeys([*own, *found]))


def read_facts(
    root: Root,
    surroundings: Surroundings,
    smoke: Smoke | None = None,
    machine: Machine | None = None,
) -> Facts:
    """Everything, once.  Never raises for what a machine, or a broken file of it, can hold.

    ``machine`` is for whoever has read it.
    """
    machine = machine or read_machine(root)
    given = _guarded(lambda: _parameters(machine))
    sources = read_sources(root)
    options = given if isinstance(given, Unknown) else _options(sources)
    installed = _guarded(lambda: packages(root))
    memory = read_pool_facts(root, machine)
    return Facts(
        machine=machine,
        live=root.live,
        parameters=given,
        options=options,
        option_files=_guarded(lambda: _option_files(root, sources)),
        odd_files=tuple(p for p in sources.problems if not p.startswith(COMMAND_LINE)),
        live_options=_guarded(lambda: _live_options(root, _options(sources))),
        initramfs=_guarded(lambda: _initramfs(root, machine)),
        booted=_guarded(lambda: booted(root)),
        mes=_guarded(lambda: _mes(root, machine)),
        packages=installed,
        rocm=_guarded(lambda: rocm_version(root, installed)),
        vulkan=_guarded(lambda: _vulkan(root)),
        kfd_context=_guarded(lambda: _kfd_context(root)),
        npu_device=_guarded(lambda: _has_npu(root, machine)),
        undriven_gpus=_guarded(lambda: _undriven(root)),
        modules=_guarded(lambda: _modules(root)),
        sensors=_guarded(lambda: _sensors(root, machine)),
        processor=_guarded(lambda: _processor(root)),
        paging=_guarded(lambda: _paging(root)),
        tuned=_guarded(lambda: tuned(root)),
        log=_guarded(lambda: _log(root, surroundings)),
        memory=memory,
        next_boot=next_boot(root, machine, memory),
        outlooks=outlooks(root, machine, memory),
        declared=_guarded(lambda: read_servers(root)),
        python=_guarded(lambda: python_programs(root)),
        environment=surroundings.environment,
        server=surroundings.server,
        devices=surroundings.devices,
        staged=surroundings.staged,
        compute_clients=surroundings.compute_clients,
        container=_guarded(lambda: container_kind(root)),
        power_at_boot=_guarded(lambda: power_at_boot(root)),
        boot_writes=_guarded(lambda: boot_writes(root)),
        core_dumps=_guarded(lambda: core_dumps(root)),
        swappiness=_guarded(lambda: swappiness(root)),
        smoke=smoke,
    )


def _guarded(read: Callable[[], T]) -> T | Unknown:
    """A reading that fails is unknown; it must not take the others with it."""
    try:
        return read()
    except OSError as error:
        return Unknown(_why(error))
    except Exception as error:
        return Unknown(f"reading it failed, please report: {type(error).__name__}: {error}")


def _why(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{_words(error)}"


def _words(error: OSError) -> str:
    words = error.strerror or "cannot be read"
    return words[:1].lower() + words[1:]


# -- settings of the boot --------------------------------------------------------


def _parameters(machine: Machine) -> tuple[tuple[str, str], ...] | Unknown:
    if machine.cmdline is None:
        return Unknown("the kernel command line cannot be read")
    return tuple(parameters(machine.cmdline))


def _options(sources: Sources) -> tuple[Assignment, ...]:
    """Options of the GPU's modules: of files first, then of the command line."""
    return tuple(each for each in sources.assignments if each.module in GPU_MODULES)


def _option_files(root: Root, sources: Sources) -> tuple[OptionFile, ...]:
    """The files that have such options."""
    named = dict.fromkeys(each.file for each in _options(sources))
    return tuple(OptionFile(path, root.modified(path)) for path in sources.files if path in named)


_WATCHED = (
    *("ttm.pages_limit", "amdttm.pages_limit", "amd_ttm.pages_limit"),
    *("ttm.page_pool_size", "amdttm.page_pool_size", "amd_ttm.page_pool_size"),
    *("amdgpu.gttsize", "amdgpu.cwsr_enable", "amdgpu.lockup_timeout"),
    "amdgpu.no_system_mem_limit",
)


def _live_options(root: Root, options: tuple[Assignment, ...]) -> Mapping[str, str | None]:
    names = {*_WATCHED, *(f"{each.module}.{each.name}" for each in options)}
    live: dict[str, str | None] = {}
    for key in sorted(names):
        module, _, name = key.partition(".")
        if re.fullmatch(r"\w{1,60}", name) and shows_parameters(root, module):
            live[key] = module_parameter(root, module, name)
    return live


def _modules(root: Root) -> frozenset[str]:
    return frozenset(name for name in GPU_MODULES if is_loaded(root, name))


def _initramfs(root: Root, machine: Machine) -> Initramfs | Unknown:
    release = machine.kernel or ""
    if not re.fullmatch(r"[\w.+~-]{1,120}", release):
        return Unknown("the kernel's release cannot be read")
    # Debian; Fedora and dracut elsewhere; openSUSE; then Arch, which names it after the package.
    names = (f"initrd.img-{release}", f"initramfs-{release}.img", f"initrd-{release}")
    arch = sorted(root.glob("/boot/initramfs-linux*.img"), key=len)
    packaged = [] if "fallback" in "".join(arch[:1]) else arch[:1]
    for path in (*(f"/boot/{name}" for name in names), *packaged):
        modified = root.modified(path)
        if modified is not None:
            return Initramfs(path, modified)
    return Unknown("no initramfs of this kernel was found in /boot")


# -- hardware, firmware, drivers ---------------------------------------------------


def _mes(root: Root, machine: Machine) -> int | Unknown:
    gpu = machine.inference_gpu
    if gpu is None:
        return Unknown("no GPU to run models on was found")
    return mes_version(root, gpu.path)


def _vulkan(root: Root) -> tuple[str, ...] | Unknown:
    # A snapshot from before the doctor did not look there.
    if not any(map(root.exists, ("/usr/share/vulkan/icd.d", SURROUNDINGS))) and not root.live:
        return Unknown("the snapshot does not say which Vulkan drivers there are")
    return vulkan_drivers(root)


def _kfd_context(root: Root) -> bool | None:
    return next((node.has_save_area for node in kfd_nodes(root)), None)


def _has_npu(root: Root, machine: Machine) -> bool | Unknown:
    if machine.npu == "amdxdna":
        return True
    devices = pci_devices(root)
    if not devices:
        return Unknown("the PCI bus cannot be read")
    return any(device.ids in XDNA_IDS for device in devices)


def _undriven(root: Root) -> tuple[str, ...] | Unknown:
    devices = pci_devices(root)
    if not devices:
        return Unknown("the PCI bus cannot be read")
    return tuple(
        device.ids
        for device in devices
        # Base class 0x03 is a display controller, 0x12 an accelerator.
        if device.ids.startswith("1002:")
        and device.kind.startswith("0x03")
        and device.driver is None
    )


def _sane(value: int | None) -> int | None:
    return None if value is None or abs(value) > _SANE else value


def _scaled(value: int | None, scale: float) -> float | None:
    sane = _sane(value)
    return None if sane is None else sane / scale


def _sensors(root: Root, machine: Machine) -> Sensors | Unknown:
    gpu = machine.inference_gpu
    if gpu is None:
        return Unknown("no GPU to run models on was found")
    monitor = hwmon(root, gpu.path)
    temperatures = list(monitor.temperatures_mc.values()) if monitor else []
    return Sensors(
        cap_watts=_scaled(monitor.power_cap_uw, 1e6) if monitor else None,
        cap_default_watts=_scaled(monitor.power_cap_default_uw, 1e6) if monitor else None,
        temperature_c=_scaled(temperatures[0], 1e3) if temperatures else None,
        fan_rpm=monitor.fan_rpm if monitor else None,
        fan_by_hand=monitor.fan_by_hand if monitor else None,
        level=performance_level(root, gpu.path),
    )


def _processor(root: Root) -> Processor:
    found = policies(root, _POLICIES)
    limits = [
        each.scaling_max / each.hardware_max
        for each in found
        if each.scaling_max
        and each.hardware_max
        and 0 < each.scaling_max <= _SANE
        and 0 < each.hardware_max <= _SANE
    ]
    return Processor(
        governors=frozenset(filter(None, (each.governor for each in found))),
        preferences=frozenset(filter(None, (each.preference for each in found))),
        lowest_limit=min(limits, default=None),
        boost=boost(root),
        platform_profile=platform_profile(root),
        mains=on_mains(root),
    )


# -- memory ------------------------------------------------------------------------


def _paging(root: Root) -> Paging:
    full = [each for each in pressure(root)["memory"] if each.share == "full"]
    events = vmstat(root)
    return Paging(
        thp=huge_pages(root),
        meminfo=meminfo(root),
        overcommit=overcommit(root),
        stalled_percent=full[0].average_300s_percent if full else None,
        free_huge_blocks=free_huge_blocks(root),
        oom_kills=events.get("oom_kill"),
        compaction_failures=events.get("compact_fail"),
        locked_limit=locked_limit(root),
        group_limit=group_limit(root),
        read_ahead=read_ahead_kib(root),
    )


# -- software ------------------------------------------------------------------------


def _log(root: Root, surroundings: Surroundings) -> tuple[str, ...] | Unknown:
    if surroundings.journal is not None:
        return surroundings.journal
    try:
        return tuple(kernel_log.messages(root.read_records("/dev/kmsg", _LOG_LIMIT)))
    except PermissionError:
        return Unknown("the kernel log is for root here, and the journal gives none of it")
    except FileNotFoundError:
        return Unknown("there is no kernel log here")
