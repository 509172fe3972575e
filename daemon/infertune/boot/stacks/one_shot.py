# SPDX-License-Identifier: Apache-2.0
"""A boot entry that systemd-boot starts once, and never by itself.

LoaderEntryOneShot names the entry of the next boot.  systemd-boot takes the variable away as it
reads it, before it starts anything, and does not remember such an entry for ``default @saved``
(systemd 257.13, src/boot/boot.c: config_load_defaults, save_selected_entry).  Where the entry is
gone by then, or its kernel, the default is started.

What it starts without being told is the first entry of its order, so ours has to be the last one:

- It has no sort-key: entries that have one come first (boot_entry_compare).
- Among those without, the larger name comes first, and '-' is less than every letter and digit;
  the '_' before it does not count (strverscmp_improved).  It is there for bootctl, to which a '-'
  begins an option.
- It has no counter of boot counting.  '+0' would put it last as well, but systemd-boot renames
  such a file when it starts it, and systemd-bless-boot(8) takes the counter away before anybody
  has looked at the boot.
"""

from __future__ import annotations

import os
import re

from infertune.base.root import Root
from infertune.boot.change import AT_THE_TRY, NO_PART, Command, NewFile, Part, Words
from infertune.boot.commands import find
from infertune.boot.words import HEADER, add
from infertune.host import efi
from infertune.host.mounts import mounted

ID = "_-infertune-trial.conf"
"""The file's name, and what systemd-boot calls the entry."""

SORTS_SO_SINCE = 251
"""The systemd whose systemd-boot knows sort-key; names were compared otherwise before 250."""

AT_BOOT = "hold Space while it boots, press 'e' in systemd-boot's menu and delete the options"


def starts_once(root: Root) -> bool:
    """Whether this machine's loader does all of the above, and can be told to."""
    version = re.match(r"systemd-boot (\d+)", efi.loader_info(root) or "")
    return (
        version is not None
        and int(version[1]) >= SORTS_SO_SINCE
        and efi.honours_one_shot(root) is True
        and find(root, "bootctl") is not None
    )


def one_shot(root: Root, directory: str, entry: str, words: Words) -> Part:
    """What makes the next boot the one that tries the words; nothing where there is no way.

    ``entry`` is the text of the entry to start, ``directory`` the one it belongs in.
    """
    tool = find(root, "bootctl")
    if tool is None or not starts_once(root) or not _writable(root, directory):
        return NO_PART
    text = HEADER + add("options", _renamed(entry), (*words, *AT_THE_TRY))
    return Part(
        (NewFile(f"{directory}/{ID}", text.encode("utf-8", "surrogateescape")),),
        commands=(
            Command(
                (tool, "set-oneshot", ID),
                "has systemd-boot start the trial entry at the next boot, once",
                undo=(tool, "set-oneshot", ""),
            ),
        ),
    )


def _renamed(entry: str) -> str:
    """The entry as another one, that is not sorted among those of its system."""
    lines = [line for line in entry.splitlines() if not re.match(r"sort-key\s", line)]
    titles = [at for at, line in enumerate(lines) if re.match(r"title\s", line)]
    for at in titles:
        lines[at] = f"{lines[at].rstrip()} (infertune trial)"
    if not titles:
        lines.insert(0, "title infertune trial")
    return "\n".join(lines) + "\n"


def _writable(root: Root, directory: str) -> bool:
    mount = mounted(root, os.path.normpath(directory))
    return mount is None or "ro" not in mount.options
