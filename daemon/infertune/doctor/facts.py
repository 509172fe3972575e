# SPDX-License-Identifier: Apache-2.0
"""One reading of everything the rules need.

Each reading is bounded, none of them raises, and what cannot be read is :class:`Unknown` with the
reason.  ``None`` is what is known to be absent.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from infertune import kernel_log
from infertune.boot.sources import config_files, options_of
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import LlamaServer, Staged, Surroundings
from infertune.host.unknown import Unknown, need
from infertune.host.version import Version
from infertune.knobs.boot import parameters
from infertune.machine import Gpu, Machine, read_machine
from infertune.redaction import GPU_MODULES, reduce_file
from infertune.root import Root
from infertune.units import KIB

T = TypeVar("T")

_SMALL = 64 * KIB
_LOG_LIMIT = 4 * 1024 * KIB
_STATUS_LIMIT = 32 * 1024 * KIB
"""dpkg's status file: some 1.5 KiB a package."""
_SANE = 1 << 50
"""No size in bytes, pages or microwatts of these machines is larger."""
_FILES_LIMIT = 400
"""Files looked into in one directory."""


@dataclass(frozen=True, slots=True)
class Option:
    """One parameter of a module as somebody configured it."""

    module: str
    """With ``_``, as below /sys/module."""
    name: str
    value: str
    origin: str
    """``the kernel command line`` or the path of a file."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}={self.value}"


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
class Declared:
    """A model server that a file starts: a unit of systemd's, or one of /etc/infertune."""

    path: str
    model: str | None
    """Label of its model, quantisation only; None where the file names none."""
    flags: Mapping[str, str]
    """Flags that matter and their values, empty for a switch."""
    environment: Mapping[str, str]
    settings: Mapping[str, str]
    """What it may use: LimitMEMLOCK, MemoryMin, AllowedCPUs and the like."""

    def has(self, *flags: str) -> bool:
        return not self.flags.keys().isdisjoint(flags)


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
    options: tuple[Option, ...] | Unknown
    """Options of the GPU's modules: of files first, then of the command line."""
    option_files: tuple[OptionFile, ...] | Unknown
    odd_files: tuple[str, ...]
    """Files of modprobe.d that are not what they should be: ``path: why``."""
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
    tuned_profile: str | Unknown | None
    log: tuple[str, ...] | Unknown
    declared: tuple[Declared, ...] | Unknown
    python: frozenset[str] | Unknown
    """Of vllm and llmlingua, those in the system's Python."""
    environment: Mapping[str, str] | Unknown
    server: LlamaServer | Unknown | None
    devices: Mapping[str, bool] | Unknown
    staged: Staged | Unknown
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

    def configured(self, module: str, name: str) -> list[Option]:
        """What is configured for one parameter of a module.  Raises Missing."""
        return [each for each in need(self.options) if (each.module, each.name) == (module, name)]

    def variables(self, name: str) -> list[tuple[str, str]]:
        """Values of a variable and who has it: the caller, declared servers.  Raises Missing."""
        found = [
            (each.environment[name], each.path)
            for each in need(self.declared)
            if name in each.environment
        ]
        caller = need(self.environment)
        return [(caller[name], "your environment"), *found] if name in caller else found


def read_facts(root: Root, surroundings: Surroundings, smoke: Smoke | None = None) -> Facts:
    """Everything, once.  Never raises for what a machine, or a broken file of it, can hold."""
    machine = read_machine(root)
    given = _guarded(lambda: _parameters(machine))
    found = _guarded(lambda: _modprobe(root))
    files, from_files, odd = ((), (), ()) if isinstance(found, Unknown) else found
    options: tuple[Option, ...] | Unknown
    if isinstance(found, Unknown):
        options = found
    elif isinstance(given, Unknown):
        options = given
    else:
        options = (*from_files, *_module_options(given))
    packages = _guarded(lambda: _packages(root))
    return Facts(
        machine=machine,
        live=root.live,
        parameters=given,
        options=options,
        option_files=found if isinstance(found, Unknown) else files,
        odd_files=odd,
        live_options=_guarded(lambda: _live_options(root, options)),
        initramfs=_guarded(lambda: _initramfs(root, machine)),
        booted=_guarded(lambda: _booted(root)),
        mes=_guarded(lambda: _mes(root, machine)),
        packages=packages,
        rocm=_guarded(lambda: _rocm(root, packages)),
        vulkan=_guarded(lambda: _vulkan(root)),
        kfd_context=_guarded(lambda: _kfd_context(root)),
        npu_device=_guarded(lambda: _has_npu(root, machine)),
        undriven_gpus=_guarded(lambda: _undriven(root)),
        modules=_guarded(lambda: _modules(root)),
        sensors=_guarded(lambda: _sensors(root, machine)),
        processor=_guarded(lambda: _processor(root)),
        paging=_guarded(lambda: _paging(root)),
        tuned_profile=_guarded(lambda: _tuned_profile(root)),
        log=_guarded(lambda: _log(root, surroundings)),
        declared=_guarded(lambda: _declared(root)),
        python=_guarded(lambda: _python(root)),
        environment=surroundings.environment,
        server=surroundings.server,
        devices=surroundings.devices,
        staged=surroundings.staged,
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


def _module_options(given: tuple[tuple[str, str], ...]) -> list[Option]:
    found = []
    for key, value in given:
        module, dot, name = key.replace("-", "_").partition(".")
        if dot and module in GPU_MODULES:
            found.append(Option(module, name, value, "the kernel command line"))
    return found


def _modprobe(
    root: Root,
) -> tuple[tuple[OptionFile, ...], tuple[Option, ...], tuple[str, ...]]:
    """What ``infertune boot`` reads, reduced to what a snapshot would have of it."""
    files, options, odd = [], [], []
    for path in config_files(root)[:_FILES_LIMIT]:
        try:
            text = root.read_small(path, _SMALL)
        except OSError as error:
            odd.append(f"{path}: {_words(error)}")
            continue
        part = reduce_file(path, text.encode())
        if part is None:
            continue
        files.append(OptionFile(path, root.modified(path)))
        options += [
            Option(each.module, each.name, each.value, path) for each in options_of(path, part, [])
        ]
    return tuple(files), tuple(options), tuple(odd)


_WATCHED = (
    *("ttm.pages_limit", "amdttm.pages_limit", "amd_ttm.pages_limit"),
    *("ttm.page_pool_size", "amdttm.page_pool_size", "amd_ttm.page_pool_size"),
    *("amdgpu.gttsize", "amdgpu.cwsr_enable", "amdgpu.lockup_timeout"),
    "amdgpu.no_system_mem_limit",
)


def _live_options(root: Root, options: tuple[Option, ...] | Unknown) -> Mapping[str, str | None]:
    configured = () if isinstance(options, Unknown) else options
    names = {*_WATCHED, *(f"{each.module}.{each.name}" for each in configured)}
    live: dict[str, str | None] = {}
    for key in sorted(names):
        module, _, name = key.partition(".")
        if re.fullmatch(r"\w{1,60}", name) and root.exists(f"/sys/module/{module}/parameters"):
            live[key] = root.get(f"/sys/module/{module}/parameters/{name}")
    return live


def _modules(root: Root) -> frozenset[str]:
    return frozenset(name for name in GPU_MODULES if root.exists(f"/sys/module/{name}"))


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


def _booted(root: Root) -> int | Unknown:
    for line in (root.get("/proc/stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "btime" and value.isascii() and value.isdecimal() and len(value) < 15:
            return int(value)
    return Unknown("/proc/stat does not say when the machine was started")


# -- hardware, firmware, drivers ---------------------------------------------------


def _mes(root: Root, machine: Machine) -> int | Unknown:
    gpu = machine.inference_gpu
    if gpu is None:
        return Unknown("no GPU to run models on was found")
    # World-readable, where the driver has it (amdgpu_ucode.c).
    version = root.get_int(f"{gpu.path}/fw_version/mes_fw_version")
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


def _packages(root: Root) -> Mapping[str, str] | Unknown:
    if root.exists("/var/lib/dpkg/status"):
        text = root.read_small("/var/lib/dpkg/status", _STATUS_LIMIT)
        part = (reduce_file("/var/lib/dpkg/status", text.encode()) or b"").decode()
        found = re.findall(
            r"^Package: (\S+)\nStatus: install ok installed\nVersion: (\S+)$", part, re.MULTILINE
        )
        return dict(found)
    # pacman: one directory for each package, with its version in the name.
    packages = {}
    for name in ("linux-firmware-amdgpu", "linux-firmware", "rocm-core", "hsa-rocr", "amdvlk"):
        for path in root.glob(f"/var/lib/pacman/local/{name}-[0-9]*"):
            if root.exists(path):
                packages[name] = path.rpartition("/")[2].removeprefix(f"{name}-")
    if packages:
        return packages
    return Unknown("the package database of this system is not one infertune reads")


def _rocm(root: Root, packages: Mapping[str, str] | Unknown) -> Version | Unknown | None:
    # /opt/rocm is a link to one of them, the one that programs find.
    for path in ("/opt/rocm/.info/version", *reversed(root.glob("/opt/rocm-*/.info/version"))):
        text = root.get(path)
        if text is not None:
            numbers = re.match(r"\d{1,4}(?:\.\d{1,6}){1,3}", text)
            if numbers is None:
                return Unknown(f"{path} holds no version")
            return tuple(int(part) for part in numbers[0].split("."))
    # A distribution's own: the library's name has the first two numbers of ROCm's version.
    for pattern in ("/usr/lib64/libamdhip64.so.*", "/usr/lib/*-linux-gnu/libamdhip64.so.*"):
        for path in root.glob(pattern):
            numbers = re.search(r"\.so\.(\d{1,4})\.(\d{1,6})\.", path, re.ASCII)
            if numbers and root.exists(path):
                return int(numbers[1]), int(numbers[2])
    if isinstance(packages, Unknown):
        return Unknown("ROCm is not in /opt/rocm, and the package database cannot be read")
    for name in ("rocm-core", "hsa-rocr"):
        numbers = re.match(r"(?:\d+:)?(\d{1,4}(?:\.\d{1,6}){1,3})", packages.get(name, ""))
        if numbers:
            return tuple(int(part) for part in numbers[1].split("."))
    return None


_ICD = re.compile(r"(radeon_icd|amd_icd|amd_pro_icd|intel_icd|nvidia_icd|lvp_icd)[\w.-]*\.json")


def _vulkan(root: Root) -> tuple[str, ...] | Unknown:
    found = []
    # A snapshot from before the doctor did not look there.
    if not any(map(root.exists, ("/usr/share/vulkan/icd.d", SURROUNDINGS))) and not root.live:
        return Unknown("the snapshot does not say which Vulkan drivers there are")
    for directory in ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"):
        for path in root.glob(f"{directory}/*.json")[:_FILES_LIMIT]:
            name = path.rpartition("/")[2]
            if _ICD.fullmatch(name) and root.exists(path):
                found.append(name)
    return tuple(dict.fromkeys(found))


def _kfd_context(root: Root) -> bool | None:
    for path in root.glob("/sys/class/kfd/kfd/topology/nodes/*/properties"):
        properties = dict(
            line.split(" ", 1)
            for line in (root.get(path) or "").splitlines()
            if line.count(" ") == 1
        )
        if properties.get("gfx_target_version", "0") != "0":
            return "cwsr_size" in properties and "ctl_stack_size" in properties
    return None


def _pci(root: Root) -> list[tuple[str, str, str]]:
    """Path, ``vendor:device`` and class of every PCI device."""
    found = []
    for path in root.glob("/sys/bus/pci/devices/*")[:_FILES_LIMIT]:
        vendor, device = root.get(f"{path}/vendor"), root.get(f"{path}/device")
        if vendor and device:
            ids = f"{vendor.removeprefix('0x')}:{device.removeprefix('0x')}"
            found.append((path, ids, root.get(f"{path}/class") or ""))
    return found


_NPUS = ("1022:17f0", "1022:1502")
"""XDNA 2 (Strix, Strix Halo, Krackan) and XDNA (Phoenix, Hawk Point), amdxdna's table of ids."""


def _has_npu(root: Root, machine: Machine) -> bool | Unknown:
    if machine.npu == "amdxdna":
        return True
    devices = _pci(root)
    if not devices:
        return Unknown("the PCI bus cannot be read")
    return any(ids in _NPUS for _, ids, _ in devices)


def _undriven(root: Root) -> tuple[str, ...] | Unknown:
    devices = _pci(root)
    if not devices:
        return Unknown("the PCI bus cannot be read")
    return tuple(
        ids
        for path, ids, kind in devices
        # Base class 0x03 is a display controller, 0x12 an accelerator.
        if ids.startswith("1002:")
        and kind.startswith("0x03")
        and root.readlink(f"{path}/driver") is None
    )


def _number(root: Root, path: str, scale: float) -> float | None:
    value = root.get_int(path)
    return None if value is None or abs(value) > _SANE else value / scale


def _sensors(root: Root, machine: Machine) -> Sensors | Unknown:
    gpu = machine.inference_gpu
    if gpu is None:
        return Unknown("no GPU to run models on was found")
    monitors = root.names(f"{gpu.path}/hwmon")
    hwmon = f"{gpu.path}/hwmon/{monitors[0]}" if monitors else f"{gpu.path}/hwmon/none"
    by_hand = root.get_int(f"{hwmon}/pwm1_enable")
    return Sensors(
        cap_watts=_number(root, f"{hwmon}/power1_cap", 1e6),
        cap_default_watts=_number(root, f"{hwmon}/power1_cap_default", 1e6),
        temperature_c=_number(root, f"{hwmon}/temp1_input", 1e3),
        fan_rpm=root.get_int(f"{hwmon}/fan1_input"),
        # hwmon: 0 full speed, 1 by hand, 2 automatic.
        fan_by_hand=None if by_hand is None else by_hand == 1,
        level=root.get(f"{gpu.path}/power_dpm_force_performance_level"),
    )


def _processor(root: Root) -> Processor:
    base = "/sys/devices/system/cpu/cpufreq"
    policies = root.glob(f"{base}/policy*")
    limits = []
    for policy in policies:
        most, hardware = (
            root.get_int(f"{policy}/{name}") for name in ("scaling_max_freq", "cpuinfo_max_freq")
        )
        if most and hardware and 0 < most <= _SANE and 0 < hardware <= _SANE:
            limits.append(most / hardware)
    boost = root.get_int(f"{base}/boost")
    # Named by the firmware: AC, ACAD, ADP1; no other supply is called so.
    online = [root.get_int(path) for path in root.glob("/sys/class/power_supply/A*/online")]
    known = [each for each in online if each is not None]
    return Processor(
        governors=frozenset(filter(None, (root.get(f"{p}/scaling_governor") for p in policies))),
        preferences=frozenset(
            filter(None, (root.get(f"{p}/energy_performance_preference") for p in policies))
        ),
        lowest_limit=min(limits, default=None),
        boost=None if boost is None else boost == 1,
        platform_profile=root.get("/sys/firmware/acpi/platform_profile") or None,
        mains=any(known) if known else None,
    )


# -- memory ------------------------------------------------------------------------


def _paging(root: Root) -> Paging:
    limits = root.get("/proc/self/limits") or ""
    locked = re.search(r"^Max locked memory\s+\S+\s+(\d+|unlimited)\s", f"{limits} ", re.MULTILINE)
    pressure = re.search(
        r"^full .*avg300=(\d+\.\d+)", root.get("/proc/pressure/memory") or "", re.M
    )
    chosen = re.search(r"\[(\w+)\]", root.get("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    vmstat = _counters(root.get("/proc/vmstat"))
    return Paging(
        thp=chosen[1] if chosen else None,
        meminfo=_meminfo(root.get("/proc/meminfo")),
        overcommit=root.get_int("/proc/sys/vm/overcommit_memory"),
        stalled_percent=float(pressure[1]) if pressure else None,
        free_huge_blocks=_huge_blocks(root.get("/proc/buddyinfo")),
        oom_kills=vmstat.get("oom_kill"),
        compaction_failures=vmstat.get("compact_fail"),
        locked_limit=int(locked[1]) if locked and locked[1] != "unlimited" else None,
        group_limit=_group_limit(root),
        read_ahead={
            path.split("/")[3]: value
            for path in root.glob("/sys/block/nvme*/queue/read_ahead_kb")
            if (value := root.get_int(path)) is not None
        },
    )


def _counters(text: str | None) -> dict[str, int]:
    pairs = (line.split() for line in (text or "").splitlines())
    return {
        pair[0]: int(pair[1])
        for pair in pairs
        if len(pair) == 2 and pair[1].isascii() and pair[1].isdecimal() and len(pair[1]) < 20
    }


def _meminfo(text: str | None) -> dict[str, int]:
    found = re.findall(r"^(\w+): +(\d{1,15})( kB)?$", text or "", re.MULTILINE | re.ASCII)
    return {name: int(value) * (KIB if unit else 1) for name, value, unit in found}


def _huge_blocks(text: str | None) -> int | None:
    """Blocks of order 9 and above count as so many of order 9."""
    if not text:
        return None
    total = 0
    for line in text.splitlines():
        found = re.match(r"Node \d+, zone +\w+ +([\d ]+)$", line)
        counts = found[1].split() if found else []
        total += sum(int(count[:18]) << at for at, count in enumerate(counts[9:12]))
    return total


def _group_limit(root: Root) -> int | None:
    # In the real root group there is no such file: it stands for a control group namespace.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        value = root.get_int(path)
        if value is not None and value < 1 << 60:  # v1 says "no limit" with a very large number
            return value
    return None


# -- software ------------------------------------------------------------------------


def _tuned_profile(root: Root) -> str | None:
    text = root.get("/etc/tuned/active_profile")
    return text[:60] if text else None


def _log(root: Root, surroundings: Surroundings) -> tuple[str, ...] | Unknown:
    if surroundings.journal is not None:
        return surroundings.journal
    try:
        return tuple(kernel_log.messages(root.read_records("/dev/kmsg", _LOG_LIMIT)))
    except PermissionError:
        return Unknown("the kernel log is for root here, and the journal gives none of it")
    except FileNotFoundError:
        return Unknown("there is no kernel log here")


def _declared(root: Root) -> tuple[Declared, ...]:
    found = []
    paths = root.glob("/etc/systemd/system/*.service") + root.glob(
        "/etc/infertune/servers.d/*.toml"
    )
    for path in paths[:_FILES_LIMIT]:
        try:
            text = root.read_small(path, _SMALL)
        except OSError:
            continue
        part = reduce_file(path, text.encode())
        if not part:
            continue
        parse = _unit if path.endswith(".service") else _toml
        found.append(parse(path, part.decode()))
    return tuple(found)


def _toml(path: str, text: str) -> Declared:
    model = tomllib.loads(text).get("model")
    return Declared(path, model if isinstance(model, str) else None, {}, {}, {})


def _unit(path: str, text: str) -> Declared:
    flags: dict[str, str] = {}
    environment: dict[str, str] = {}
    settings: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "ExecStart":
            words = value.split()[1:]
            for at, word in enumerate(words):
                if word.startswith("-"):
                    follower = words[at + 1] if at + 1 < len(words) else "-"
                    flags[word] = "" if follower.startswith("-") else follower
        elif name == "Environment":
            variable, _, content = value.partition("=")
            environment[variable] = content
        elif name != "[Service]":
            settings[name] = value
    return Declared(path, flags.get("--model") or flags.get("-m"), flags, environment, settings)


def _python(root: Root) -> frozenset[str]:
    found = set()
    for name in ("vllm", "llmlingua"):
        for where in ("/usr/lib", "/usr/local/lib"):
            for path in root.glob(f"{where}/python3*/*-packages/{name}-*.dist-info"):
                if root.exists(path):
                    found.add(name)
    return frozenset(found)
