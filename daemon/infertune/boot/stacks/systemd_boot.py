# SPDX-License-Identifier: Apache-2.0
"""Boot entries of type 1, whoever makes them: systemd-boot's, and those of openSUSE's GRUB.

Entries are small text and are replaced as a whole, so no image and no kernel is touched, and no
tool is run that would write either in place.  What differs from one distribution to the next is
where new entries get their command line from; that file is edited beside them.

- kernel-install: /etc/kernel/cmdline, else /usr/lib/kernel/cmdline, else /proc/cmdline, which is
  the one of the boot that tries the options (systemd 257.13, 90-loaderentry.install)
- kernelstub of Pop!_OS: user.kernel_options in /etc/kernelstub/configuration, at every update of
  an initramfs (kernelstub 3fb4e06, application.py, config.py; data/initramfs/zz-kernelstub).
  ``kernelstub --add-options`` would also copy kernel and initramfs over those on the ESP, and
  ``--delete-options`` leaves the others in another order (a set of Python's).
- sdboot-manage of CachyOS and Manjaro: /etc/sdboot-manage.conf, which it sources.  It makes every
  entry anew, and removes the others unless told otherwise (systemd-boot-manager 0ea9ba4).
- sdbootutil of openSUSE: /etc/kernel/cmdline and so on, as kernel-install; ``update-all-entries``
  does to the entries of the running snapshot what is done here (sdbootutil 001e067,
  create_boot_options, update_entry_conf)
"""

from __future__ import annotations

import json
import os
import re

from infertune.base.root import Root
from infertune.boot import words as texts
from infertune.boot.change import NO_PART, Command, Edit, Part, Sweep, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.one_shot import AT_BOOT, ID, one_shot
from infertune.boot.stacks.text import KERNEL_CMDLINE, MENU, ONCE, ask_to_look, kernel_cmdline, read
from infertune.host import efi
from infertune.host.boot_entries import (
    BootEntry,
    boot_entries,
    boot_partitions,
    selected_entry,
)
from infertune.host.machine import Machine
from infertune.host.measured_boot import measured
from infertune.host.system import machine_id, os_release

KERNELSTUB = "/etc/kernelstub/configuration"
KERNELSTUB_PLACE = "list kernel_options"
SDBOOT_MANAGE = "/etc/sdboot-manage.conf"


def systemd_boot(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    entries = _entries(root)
    if not _made_by_kernel_install(root, entries):
        return _way(root, words, entries)
    return _way(root, words, entries, (_kernel_cmdline(root, words, entries),))


def kernelstub(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    # Older revisions have one string instead of the list, and an OEM's file may have anything.
    before = read(root, KERNELSTUB)
    after = texts.add(KERNELSTUB_PLACE, before, words)
    there = _kernelstub_options(texts.remove(KERNELSTUB_PLACE, before, words))
    if there is None or _kernelstub_options(after) != [*there, *words]:
        return by_hand(f'kernelstub --add-options "{" ".join(words)}"')
    return _way(root, words, _entries(root), (Edit(KERNELSTUB, KERNELSTUB_PLACE, words),))


def sdboot_manage(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    source = Edit(SDBOOT_MANAGE, "shell LINUX_OPTIONS", words)
    note = "a kernel update before the reboot removes the trial entry (sdboot-manage gen)"
    return _way(root, words, _entries(root), (source,), trial_note=note)


def sdbootutil(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    entries = _entries(root)
    tool = find(root, "sdbootutil")
    argv = (tool, "update-predictions") if tool and measured(root) else ()
    after = (Command(argv, "lets the TPM expect the new command line", undo=argv),) if argv else ()
    return _way(root, words, entries, (_kernel_cmdline(root, words, entries),), after)


def _way(
    root: Root,
    words: Words,
    entries: tuple[BootEntry, ...],
    sources: tuple[Edit, ...] = (),
    after: tuple[Command, ...] = (),
    *,
    trial_note: str = "",
) -> Way:
    """Words for the entries of this system, and for those to come that are made of ``sources``."""
    ours = [each for each in entries if each.of_this_system]
    if not ours:
        return by_hand(f"add to the line 'options' of your boot entry: {' '.join(words)}")
    edits = (*(Edit(each.path, "options", words) for each in ours), *sources)
    for each in edits:
        read(root, each.path)  # what cannot be edited is told now, not after the trial
    sweeps = tuple(
        Sweep(f"{directory}/*.conf", "options")
        for directory in dict.fromkeys(os.path.dirname(each.path) for each in ours)
    )
    booted = _booted(root, entries)
    trial = NO_PART
    if booted:
        directory = os.path.dirname(booted.path)
        trial = one_shot(root, directory, read(root, booted.path), words)
    kept = ", ".join(each.id for each in entries if each not in ours)
    notes = (
        (f"entries of other systems and rescue entries stay as they are: {kept}",) if kept else ()
    )
    return Way(
        Part(edits=edits, commands=after),
        trial and trial + Part(commands=after),
        one_try="loader" if trial else "guard",
        rescue=(
            ONCE.format(who="systemd-boot") if trial else MENU.format(what=_at_boot(root, entries))
        ),
        sweeps=sweeps,
        notes=(*notes, trial_note) if trial and trial_note else notes,
    )


def _entries(root: Root) -> tuple[BootEntry, ...]:
    """Every entry but our own.  Raises NotPermitted."""
    ask_to_look(root)
    return tuple(each for each in boot_entries(root) if each.id != ID)


def _booted(root: Root, entries: tuple[BootEntry, ...]) -> BootEntry | None:
    """The entry that booted this machine; where that was a trial, the one it is a copy of."""
    found = selected_entry(root, entries)
    if found is None and (efi.entry_selected(root) or "") == ID:
        trial = next((each for each in boot_entries(root) if each.id == ID), None)
        found = trial and next(
            (e for e in entries if (e.linux, e.initrd) == (trial.linux, trial.initrd)), None
        )
    return found if found and found.of_this_system else None


def _made_by_kernel_install(root: Root, entries: tuple[BootEntry, ...]) -> bool:
    """Whether kernel-install makes them: it begins their names with its entry token."""
    release = os_release(root)
    tokens = (
        root.get("/etc/kernel/entry-token"),
        machine_id(root),
        release.get("IMAGE_ID"),
        release.get("ID"),
    )
    begin = tuple(f"{token}-" for token in tokens if token)
    return find(root, "kernel-install") is not None and any(
        each.of_this_system and each.id.startswith(begin) for each in entries
    )


def _kernel_cmdline(root: Root, words: Words, entries: tuple[BootEntry, ...]) -> Edit:
    booted = _booted(root, entries)
    base = kernel_cmdline(root, booted.options if booted else None)
    return Edit(KERNEL_CMDLINE, "cmdline", words, base=base)


def _kernelstub_options(text: str) -> list[str] | None:
    try:
        found = json.loads(text)["user"]["kernel_options"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _at_boot(root: Root, entries: tuple[BootEntry, ...]) -> str:
    """What a person does in the menu."""
    if not (efi.loader_info(root) or "systemd-boot").startswith("systemd-boot"):
        return "press 'e' in GRUB's menu and delete the options"
    off = r"^editor\s+(?:no|n|false|f|off|0)\s*$"
    settings = (read(root, f"{place}/loader/loader.conf") for place in boot_partitions(root))
    if not any(re.search(off, text, re.MULTILINE | re.IGNORECASE) for text in settings):
        return AT_BOOT
    way_out = next((e.title or e.id for e in entries if "fallback" in e.id), None)
    if way_out:
        return f"hold Space while it boots and choose '{way_out}', which has no such options"
    return "there is no way in systemd-boot's menu (loader.conf: editor no); allow its editor first"
