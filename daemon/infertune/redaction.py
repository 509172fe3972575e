# SPDX-License-Identifier: Apache-2.0
"""What of a file may go into a snapshot, where only a part of it is anybody's business.

Reducing what is reduced already changes nothing: a recorded machine can be recorded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from infertune.kernel_log import reduce_log

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
)
"""Variables with a meaning for inference whose values hold nothing private."""

SHOWN_FLAGS = (
    *("--mlock", "--no-mmap", "--mmap", "--direct-io", "-dio", "--load-mode", "-lm"),
    *("--cache-type-k", "-ctk", "--cache-type-v", "-ctv", "--flash-attn", "-fa"),
    *("--model-draft", "-md", "--spec-draft-model", "--spec-type", "--spec-default"),
    *("--draft-max", "--draft-min", "--draft", "--parallel", "-np", "--kv-unified", "-kvu"),
    *("--ubatch-size", "-ub", "--batch-size", "-b", "--cpu-range", "-Cr", "--cpu-mask", "-C"),
    *("--device", "-dev", "--model", "-m"),
)
"""Flags of llama-server that may be shown; of a model's name only how it is quantised."""

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
_PLAIN_VALUE = re.compile(r"[\w.,+-]{1,24}")
_UNIT_SETTINGS = re.compile(
    r"(?:LimitMEMLOCK|Memory(?:Min|Low|High|Max)|AllowedCPUs|CPUAffinity)=[\w ,.%-]*"
)


def reduce_file(path: str, data: bytes) -> bytes | None:
    """The part of ``data`` to record; ``data`` itself where no rule is for ``path``.

    None: nothing of it.
    """
    for pattern, reduce in _REDUCTIONS.items():
        if re.fullmatch(pattern, path):
            return reduce(data)
    return data


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


def _unit(data: bytes) -> bytes | None:
    """Of a unit that starts a llama-server: what it may use, and known flags and variables."""
    lines = _text(re.sub(rb"\\\r?\n", b" ", data))
    if not any(line.startswith("ExecStart=") and "llama-server" in line for line in lines):
        return None
    kept = ["[Service]"]
    for line in map(str.strip, lines):
        name, _, value = line.partition("=")
        if name == "ExecStart" and "llama-server" in value:
            kept.append("ExecStart=llama-server" + "".join(f" {w}" for w in _flags(value.split())))
        elif name == "Environment":
            shown = [word for word in value.replace('"', "").split() if _is_shown(word)]
            kept += [f"Environment={word}" for word in shown]
        elif _UNIT_SETTINGS.fullmatch(line):
            kept.append(line)
    return _bytes(kept)


def _is_shown(assignment: str) -> bool:
    name, _, value = assignment.partition("=")
    return name in SHOWN_ENVIRONMENT and _PLAIN_VALUE.fullmatch(value) is not None


def _flags(words: list[str]) -> list[str]:
    kept: list[str] = []
    for at, word in enumerate(words):
        flag, equals, joined = word.partition("=")
        if flag not in SHOWN_FLAGS:
            continue
        follower = words[at + 1] if at + 1 < len(words) else "-"
        value = joined if equals else "" if follower.startswith("-") else follower
        if value and flag in ("--model", "-m", "--model-draft", "-md", "--spec-draft-model"):
            value = model_label(value)
        kept += [flag, value] if value and _PLAIN_VALUE.fullmatch(value) else [flag]
    return kept


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


_REDUCTIONS: Mapping[str, Callable[[bytes], bytes | None]] = {
    r"/(?:etc|run|lib|usr/lib|usr/local/lib)/modprobe\.d/.*": _modprobe,
    r"/dev/kmsg": reduce_log,
    # Originals of configuration files, whole.
    r"/var/lib/infertune/.*": lambda data: None,
    r"/etc/systemd/system/.*\.service": _unit,
    r"/etc/infertune/servers\.d/.*\.toml": _declaration,
    r"/var/lib/dpkg/status": _packages,
    r"/proc/self/limits": _rows(r"Max locked memory"),
    r"/proc/stat": _rows(r"btime "),
    r"/proc/vmstat": _rows(r"(?:oom_kill|compact_\w+) "),
}
