# SPDX-License-Identifier: Apache-2.0
"""Images of ostree: each deployment has a command line of its own, and the last one stays."""

from __future__ import annotations

from infertune.boot.change import Command, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.text import MENU
from infertune.machine import Machine
from infertune.root import Root


def rpm_ostree(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    tool = find(root, "rpm-ostree")
    if tool is None:
        return by_hand(f"add kernel arguments: {' '.join(words)}")
    command = Command(
        (tool, "kargs", *(f"--append-if-missing={word}" for word in words)),
        "makes a deployment with the options beside the present one",
        undo=(tool, "kargs", *(f"--delete-if-present={word}" for word in words)),
    )
    rescue = MENU.format(what="choose the deployment before it in the boot menu")
    return Way(Part(commands=(command,)), rescue=rescue)


def bootc(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    kargs = ", ".join(f'"{word}"' for word in words)
    return by_hand(
        "this system is an image: add a file usr/lib/bootc/kargs.d/50-infertune.toml with "
        f"'kargs = [{kargs}]' to the image, build it, and 'bootc upgrade'"
    )
