# SPDX-License-Identifier: Apache-2.0
"""Boot options of the firmware, made by efibootmgr: one that it starts once, or one that is first.

The firmware deletes BootNext before it starts what that names, and goes on with BootOrder where
that cannot be started (UEFI 2.10, 3.1.2).  So no boot loader has to know about it; what is
started is a file on a partition that firmware can read, with its command line in the option.

efibootmgr 17 and 18 (src/efibootmgr.c): ``--create`` refuses a number that is taken, and puts a
new one first; ``--delete-bootnum`` takes it out of BootOrder, too, and fails (exit code 15) where
there is no such option; ``--delete-bootnext`` asks
whether Boot0001 exists, so a BootNext that was not used is left; without its option it means
nothing.
"""

from __future__ import annotations

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.boot.change import AT_THE_TRY, NO_PART, Command, Part, Words
from infertune.boot.commands import find
from infertune.host import efi

FIRST = 0x0100
"""Above the numbers that firmware gives away itself."""


@dataclass(frozen=True, slots=True)
class Program:
    """What the firmware is to start."""

    file: str
    r"""From the root of its partition: ``\EFI\Linux\arch.efi``."""
    partition: str | None
    """Its GPT id."""
    line: str
    """The command line."""


def create(root: Root, program: Program, label: str, words: Words, *how: str) -> tuple[str, ...]:
    """A command line of efibootmgr; with names for what is not known, for a person."""
    place = efi.partition_place(root, program.partition) if program.partition else None
    disk, part = place or ("DISK", "NUMBER")
    where = ("--disk", disk, "--part", str(part), "--loader", program.file, "--label", label)
    return (*how, *where, "--unicode", " ".join((program.line, *words)))


def once(root: Root, program: Program, words: Words) -> Part:
    """Nothing where it cannot be done."""
    return _made(root, program, "Linux (infertune, one try)", (*words, *AT_THE_TRY), 0)


def first(root: Root, program: Program, words: Words) -> Part:
    """Nothing where it cannot be done."""
    return _made(root, program, "Linux (infertune)", words, 1)


def _made(root: Root, program: Program, label: str, words: Words, which: int) -> Part:
    tool = find(root, "efibootmgr")
    known = program.partition and efi.partition_place(root, program.partition)
    if tool is None or not known or not program.line.isascii():
        return NO_PART
    taken = efi.boot_numbers(root)
    free = [name for n in range(FIRST, FIRST + 0x100) if (name := f"{n:04X}") not in taken]
    if len(free) <= which:
        return NO_PART
    number = free[which]
    how, why = (
        (("--create",), "makes a boot option, the first in the firmware's order")
        if which
        else (("--create-only", "--bootnext", number), "makes a boot option, to be started once")
    )
    entry = (tool, "--quiet", "--bootnum", number)
    made = create(root, program, label, words, *entry, *how)
    undo = (*entry, "--delete-bootnum")
    return Part(commands=(Command(made, why, undo=undo, makes=efi.option_file(number)),))
