# SPDX-License-Identifier: Apache-2.0
"""A kernel that the firmware starts itself, with a command line in its boot option.

A second option is tried once, and what lasts is one more, first in the firmware's order; the
present one stays as it is, to be chosen in the firmware's menu.
"""

from __future__ import annotations

import shlex

from infertune.base.root import Root
from infertune.boot.change import Way, Words, by_hand
from infertune.boot.stacks import firmware
from infertune.boot.stacks.firmware import Program
from infertune.boot.stacks.text import ONCE
from infertune.host import efi
from infertune.host.machine import Machine
from infertune.host.system import command_line, parameters


def efistub(root: Root, machine: Machine, words: Words) -> Way:
    option = efi.boot_current(root)
    if option is None or not option.file:
        given = " ".join(words)
        return by_hand(f"make a boot option with efibootmgr that also has: {given}")
    line = option.arguments or (command_line(root) or "").strip()
    kernel = Program(option.file, option.partition, line)
    trial, lasting = firmware.once(root, kernel, words), firmware.first(root, kernel, words)
    # With a kernel's version in its name, somebody makes a new option for every kernel.
    versioned = machine.kernel is not None and machine.kernel in option.file
    if versioned or not (trial and lasting) or not _is_the_line(root, option.arguments):
        create = ("efibootmgr", "--create")
        line = shlex.join(firmware.create(root, kernel, "Linux (infertune)", words, *create))
        return by_hand(line)
    return Way(lasting, trial, "loader", ONCE.format(who="the firmware"))


def _is_the_line(root: Root, arguments: str) -> bool:
    """Whether the kernel got what is read as the option's arguments."""
    given = parameters(arguments)
    return bool(given) and set(given) <= set(parameters(command_line(root) or ""))
