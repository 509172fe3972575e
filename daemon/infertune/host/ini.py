# SPDX-License-Identifier: Apache-2.0
"""Configuration files of services: the part that matters, and ``[section]`` files as tables."""

from __future__ import annotations

from infertune.base.root import Root
from infertune.base.units import KIB

_LIMIT = 64 * KIB
FILES_LIMIT = 400
"""Files looked into in one set of directories."""
DIRECTORIES = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
"""Where systemd looks for drop-ins, strongest first."""


def part_of(root: Root, path: str) -> str | None:
    """What a snapshot would have of a small text file; None where it cannot be read.

    Reduced on the live machine too: what is not recorded must not decide anything.
    """
    try:
        text = root.read_small(path, _LIMIT)
    except OSError:
        return None
    from infertune.host.redaction import reduce_file  # it knows every format there is

    part = reduce_file(path, text.encode())
    return None if part is None else part.decode("utf-8", "replace")


def sections(text: str | None) -> dict[str, dict[str, str]]:
    """``key=value`` by section, "" for what stands before the first; the last of equal keys counts.

    Lines that start with ``#`` or ``;`` are remarks.
    """
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in map(str.strip, (text or "").splitlines()):
        key, equals, value = line.partition("=")
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif equals and not line.startswith(("#", ";")):
            found.setdefault(section, {})[key.strip()] = value.strip().strip("\"'")
    return found


def drop_ins(root: Root, directories: tuple[str, ...], suffix: str = ".conf") -> list[str]:
    """Files of drop-in directories in the order of their names.

    Of equal names the first directory counts, as everywhere in systemd (systemd.unit(5),
    sysctl.d(5), tmpfiles.d(5), coredump.conf.d(5)).
    """
    first: dict[str, str] = {}
    for directory in directories:
        for name in root.names(directory):
            if name.endswith(suffix):
                first.setdefault(name, f"{directory}/{name}")
    return [first[name] for name in sorted(first)][:FILES_LIMIT]
