# SPDX-License-Identifier: Apache-2.0
"""Swap, dumps and other things of the system that take the memory a model needs."""

from __future__ import annotations

from infertune.base.units import GIB, format_size
from infertune.doctor.base import Answer, Finding, Rule, Source, Unknown, github, kernel_doc, need
from infertune.doctor.conditions import INTEGRATED
from infertune.doctor.facts import Facts
from infertune.host.swap import Swaps


def _swaps(facts: Facts) -> Swaps:
    """Raises Missing."""
    return need(facts.machine.swap or Unknown("the kernel does not show its swap areas here"))


def _large_zram(facts: Facts) -> Answer:
    size = _swaps(facts).zram_bytes
    total = need(facts.machine.memory.total_bytes or Unknown("the size of RAM is not known"))
    if size <= total // 2:
        return None
    return Finding(
        f"zram may hold {format_size(size)} of swapped pages, more than half of "
        f"{format_size(total)} of RAM, in the memory that the GPU shares"
    )


_LOW, _HIGH = 60, 100
"""The kernel's default; and above it only swap that is faster than the file system makes sense."""


def _swappiness(facts: Facts) -> Answer:
    swaps = _swaps(facts)
    value = need(facts.swappiness)
    if not swaps.areas:
        return None
    if swaps.in_memory == "zram" and value < _LOW:
        return Finding(
            f"vm.swappiness is {value} and all swap is zram: the kernel drops the model's file "
            "pages before it compresses idle memory"
        )
    if swaps.in_memory is None and not swaps.zram_bytes and value > _HIGH:
        return Finding(
            f"vm.swappiness is {value} and swap is on a disk: idle programs are written out before "
            "file pages are dropped"
        )
    return None


def _twice(facts: Facts) -> Answer:
    swaps = _swaps(facts)
    if not swaps.zram_bytes or not swaps.zswap:
        return None
    return Finding(
        "zswap is on in front of zram: pages on their way to zram are compressed twice, and kept "
        "in a second pool"
    )


_LARGE_DUMP = 64 * GIB


def _large_dumps(facts: Facts) -> Answer:
    dumps = need(facts.core_dumps)
    if dumps is None or (dumps.limit_bytes is not None and dumps.limit_bytes <= _LARGE_DUMP):
        return None
    limit = (
        "no limit" if dumps.limit_bytes is None else f"a limit of {format_size(dumps.limit_bytes)}"
    )
    return Finding(
        f"systemd-coredump has {limit} ({dumps.source}): a server that crashes may be written to "
        "disk for minutes before it can be started again"
    )


_VM = kernel_doc("admin-guide/sysctl/vm")

RULES: tuple[Rule, ...] = (
    Rule(
        id="swap-zram-large",
        title="zram larger than half of the RAM that an integrated GPU shares",
        when=INTEGRATED,
        check=_large_zram,
        severity="info",
        fix="make it smaller (zram-size in /etc/systemd/zram-generator.conf) or add swap on a disk",
        sources=(kernel_doc("admin-guide/blockdev/zram"), github("ublue-os/bazzite", 1570)),
    ),
    Rule(
        id="swap-swappiness",
        title="a vm.swappiness that does not suit the kind of swap",
        when=INTEGRATED,
        check=_swappiness,
        severity="info",
        fix="set vm.swappiness to 133 to 180 for zram, to 60 or less for swap on a disk",
        sources=(_VM, github("CachyOS/CachyOS-Settings", 30), github("ublue-os/bazzite", 2861)),
    ),
    Rule(
        id="swap-zswap-zram",
        title="zswap in front of zram",
        when=INTEGRATED,
        check=_twice,
        severity="info",
        fix="write 0 to /sys/module/zswap/parameters/enabled, and zswap.enabled=0 on the kernel "
        "command line",
        sources=(
            Source("Arch wiki: zram", "https://wiki.archlinux.org/title/Zram"),
            kernel_doc("admin-guide/mm/zswap"),
        ),
    ),
    Rule(
        id="coredump-large",
        title="systemd-coredump saves dumps of more than 64 GiB",
        when=INTEGRATED,
        check=_large_dumps,
        severity="info",
        fix="set ProcessSizeMax and ExternalSizeMax back to 32G, or LimitCORE=0 for the server",
        sources=(
            Source(
                "coredump.conf(5)",
                "https://www.freedesktop.org/software/systemd/man/latest/coredump.conf.html",
            ),
            github("systemd/systemd", 33755),
        ),
    ),
)
