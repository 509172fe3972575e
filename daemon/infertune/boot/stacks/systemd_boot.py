# SPDX-License-Identifier: Apache-2.0
"""systemd-boot with entries of type 1, whoever makes them."""

from __future__ import annotations

from infertune.boot import words as texts
from infertune.boot.change import Edit, Part, Sweep, Way, Words, by_hand
from infertune.boot.stacks.text import MENU, read
from infertune.machine import Machine
from infertune.root import Root

DIRECTORIES = ("/boot", "/efi", "/boot/efi")


def systemd_boot(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    entries = [
        path
        for directory in DIRECTORIES
        for path in root.glob(f"{directory}/loader/entries/*.conf")
        if "fallback" not in path and texts.add("options", "", words) and read(root, path)
    ]
    edits = [Edit(path, "options", words) for path in entries]
    if root.exists("/etc/kernel/cmdline"):
        edits.append(Edit("/etc/kernel/cmdline", "cmdline", words))
    if not edits:
        return by_hand(f"add to the line 'options' of your boot entry: {' '.join(words)}")
    return Way(
        Part(edits=tuple(edits)),
        rescue=MENU.format(what="press 'e' in the menu of systemd-boot and delete the options"),
        sweeps=tuple(Sweep(f"{each}/loader/entries/*.conf", "options") for each in DIRECTORIES),
        notes=("boot entries are edited; one with 'fallback' in its name stays as it is",),
    )
