# SPDX-License-Identifier: Apache-2.0
"""What this machine is: facts read once, through :class:`Root` only.

Unknown is None, never zero.  A fact that can be absent is absent (None or an
empty tuple), not an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from infertune.host.text import integer, pairs
from infertune.root import Root
from infertune.units import KIB, parse_cpulist


@dataclass(frozen=True, slots=True)
class Core:
    """One physical core."""

    cpus: tuple[int, ...]
    """Logical CPUs (SMT siblings), lowest first."""
    package: int | None
    l3: int | None
    """Number of the last-level cache group (CCD on Zen), the lowest CPU that shares it."""
    kind: str | None
    """"performance" or "efficiency" on a hybrid processor, else None."""


@dataclass(frozen=True, slots=True)
class Cpu:
    vendor: str | None
    model: str | None
    online: tuple[int, ...]
    cores: tuple[Core, ...]
    scaling_driver: str | None
    """cpufreq driver of the first policy, e.g. ``amd-pstate-epp``."""
    amd_pstate: str | None
    """/sys/devices/system/cpu/amd_pstate/status: active, guided, passive, disable."""


@dataclass(frozen=True, slots=True)
class Memory:
    total_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    cma_total_bytes: int | None
    cma_free_bytes: int | None
    gpu_active_bytes: int | None
    """GPUActive of /proc/meminfo: pages the GPU holds, where the kernel counts them."""
    numa_nodes: int | None


@dataclass(frozen=True, slots=True)
class CarveoutSize:
    """One size that the firmware can set apart for the GPU."""

    number: str
    """Its number in the firmware's list; what is written to choose it."""
    size_bytes: int


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
    """mem_info_gtt_total: the limit amdgpu took at its start."""
    carveout: str | None
    """Chosen entry of uma/carveout, in the firmware's words (Linux >= 7.0)."""
    carveout_options: tuple[str, ...]
    carveout_sizes: tuple[CarveoutSize, ...] = ()
    """The options that name their size."""


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
class Dmi:
    vendor: str | None
    product: str | None
    board: str | None
    bios_version: str | None
    bios_date: str | None


@dataclass(frozen=True, slots=True)
class Cgroup:
    version: int | None
    """2 unified, 1 legacy or hybrid, None where no cgroup file system is mounted."""
    mount: str | None
    """Where the v2 hierarchy is mounted."""
    controllers: tuple[str, ...]
    """Controllers of the v2 root: what a group can be given at all."""


@dataclass(frozen=True, slots=True)
class Tuner:
    """Another program that sets the same knobs."""

    id: str
    name: str
    running: bool


@dataclass(frozen=True, slots=True)
class Machine:
    kernel: str | None
    """Release, e.g. ``7.1.3-200.fc44.x86_64``."""
    cmdline: str | None
    distro: str | None
    distro_id: str | None
    boot_style: str | None
    """How a kernel parameter gets to the command line here: see BOOT_STYLES."""
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

    @property
    def kernel_version(self) -> tuple[int, ...]:
        """Leading numbers of the release: (7, 1, 3); empty where it is not known."""
        match = re.match(r"\d+(?:\.\d+)*", self.kernel or "")
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

TTM_MODULES = ("amdttm", "amd_ttm", "ttm")
"""Most telling first: the DKMS ones exist for amdgpu only, ``ttm`` serves other drivers too."""


@dataclass(frozen=True, slots=True)
class BootStyle:
    """How a kernel parameter gets to the command line on one family of systems."""

    id: str
    how: str
    signs: tuple[tuple[str, ...], ...]
    """Every group needs one path that exists."""


BOOT_STYLES: tuple[BootStyle, ...] = (
    BootStyle(
        "none",
        "a container: the command line is the host's",
        (("/run/.containerenv", "/.dockerenv", "/run/systemd/container"),),
    ),
    BootStyle("nixos", "boot.kernelParams in configuration.nix", (("/etc/NIXOS",),)),
    # rpm-ostree images ship bootc too, and kargs of rpm-ostree are the easier ones to undo.
    BootStyle(
        "rpm-ostree", "rpm-ostree kargs", (("/run/ostree-booted",), ("/usr/bin/rpm-ostree",))
    ),
    BootStyle("bootc", "/usr/lib/bootc/kargs.d", (("/run/ostree-booted",), ("/usr/bin/bootc",))),
    BootStyle(
        "uki",
        "/etc/kernel/cmdline, built into the unified kernel image",
        # Set by systemd-stub (systemd.io, Boot Loader Interface); the GUID is systemd's vendor ID.
        (("/sys/firmware/efi/efivars/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f",),),
    ),
    BootStyle(
        "limine",
        "/etc/default/limine",
        (("/etc/default/limine", "/boot/limine.conf", "/boot/limine/limine.conf"),),
    ),
    BootStyle(
        "systemd-boot",
        "/etc/kernel/cmdline and kernel-install",
        (("/boot/loader/loader.conf", "/efi/loader/loader.conf", "/boot/efi/loader/loader.conf"),),
    ),
    BootStyle("bls", "grubby", (("/etc/default/grub",), ("/usr/sbin/grubby", "/usr/bin/grubby"))),
    BootStyle("grub", "/etc/default/grub.d and update-grub", (("/etc/default/grub",),)),
    # Fedora keeps this file beside GRUB as well, so it is the weakest sign.
    BootStyle(
        "systemd-boot", "/etc/kernel/cmdline and kernel-install", (("/etc/kernel/cmdline",),)
    ),
)
"""First match wins."""


@dataclass(frozen=True, slots=True)
class KnownTuner:
    """How to recognise a program that sets the same knobs."""

    id: str
    name: str
    units: tuple[str, ...]
    comms: tuple[str, ...]
    """Names of its processes, as the kernel cuts them: 15 characters."""
    marks: tuple[str, ...] = ()
    """Files it leaves while in force, where no process stays."""
    bus_names: tuple[str, ...] = ()
    """Well-known names it takes on the system bus while it runs."""
    writes: tuple[str, ...] = ()
    """Knobs it may set, as patterns of their ids; what its profile of now sets is fewer."""
    profile_file: str | None = None
    """Where it notes the profile it has applied."""


_PPD_NAMES = ("org.freedesktop.UPower.PowerProfiles", "net.hadess.PowerProfiles")
"""power-profiles-daemon's own since 0.20, and before; tuned-ppd and tlp-pd take them too."""

_PPD_WRITES = (
    "platform_profile",
    "cpufreq.energy_performance_preference",
    "cpufreq.scaling_governor",
    "cpufreq.boost",
)

TUNERS: tuple[KnownTuner, ...] = (
    KnownTuner(
        "tuned",
        "TuneD",
        ("tuned.service",),
        ("tuned",),
        bus_names=("com.redhat.tuned",),
        # Plugins acpi, cpu, sysctl, sysfs, video and vm.
        writes=(
            *("platform_profile", "cpufreq.*", "cpu_dma_latency", "vm.*", "kernel.*"),
            *("transparent_hugepage.*", "amdgpu.*", "ksm.*"),
        ),
        profile_file="/etc/tuned/active_profile",
    ),
    KnownTuner(
        "tuned-ppd",
        "tuned-ppd",
        ("tuned-ppd.service",),
        ("tuned-ppd",),
        bus_names=_PPD_NAMES,
    ),
    KnownTuner(
        "power-profiles-daemon",
        "power-profiles-daemon",
        ("power-profiles-daemon.service",),
        ("power-profiles-",),
        bus_names=_PPD_NAMES,
        # Its action amdgpu_dpm lowers the GPU's level in power-saver (0.22).
        writes=(*_PPD_WRITES, "amdgpu.power_dpm_force_performance_level"),
    ),
    KnownTuner(
        "tlp",
        "TLP",
        ("tlp.service", "tlp-pd.service"),
        ("tlp-pd",),
        marks=("/run/tlp/last_pwr",),
        bus_names=_PPD_NAMES,
        writes=(*_PPD_WRITES, "amdgpu.power_dpm_force_performance_level"),
    ),
    KnownTuner(
        "auto-cpufreq",
        "auto-cpufreq",
        ("auto-cpufreq.service",),
        ("auto-cpufreq",),
        writes=_PPD_WRITES,
    ),
    KnownTuner("irqbalance", "irqbalance", ("irqbalance.service",), ("irqbalance",)),
    KnownTuner(
        "gamemode",
        "GameMode",
        ("gamemoded.service",),
        ("gamemoded",),
        writes=(
            "cpufreq.scaling_governor",
            "platform_profile",
            "amdgpu.power_dpm_force_performance_level",
        ),
    ),
    KnownTuner(
        "system76-power",
        "system76-power",
        ("com.system76.PowerDaemon.service", "system76-power.service"),
        ("system76-power",),
        bus_names=("com.system76.PowerDaemon",),
        writes=(*_PPD_WRITES, "vm.*"),
    ),
)


def tuner_by_id(tuner: str) -> KnownTuner:
    """The entry of a tuner that was found on a machine."""
    return next(known for known in TUNERS if known.id == tuner)


_UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/usr/lib/systemd/user")


# -- reading ---------------------------------------------------------------------


def read_machine(root: Root) -> Machine:
    """Read every fact once.

    Never raises for what is absent, unreadable or makes no sense: that fact is None.
    """
    cpu = _read_cpu(root)
    cgroup = read_cgroup(root)
    release = _read_os_release(root)
    return Machine(
        kernel=_text(root, "/proc/sys/kernel/osrelease"),
        cmdline=_text(root, "/proc/cmdline"),
        distro=release.get("PRETTY_NAME") or release.get("NAME"),
        distro_id=release.get("ID"),
        boot_style=_read_boot_style(root),
        dmi=Dmi(
            vendor=_text(root, "/sys/class/dmi/id/sys_vendor"),
            product=_text(root, "/sys/class/dmi/id/product_name"),
            board=_text(root, "/sys/class/dmi/id/board_name"),
            bios_version=_text(root, "/sys/class/dmi/id/bios_version"),
            bios_date=_text(root, "/sys/class/dmi/id/bios_date"),
        ),
        cpu=cpu,
        memory=_read_memory(root),
        gpus=_read_gpus(root, cpu),
        kfd=root.exists("/sys/class/kfd/kfd"),
        npu=_read_npu(root),
        ttm=_read_ttm(root),
        cgroup=cgroup,
        tuners=_read_tuners(root, cgroup),
    )


def _text(root: Root, path: str) -> str | None:
    return root.get(path) or None


def _cpulist(root: Root, path: str) -> frozenset[int]:
    try:
        return parse_cpulist(root.get(path) or "")
    except ValueError:
        return frozenset()


def _driver(root: Root, device: str) -> str | None:
    link = root.readlink(f"{device}/driver")
    return link.rpartition("/")[2] if link else None


def _pci_id(root: Root, device: str) -> str | None:
    vendor, part = root.get_int(f"{device}/vendor"), root.get_int(f"{device}/device")
    return None if vendor is None or part is None else f"{vendor:04x}:{part:04x}"


def _read_os_release(root: Root) -> dict[str, str]:
    """os-release(5): the file of /etc counts before the one of /usr/lib."""
    text = _text(root, "/etc/os-release") or _text(root, "/usr/lib/os-release")
    return {key: value.strip("\"'") for key, value in pairs(text, "=").items()}


def _read_boot_style(root: Root) -> str | None:
    for style in BOOT_STYLES:
        if all(any(map(root.exists, group)) for group in style.signs):
            return style.id
    return None


def _read_cpu(root: Root) -> Cpu:
    base = "/sys/devices/system/cpu"
    info = pairs(root.get("/proc/cpuinfo"), ":")
    online = _cpulist(root, f"{base}/online")
    efficient = _efficient_cpus(root, online)
    cores: dict[int, Core] = {}
    for cpu in sorted(online):
        here = f"{base}/cpu{cpu}"
        # core_cpus_list since Linux 5.3, thread_siblings_list is its older name.
        siblings = _cpulist(root, f"{here}/topology/core_cpus_list") or _cpulist(
            root, f"{here}/topology/thread_siblings_list"
        )
        cpus = tuple(sorted(siblings & online)) or (cpu,)
        if cpus[0] in cores:
            continue
        cores[cpus[0]] = Core(
            cpus=cpus,
            package=root.get_int(f"{here}/topology/physical_package_id"),
            l3=_l3_group(root, here),
            kind=("efficiency" if cpu in efficient else "performance") if efficient else None,
        )
    drivers = root.glob(f"{base}/cpufreq/policy*/scaling_driver")
    return Cpu(
        vendor=info.get("vendor_id"),
        model=info.get("model name"),
        online=tuple(sorted(online)),
        cores=tuple(cores.values()),
        scaling_driver=_text(root, drivers[0]) if drivers else None,
        amd_pstate=_text(root, f"{base}/amd_pstate/status"),
    )


def _l3_group(root: Root, cpu: str) -> int | None:
    for level in root.glob(f"{cpu}/cache/index*/level"):
        if root.get_int(level) == 3:
            shared = _cpulist(root, level.removesuffix("level") + "shared_cpu_list")
            return min(shared, default=None)
    return None


def _efficient_cpus(root: Root, online: frozenset[int]) -> frozenset[int]:
    """The small CPUs of a hybrid processor; empty where all are alike.

    Intel's PMUs name them (cpu_atom, cpu_lowpower beside cpu_core).  Elsewhere the scheduler's
    capacity tells: favoured cores of one kind differ by a few percent, kinds by far more.
    """
    if root.exists("/sys/devices/cpu_core"):
        return _cpulist(root, "/sys/devices/cpu_atom/cpus") | _cpulist(
            root, "/sys/devices/cpu_lowpower/cpus"
        )
    capacity = {
        cpu: value
        for cpu in online
        if (value := root.get_int(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity"))
    }
    largest = max(capacity.values(), default=0)
    return frozenset(cpu for cpu, value in capacity.items() if value < 0.75 * largest)


def _read_memory(root: Root) -> Memory:
    info = pairs(root.get("/proc/meminfo"), ":")

    def size(key: str) -> int | None:
        kib = integer(info.get(key, "").removesuffix("kB").strip())
        return None if kib is None else kib * KIB

    nodes = _cpulist(root, "/sys/devices/system/node/online")
    return Memory(
        total_bytes=size("MemTotal"),
        available_bytes=size("MemAvailable"),
        swap_bytes=size("SwapTotal"),
        cma_total_bytes=size("CmaTotal"),
        cma_free_bytes=size("CmaFree"),
        gpu_active_bytes=size("GPUActive"),
        numa_nodes=len(nodes) or None,
    )


def _read_gpus(root: Root, cpu: Cpu) -> tuple[Gpu, ...]:
    # The class directory also holds connectors (card1-DP-1).
    cards = [path for path in root.glob("/sys/class/drm/card*") if re.search(r"/card\d+$", path)]
    kfd = _kfd_targets(root)
    return tuple(_read_gpu(root, f"{card}/device", kfd, cpu) for card in cards)


def _read_gpu(root: Root, device: str, kfd: dict[str, str], cpu: Cpu) -> Gpu:
    pci_id = _pci_id(root, device)
    driver = _driver(root, device)
    name = GPU_NAMES.get(pci_id or "")
    if name and (model := GPU_MODELS.search(cpu.model or "")):
        name = model[1]
    carveout, options = _read_carveout(root, device)
    return Gpu(
        path=device,
        pci_id=pci_id,
        driver=driver,
        name=name,
        gfx_target=next((kfd[node] for node in root.names(f"{device}/drm") if node in kfd), None),
        integrated=_is_integrated(root, device, driver, pci_id),
        vram_bytes=root.get_int(f"{device}/mem_info_vram_total"),
        visible_vram_bytes=root.get_int(f"{device}/mem_info_vis_vram_total"),
        gtt_bytes=root.get_int(f"{device}/mem_info_gtt_total"),
        carveout=carveout,
        carveout_options=tuple(options.values()),
        carveout_sizes=tuple(
            CarveoutSize(number, int(found[1]) << (30 if found[2] == "GB" else 20))
            for number, text in options.items()
            if (found := re.search(r"\((\d{1,6}) (MB|GB)\)$", text))
        ),
    )


def _is_integrated(root: Root, device: str, driver: str | None, pci_id: str | None) -> bool | None:
    if pci_id in GPU_NAMES:
        return True
    monitors = root.names(f"{device}/hwmon") if driver == "amdgpu" else []
    if not monitors:
        return None
    # amdgpu shows the voltage of the north bridge on APUs only (amdgpu_pm.c).
    return any(root.get(f"{device}/hwmon/{name}/in1_label") == "vddnb" for name in monitors)


def _read_carveout(root: Root, device: str) -> tuple[str | None, dict[str, str]]:
    """The firmware's memory sizes for the GPU (Documentation/gpu/amdgpu, uma/carveout)."""
    options = pairs(root.get(f"{device}/uma/carveout_options"), ":")
    return options.get(root.get(f"{device}/uma/carveout") or ""), options


def _kfd_targets(root: Root) -> dict[str, str]:
    """gfx name by render node (``renderD128``), of every GPU the compute driver knows."""
    targets = {}
    for path in root.glob("/sys/class/kfd/kfd/topology/nodes/*/properties"):
        properties = pairs(root.get(path), None)
        version = integer(properties.get("gfx_target_version"))
        if version:
            # 110501 is 11.5.1; minor and stepping are one hexadecimal digit each in the name.
            major, minor, stepping = version // 10000, version // 100 % 100, version % 100
            node = f"renderD{properties.get('drm_render_minor')}"
            targets[node] = f"gfx{major}{minor:x}{stepping:x}"
    return targets


def _read_npu(root: Root) -> str | None:
    devices = root.names("/sys/class/accel")
    drivers = (_driver(root, f"/sys/class/accel/{name}/device") for name in devices)
    return next((driver for driver in drivers if driver), None)


def _read_ttm(root: Root) -> Ttm | None:
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
        pages_limit=root.get_int(f"/sys/module/{candidates[0]}/parameters/pages_limit"),
    )


def read_cgroup(root: Root) -> Cgroup:
    """Which control groups there are, and where."""
    mount, legacy = None, False
    for line in (root.get("/proc/self/mounts") or "").splitlines():
        _, where, kind, *_ = [*line.split(), "", "", ""]
        if kind == "cgroup2" and where.startswith("/") and ".." not in where.split("/"):
            mount = mount or where
        legacy = legacy or kind == "cgroup"
    controllers = root.get(f"{mount}/cgroup.controllers") if mount else None
    return Cgroup(
        version=1 if legacy else 2 if mount else None,
        mount=mount,
        controllers=tuple((controllers or "").split()),
    )


def _read_tuners(root: Root, cgroup: Cgroup) -> tuple[Tuner, ...]:
    """The tuners that are installed; running: a service, a process or a mark says so."""
    # systemd's own tree: the v2 one, or beside it the named v1 hierarchy.
    trees = {cgroup.mount, "/sys/fs/cgroup/systemd"} - {None}
    # Not by glob, which asks for each path three times: this is most of the time of an apply.
    comms = {root.get(f"/proc/{pid}/comm") for pid in root.names("/proc") if pid.isdecimal()}
    found = []
    for known in TUNERS:
        running = (
            any(root.exists(f"{tree}/system.slice/{u}") for tree in trees for u in known.units)
            or not comms.isdisjoint(known.comms)
            or any(map(root.exists, known.marks))
        )
        installed = running or any(
            root.exists(f"{directory}/{unit}")
            for directory in _UNIT_DIRECTORIES
            for unit in known.units
        )
        if installed:
            found.append(Tuner(known.id, known.name, running))
    return tuple(found)
