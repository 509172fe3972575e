# SPDX-License-Identifier: Apache-2.0
"""GRUB with grub.cfg made by grub-mkconfig: Debian, Ubuntu, Mint, Arch, openSUSE's older ones."""

from __future__ import annotations

from infertune.base.root import Root
from infertune.boot.change import (
    AT_THE_TRY,
    Command,
    Edit,
    NewFile,
    Part,
    Way,
    Words,
    by_hand,
)
from infertune.boot.commands import find
from infertune.boot.stacks.text import MENU
from infertune.boot.words import HEADER
from infertune.host.machine import Machine
from infertune.host.mounts import mounted

# A name that sorts last: GRUB_CMDLINE_LINUX_DEFAULT is added to, and what comes last counts.
DROP_IN = "/etc/default/grub.d/zz-infertune.cfg"
SCRIPT = "/etc/grub.d/01_infertune"
DEFAULTS = "/etc/default/grub"

COUNTING_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "vfat", "xfs")
"""Where GRUB can write its environment block: not on btrfs or zfs, nor on LVM or RAID."""

COUNTS = (
    "after a panic, or when the initramfs gives up, the machine reboots by itself and GRUB drops "
    "the options; if it hangs, reset or power-cycle it once"
)


def grub(root: Root, machine: Machine, words: Words) -> Way:
    del machine
    script = find(root, "grub-mkconfig") or find(root, "grub2-mkconfig")
    updater = find(root, "update-grub")
    rebuild = (updater,) if updater else _mkconfig(root, script)
    if not rebuild or not script:
        return by_hand(f"add to the kernel's line in grub.cfg: {' '.join(words)}")
    build = Command(rebuild, "writes GRUB's menu", undo=rebuild)
    if "default/grub.d" not in (root.get(script) or ""):
        # Debian, Ubuntu and Arch patch grub-mkconfig to read drop-ins; upstream does not.
        edit = Edit(DEFAULTS, "shell GRUB_CMDLINE_LINUX_DEFAULT", words)
        return Way(
            Part(edits=(edit,), commands=(build,)),
            rescue=MENU.format(what="press 'e' in GRUB's menu and delete the options"),
            notes=(f"{DEFAULTS} is edited: this GRUB reads no /etc/default/grub.d",),
        )
    editor = find(root, "grub-editenv")
    if editor is None or not can_write_environment(root, "/boot/grub"):
        line = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {}"\n'
        drop_in = NewFile(DROP_IN, (HEADER + line.format(" ".join(words))).encode())
        return Way(
            Part((drop_in,), commands=(build,)),
            rescue=MENU.format(
                what="choose 'recovery mode' in GRUB's menu, which has no such options"
            ),
        )
    # The default entry takes what a variable holds, and the variable is empty but for one boot:
    # so a kernel that is installed meanwhile has the same protection.
    line = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT \\$infertune_options"\n'
    count = Command(
        (editor, "-", "set", "infertune_boot=staged"),
        "lets GRUB count: one boot without confirmation, and it drops the options",
        undo=(editor, "-", "unset", "infertune_boot"),
        confirm=(editor, "-", "set", "infertune_boot=confirmed"),
    )
    files = (
        NewFile(DROP_IN, (HEADER + line).encode()),
        NewFile(SCRIPT, grub_script(words).encode(), 0o755),
    )
    return Way(Part(files, commands=(count, build)), one_try="loader", rescue=COUNTS)


def grub_script(words: Words) -> str:
    """A script for /etc/grub.d: what it prints is run by GRUB at each boot."""
    return f"""#!/bin/sh
{HEADER}cat <<'END'
set infertune_options=""
if [ "${{infertune_boot}}" = "confirmed" ]; then
  set infertune_options="{" ".join(words)}"
elif [ "${{infertune_boot}}" = "staged" ]; then
  set infertune_boot="tried"
  if save_env infertune_boot; then
    set infertune_options="{" ".join((*words, *AT_THE_TRY))}"
  fi
fi
export infertune_options
END
"""


def can_write_environment(root: Root, directory: str) -> bool:
    """Whether GRUB itself can write the environment block in that directory."""
    place = mounted(root, directory)
    if place is None or place.device.startswith(("/dev/mapper/", "/dev/md", "/dev/dm-")):
        return False
    return place.kind in COUNTING_FILE_SYSTEMS


def _mkconfig(root: Root, script: str | None) -> tuple[str, ...]:
    for config in ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"):
        if script and root.exists(config):
            return (script, "-o", config)
    return ()
