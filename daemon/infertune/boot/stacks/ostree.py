# SPDX-License-Identifier: Apache-2.0
"""Images: ostree, where each deployment has a command line of its own, and bootc without it.

No deployment is pinned: until the one with the options has booted, the present one is the booted
one, and after that the rollback, which ostree keeps until another one has booted.  By then it is
confirmed, or put back.  ``ostree admin pin`` counts from the top of a list that is another one by
then (ot-admin-builtin-pin.c), so nothing could take the right pin off again.
"""

from __future__ import annotations

from infertune.base.root import Root
from infertune.boot.change import Command, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.grub import can_write_environment
from infertune.boot.stacks.text import MENU, ONCE
from infertune.host import efi
from infertune.host.boot_entries import boot_entries, grub_environment
from infertune.host.machine import Machine

CONFIG = "/boot/grub2/grub.cfg"
SOURCES = "/usr/share/man/man8/bootc-loader-entries-set-options-for-source.8*"
"""bootc, docs/src/man; the verb is there where its manual page is."""


def rpm_ostree(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    tool = find(root, "rpm-ostree")
    if tool is None:
        return by_hand(f"add kernel arguments: {' '.join(words)}")
    # Compares whole words, and takes the deployment that is booted next as base
    # (rpm-ostree, src/daemon/rpmostreed-transaction-types.cxx; man rpm-ostree).
    command = Command(
        (tool, "kargs", *(f"--append-if-missing={word}" for word in words)),
        "makes a deployment with the options beside the present one",
        undo=(tool, "kargs", *(f"--delete-if-present={word}" for word in words)),
    )
    return _deployed(root, command)


def bootc(root: Root, machine: Machine, words: Words) -> Way:
    """bootc on ostree.  What a source has set it takes back alone (crates/lib/loader_entries.rs).

    It needs ostree 2026.1, and ends with an error on an older one.
    """
    del machine
    tool = find(root, "bootc")
    if tool is None or not root.glob(SOURCES):
        return _by_source(words, _in_image(words))
    source = (tool, "loader-entries", "set-options-for-source", "--source", "infertune")
    command = Command(
        (*source, "--options", " ".join(words)),
        "makes a deployment with the options beside the present one",
        undo=source,
    )
    return _deployed(root, command)


def composefs(root: Root, machine: Machine, words: Words) -> Way:
    """bootc without ostree.

    The same verb edits the booted entry itself there in its first versions
    (crates/lib/src/bootc_composefs/loader_entries.rs), so nobody but a person uses it.
    """
    del machine
    if efi.stub_info(root):
        return by_hand(_in_image(words))
    ours = [entry.path for entry in boot_entries(root) if entry.of_this_system]
    entry = ours[0] if ours else "the booted entry in /boot/loader/entries"
    given = " ".join(words)
    return _by_source(words, f"add to the line 'options' of {entry}: {given}")


def _deployed(root: Root, command: Command) -> Way:
    fallback = _fallback(root)
    if fallback:
        rescue = ONCE.format(who="GRUB")
        return Way(Part(commands=(fallback, command)), one_try="loader", rescue=rescue)
    # Nothing that the loader does once: GRUB's static grub.cfg of bootupd does not know
    # next_entry (bootupd, src/grub2/grub-static-pre.cfg).
    rescue = MENU.format(what="choose the deployment before it in the boot menu")
    return Way(Part(commands=(command,)), rescue=rescue)


def _fallback(root: Root) -> Command | None:
    """Lets GRUB boot the deployment before it after one boot that nobody confirmed.

    With boot_counter=0 it does so unless boot_success is 1, and it sets that to 0 at each boot;
    in a grub.cfg of grub-mkconfig, and where greenboot is (rhboot/grub2,
    util/grub.d/08_fallback_counting.in, 10_reset_boot_success.in).
    """
    editor = find(root, "grub2-editenv")
    config = root.get(CONFIG) or ""
    known = "boot_counter" in config and "boot_success" in config
    busy = "boot_counter" in (grub_environment(root) or {})
    if editor is None or not known or busy or not can_write_environment(root, "/boot/grub2"):
        return None
    stop = (editor, "-", "unset", "boot_counter")
    return Command(
        (editor, "-", "set", "boot_counter=0", "boot_success=1"),
        "lets GRUB count: one boot without confirmation, and it boots the deployment before",
        undo=stop,
        confirm=stop,
    )


def _by_source(words: Words, otherwise: str) -> Way:
    given = " ".join(words)
    line = f"bootc loader-entries set-options-for-source --source infertune --options '{given}'"
    return Way(
        one_try="nobody",
        manual=(line, f"if bootc has no such command: {otherwise}"),
        notes=("the same command without --options removes them",),
    )


def _in_image(words: Words) -> str:
    kargs = ", ".join(f'"{word}"' for word in words)
    return (
        f"add a file usr/lib/bootc/kargs.d/50-infertune.toml with 'kargs = [{kargs}]' to the "
        "image, build it, and 'bootc upgrade'"
    )
