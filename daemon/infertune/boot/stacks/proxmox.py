# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE with systemd-boot on partitions that proxmox-boot-tool writes.

They are mounted only while it runs.  It copies the kernels anew and makes every entry of the first
line of /etc/kernel/cmdline, else of /proc/cmdline; without root= there it gives up
(proxmox-kernel-helper 002b7b1, src/proxmox-boot/zz-proxmox-boot: update_esps,
copy_and_config_kernels).  Which loader a partition has is no matter of
/etc/kernel/proxmox-boot-uuids but of the partition; where that is GRUB, update-grub runs the tool
(000_proxmox_boot_header), and boot/stacks/grub.py is the way.
"""

from __future__ import annotations

from infertune.base.root import Root
from infertune.boot.change import Command, Edit, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.one_shot import AT_BOOT
from infertune.boot.stacks.text import KERNEL_CMDLINE, MENU, kernel_cmdline
from infertune.host.machine import Machine


def proxmox(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    tool = find(root, "proxmox-boot-tool")
    if tool is None:
        return by_hand(
            f"add to the one line of {KERNEL_CMDLINE}: {' '.join(words)}; then "
            "'proxmox-boot-tool refresh'"
        )
    refresh = (tool, "refresh")
    return Way(
        Part(
            edits=(Edit(KERNEL_CMDLINE, "line", words, base=kernel_cmdline(root)),),
            commands=(Command(refresh, "writes the entries of every ESP", undo=refresh),),
        ),
        rescue=MENU.format(what=AT_BOOT),
        notes=("the tool copies the kernels, too: do not cut the power while it runs",),
    )
