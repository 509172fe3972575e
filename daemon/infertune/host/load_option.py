# SPDX-License-Identifier: Apache-2.0
"""A boot option of UEFI firmware (EFI_LOAD_OPTION), as the variables Boot#### hold it.

UEFI 2.10, 3.1.3 (load options), 10.3 (device paths).  Bytes in, values out: whatever the firmware
or a program wrote there is read as far as it makes sense, and nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from infertune.base.records import dataclass

_HARD_DRIVE, _FILE = (4, 1), (4, 4)
"""Type and subtype of the nodes that say where on a disk the file is."""
_END = b"\x7f\xff\x04\x00"
_MAX_NODES = 64
_MAX_PATH = 16 * 1024


@dataclass(frozen=True, slots=True)
class LoadOption:
    """What the firmware starts, and with what."""

    description: str
    """What the firmware's menu shows, e.g. ``debian``."""
    file: str
    r"""From the root of its partition, e.g. ``\EFI\debian\shimx64.efi``; empty for none."""
    partition: str | None
    """GPT id of the file's partition, in lower case."""
    data: bytes
    """Optional data; a kernel takes it as its command line."""

    @property
    def arguments(self) -> str:
        """The optional data where it is text, as efibootmgr --unicode writes it, or without."""
        wide = wide_text(self.data)
        narrow = self.data.decode("utf-8", "replace").strip("\0 ")
        return next((each for each in (wide, narrow) if each and each.isascii()), "")


def load_option(data: bytes) -> LoadOption | None:
    """The boot option in ``data``; None where it is none."""
    end = _description_end(data)
    if end is None:
        return None
    size = int.from_bytes(data[4:6], "little")
    nodes = list(_nodes(data[end : end + size]))
    names = [wide_text(body).strip("\\") for kind, body in nodes if kind == _FILE]
    partitions = [_gpt(body) for kind, body in nodes if kind == _HARD_DRIVE]
    return LoadOption(
        description=wide_text(data[6:end]),
        file="".join(f"\\{name}" for name in names if name),
        partition=next(filter(None, partitions), None),
        data=data[end + size :],
    )


def plain(data: bytes) -> bytes:
    """The same option with nothing but its file, as it would be named on any machine."""
    end = _description_end(data)
    if end is None:
        return b""
    size = int.from_bytes(data[4:6], "little")
    names = (body for kind, body in _nodes(data[end : end + size]) if kind == _FILE)
    path = b"".join(_file_node(without_ids(wide_text(name))) for name in names) + _END
    return data[:4] + len(path).to_bytes(2, "little") + b"\0\0" + path


def wide_text(data: bytes) -> str:
    """UTF-16 text up to its first NUL; what cannot be shown is ``?``."""
    text = data[: len(data) // 2 * 2].decode("utf-16-le", "replace").partition("\0")[0]
    return "".join(each if each.isprintable() else "?" for each in text)


def _description_end(data: bytes) -> int | None:
    """Where the device path begins: after attributes, its size and the description."""
    for at in range(6, len(data) - 1, 2):
        if data[at : at + 2] == b"\0\0":
            return at + 2
    return None


def _nodes(path: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Type with subtype, and content, of each node of the first device path."""
    path = path[:_MAX_PATH]
    for _ in range(_MAX_NODES):
        size = int.from_bytes(path[2:4], "little")
        if size < 4 or size > len(path) or path[0] & 0x7F == 0x7F:
            return
        yield (path[0], path[1]), path[4:size]
        path = path[size:]


def _file_node(name: str) -> bytes:
    body = f"{name}\0".encode("utf-16-le")
    return bytes(_FILE) + (len(body) + 4).to_bytes(2, "little") + body


def _gpt(body: bytes) -> str | None:
    """Id of a partition, of a hard drive node; None where the disk has no GPT."""
    # Number (4), start (8), size (8), signature (16), format, type of the signature: 2 is a GUID.
    if len(body) < 38 or body[37] != 2:
        return None
    import uuid  # as in efi.py: late, for what it takes to import it

    return str(uuid.UUID(bytes_le=body[20:36]))


def without_ids(text: str) -> str:
    """A file's name without a machine's id, as kernel-install puts it there."""
    return re.sub(r"(?i)(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", "0" * 32, text)
