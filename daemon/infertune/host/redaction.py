# SPDX-License-Identifier: Apache-2.0
"""What of a file may go into a snapshot, where only a part of it is anybody's business.

Reducing what is reduced already changes nothing: a recorded machine can be recorded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from infertune.base.records import replace
from infertune.host.kernel_log import reduce_log
from infertune.host.load_option import plain, without_ids
from infertune.server_files import formats, script
from infertune.server_files.block_yaml import NotUnderstood
from infertune.server_files.command_line import (
    CONTAINER,
    INHERITED,
    LLAMA,
    MODEL_FLAGS,
    PRIVATE_FLAGS,
    SCRIPT,
    Command,
    holds_flags,
    image_engine,
    may_start_a_server,
    parse_flags,
    render_flags,
)

GPU_MODULES = ("amdgpu", "amdttm", "amd_ttm", "ttm", "amdxdna")
"""Modules whose options matter to inference; the kernel takes ``-`` for ``_`` in a name."""

PACKAGES = (
    *("linux-firmware", "firmware-amd-graphics", "amdgpu-dkms", "amdgpu-dkms-firmware"),
    *("mesa-vulkan-drivers", "amdvlk", "rocm-core", "hsa-rocr", "llama.cpp", "llama.cpp-tools"),
)
"""Packages whose versions matter, by the names of any distribution."""

SHOWN_ENVIRONMENT = (
    *("HSA_OVERRIDE_GFX_VERSION", "HSA_ENABLE_SDMA", "GPU_MAX_HW_QUEUES", "ROCBLAS_USE_HIPBLASLT"),
    *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"),
    *("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "AMD_VULKAN_ICD", "RADV_PERFTEST"),
    *("LLAMA_ARG_MLOCK", "LLAMA_ARG_MMAP", "LLAMA_ARG_NO_MMAP", "LLAMA_ARG_DIO"),
    *("LLAMA_ARG_CACHE_TYPE_K", "LLAMA_ARG_CACHE_TYPE_V", "LLAMA_ARG_SPEC_TYPE"),
    *("LLAMA_ARG_LOAD_MODE", "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_BATCH", "LLAMA_ARG_UBATCH"),
    *("LLAMA_ARG_N_PARALLEL", "LLAMA_ARG_KV_UNIFIED", "LLAMA_ARG_FLASH_ATTN"),
    *("LLAMA_ARG_CACHE_RAM", "LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_DEVICE", "LLAMA_ARG_FIT"),
    *("LLAMA_ARG_DRAFT_MAX", "LLAMA_ARG_DRAFT_MIN", "LLAMA_ARG_DRAFT_P_MIN"),
    *("LLAMA_ARG_EMBEDDINGS", "LLAMA_ARG_RERANKING"),
    *("OLLAMA_FLASH_ATTENTION", "OLLAMA_KV_CACHE_TYPE", "OLLAMA_NUM_PARALLEL"),
    *("OLLAMA_CONTEXT_LENGTH", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_GPU_OVERHEAD"),
    *("OLLAMA_VULKAN", "OLLAMA_LLM_LIBRARY", "OLLAMA_SCHED_SPREAD"),
)
"""Variables with a meaning for inference whose values hold nothing private."""

SHOWN_FLAGS = frozenset(
    (
        *("--mlock", "--no-mmap", "--mmap", "--direct-io", "-dio", "--load-mode", "-lm"),
        *("--cache-type-k", "-ctk", "--cache-type-v", "-ctv", "--flash-attn", "-fa"),
        *("--spec-type", "--spec-default", "--spec-draft-n-max", "--spec-draft-n-min"),
        *("--draft-max", "--draft-min", "--draft", "--draft-n", "--draft-n-min"),
        *("--parallel", "-np", "--kv-unified", "-kvu", "--ctx-size", "-c", "--fit", "-fit"),
        *("--ubatch-size", "-ub", "--batch-size", "-b", "--cache-ram", "-cram"),
        *("--cpu-range", "-Cr", "--cpu-mask", "-C", "--device", "-dev"),
        *("--n-gpu-layers", "--gpu-layers", "-ngl", "--n-cpu-moe", "-ncmoe"),
        *("--ctx-checkpoints", "-ctxcp", "--models-max", "--sleep-idle-seconds"),
    )
)
"""Flags of llama-server whose values may be shown; of all others only the names are."""

PRESET_VARIABLE = "LLAMA_ARG_MODELS_PRESET"
"""Stands for ``--models-preset``."""

_VALUED = frozenset(("--flash-attn", "-fa"))
"""Flags of which it matters whether they have a value, even one that may not be shown."""

FILE_FLAGS = frozenset(("--models-preset", "--config", "-config"))
"""Flags that name a file which says what is served."""

PLAIN_PARAMETERS = re.compile(
    r"""
    (amdgpu|amdttm|amd_ttm|amd-ttm|ttm|amdxdna|i915|xe|nvidia|drm|iommu|acpi|pcie|rcu\w*
     |processor|cpuidle\w*|cpufreq|zswap|zram|workqueue|page_reporting)\.[\w.-]+
    |amd_\w+|intel_\w+|iommu(\.\w+)?|transparent_hugepage\w*|thp_\w+|hugepages\w*|hugepagesz
    |default_hugepagesz|cma|numa\w*|isolcpus|nohz\w*|rcu_\w+|irqaffinity|mitigations|spec_\w+
    |nosmt|maxcpus|nr_cpus|max_cstate|idle|clocksource|tsc|pci|pcie_\w+|mem|memmap|swiotlb
    |systemd\.unified_cgroup_hierarchy|cgroup_\w+|psi|preempt|threadirqs|efi|swapaccount
    """,
    re.VERBOSE,
)
"""Kernel parameters whose value may be shown; of all others only the name is."""

_QUANT = re.compile(r"(?:UD-)?(?:I?Q\d\w*|MXFP4\w*|BF16|F16)", re.IGNORECASE)
_PLAIN_VALUE = re.compile(r"-\d[\d.,]{0,20}|[\w.,+][\w.,+-]{0,23}", re.ASCII)
"""Not what looks like a flag: what is left of a command line must read the same again."""
_PLAIN_FILE = re.compile(r"[\w./%~*+][\w./@%~*+-]{0,199}", re.ASCII)
_PLAIN_PROGRAM = re.compile(r"(?:/usr(?:/local)?)?/s?bin/[\w.+-]{1,60}|[\w.+-]{1,60}", re.ASCII)
_IMAGE_PARTS = re.compile(
    r"(?<![a-z0-9])(?:server|full|light|vulkan|radv|rocm(?:-?\d[\d.]{0,8})?|cuda|b\d{3,6})(?![a-z0-9])"
)
_UNIT_SETTINGS = re.compile(r"LimitMEMLOCK|Memory(?:Min|Low|High|Max)|AllowedCPUs|CPUAffinity")
_UNIT_VALUE = re.compile(r"[\w ,.%-]{1,200}", re.ASCII)


def reduce_file(path: str, data: bytes) -> bytes | None:
    """The part of ``data`` to record; ``data`` itself where no rule is for ``path``.

    None: nothing of it.
    """
    for pattern, reduce in _REDUCTIONS.items():
        if re.fullmatch(pattern, path):
            return reduce(data)
    return data


def is_reduced(path: str) -> bool:
    """Whether only a part of what is at ``path`` would get into a snapshot."""
    return any(re.fullmatch(pattern, path) for pattern in _REDUCTIONS)


def model_label(name: str) -> str:
    """How a model is quantised, without its name: ``model-UD-Q4_K_XL.gguf``."""
    found = _QUANT.findall(name.rpartition("/")[2])
    return f"model-{found[-1]}.gguf" if found else "model.gguf"


def _text(data: bytes) -> list[str]:
    return data.decode("utf-8", "replace").splitlines()


def _bytes(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _modprobe(data: bytes) -> bytes | None:
    """``options`` of the GPU's modules, and of them what a command line may show."""
    kept = []
    for line in _text(data.replace(b"\\\n", b"")):  # kmod joins lines so
        word, module, *options = [*line.split("#", 1)[0].split(), "", ""]
        if word == "options" and module.replace("-", "_") in GPU_MODULES:
            plain = [each.replace('"', "") for each in options]
            shown = [each for each in plain if _PLAIN_OPTION.fullmatch(each)]
            kept.append(" ".join((word, module, *shown)))
    return _bytes(kept) if kept else None


_PLAIN_OPTION = re.compile(r"[\w-]{1,64}(?:=[\w.,:-]{0,256})?", re.ASCII)


def _servers(parser: formats.Parser, *, titled: bool = True) -> Callable[[bytes], bytes | None]:
    """Of a file that starts model servers: flags, variables and settings that matter."""

    def reduce(data: bytes) -> bytes | None:
        text = data.decode("utf-8", "replace")
        try:
            found = [_shown(entry) for entry in formats.entries(text, parser)]
        except NotUnderstood as error:
            return formats.bad(str(error)).encode()
        said = [each for each in found if each != formats.Entry()]
        return formats.short(said, titled=titled).encode() if said else None

    return reduce


def _unit(data: bytes) -> bytes | None:
    """The same of a unit; one that starts no model server is nobody's business."""
    if not may_start_a_server(data.decode("utf-8", "replace")):
        return None
    reduced = _servers(formats.unit, titled=False)(data)
    return reduced if reduced and re.search(rb"^ExecStart=.", reduced, re.MULTILINE) else None


def _script(data: bytes) -> bytes | None:
    """The same of a shell script; of one that starts no server, that it is there."""
    if b"\0" in data:
        return None  # a program
    found = formats.entries(data.decode("utf-8", "replace"), script.script)
    return formats.short(map(_shown, found), titled=True).encode()


def _shown(entry: formats.Entry) -> formats.Entry:
    environment = {
        name: kept
        for name, value in entry.environment.items()
        if (kept := _shown_variable(name, value)) is not None
    }
    settings = {
        name: value
        for name, value in entry.settings.items()
        if _UNIT_SETTINGS.fullmatch(name) and _UNIT_VALUE.fullmatch(value)
    }
    return formats.Entry(
        _shown_command(entry.command) if entry.command else None,
        environment,
        settings,
        tuple(file for file in entry.files if _PLAIN_FILE.fullmatch(file)),
        entry.resets,
    )


def _shown_variable(name: str, value: str) -> str | None:
    """The value to keep; None where the variable is nobody's business."""
    if name in SHOWN_ENVIRONMENT:
        return value if _PLAIN_VALUE.fullmatch(value) or not value else None
    if name in ("LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO"):
        return model_label(value)
    if name == PRESET_VARIABLE:
        return value if _PLAIN_FILE.fullmatch(value) else ""
    if re.fullmatch(r"LLAMA_ARG_[A-Z_]{1,40}", name):
        return ""
    if holds_flags(name):  # for ``$LLAMA_OPTS``, or LEMONADE_LLAMACPP_ARGS
        words = render_flags(Command("", "", flags=_shown_flags(parse_flags(value))))
        return " ".join(words) or None
    return None


def _shown_command(command: Command) -> Command:
    if command.engine == SCRIPT:
        return replace(command, environment={})  # where it lies; its own text is reduced, too
    image = command.image
    return replace(
        command,
        program=program_label(command.program),
        image=image if image is None else _image_label(image),
        flags=_shown_flags(command.flags),
        environment={},
    )


def _shown_flags(flags: Mapping[str, str]) -> dict[str, str]:
    kept = {}
    for flag, value in flags.items():
        if value and flag in MODEL_FLAGS:
            kept[flag] = model_label(value)
        elif flag in FILE_FLAGS:
            kept[flag] = value if _PLAIN_FILE.fullmatch(value) else ""
        elif flag in PRIVATE_FLAGS or (
            flag in _VALUED and not _PLAIN_VALUE.fullmatch(value or "x")
        ):
            kept[flag] = "redacted"
        else:
            kept[flag] = value if flag in SHOWN_FLAGS and _PLAIN_VALUE.fullmatch(value) else ""
    return kept


def program_label(path: str) -> str:
    """A program where everybody has it; ``/elsewhere/NAME`` for any other place."""
    return path if not path or _PLAIN_PROGRAM.fullmatch(path) else f"/elsewhere/{_base(path)}"


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _image_label(image: str) -> str:
    """What an image runs and how it was built, without its registry, owner and own name."""
    if image == INHERITED:
        return image
    name = _base(image).lower()
    parts = dict.fromkeys(_IMAGE_PARTS.findall(name))
    engine = image_engine(name)
    plain = "llama.cpp" if engine == LLAMA else (engine or CONTAINER).lower()
    return f"{plain}:{'-'.join(parts)}" if parts else plain


def _declaration(data: bytes) -> bytes | None:
    """Of a declared server: how its model is quantised."""
    found = re.search(r"^model\s*=\s*[\"'](.+)[\"']", data.decode("utf-8", "replace"), re.MULTILINE)
    return f'model = "{model_label(found[1])}"\n'.encode() if found else None


def _packages(data: bytes) -> bytes:
    """Name, state and version of the packages that matter, of dpkg's status file."""
    kept = []
    data = b"\n" + data
    for name in PACKAGES:
        # Not by a pattern: the file has megabytes.
        start = data.find(f"\nPackage: {name}\n".encode())
        if start >= 0:
            end = data.find(b"\n\n", start)
            lines = _text(data[start : end if end >= 0 else len(data)])
            kept += [line for line in lines if re.match(r"(Package|Status|Version): ", line)]
            kept.append("")
    return _bytes(kept)


def _rows(pattern: str) -> Callable[[bytes], bytes]:
    wanted = re.compile(pattern)
    return lambda data: _bytes([line for line in _text(data) if wanted.match(line)])


_PACKAGED = "llama|ollama|lemon|vllm"
"""Beginnings of the names under which packages of engines keep files in /etc."""
_UNITS = r".*/(?:systemd/(?:system|user)|containers/systemd)(?:/.*)?"


def _swaps(data: bytes) -> bytes:
    """A swap file may lie in a home directory."""
    return re.sub(rb"(?m)^(?!/dev/|Filename)\S+", b"/swapfile", data)


_SYSTEMD = r"/(?:etc|run|usr/local/lib|usr/lib)"
_EFIVARS = r"/sys/firmware/efi/efivars"
_ATTRIBUTES = 4
"""Bytes before the value of an EFI variable."""


def _boot_option(data: bytes) -> bytes:
    """Which file the firmware started: its menu shows serial numbers, a path has ids of disks."""
    return data[:_ATTRIBUTES] + plain(data[_ATTRIBUTES:])


def _efi_text(data: bytes) -> bytes:
    """A file's or an entry's name, which kernel-install begins with the machine's id."""
    text = without_ids(data[_ATTRIBUTES:].decode("utf-16-le", "replace"))
    text = re.sub(r"(?i)[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", _NO_UUID, text)
    return data[:_ATTRIBUTES] + text.encode("utf-16-le")


_NO_UUID = "00000000-0000-0000-0000-000000000000"

_REDUCTIONS: Mapping[str, Callable[[bytes], bytes | None]] = {
    r"/(?:etc|run|lib|usr/lib|usr/local/lib)/modprobe\.d/.*": _modprobe,
    r"/dev/kmsg": reduce_log,
    # Originals of configuration files, whole.
    r"/var/lib/infertune/.*": lambda data: None,
    r"/var/lib/dpkg/status": _packages,
    r"/proc/self/limits": _rows(r"Max locked memory"),
    r"/proc/stat": _rows(r"btime "),
    r"/proc/vmstat": _rows(r"(?:oom_kill|compact_\w+) "),
    r"/proc/swaps": _swaps,
    rf"{_EFIVARS}/(?:LoaderInfo|LoaderFeatures|StubInfo|BootCurrent|SecureBoot)-.*": bytes,
    rf"{_EFIVARS}/Boot[0-9A-F]{{4}}-.*": _boot_option,
    rf"{_EFIVARS}/(?:StubImageIdentifier|LoaderEntrySelected|LoaderDevicePartUUID)-.*": _efi_text,
    rf"{_EFIVARS}/.*": lambda data: None,
    # Who an entry starts is told by ids of disks, and disks are unlocked by more than that.
    r".*/loader/entries/.*|/etc/(?:fstab|crypttab.*|kernel/cmdline)": lambda data: None,
    r"/etc/sysconfig/bootloader": _rows(r"LOADER_TYPE=[\"']?[\w-]{1,40}[\"']?$"),
    r"/proc/sys/kernel/core_pattern": _rows(r"\|\S*/systemd-coredump(?: |$)"),
    rf"{_SYSTEMD}/sysctl\.d/.*": _rows(
        r"-?(?:vm[./]\w+|kernel[./]numa_balancing)\s*=\s*[\w. -]{1,64}$"
    ),
    rf"{_SYSTEMD}/(?:tmpfiles)\.d/.*": _rows(
        r"w\S*\s+/(?:proc/sys/vm|sys/kernel/mm|sys/module/zswap|sys/devices/system/cpu"
        r"|sys/firmware/acpi|sys/class/drm/card\d+/device)/[\w./-]+"
        r"(?:\s+\S{1,64}){5,6}$"
    ),
    rf"{_SYSTEMD}/systemd/coredump\.conf.*": _rows(r"\[Coredump\]|\w{1,40}SizeMax=\w{1,20}$"),
    r"/etc/tuned/ppd\.conf": _rows(r"\[\w{1,40}\]|[\w-]{1,40}\s*=\s*[\w-]{1,60}$"),
    r"/etc/tuned/ppd_base_profile": _rows(r"[\w-]{1,60}$"),
    r"/var/lib/power-profiles-daemon/state\.ini": _rows(r"\[State\]|Profile=[\w-]{1,40}$"),
    r"/etc/tlp(?:\.d/.*)?\.conf": _rows(
        r"(?:TLP_PROFILE_AC|(?:PLATFORM_PROFILE|CPU_SCALING_GOVERNOR|CPU_ENERGY_PERF_POLICY)"
        r"_ON_(?:AC|BAT|SAV))=[\"']?[\w-]{0,40}[\"']?(?:\s*#.*)?$"
    ),
    r"/etc/auto-cpufreq\.conf": _rows(
        r"\[\w{1,40}\]|(?:governor|energy_performance_preference|platform_profile)"
        r"\s*=\s*[\w-]{1,40}$"
    ),
    r"/etc/asusd/asusd\.ron": _rows(r"\s*(?:change_)?platform_profile_on_ac:\s*\w{1,40},"),
    # Names of whatever kind last: of two that match the first counts.
    r"/etc/infertune/servers\.d/.*\.toml": _declaration,
    rf"{_UNITS}/[^/]*\.(?:service|container)": _unit,
    rf"{_UNITS}/[^/]*\.d/[^/]*\.conf": _servers(formats.unit, titled=False),
    r".*\.ya?ml": _servers(formats.yaml),
    r".*\.ini": _servers(formats.preset),
    r".*/lemonade/[\w.-]*\.json": _servers(formats.lemonade),
    r"/etc/lemonade/conf\.d/.*|.*\.env": _servers(formats.variables),
    rf"/etc/(?:(?:default|sysconfig|conf\.d)/)?(?:{_PACKAGED})[^/]*(?:/[^/]*)?": _servers(
        formats.variables
    ),
    r".*\.sh|.*/[\w-]*(?:llama|llm)[\w-]*": _script,
}
