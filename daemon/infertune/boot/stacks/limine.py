# SPDX-License-Identifier: Apache-2.0
"""Limine with limine-entry-tool: CachyOS; Omarchy, whose entries are unified kernel images.

The tool writes limine.conf and builds every kernel's image, whatever an entry starts (its
README.md, 1.37).  limine.conf may hold a checksum of each image, so an old image is not simply
put back: the tool makes it anew.

Since 12.4 Limine starts what LoaderEntryOneShot names (common/lib/bli.c), but that would have to
be an entry in a file which the tool rewrites; so the guard puts it back.
"""

from __future__ import annotations

import re

from infertune.boot import words as texts
from infertune.boot.change import Command, Edit, NewFile, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.text import MENU
from infertune.boot.words import HEADER
from infertune.host import efi
from infertune.host.system import command_line
from infertune.machine import Machine
from infertune.root import Root

DROP_INS = "/etc/limine-entry-tool.d"
DROP_IN = f"{DROP_INS}/zz-infertune.conf"
DEFAULT = "/etc/default/limine"
LAYERS = (
    "/usr/share/limine-entry-tool.d/*.conf",
    "/etc/limine-entry-tool.conf",
    f"{DROP_INS}/*.conf",
    DEFAULT,
)
"""Read in this order; ``+=`` adds to what was there, ``=`` throws it away."""
CMDLINE = "/etc/kernel/cmdline"
TOOLS = ("limine-mkinitcpio", "limine-dracut", "limine-update")


def limine(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    given = " ".join(words)
    tool = next((found for name in TOOLS if (found := find(root, name))), None)
    if tool is None:
        return by_hand(f"add to the line 'cmdline:' of your entry in limine.conf: {given}")
    lines = _lines(root)
    # What a drop-in adds to nothing is all there is: /etc/kernel/cmdline is not read then.
    line = command_line(root) or ""
    present = lines or {"": root.get(CMDLINE) or ""}
    if "root=" in line and not all("root=" in each for each in present.values()):
        return by_hand(
            f"what {tool} would write has no root=: make {DEFAULT} have "
            f'KERNEL_CMDLINE[default]="{line} {given}", and run {tool}'
        )
    command = Command((tool,), "writes Limine's entries and builds their images", undo=(tool,))
    return Way(
        _written(root, lines, words) + Part(commands=(command,)),
        rescue=MENU.format(what=_way_out(root)),
        notes=(f"{tool} builds the images of every kernel",),
    )


def _written(root: Root, lines: dict[str, str], words: Words) -> Part:
    keys = " ".join(lines)
    if not keys:
        return Part(edits=(Edit(CMDLINE, "cmdline", words),))
    replaced = any(operator == "=" for _, operator, _ in _assignments(root.get(DEFAULT)))
    if replaced or not root.exists(DROP_INS):
        return Part(edits=(Edit(DEFAULT, f"limine {keys}", words),))
    return Part((NewFile(DROP_IN, (HEADER + texts.limine(keys, words)).encode()),))


def _lines(root: Root) -> dict[str, str]:
    """What the tool puts together for each key: a kernel's name, or default for the others.

    Entries named fallback have one of their own, and stay as they are.
    """
    found: dict[str, str] = {}
    for layer in LAYERS:
        for path in root.glob(layer):
            if path != DROP_IN:
                for key, operator, value in _assignments(root.get(path)):
                    found[key] = f"{found.get(key, '')} {value}" if operator == "+=" else value
    return {key: value for key, value in found.items() if key != "fallback"}


def _assignments(text: str | None) -> list[tuple[str, str, str]]:
    return re.findall(r"(?m)^[ \t]*KERNEL_CMDLINE\[([^]\s]+)\][ \t]*(\+?=)(.*)$", text or "")


def _way_out(root: Root) -> str:
    ways = []
    if efi.secure_boot(root) is not True:  # no editor then (Limine, CONFIG.md)
        ways.append("press 'e' in Limine's menu and delete the options")
    if root.exists("/usr/bin/limine-snapper-sync"):
        ways.append("choose a snapshot in Limine's menu")
    return ", or ".join(ways) or "boot from another medium"
