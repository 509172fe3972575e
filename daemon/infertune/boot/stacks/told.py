# SPDX-License-Identifier: Apache-2.0
"""Stacks that are recognised and not written to: the exact lines for a person."""

from __future__ import annotations

from infertune.boot.change import Way, Words, by_hand
from infertune.machine import Machine
from infertune.root import Root


def nixos(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    listed = " ".join(f'"{word}"' for word in words)
    return by_hand(
        f"add to configuration.nix: boot.kernelParams = [ {listed} ]; then 'nixos-rebuild "
        "boot'; in the boot menu every earlier generation is still there"
    )


def container(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    return by_hand(f"a container has its host's command line; there: {' '.join(words)}")


def unknown(root: Root, machine: Machine, words: Words) -> Way:
    del root, machine
    return by_hand(f"no boot loader is known here: add to the command line {' '.join(words)}")
