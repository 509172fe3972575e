# SPDX-License-Identifier: Apache-2.0
"""Drop-ins of server units: the files with which a profile reaches systemd."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from infertune.errors import Failed
from infertune.names import server_unit
from infertune.root import Root

_UNITS = "/run/systemd/system"
_DROP_IN = "50-infertune.conf"


def drop_in_path(unit: str) -> str:
    """Where the drop-in of a unit is; below /run, so it goes with the boot."""
    return f"{_UNITS}/{unit}.d/{_DROP_IN}"


def write_drop_ins(root: Root, texts: Mapping[str, str]) -> None:
    """Write the drop-in of each unit.  Raises Failed."""
    for unit, text in texts.items():
        path = drop_in_path(unit)
        try:
            root.mkdir(path.rpartition("/")[0])
            root.replace(path, text.encode())
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error


def remove_drop_in(root: Root, unit: str) -> None:
    """Remove the drop-in of a unit and its directory.  Raises Failed."""
    path = drop_in_path(unit)
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
    paths = root.glob(f"{_UNITS}/{server_unit('*')}.d/{_DROP_IN}")
    return [path.split("/")[-2].removesuffix(".d") for path in paths]


def remove_notes(root: Root, unit: str) -> None:
    """Remove what systemd notes of properties that were set at run time.  Raises Failed.

    They say what our drop-in says, and would outlive it.
    """
    directory = f"/run/systemd/system.control/{unit}.d"
    try:
        for name in ("50-MemoryMin.conf", "50-AllowedCPUs.conf"):
            root.unlink(f"{directory}/{name}")
        _remove_empty(root, directory)
    except OSError as error:
        raise Failed(f"{directory}: {error.strerror}") from error
