# SPDX-License-Identifier: Apache-2.0
"""Sentences that more than one stack needs, and how their files are read."""

from __future__ import annotations

from infertune.errors import Failed, describe
from infertune.root import Root

MAX_FILE = 1024 * 1024
ONCE = (
    "a panic, or an initramfs that gives up, reboots by itself, and {who} boots what it booted "
    "before; a machine that hangs needs one reset or power cycle for that"
)
"""Where the loader itself starts a trial once."""
MENU = "nothing comes back by itself: {what}, and run 'infertune boot undo'"


def read(root: Root, path: str) -> str:
    """A text file that is to be edited; empty where there is none.  Raises Failed."""
    try:
        data, _ = root.read_file(path, MAX_FILE + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Failed(f"{describe(error)}; nothing was touched") from error
    if len(data) > MAX_FILE or b"\0" in data:
        raise Failed(f"{path} is no text file of a boot loader; nothing was touched")
    return data.decode("utf-8", "surrogateescape")
