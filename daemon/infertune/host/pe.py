# SPDX-License-Identifier: Apache-2.0
"""Sections of a unified kernel image: a PE file (Microsoft PE format; UAPI.5 for the names)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from infertune.base.root import Root

Read = Callable[[int, int], bytes]
"""At most so many bytes from an offset; less at the end of the file."""

_SECTIONS = 96
"""The Windows loader takes no more, and an image for several profiles has about 20."""
_HEADER = 40


def section(read: Read, name: str, limit: int = 65536) -> bytes | None:
    """The first section of a name, without the padding; None where there is none.

    With several profiles in an image the first is the one that all others build on.  Raises
    ValueError for what is no PE file with all of its sections, or has a larger one of that name.
    """
    if read(0, 2) != b"MZ":
        raise ValueError("no PE file")
    (start,) = struct.unpack("<I", _exactly(read, 0x3C, 4))
    signature, _, count, _, _, _, optional, _ = struct.unpack(
        "<4sHHIIIHH", _exactly(read, start, 24)
    )
    if signature != b"PE\0\0" or count > _SECTIONS:
        raise ValueError("no PE file")
    table = _exactly(read, start + 24 + optional, count * _HEADER)
    result = None
    for at in range(0, len(table), _HEADER):
        found, used, _, stored, offset = struct.unpack_from("<8sIIII", table, at)
        if stored:
            _exactly(read, offset + stored - 1, 1)  # or its builder was cut off
        if result is None and found.rstrip(b"\0") == name.encode():
            size = min(used, stored) if used else stored
            if size > limit:
                raise ValueError(f"its section {name} has {size} bytes")
            result = _exactly(read, offset, size).rstrip(b"\0")
    return result


def command_line(root: Root, path: str) -> str | None:
    """The command line in a unified kernel image; None where it has none.

    Raises OSError, or ValueError for what is no whole image.
    """
    found = section(lambda offset, size: root.read_part(path, offset, size), ".cmdline")
    return None if found is None else found.decode("utf-8", "replace").strip("\0 \t\r\n")


def _exactly(read: Read, offset: int, size: int) -> bytes:
    data = read(offset, size)
    if len(data) != size:
        raise ValueError("it ends in the middle")
    return data
