# SPDX-License-Identifier: Apache-2.0
"""GRUB with entries of the Boot Loader Specification: Fedora, RHEL and their kin, by grubby."""

from __future__ import annotations

from infertune.boot.change import Command, Part, Way, Words
from infertune.boot.commands import find
from infertune.boot.stacks.grub import grub
from infertune.boot.stacks.text import MENU
from infertune.machine import Machine
from infertune.root import Root


def bls(root: Root, machine: Machine, words: Words) -> Way:
    grubby = find(root, "grubby")
    if grubby is None:
        return grub(root, machine, words)
    given = " ".join(words)
    command = Command(
        (grubby, "--update-kernel=ALL", f"--args={given}"),
        "adds the options to every entry and to what new kernels get",
        undo=(grubby, "--update-kernel=ALL", f"--remove-args={given}"),
        touches=(
            "/boot/loader/entries/*.conf",
            "/etc/kernel/cmdline",
            "/etc/default/grub",
        ),
    )
    rescue = MENU.format(what="press 'e' in GRUB's menu and delete the options")
    return Way(Part(commands=(command,)), rescue=rescue)
