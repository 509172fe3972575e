# SPDX-License-Identifier: Apache-2.0
"""Stacks that are recognised and not written to: the exact lines for a person."""

from __future__ import annotations

import re

from infertune.base.root import Root
from infertune.boot.change import Way, Words, by_hand
from infertune.host.machine import Machine
from infertune.host.mounts import mounted
from infertune.host.system import command_line

REFIND = "/boot/refind_linux.conf"


def refind(root: Root, machine: Machine, words: Words) -> Way:
    """The first line of refind_linux.conf is the default (rEFInd, docs/refind/linux.html)."""
    del machine
    given = " ".join(words)
    rows = re.findall(r'(?m)^[ \t]*("[^"]*")[ \t]+"([^"]*)"[ \t]*$', root.get(REFIND) or "")
    if not rows:
        return by_hand(f"add to the line 'options' of your stanza in refind.conf: {given}")
    title, line = rows[0]
    return by_hand(
        f'make the first line of {REFIND}: {title} "{line} {given}"',
        notes=("in rEFInd press F2 on the entry, and F2 again, to edit it for one boot",),
    )


def zfsbootmenu(root: Root, machine: Machine, words: Words) -> Way:
    """A property of the dataset is the command line; root= and the host's id are added to it
    (zfsbootmenu(7), lib/zfsbootmenu-core.sh)."""
    del machine
    place = mounted(root, "/")
    dataset = place.device if place else "DATASET"
    added = ("root=", "spl_hostid=", "spl.spl_hostid=")
    given = [w for w in (command_line(root) or "").split() if not w.startswith(added)]
    line = " ".join((*given, *words))
    return by_hand(
        f"zfs set org.zfsbootmenu:commandline='{line}' {dataset}",
        notes=("in ZFSBootMenu press Ctrl-E to edit it for one boot",),
    )


def nixos(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    listed = " ".join(f'"{word}"' for word in words)
    return by_hand(
        f"add to configuration.nix: boot.kernelParams = [ {listed} ]; then 'nixos-rebuild "
        "boot'; in the boot menu every earlier generation is still there"
    )


def container(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    return by_hand(f"a container has its host's command line; add there: {' '.join(words)}")


def unknown(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    given = " ".join(words)
    line = (command_line(root) or "").strip()
    return by_hand(
        f"unknown boot loader: where it keeps the command line '{line}', add {given}"
        if line
        else f"unknown boot loader: add to its command line {given}"
    )
