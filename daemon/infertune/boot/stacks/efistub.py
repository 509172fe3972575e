# SPDX-License-Identifier: Apache-2.0
"""A kernel that the firmware starts itself, with a command line in its boot option.

A second option is made beside the present one, and BootNext lets the firmware start it once: it
deletes BootNext before it does (UEFI 2.10, 3.1.2).  What lasts is one more option, first in
BootOrder.  The present one stays as it is, to be chosen in the firmware's menu.

efibootmgr 18 (src/efibootmgr.c): ``--create`` refuses a number that is taken, and puts a new one
first; ``--delete-bootnum`` takes it out of BootOrder, too; ``--delete-bootnext`` asks whether
Boot0001 exists, so a BootNext that was not used is left, and means nothing without its option.
"""

from __future__ import annotations

import shlex

from infertune.boot.change import AT_THE_TRY, Command, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.text import ONCE
from infertune.host import efi
from infertune.host.system import command_line, parameters
from infertune.machine import Machine
from infertune.root import Root

FIRST = 0x0100
"""Above the numbers that firmware gives away itself."""


def efistub(root: Root, machine: Machine, words: Words) -> Way:
    option = efi.boot_current(root)
    given = " ".join(words)
    if option is None or not option.file:
        return by_hand(f"make a boot option with efibootmgr that has also: {given}")
    place = efi.partition_place(root, option.partition) if option.partition else None
    disk, part = place or ("DISK", "NUMBER")
    line = option.arguments or (command_line(root) or "").strip()
    file = ("--disk", disk, "--part", str(part), "--loader", option.file)

    def create(label: str, *how: str, more: Words = words) -> tuple[str, ...]:
        return (*how, *file, "--label", label, "--unicode", " ".join((line, *more)))

    tool = find(root, "efibootmgr")
    # With a kernel's version in its name, somebody makes a new option for every kernel.
    versioned = machine.kernel is not None and machine.kernel in option.file
    if tool is None or place is None or versioned or not _is_the_line(root, option.arguments):
        return by_hand(shlex.join(create("Linux (infertune)", "efibootmgr", "--create")))
    taken = efi.boot_numbers(root)
    free = (number for number in map("{:04X}".format, range(FIRST, 0x10000)) if number not in taken)
    once, lasts = next(free), next(free)
    trial = Command(
        create(
            "Linux (infertune, one try)",
            *(tool, "--quiet", "--create-only", "--bootnum", once, "--bootnext", once),
            more=(*words, *AT_THE_TRY),
        ),
        "makes a boot option that the firmware starts once",
        undo=(tool, "--quiet", "--bootnum", once, "--delete-bootnum"),
    )
    lasting = Command(
        create("Linux (infertune)", tool, "--quiet", "--create", "--bootnum", lasts),
        "makes a boot option, the first in the firmware's order",
        undo=(tool, "--quiet", "--bootnum", lasts, "--delete-bootnum"),
    )
    return Way(
        Part(commands=(lasting,)),
        Part(commands=(trial,)),
        "loader",
        ONCE.format(who="the firmware"),
    )


def _is_the_line(root: Root, arguments: str) -> bool:
    """Whether the kernel got what is read as the option's arguments."""
    given = parameters(arguments)
    return bool(given) and set(given) <= set(parameters(command_line(root) or ""))
