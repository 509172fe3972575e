# SPDX-License-Identifier: Apache-2.0
"""Sentences that more than one stack needs, and how their files are read."""

from __future__ import annotations

import re

from infertune.base.errors import Failed, NotPermitted, describe
from infertune.base.root import Root
from infertune.host.boot_entries import boot_partitions
from infertune.host.system import command_line

KERNEL_CMDLINE = "/etc/kernel/cmdline"
"""The command line of kernels to come (kernel-install(8), mkinitcpio(8), sdbootutil)."""

MAX_FILE = 1024 * 1024
ONCE = (
    "after a panic, or when the initramfs gives up, the machine reboots by itself and {who} boots "
    "what it booted before; if it hangs, reset or power-cycle it once"
)
"""Where the loader itself starts a trial once."""
MENU = "nothing is put back automatically: {what}, then run 'infertune boot undo'"


def read(root: Root, path: str) -> str:
    """A text file that is to be edited; empty where there is none.

    Raises Failed, or NotPermitted where only root may read it.
    """
    try:
        data, _ = root.read_file(path, MAX_FILE + 1)
    except FileNotFoundError:
        return ""
    except PermissionError as error:
        raise NotPermitted(describe(error)) from error
    except OSError as error:
        raise Failed(f"{describe(error)}; nothing was touched") from error
    if len(data) > MAX_FILE or b"\0" in data:
        raise Failed(f"{path} is no text file of a boot loader; nothing was touched")
    return data.decode("utf-8", "surrogateescape")


def ask_to_look(root: Root) -> None:
    """Raise NotPermitted where only root may look into a boot partition: it would seem empty."""
    for place in boot_partitions(root):
        for directory in (place, f"{place}/loader/entries"):
            try:
                root.listed(directory)
            except PermissionError as error:
                raise NotPermitted(describe(error)) from error
            except OSError:
                continue


def kernel_cmdline(root: Root, booted: str | None = None) -> str:
    """What KERNEL_CMDLINE has to begin with where it is not there: what is taken without it.

    That is the vendor's file, else the line of this boot.  ``booted`` is that line as the loader's
    entry has it; what loaders and kernel-install add themselves is left out.
    """
    vendor = read(root, "/usr/lib/kernel/cmdline")
    if vendor.strip():
        return f"{' '.join(vendor.split())}\n"
    line = command_line(root) or "" if booted is None else booted
    theirs = r"(?:^|(?<=\s))(?:BOOT_IMAGE|initrd|systemd\.machine_id)=\S*(?:\s+|$)"
    return f"{re.sub(theirs, '', line).strip()}\n"
