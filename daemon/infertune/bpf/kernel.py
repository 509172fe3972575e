# SPDX-License-Identifier: Apache-2.0
"""What the running kernel has and allows, as far as BPF programs care."""

from __future__ import annotations

from infertune.base.errors import BtfMissing
from infertune.base.root import Root
from infertune.bpf import btf
from infertune.host.bpf import BTF, btf_bytes, has_btf, measures_programs
from infertune.host.gpu import is_module
from infertune.host.processes import capability_sets
from infertune.host.system import lockdown

VMLINUX = f"{BTF}/vmlinux"

CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""linux/capability.h.  CAP_SYS_ADMIN stands for the other two."""


class Types:
    """BTF of the kernel and its modules.  Each file is read once, when it is asked for."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._read: dict[str, bytes] = {}

    def vmlinux(self) -> bytes:
        """BTF of the kernel itself.  Raises BtfMissing."""
        try:
            found = self._file("vmlinux")
            btf.check(found)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise BtfMissing(
                f"this kernel does not tell its types: {VMLINUX}: {why}",
                hint="kernels of distributions do (CONFIG_DEBUG_INFO_BTF)",
            ) from error
        return found

    def module(self, name: str) -> bytes:
        """BTF of a loaded module, joined with the kernel's.  Raises BtfMissing."""
        try:
            split = self._file(name)
        except OSError as error:
            raise BtfMissing(
                f"the module {name} does not tell its types: {BTF}/{name}: {error.strerror}",
                hint="kernels of distributions do (CONFIG_DEBUG_INFO_BTF_MODULES)",
            ) from error
        return btf.join(self.vmlinux(), split)

    def has_module(self, name: str) -> bool:
        """Whether the module is loaded now; one that is built in is not a module."""
        return has_btf(self._root, name) or is_module(self._root, name)

    def has_tracepoint(self, name: str, module: str | None = None) -> bool:
        """Whether the kernel, or the module if it is loaded, has the tracepoint.

        Each has a type ``btf_trace_NAME`` (Linux 5.5), and the file is readable for everybody;
        the directory of events is not.  Raises BtfMissing.
        """
        wanted = f"\0btf_trace_{name}\0".encode()
        if wanted in self.vmlinux():
            return True
        return (
            bool(module) and self.has_module(module or "") and wanted in self.module(module or "")
        )

    def _file(self, name: str) -> bytes:
        if name not in self._read:
            self._read[name] = btf_bytes(self._root, name)
        return self._read[name]


def missing_capabilities(root: Root) -> tuple[str, ...]:
    """Which of CAP_BPF and CAP_PERFMON this process lacks."""
    try:
        effective = capability_sets(root).get("CapEff")
    except OSError:
        effective = None
    if effective is None:
        return ()
    have = {name for name, bit in CAPABILITIES.items() if effective >> bit & 1}
    if "CAP_SYS_ADMIN" in have:
        return ()
    return tuple(name for name in ("CAP_BPF", "CAP_PERFMON") if name not in have)


def locked_down(root: Root) -> bool:
    """Whether lockdown forbids to read kernel memory (mode ``confidentiality``)."""
    return lockdown(root) == "confidentiality"


def statistics_enabled(root: Root) -> bool:
    """Whether the kernel measures the run time of BPF programs (kernel.bpf_stats_enabled)."""
    return measures_programs(root)
