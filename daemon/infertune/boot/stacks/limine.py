# SPDX-License-Identifier: Apache-2.0
"""Limine with limine-entry-tool: CachyOS; Omarchy, whose entries are unified kernel images.

The tool writes limine.conf and builds every kernel's image, whatever an entry starts (its
README.md, 1.37).  limine.conf may hold a checksum of each image, so an old image is not simply
put back: the tool makes it anew.

The trial needs neither: the firmware starts the present image once, with another command line.
Limine itself starts what LoaderEntryOneShot names since 12.4 (common/lib/bli.c), but that has to
be an entry of limine.conf, which may have a checksum, too, and with remember_last_entry it would
be the next default (common/menu.c).
"""

from __future__ import annotations

import re

from infertune.base.root import Root
from infertune.boot import words as texts
from infertune.boot.change import NO_PART, Command, Edit, NewFile, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks import firmware
from infertune.boot.stacks.firmware import Program
from infertune.boot.stacks.text import MENU, ONCE
from infertune.boot.words import HEADER
from infertune.host import efi
from infertune.host.boot_entries import loader_place
from infertune.host.machine import Machine
from infertune.host.system import command_line, machine_id

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
    place = loader_place(root) or "/boot"
    command = Command(
        (tool,),
        "writes Limine's entries and builds their images",
        undo=(tool,),
        rewrites=(f"{place}/{machine_id(root)}/*/initramfs*", f"{place}/EFI/Linux/*.efi"),
    )
    lasting = _written(root, lines, words) + Part(commands=(command,))
    notes = (f"{tool} builds the images of every kernel",)
    image = _image(root, machine)
    trial = firmware.once(root, image, words) if image else NO_PART
    if trial:
        return Way(lasting, trial, "loader", ONCE.format(who="the firmware"), notes=notes)
    return Way(lasting, rescue=MENU.format(what=_way_out(root)), notes=notes)


def _image(root: Root, machine: Machine) -> Program | None:
    """What the firmware can start of the running kernel: its unified image, or its EFI stub."""
    partition, place = efi.loader_partition(root), loader_place(root)
    line = (command_line(root) or "").strip()
    # Under Secure Boot a unified image keeps its own command line (systemd, src/boot/stub.c,
    # use_load_options), and the firmware starts no kernel that only Limine has checked.
    if place is None or efi.secure_boot(root) is not False or "/.snapshots/" in line:
        return None
    if image := efi.stub_image(root):
        return Program(image, partition, line)
    package = root.get(f"/usr/lib/modules/{machine.kernel}/pkgbase")
    folder = f"/{machine_id(root)}/{package}"
    # Where limine-entry-tool copies them to; older ones add the package to the names.
    for more in ("", f"-{package}"):
        kernel, initramfs = f"{folder}/vmlinuz{more}", f"{folder}/initramfs{more}"
        if root.exists(f"{place}{kernel}") and root.exists(f"{place}{initramfs}"):
            file, initrd = (path.replace("/", "\\") for path in (kernel, initramfs))
            return Program(file, partition, f"initrd={initrd} {line}")
    return None


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
