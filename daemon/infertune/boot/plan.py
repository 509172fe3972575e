# SPDX-License-Identifier: Apache-2.0
"""What staging options takes on one machine: read, decided, and nothing done.

Everything goes on the kernel's command line where that can be written: it reaches drivers in an
initramfs, too (kmod reads /proc/cmdline last), it wins over every file, it can be taken out in a
boot menu, and no image has to be built for it.  Only where a person has to write the command line
do drivers' options go to modprobe.d, and into the running kernel's initramfs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infertune.base.errors import NotPermitted, UsageError
from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.boot.builders import ByHand, initramfs_image
from infertune.boot.change import AT_THE_TRY, Change, NewFile, Part, Way, Words
from infertune.boot.options import Option
from infertune.boot.stacks import (
    bls,
    efistub,
    grub,
    limine,
    ostree,
    proxmox,
    systemd_boot,
    told,
    uki,
)
from infertune.boot.stacks.text import MENU
from infertune.boot.words import HEADER
from infertune.host.machine import Machine
from infertune.host.system import command_line

MODPROBE = "/etc/modprobe.d/zz-infertune.conf"
"""Sorts after other files, since of two values of one parameter the later one counts."""
OURS = (MODPROBE, grub.DROP_IN, grub.SCRIPT, uki.DROP_IN, limine.DROP_IN)

COMMAND_LINE_SIZE = 2048
"""Bytes with the NUL at the end, of x86 and arm64 (asm/setup.h); what is beyond it is cut off."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One boot stack; ids are those of host/boot_loader.py."""

    way: Callable[[Root, Machine, Words], Way]
    modprobe: bool = True
    """Whether /etc/modprobe.d reaches drivers here, where the command line is left to a person."""


STACKS: dict[str | None, Stack] = {
    "grub": Stack(grub.grub),
    "bls": Stack(bls.bls),
    "systemd-boot": Stack(systemd_boot.systemd_boot),
    "kernelstub": Stack(systemd_boot.kernelstub),
    "sdboot-manage": Stack(systemd_boot.sdboot_manage),
    "sdbootutil": Stack(systemd_boot.sdbootutil),
    "proxmox-boot-tool": Stack(proxmox.proxmox),
    "uki": Stack(uki.uki, modprobe=False),
    "limine": Stack(limine.limine),
    "rpm-ostree": Stack(ostree.rpm_ostree, modprobe=False),
    "bootc": Stack(ostree.bootc, modprobe=False),
    "composefs": Stack(ostree.composefs, modprobe=False),
    "efistub": Stack(efistub.efistub),
    "refind": Stack(told.refind),
    "zfsbootmenu": Stack(told.zfsbootmenu),
    "nixos": Stack(told.nixos, modprobe=False),
    "none": Stack(told.container, modprobe=False),
    None: Stack(told.unknown),
}


def plan(root: Root, machine: Machine, options: Sequence[Option]) -> Change:
    """What staging ``options`` takes on this machine.

    Raises Failed for a file it cannot read, UsageError for options that have no room.
    """
    stack = STACKS.get(machine.boot_style, STACKS[None])
    firmware = tuple(option for option in options if not option.parameters)
    given = [option for option in options if option.parameters]
    change = Change(machine.boot_style, machine.boot_evidence, firmware)
    if not given:
        return change
    try:
        way = stack.way(root, machine, _words(given))
    except NotPermitted as error:
        # What they come to does not depend on files that only root may read.
        way = Way(notes=(f"{error.message}: 'sudo infertune boot plan' shows what is written",))
    if not way.manual:
        given = [replace(option, on_command_line=True) for option in given]
        _check_room(root, (*_words(given), *AT_THE_TRY))
        return _with(change, way, given)
    in_file = [each for each in given if stack.modprobe and not each.on_command_line]
    told_ = [each for each in given if each not in in_file]
    if told_:
        way = stack.way(root, machine, _words(told_))
        change = replace(change, manual=way.manual, notes=way.notes, by_hand=tuple(told_))
    if in_file:
        change = _with_driver_file(root, machine, change, in_file)
    order = list(options)
    return replace(change, options=tuple(sorted(change.options, key=_position(order))))


def _with(change: Change, way: Way, given: Sequence[Option]) -> Change:
    return replace(
        change,
        options=(*change.options, *given),
        words=_words(given),
        lasting=way.lasting,
        trial=way.trial,
        one_try=way.one_try,
        rescue=way.rescue,
        sweeps=way.sweeps,
        notes=way.notes,
    )


def _words(options: Sequence[Option]) -> Words:
    return tuple(f"{p.word}={o.value}" for o in options for p in o.parameters)


def _position(order: Sequence[Option]) -> Callable[[Option], int]:
    ids = [option.id for option in order]
    return lambda option: ids.index(option.id)


def _check_room(root: Root, words: Words) -> None:
    """Ours come last on the command line: what does not fit there is cut out of them."""
    there = command_line(root) or ""
    size = len(" ".join((there, *words)).encode())
    if size >= COMMAND_LINE_SIZE:
        raise UsageError(
            f"the command line would have {size} bytes, and the kernel takes "
            f"{COMMAND_LINE_SIZE - 1} of them ({len(there.encode())} are there now); nothing was "
            "touched",
            hint="shorten what is there, or leave options out of the profile's [boot]",
        )
    if "--" in there.split():
        raise UsageError(
            "the command line has '--', and what follows goes to init, not to the kernel; nothing "
            "was touched",
            hint="move what is meant for init elsewhere",
        )


def _with_driver_file(
    root: Root, machine: Machine, change: Change, options: Sequence[Option]
) -> Change:
    """Drivers' options in modprobe.d, and in the initramfs that may hold the driver."""
    lines: dict[str, list[str]] = {}
    for option in options:
        for parameter in option.parameters:
            lines.setdefault(parameter.module, []).append(f"{parameter.name}={option.value}")
    text = "".join(f"options {module} {' '.join(given)}\n" for module, given in lines.items())
    file = NewFile(MODPROBE, (HEADER + text).encode())
    image = initramfs_image(root, machine.kernel or "")
    notes = (image.why,) if isinstance(image, ByHand) else ()
    return replace(
        change,
        options=(*change.options, *options),
        lasting=Part((file,), images=() if isinstance(image, ByHand) else (image,)),
        rescue=MENU.format(what="add modprobe.blacklist=amdgpu in the boot menu"),
        notes=(*change.notes, *notes),
    )
