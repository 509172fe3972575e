# SPDX-License-Identifier: Apache-2.0
"""What a profile's ``[launch]`` and ``[env]`` may say: how the server process is placed.

Declarations only; ``launch/place.py`` carries them out and reports an outcome
for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.units import GIB, parse_size
from infertune.catalogue.cpuset import CpuSet
from infertune.catalogue.knobs.base import Evidence
from infertune.catalogue.values import Choice, Integer, Switch, Value
from infertune.host.machine import Machine


@dataclass(frozen=True)
class Limit(Value):
    """Bytes, written as a size or a share of memory, or one ``word`` that means no limit."""

    unit_bytes = 1
    word: str | None
    low_bytes: int = 0
    high_bytes: int = 16 * 1024 * GIB

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if configured == "0" or (configured == 0 and configured is not False):
            configured = "0B"
        if not isinstance(configured, str):
            raise ValueError(f"{configured!r} is not {self.accepts()}")
        if configured == self.word:
            return configured
        if "%" in configured and machine is None:
            parse_size(configured, total=0)
            return configured
        size = parse_size(configured, total=machine.memory.total_bytes if machine else None)
        if not self.low_bytes <= size <= self.high_bytes:
            raise ValueError(f"'{configured}' is out of range; write {self.accepts()}")
        return str(size)

    def decode(self, raw: bytes) -> str:
        text = raw.decode("ascii").strip()
        return text if text == self.word else str(int(text, 10))

    def accepts(self) -> str:
        sizes = "a size such as '512MiB' or '2%'"
        return f"{sizes}, or '{self.word}'" if self.word else sizes


@dataclass(frozen=True)
class Partition(Choice):
    """``cpuset.cpus.partition``; the kernel says ``isolated invalid (why)`` where it cannot be."""

    def decode(self, raw: bytes) -> str:
        return raw.decode("ascii", "replace").strip()


@dataclass(frozen=True, kw_only=True)
class LaunchSetting:
    """One property of the server process, as a catalogue entry."""

    id: str
    value: Value
    summary: str
    evidence: Evidence
    cgroup_file: str | None = None
    """File of the process's own cgroup v2 group; its first word is the controller."""
    process: Literal["affinity", "memlock", "oom_score_adj", "nice", "scheduling_policy"] | None = (
        None
    )
    """How the process itself is given it, where the group cannot be (or there is no file)."""
    live: Literal["t", "ay"] | None = None
    """D-Bus type of the directive where systemd changes it in a unit that runs; None: it cannot."""
    tunable: str | None = None
    """Tunable of glibc that it is: the process is started with it in GLIBC_TUNABLES."""
    directive: str | None = None
    """Directive of systemd for a unit; None: it has none (service/partition.py)."""

    @property
    def controller(self) -> str | None:
        return self.cgroup_file.partition(".")[0] if self.cgroup_file else None


_CGROUP_DOC = "Documentation/admin-guide/cgroup-v2.rst"

_SETTINGS = (
    LaunchSetting(
        id="cpus",
        value=CpuSet(),
        summary="CPUs the server may run on",
        evidence=Evidence(
            "protective, unmeasured",
            "keeps the server and its neighbours apart; pinning one thread alone did not help",
            _CGROUP_DOC,
        ),
        cgroup_file="cpuset.cpus",
        process="affinity",
        directive="AllowedCPUs",
        live="ay",
    ),
    LaunchSetting(
        id="cpus_partition",
        value=Partition(("member", "root", "isolated")),
        summary="whether others may use the server's CPUs too: member yes, root no; isolated: "
        "nor does the kernel balance load among them, so threads must be pinned",
        evidence=Evidence(
            "protective, unmeasured",
            "the run-time substitute for isolcpus=, without nohz_full and rcu_nocbs (Linux 6.1)",
            _CGROUP_DOC,
        ),
        cgroup_file="cpuset.cpus.partition",
    ),
    LaunchSetting(
        id="memory_min",
        value=Limit(word=None),
        summary="memory of the server that is never reclaimed (GTT pages are not counted in it)",
        evidence=Evidence(
            "protective, unmeasured",
            "protects heap and page cache of the server; GPU memory in GTT is not charged to it",
            _CGROUP_DOC,
        ),
        cgroup_file="memory.min",
        directive="MemoryMin",
        live="t",
    ),
    LaunchSetting(
        id="memory_swap_max",
        value=Limit(word="max"),
        summary="swap the server may use; 0 keeps it in memory",
        evidence=Evidence(
            "protective, unmeasured",
            "a server that swaps answers a hundred times slower; without swap it is killed instead",
            _CGROUP_DOC,
        ),
        cgroup_file="memory.swap.max",
        directive="MemorySwapMax",
        live="t",
    ),
    LaunchSetting(
        id="memlock",
        value=Limit(word="unlimited"),
        summary="memory the server may lock (RLIMIT_MEMLOCK), needed by load_mode mlock",
        evidence=Evidence(
            "protective, unmeasured",
            "without it a load mode that locks fails or locks only a part",
            "setrlimit(2)",
        ),
        process="memlock",
        directive="LimitMEMLOCK",
    ),
    LaunchSetting(
        id="oom_score_adj",
        value=Integer(-1000, 1000),
        summary="how soon the kernel kills the server when memory runs out (-1000 never)",
        evidence=Evidence(
            "protective, unmeasured",
            "the OOM killer does not see GTT and may take the wrong process",
            "Documentation/filesystems/proc.rst 3.1; ROCm issue 6370",
        ),
        process="oom_score_adj",
        directive="OOMScoreAdjust",
    ),
    LaunchSetting(
        id="nice",
        value=Integer(-20, 19),
        summary="scheduling priority of the server (-20 highest)",
        evidence=Evidence(
            "measured",
            "CPU inference beside two busy loops: faster in most runs, no better in some, and no "
            "cost when the machine is quiet; with full GPU offload expect less",
            "Gemma 3 270M, llama.cpp b11669, two Zen 4 cores, 3 to 12 runs each",
        ),
        process="nice",
        directive="Nice",
    ),
    LaunchSetting(
        id="scheduling_policy",
        value=Choice(("other", "batch", "idle", "rr", "fifo")),
        summary="scheduling policy of the server; rr and fifo are real time, at lowest priority",
        evidence=Evidence(
            "protective, unmeasured",
            "real-time threads that spin (poll above 0) starve everything else on their CPUs",
            "sched(7)",
        ),
        process="scheduling_policy",
        directive="CPUSchedulingPolicy",
    ),
    LaunchSetting(
        id="cpu_weight",
        value=Integer(1, 10000),
        summary="share of CPU time against other groups (100 is the default)",
        evidence=Evidence(
            "protective, unmeasured",
            "keeps the server's share when other groups are busy",
            _CGROUP_DOC,
        ),
        cgroup_file="cpu.weight",
        directive="CPUWeight",
        live="t",
    ),
    LaunchSetting(
        id="malloc_hugetlb",
        value=Switch(),
        summary="whether malloc asks for 2 MiB pages, which transparent_hugepage.enabled = madvise "
        "gives to who asks; musl and static programs do not know it, GPU memory is not affected",
        evidence=Evidence(
            "measured",
            "huge pages of llama-server's heap under madvise: 0 to 320 of 329 MB with load_mode "
            "none, 0 to 226 of 238 MB with mmap; whether it is faster was not decidable",
            "llama.cpp b11669, two Zen 4 cores, 2026-11; glibc manual, Memory Allocation Tunables",
        ),
        tunable="glibc.malloc.hugetlb",
    ),
)

LAUNCH_SETTINGS: Mapping[str, LaunchSetting] = {setting.id: setting for setting in _SETTINGS}

TUNABLES = "GLIBC_TUNABLES"
"""``name=value:name=value`` (ld.so(8)); a C library that is not glibc ignores it."""


def with_tunables(env: Mapping[str, str], launch: Mapping[str, str]) -> dict[str, str]:
    """Variables with the tunables of ``launch`` (canonical values by id) beside those set there.

    One that is set there already stays as it is.
    """
    wanted = {LAUNCH_SETTINGS[name].tunable: value for name, value in launch.items()}
    ours = ":".join(f"{name}={value}" for name, value in wanted.items() if name)
    return {**env, TUNABLES: join_tunables(env.get(TUNABLES, ""), ours)} if ours else dict(env)


def join_tunables(given: str, more: str) -> str:
    """A value of GLIBC_TUNABLES with those tunables of another that it does not name itself."""
    known = tunables_in(given)
    missing = (f"{name}={value}" for name, value in tunables_in(more).items() if name not in known)
    return ":".join(filter(None, (given, *missing)))


def tunables_in(text: str) -> dict[str, str]:
    """The tunables of a value of GLIBC_TUNABLES, by name."""
    return dict(each.partition("=")[::2] for each in text.split(":") if each)


@dataclass(frozen=True, slots=True)
class EnvironmentRule:
    """Names that match ``pattern`` (``*`` matches any text) and why they are let in or kept out."""

    pattern: str
    why: str


ENVIRONMENT_REJECTED = (
    EnvironmentRule("LD_*", "it makes the loader run other code in the server"),
    EnvironmentRule("PYTHON*", "it makes Python run other code"),
    EnvironmentRule("GCONV_PATH", "it makes the C library load other code"),
    EnvironmentRule("*_LIBRARY_PATH", "it names a place to load code from"),
    EnvironmentRule("VK_LAYER_PATH", "it names a place to load Vulkan layers from"),
    EnvironmentRule("VK_INSTANCE_LAYERS", "it loads Vulkan layers into the server"),
    EnvironmentRule("OCL_ICD_*", "it names OpenCL drivers to load"),
    EnvironmentRule("HSA_TOOLS_*", "it loads a profiling library into the server"),
    EnvironmentRule("OMP_TOOL*", "it loads a profiling library into the server"),
    EnvironmentRule("GGML_BACKEND_PATH", "it loads a backend library into the server"),
    EnvironmentRule(
        "LLAMA_*", "server settings belong in [server]; old names are silently ignored"
    ),
)
"""Looked at first, so that a wider rule below cannot let one of these in."""

ENVIRONMENT_ALLOWED = (
    EnvironmentRule("HSA_OVERRIDE_GFX_VERSION", "which GPU ROCm takes this one for"),
    EnvironmentRule("HSA_*", "ROCm runtime (ROCr) settings"),
    EnvironmentRule("ROCBLAS_USE_HIPBLASLT", "which matrix library rocBLAS uses"),
    EnvironmentRule("HIP_VISIBLE_DEVICES", "which GPUs HIP shows"),
    EnvironmentRule("ROCR_VISIBLE_DEVICES", "which GPUs ROCm shows"),
    EnvironmentRule("GPU_MAX_HW_QUEUES", "hardware queues HIP uses"),
    EnvironmentRule("AMD_VULKAN_ICD", "RADV or AMDVLK, where both are installed"),
    EnvironmentRule("RADV_PERFTEST", "experimental features of the Vulkan driver"),
    EnvironmentRule("GGML_*", "settings of ggml's backends"),
    EnvironmentRule("OMP_*", "OpenMP threads"),
    EnvironmentRule("GOMP_*", "threads of GNU OpenMP"),
    EnvironmentRule("MALLOC_ARENA_MAX", "heaps of the C library"),
    EnvironmentRule("MALLOC_*_", "thresholds of the C library's heap (mallopt(3))"),
)


def check_environment(name: str, value: str) -> None:
    """Raise ValueError unless a profile may set the variable ``name`` to ``value``."""
    for rule in ENVIRONMENT_REJECTED:
        if fnmatchcase(name, rule.pattern):
            raise ValueError(f"{name} may not be set by a profile: {rule.why}")
    if not name.isidentifier() or not any(
        fnmatchcase(name, rule.pattern) for rule in ENVIRONMENT_ALLOWED
    ):
        allowed = ", ".join(rule.pattern for rule in ENVIRONMENT_ALLOWED)
        raise ValueError(f"{name!r} is not a variable a profile may set; allowed: {allowed}")
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError(f"the value of {name} holds a control character")
