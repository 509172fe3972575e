# SPDX-License-Identifier: Apache-2.0
"""Drop-ins of server units: the files with which a profile reaches systemd."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from infertune.base.errors import Failed
from infertune.base.names import SLICE, server_of_unit, server_unit
from infertune.base.root import Root
from infertune.servers.adopted import SYSTEM, Places

_DROP_IN = "50-infertune.conf"
_LAST = "zz-infertune.conf"
_MAX_FILE = 64 * 1024


def drop_in_path(unit: str, places: Places = SYSTEM) -> str:
    """Where the drop-in of a unit is; below /run, so it goes with the boot.

    Units of others have theirs after all of their own (``override.conf`` of ``systemctl edit``).
    """
    ours = unit == SLICE or server_of_unit(unit) is not None
    return f"{places.units}/{unit}.d/{_DROP_IN if ours else _LAST}"


def write_drop_ins(root: Root, texts: Mapping[str, str], places: Places = SYSTEM) -> None:
    """Write the drop-in of each unit.  Raises Failed."""
    for unit, text in texts.items():
        path = drop_in_path(unit, places)
        try:
            root.mkdir(path.rpartition("/")[0])
            root.replace(path, text.encode())
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error


def read_drop_in(root: Root, unit: str, places: Places = SYSTEM) -> str:
    """The drop-in of a unit, to be written again; empty where there is none.  Raises Failed."""
    path = drop_in_path(unit, places)
    try:
        return root.read_small(path, _MAX_FILE)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def remove_drop_in(root: Root, unit: str, places: Places = SYSTEM) -> None:
    """Remove the drop-in of a unit and its directory.  Raises Failed."""
    path = drop_in_path(unit, places)
    try:
        root.unlink(path)
        _remove_empty(root, path.rpartition("/")[0])
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def _remove_empty(root: Root, directory: str) -> None:
    """Remove a directory unless an admin has something in it too."""
    try:
        root.rmdir(directory)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


def units_with_drop_in(root: Root) -> list[str]:
    """Server units that have a drop-in of ours."""
    paths = root.glob(f"{SYSTEM.units}/{server_unit('*')}.d/{_DROP_IN}")
    return [path.split("/")[-2].removesuffix(".d") for path in paths]


def remove_notes(root: Root, unit: str) -> None:
    """Remove what systemd notes of properties that were set at run time.  Raises Failed.

    They say what our drop-in says, and would outlive it.
    """
    put_notes_back(root, dict.fromkeys(_notes(unit, ("MemoryMin", "AllowedCPUs"))))


def read_notes(
    root: Root, unit: str, properties: Iterable[str], places: Places = SYSTEM
) -> dict[str, str | None]:
    """The files that systemd writes when properties are set at run time, as they are now.

    None where there is none.  Raises Failed for one that is there and cannot be read.
    """
    found: dict[str, str | None] = {}
    for path in _notes(unit, properties, places):
        try:
            found[path] = root.read_small(path, _MAX_FILE)
        except FileNotFoundError:
            found[path] = None
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error
    return found


def put_notes_back(root: Root, notes: Mapping[str, str | None]) -> None:
    """Make such files what they were.  Raises Failed."""
    for path, text in notes.items():
        try:
            if text is None:
                root.unlink(path)
            else:
                root.replace(path, text.encode())
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error
    for directory in dict.fromkeys(path.rpartition("/")[0] for path in notes):
        try:
            _remove_empty(root, directory)
        except OSError as error:
            raise Failed(f"{directory}: {error.strerror}") from error


def _notes(unit: str, properties: Iterable[str], places: Places = SYSTEM) -> list[str]:
    return [f"{places.notes}/{unit}.d/50-{name}.conf" for name in properties]
