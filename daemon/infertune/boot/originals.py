# SPDX-License-Identifier: Apache-2.0
"""Originals of images that were confirmed, for an undo that brings every byte back.

Once a new image is confirmed the old one has no place on the boot partition any more.  A tool
that rebuilds it makes other bytes of it (times, microcode, modules as they are by then), so a
copy stays here until undo.  It is of use only for as long as the image is the one that we built:
what another program has built since is newer than the copy, and is rebuilt by its tool.

Nothing here is needed for a machine to boot: without a copy the tool builds.
"""

from __future__ import annotations

import contextlib
import os

from infertune.base.errors import describe
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import MIB
from infertune.host.unknown import Unknown

STORE = "/var/lib/infertune/boot-images"
"""One file for each image, under the image's own name."""

ROOM = 256 * MIB
"""What a copy leaves to others on the file system of /var: a full one stops services."""


@dataclass(frozen=True, slots=True)
class Original:
    """What there is of an image's original."""

    path: str
    """Of the image."""
    copy: str
    size: int | Unknown | None
    """Bytes of the copy; None: there is none."""


def place(path: str) -> str:
    """Where the original of the image at ``path`` is kept."""
    return f"{STORE}/{os.path.basename(path)}"


def no_room(root: Root, path: str) -> str | None:
    """Why there is none for the image at ``path``, in one phrase; None where there is.

    Raises OSError where that cannot be found out.
    """
    size = root.size(path)
    there = STORE
    while not root.exists(there):
        there = os.path.dirname(there)
    space = root.space(there)
    if space.read_only:
        return "read-only"
    needed = size + ROOM
    if space.free < needed:
        return f"{space.free // MIB} MiB free, {-(-needed // MIB)} MiB needed"
    return None


def keep(root: Root, path: str, source: str, digest: str) -> None:
    """Keep ``source``, the original of the image at ``path``, where there is room for it.

    Can be repeated.  ``digest`` is its SHA-256.
    """
    with contextlib.suppress(OSError):
        if root.digest(place(path)) == digest:
            return
    drop(root, path)
    try:
        if no_room(root, source) is None:
            # An initramfs may hold what others shall not read, whatever its own mode.
            root.mkdir(STORE, 0o700)
            root.copy(source, place(path))
    except OSError:
        drop(root, path)


def put_back(root: Root, path: str, digest: str) -> str:
    """The original at its place again, as a whole; or why not, in one phrase."""
    copy = place(path)
    try:
        if root.digest(copy) != digest:
            return f"{copy} is damaged"
        root.copy(copy, path)
    except FileNotFoundError:
        return "its original is not kept"
    except OSError as error:
        return f"its original could not be put back ({describe(error)})"
    return ""


def drop(root: Root, path: str) -> None:
    """Nothing kept for the image at ``path`` any more."""
    with contextlib.suppress(OSError):
        root.unlink(place(path))
        _empty(root)


def clear(root: Root) -> None:
    """Nothing kept at all: no change is staged that could need it."""
    for name in root.names(STORE):
        with contextlib.suppress(OSError):
            root.unlink(f"{STORE}/{name}")
    _empty(root)


def look(root: Root, path: str) -> Original:
    """What is kept for the image at ``path``."""
    size: int | Unknown | None
    try:
        size = root.size(place(path))
    except FileNotFoundError:
        size = None
    except OSError as error:
        size = Unknown(describe(error))
    return Original(path, place(path), size)


def _empty(root: Root) -> None:
    with contextlib.suppress(OSError):
        if root.exists(STORE) and not root.listed(STORE):
            root.rmdir(STORE)
