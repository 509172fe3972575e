# SPDX-License-Identifier: Apache-2.0
"""Kernel values that systemd writes at each boot: sysctl.d(5), and tmpfiles.d(5)'s ``w`` lines."""

from __future__ import annotations

import re
from collections.abc import Iterator

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.ini import DIRECTORIES, drop_ins, part_of
from infertune.host.unknown import Unknown

_TMPFILES = "tmpfiles.d"


@dataclass(frozen=True, slots=True)
class BootWrite:
    """The last word on one file of /proc/sys or /sys."""

    path: str
    value: str
    source: str
    """The file that says so."""
    live: str | None
    """What the kernel holds now, of a list the chosen word; None where it cannot be read."""


def boot_writes(root: Root) -> tuple[BootWrite, ...] | Unknown:
    """One entry for each kernel file that is written, as it ends up after a boot."""
    if not any(root.exists(f"{each}/sysctl.d") for each in DIRECTORIES):
        return Unknown("there is no sysctl.d here")
    last = {path: (value, source) for path, value, source in _assignments(root)}
    return tuple(
        BootWrite(path, value, source, _live(root, path))
        for path, (value, source) in sorted(last.items())
    )


def _assignments(root: Root) -> Iterator[tuple[str, str, str]]:
    # systemd-tmpfiles-setup comes after systemd-sysctl; hardly a file is written by both.
    for source in drop_ins(root, tuple(f"{each}/sysctl.d" for each in DIRECTORIES)):
        for line in (part_of(root, source) or "").splitlines():
            key, equals, value = line.partition("=")
            name = key.strip().lstrip("-")
            if equals and re.fullmatch(r"[\w./-]+", name):
                yield f"/proc/sys/{_sysctl_path(name)}", " ".join(value.split()), source
    for source in drop_ins(root, tuple(f"{each}/{_TMPFILES}" for each in DIRECTORIES)):
        for line in (part_of(root, source) or "").splitlines():
            words = line.split(None, 6)
            if len(words) == 7 and words[0].startswith("w") and ".." not in words[1]:
                yield words[1], words[6].strip("\"'"), source


def _sysctl_path(name: str) -> str:
    """sysctl.d(5): where the first separator is a slash, dots are part of the names."""
    slash, dot = name.find("/"), name.find(".")
    return name if 0 <= slash < dot or dot < 0 else name.replace(".", "/")


def _live(root: Root, path: str) -> str | None:
    text = root.get(path) if ".." not in path.split("/") else None
    chosen = re.search(r"\[([^\]]*)\]", text or "")
    return chosen[1] if chosen else None if text is None else " ".join(text.split())
