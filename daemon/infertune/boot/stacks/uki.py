# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images: the command line is part of the image."""

from __future__ import annotations

from infertune.boot.change import Command, Edit, NewFile, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.text import MENU
from infertune.machine import Machine
from infertune.root import Root

DROP_IN = "/etc/cmdline.d/zz-infertune.conf"
SINGLE = "/etc/kernel/cmdline"


def uki(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    rescue = MENU.format(
        what="an image that is signed cannot be edited in a menu: boot another kernel's image"
    )
    install, mkinitcpio = find(root, "kernel-install"), find(root, "mkinitcpio")
    single, parts = root.exists(SINGLE), root.glob("/etc/cmdline.d/*.conf")
    if mkinitcpio and root.glob("/etc/mkinitcpio.d/*.preset"):
        build = Command((mkinitcpio, "-P"), "builds the images", undo=(mkinitcpio, "-P"))
        if parts and not single:
            drop_in = NewFile(DROP_IN, f"{' '.join(words)}\n".encode())
            return Way(Part((drop_in,), commands=(build,)), rescue=rescue)
        if parts and single:
            return by_hand(
                f"{SINGLE} and /etc/cmdline.d both exist, and which of them counts depends on "
                f"mkinitcpio's version: add there {' '.join(words)}"
            )
        if single:
            return _edited(words, build, rescue)
    elif install and single:
        build = Command((install, "add-all"), "builds the images", undo=(install, "add-all"))
        return _edited(words, build, rescue)
    return by_hand(f"build an image whose command line has also: {' '.join(words)}")


def _edited(words: Words, build: Command, rescue: str) -> Way:
    return Way(
        Part(edits=(Edit(SINGLE, "cmdline", words),), commands=(build,)),
        rescue=rescue,
        notes=(f"{SINGLE} is edited: it has no drop-ins",),
    )
