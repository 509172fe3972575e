# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images: the command line is part of the image.

One image is built, that which booted this machine, with the words where its tool takes the command
line from.  It lies beside the old one under a name that no loader looks for, and is started once:
by systemd-boot with an entry of type 1, or by the firmware with a boot option.  Both hand over the
image's own command line and what a try needs besides: without Secure Boot that counts instead of
the image's, with it it does not (systemd 257.13, src/boot/stub.c: use_load_options).  When the
boot is confirmed the image gets the old one's name.

Where an image takes its command line from:

- mkinitcpio: /etc/cmdline.d/*.conf since 36, else /etc/kernel/cmdline, /usr/lib/kernel/cmdline,
  /proc/cmdline (mkinitcpio(8))
- ukify, by kernel-install: the last three (60-ukify.install.in)
- dracut with uefi=yes: kernel_cmdline of dracut.conf(5)
"""

from __future__ import annotations

import os
import re

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.boot.builders import ByHand, uki_image
from infertune.boot.change import NO_PART, Edit, Image, NewFile, Part, Shelter, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.images import OLD, kept
from infertune.boot.stacks import firmware
from infertune.boot.stacks.one_shot import ID, one_shot
from infertune.boot.stacks.systemd_boot import systemd_boot
from infertune.boot.stacks.text import KERNEL_CMDLINE, ONCE, ask_to_look, kernel_cmdline
from infertune.boot.words import HEADER
from infertune.host import efi, pe
from infertune.host.boot_entries import boot_entries, boot_partitions, selected_entry
from infertune.host.machine import Machine
from infertune.host.system import command_line, release

DROP_IN = "/etc/cmdline.d/zz-infertune.conf"
DRACUT_DROP_IN = "/etc/dracut.conf.d/zz-infertune.conf"

TRIAL = ".infertune-trial"
"""What the image to try is called after; loaders look for \\*.efi."""

SIGNERS = {
    "mkinitcpio": ("/etc/initcpio/post/*", "/usr/lib/initcpio/post/*"),
    "kernel-install": ("/etc/kernel/install.d/*sbctl*", "/usr/lib/kernel/install.d/*sbctl*"),
}
"""What signs an image once its tool has built it: sbctl's hooks, or somebody's own."""
SIGNING = {
    "kernel-install": ("/etc/kernel/uki.conf", r"^\s*SecureBootPrivateKey\s*="),
    "dracut": ("/etc/dracut.conf.d/*.conf", r"^\s*uefi_secureboot_key="),
}
"""Tools that sign it themselves, and where they are told to (ukify(1), dracut.conf(5))."""

HELD = (
    "if the machine panics or hangs, reset or power-cycle it once, and {who} boots what it booted "
    "before"
)


def uki(root: Root, machine: Machine, words: Words) -> Way:
    ask_to_look(root)
    given = " ".join(words)
    entry = selected_entry(root, boot_entries(root))
    locked = efi.secure_boot(root) is not False
    if entry and entry.id != ID and entry.options and not locked:
        return systemd_boot(root, machine, words)  # it has a command line of its own, which counts
    booted = _booted(root)
    if booted is None:
        return by_hand(f"build an image whose command line also has: {given}")
    place, path = booted
    image = uki_image(root, words, path)
    if isinstance(image, ByHand):
        return by_hand(f"{image.why}: {given}")
    line = _line(root, path)
    source = _source(root, image, words, line)
    if source is None:
        return by_hand(
            f"{KERNEL_CMDLINE} and /etc/cmdline.d both exist, and which of them counts depends on "
            f"mkinitcpio's version: add there {given}; then {' '.join(image.build)}"
        )
    if efi.secure_boot(root) is True and not _signs(root, image):
        return by_hand(
            f"Secure Boot is on, and nothing that signs is found here: build {path} with "
            f"{given}, too, and sign it"
        )
    who, start = _starts_once(root, machine, (place, path + TRIAL), line, words)
    if not start:
        # Without a second entry there is no way back to the old image but another machine.
        return by_hand(
            f"nothing here boots an image once: keep a copy of {path} that your firmware or loader "
            f"boots, add {given} to {_where(source)}, then {' '.join(image.build)}"
        )
    image = replace(image, trial=path + TRIAL, shelter=_shelter(root, image))
    return Way(
        source,
        start + _briefly(source) + Part(images=(image,)),
        one_try="loader",
        rescue=(HELD if locked else ONCE).format(who=who),
        notes=(f"when it is confirmed, {path}{TRIAL} takes the place of {path}",),
    )


def _starts_once(
    root: Root, machine: Machine, image: tuple[str, str], line: str, words: Words
) -> tuple[str, Part]:
    """Who started this machine, and how it starts another image once."""
    place, path = image
    file = path.removeprefix(place)
    if efi.loader_info(root):
        title = machine.distro or "Linux"
        entry = f"title {title}\nefi {file}\noptions {line}\n"
        return "systemd-boot", one_shot(root, f"{place}/loader/entries", entry, words)
    option = efi.boot_current(root)
    if option is None or not option.file or option.arguments:
        return "the firmware", NO_PART
    program = firmware.Program(file.replace("/", "\\"), option.partition, line)
    return "the firmware", firmware.once(root, program, words)


def _booted(root: Root) -> tuple[str, str] | None:
    """Where its partition is mounted, and the image that booted this machine."""
    option, entry = efi.boot_current(root), efi.entry_selected(root)
    named = (
        efi.stub_image(root)
        or (rf"\EFI\Linux\{entry}" if entry else None)
        or (option.file if option else None)
    )
    if not named:
        return None
    file = named.replace("\\", "/").removesuffix(TRIAL)
    for place in boot_partitions(root):
        # systemd-boot tells names in lower case, and a recorded machine is no FAT.
        there = root.glob(f"{place}/EFI/Linux/*.efi")
        found = [path for path in there if path.lower() == f"{place}{file}".lower()]
        if found or root.exists(place + file):
            return place, (found or [place + file])[0]
        if os.path.basename(file).lower() == os.path.basename(OLD):
            # Power was cut while a tool wrote: the copy was booted, and has its own name again.
            ours = [path for path in there if (release(root) or "?") in path] or there
            return (place, ours[0]) if len(ours) == 1 else None
    return None


def _line(root: Root, path: str) -> str:
    """The command line in the image; where that cannot be read, the one of this boot."""
    try:
        found = pe.command_line(root, path)
    except (OSError, ValueError):
        found = None
    return " ".join((found or command_line(root) or "").split())


def _source(root: Root, image: Image, words: Words, line: str) -> Part | None:
    """Where the tool takes the command line from; None where that is not known."""
    tool = os.path.basename(image.build[0])
    given = " ".join(words)
    if tool == "dracut":
        text = f'{HEADER}kernel_cmdline+=" {given} "\n'
        return Part((NewFile(DRACUT_DROP_IN, text.encode()),))
    parts = [path for path in root.glob("/etc/cmdline.d/*.conf") if path != DROP_IN]
    if tool == "mkinitcpio" and parts:
        if root.exists(KERNEL_CMDLINE):
            return None
        return Part((NewFile(DROP_IN, f"{given}\n".encode()),))
    edit = Edit(KERNEL_CMDLINE, "cmdline", words, base=kernel_cmdline(root, line))
    return Part(edits=(edit,))


def _where(source: Part) -> str:
    return ", ".join(each.path for each in source.texts)


def _briefly(source: Part) -> Part:
    """The same for as long as the image is built; what others build after that is as it was."""
    return Part(
        tuple(replace(each, briefly=True) for each in source.files),
        tuple(replace(each, briefly=True) for each in source.edits),
    )


def _signs(root: Root, image: Image) -> bool:
    tool = os.path.basename(image.build[0])
    if any(root.glob(pattern) for pattern in SIGNERS.get(tool, ())):
        return True
    pattern, told = SIGNING.get(tool, ("", ""))
    files = root.glob(pattern) if pattern else []
    return any(re.search(told, root.get(path) or "", re.MULTILINE) for path in files)


def _shelter(root: Root, image: Image) -> Shelter | None:
    """The old image is the default for as long as the tool writes in its place."""
    tool = find(root, "bootctl")
    if tool is None or not efi.loader_info(root):
        return None
    return Shelter(
        (tool, "set-default", os.path.basename(kept(image))),
        (tool, "set-default", efi.entry_default(root) or ""),
    )
