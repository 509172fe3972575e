# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells BPF programs: its types, and whether it measures them."""

from __future__ import annotations

from infertune.base.root import Root

BTF = "/sys/kernel/btf"


def has_btf(root: Root, name: str) -> bool:
    """Whether a loaded module, or the kernel itself (``vmlinux``), tells its types."""
    return root.exists(f"{BTF}/{name}")


def btf_bytes(root: Root, name: str) -> bytes:
    """Types of the kernel or of a module (Documentation/bpf/btf.rst).  Raises OSError."""
    # Larger than what Root reads at once: 5.5 MB on Linux 6.18.
    return root.at(f"{BTF}/{name}").read_bytes()


def measures_programs(root: Root) -> bool:
    """Whether the kernel measures the run time of BPF programs (kernel.bpf_stats_enabled)."""
    return root.get_int("/proc/sys/kernel/bpf_stats_enabled") == 1
