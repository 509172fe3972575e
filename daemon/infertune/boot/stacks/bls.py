# SPDX-License-Identifier: Apache-2.0
"""GRUB with entries of the Boot Loader Specification: Fedora, RHEL and their kin.

An entry is a text file that kernel-install writes once, so it is edited here, and no image is
built.  grubby would put the words into 0-rescue, too (grubby-bls, update_bls_fragment).

GRUB starts a trial entry once.  What grub-mkconfig writes takes ``next_entry`` out of the
environment block before it boots what that names, and saves no default then (rhboot/grub2,
util/grub.d/00_header.in); the id of an entry is its file's name without ``.conf``
(grub-core/commands/blscfg.c, blsuki.c in 2.14).  Neither boot_success nor the hidden menu is
touched (util/grub.d/10_reset_boot_success.in).
"""

from __future__ import annotations

import os
import re

from infertune.base.root import Root
from infertune.boot import words as texts
from infertune.boot.change import (
    AT_THE_TRY,
    NO_PART,
    Command,
    Edit,
    NewFile,
    Part,
    Sweep,
    Way,
    Words,
    by_hand,
)
from infertune.boot.commands import find
from infertune.boot.stacks.grub import DEFAULTS, can_write_environment, grub
from infertune.boot.stacks.text import MENU, ONCE, read
from infertune.host.boot_entries import BootEntry, boot_entries
from infertune.host.machine import Machine
from infertune.host.system import command_line

ENTRIES = "/boot/loader/entries"
CONFIG = "/boot/grub2/grub.cfg"
ENVIRONMENT = "/boot/grub2/grubenv"
"""A link to the EFI system partition on Fedora up to 33."""
CMDLINE = "/etc/kernel/cmdline"


def bls(root: Root, machine: Machine, words: Words) -> Way:
    config = root.get(CONFIG)
    if config and "blscfg" not in config:
        return grub(root, machine, words)  # GRUB_ENABLE_BLSCFG=false
    ours = [e for e in boot_entries(root) if e.of_this_system and e.linux and e.options]
    if not ours:
        return _unseen(root, words)
    running = _running(machine, ours)
    edits = tuple(Edit(entry.path, "options", words) for entry in ours)
    lasting = Part(edits=(*edits, _new_kernels(root, running or ours[0], words)))
    sweeps = (Sweep(f"{ENTRIES}/*.conf", "options"),)
    trial = _trial(root, machine, running, words) if running else NO_PART
    if trial:
        return Way(lasting, trial, "loader", ONCE.format(who="GRUB"), sweeps)
    menu = "choose the entry '0-rescue' in GRUB's menu, or press 'e' there and delete the options"
    return Way(lasting, rescue=MENU.format(what=menu), sweeps=sweeps)


def _unseen(root: Root, words: Words) -> Way:
    """Where no entry can be read: they are root's, or kept where only grubby looks."""
    given = " ".join(words)
    grubby = find(root, "grubby")
    if grubby is None:
        return by_hand(f"add to the line 'options' of your entries in {ENTRIES}: {given}")
    command = Command(
        (grubby, "--update-kernel=ALL", f"--args={given}"),
        "adds the options to every entry and to what new kernels get",
        undo=(grubby, "--update-kernel=ALL", f"--remove-args={given}"),
        touches=(f"{ENTRIES}/*.conf", "/boot/efi/loader/entries/*.conf", CMDLINE, DEFAULTS),
    )
    menu = "press 'e' in GRUB's menu and delete the options"
    return Way(
        Part(commands=(command,)),
        rescue=MENU.format(what=menu),
        sweeps=(Sweep(f"{ENTRIES}/*.conf", "options"),),
        notes=(f"no entry in {ENTRIES} can be read here: as root each is edited, and one tried",),
    )


def _running(machine: Machine, entries: list[BootEntry]) -> BootEntry | None:
    """The entry of the running kernel, under the name that kernel-install gives it."""
    ending = f"-{machine.kernel}.conf"
    return next((entry for entry in entries if entry.id.endswith(ending)), None)


def _new_kernels(root: Root, entry: BootEntry, words: Words) -> Edit:
    """The words in what new kernels get.

    Where there is no such file, kernel-install takes /proc/cmdline (20-grub.install), with all
    that is on it for a trial; so one is made.  GRUB_CMDLINE_LINUX in /etc/default/grub is left
    alone: once that file is the newer one, grub2-mkconfig writes this one anew from it.
    """
    line = entry.options
    if "$" in line:  # $kernelopts of Fedora up to 32, or tuned's: only GRUB knows what they hold
        given = (command_line(root) or "").split()
        line = " ".join(w for w in given if not w.startswith(("BOOT_IMAGE=", "initrd=")))
    return Edit(CMDLINE, "cmdline", words, base=f"{line}\n")


def _trial(root: Root, machine: Machine, running: BootEntry, words: Words) -> Part:
    editor = find(root, "grub2-editenv")
    if editor is None or not _starts_once(root):
        return NO_PART
    # Version 0 of the same name: like 0-rescue older than every kernel, so never the first, which
    # is the default where none is saved (blscfg.c, split_cmp; blsuki.c, filevercmp).
    name = f"{running.id.removesuffix(f'-{machine.kernel}.conf')}-0-infertune"
    text = read(root, running.path)
    text = re.sub(r"(?m)^(title[ \t].*?)[ \t]*$", r"\1 (infertune, one try)", text, count=1)
    text = texts.add("options", text, (*words, *AT_THE_TRY))
    path = f"{os.path.dirname(running.path)}/{name}.conf"
    once = Command(
        (editor, "-", "set", f"next_entry={name}"),
        "lets GRUB boot that entry once",
        undo=(editor, "-", "unset", "next_entry"),
    )
    return Part((NewFile(path, text.encode("utf-8", "surrogateescape")),), commands=(once,))


def _starts_once(root: Root) -> bool:
    """Whether GRUB takes next_entry out before it boots that."""
    config = root.get(CONFIG)
    if config and "next_entry" not in config:
        return False
    try:
        environment = root.real(ENVIRONMENT)
    except (ValueError, RuntimeError, OSError):
        return False  # a link that leads nowhere
    return can_write_environment(root, os.path.dirname(environment))
