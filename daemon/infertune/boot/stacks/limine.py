# SPDX-License-Identifier: Apache-2.0
"""Limine with limine-entry-tool: CachyOS, Omarchy."""

from __future__ import annotations

import re

from infertune.boot.change import Command, NewFile, Part, Way, Words, by_hand
from infertune.boot.commands import find
from infertune.boot.stacks.text import MENU
from infertune.boot.words import HEADER
from infertune.machine import Machine
from infertune.root import Root

DROP_IN = "/etc/limine-entry-tool.d/zz-infertune.conf"


def limine(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    given = " ".join(words)
    tools = ("limine-mkinitcpio", "limine-dracut", "limine-update")
    tool = next((found for name in tools if (found := find(root, name))), None)
    rescue = MENU.format(
        what="press 'e' in Limine's menu and delete the options, or pick a snapshot"
    )
    if tool is None:
        return by_hand(f"add to the line 'cmdline:' of your entry in limine.conf: {given}")
    # Read after every drop-in: a plain '=' there would throw ours away (limine-entry-tool).
    default = root.get("/etc/default/limine") or ""
    if re.search(r"^\s*KERNEL_CMDLINE\[default\]\s*=", default, re.M):
        return by_hand(
            "/etc/default/limine sets KERNEL_CMDLINE[default] and wins over drop-ins: add "
            f"there {given}, and run {tool}"
        )
    if not root.exists("/etc/limine-entry-tool.d"):
        return by_hand(f'add to /etc/default/limine: KERNEL_CMDLINE[default]+=" {given}"')
    line = f'KERNEL_CMDLINE[default]+=" {given}"\n'
    drop_in = NewFile(DROP_IN, (HEADER + line).encode())
    command = Command((tool,), "writes Limine's entries", undo=(tool,))
    return Way(Part((drop_in,), commands=(command,)), rescue=rescue)
