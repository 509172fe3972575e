# SPDX-License-Identifier: Apache-2.0
"""What boot settings infertune has staged, and everything it takes to put them back.

One file that outlives the boot, ``/var/lib/infertune/boot``: a JSON document behind its CRC-32,
replaced atomically before anything is touched and after each phase.  So what is on disk is
always one whole state.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from infertune.boot.options import Option, Parameter
from infertune.errors import Failed, NotPermitted, describe
from infertune.root import MAX_READ, Root

PATH = "/var/lib/infertune/boot"
FORMAT = 1
MAX_FILE = 1024 * 1024

Phase = Literal["staging", "staged", "trying", "confirmed", "undoing", "undone", "failed"]
"""staging, undoing: cut short, if nobody is at it.  undone: nothing of it is left but what the
running kernel was started with.  failed: it was put back, because a start was not confirmed."""


@dataclass(frozen=True, slots=True)
class Content:
    """A file with all that an undo must bring back."""

    data: bytes
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One file: what it was (None: not there) and what we made of it."""

    path: str
    before: Content | None
    after: Content | None
    """None: not yet known (a command is to edit it), or not there."""
    edited: bool = False
    """Whether a command edits it, and not we."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A file of sysfs that hands a value to the firmware."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Step:
    """One command, with what takes it back and what makes it last."""

    argv: tuple[str, ...]
    undo: tuple[str, ...]
    confirm: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A staged change."""

    phase: Phase
    profile: str
    since: str
    """ISO 8601, UTC."""
    boot_id: str
    """Of the boot in which it was staged."""
    tried: str | None = None
    """Of the boot that tries it."""
    by_hand: bool = False
    """Whether only a person confirms it."""
    counted: bool = False
    """Whether the boot loader itself drops the kernel's options."""
    options: tuple[Option, ...] = ()
    files: tuple[Kept, ...] = ()
    directories: tuple[str, ...] = ()
    """Made for the files; outermost first."""
    settings: tuple[Setting, ...] = ()
    steps: tuple[Step, ...] = ()
    reason: str | None = None
    """Why it was put back."""
    rebooted: bool = False
    """Whether the guard has started the machine again for that; it does so once."""

    @property
    def over(self) -> bool:
        """Everything is back; the record only says what the running kernel still shows, or why."""
        return self.phase in ("undone", "failed")

    @property
    def in_force(self) -> bool:
        """Whether files of ours are on disk."""
        return self.phase in ("staged", "trying", "confirmed")


def load(root: Root) -> Stage | None:
    """The record on disk.  Raises Failed where it cannot be read or trusted."""
    try:
        data = root.read_bytes(PATH) if root.exists(PATH) else None
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise NotPermitted(f"{PATH} holds a file that only root may read") from error
    except OSError as error:
        raise Failed(describe(error)) from error
    if data is None:
        return None
    try:
        return parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Failed(
            f"{PATH} is damaged: {error}",
            hint="put back by hand the files in /etc and /boot with 'infertune' in name or text, "
            "and move it away",
        ) from error


def save(root: Root, stage: Stage) -> None:
    """Replace the record durably.  Raises OSError; the old one is then still there."""
    root.mkdir(os.path.dirname(PATH))
    # What others may not read in a file they shall not read in our copy of it.
    kept = [each for file in stage.files for each in (file.before, file.after) if each]
    public = all(each.mode & 0o004 for each in kept)
    data = dump(stage)
    if len(data) > MAX_READ:
        raise OSError(errno.EFBIG, "more than a record can hold", PATH)  # or nobody could read it
    root.replace(PATH, data, 0o644 if public else 0o600)


def conclude(root: Root, stage: Stage) -> None:
    """The last, small word on a change that is put back.  Raises OSError.

    On a full disk the record of the change, which nothing needs any more, makes room for it.
    """
    try:
        save(root, stage)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remove(root)
        save(root, stage)


def remove(root: Root) -> None:
    root.unlink(PATH)


def dump(stage: Stage) -> bytes:
    fields = asdict(stage)
    for file in fields["files"]:
        for when in ("before", "after"):
            if file[when]:
                file[when]["data"] = base64.b64encode(file[when]["data"]).decode()
    text = json.dumps({"format": FORMAT, **fields}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(data: bytes) -> Stage:
    """Raises ValueError, TypeError or KeyError for what is no whole record; Failed for another."""
    checksum, _, rest = data.partition(b" ")
    text = rest.removesuffix(b"\n")
    if not rest.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    fields = json.loads(text)
    if (version := fields.pop("format")) != FORMAT:
        raise Failed(
            f"{PATH} is of another version of infertune (format {version}, this one has {FORMAT})",
            hint="'infertune boot undo' of that version ends it",
        )
    if fields["phase"] not in get_args(Phase):
        raise ValueError(f"{fields['phase']!r} is no phase")
    return Stage(
        **{
            **fields,
            "options": tuple(_option(each) for each in fields["options"]),
            "files": tuple(_kept(each) for each in fields["files"]),
            "directories": tuple(map(_path, fields["directories"])),
            "settings": tuple(Setting(**each) for each in fields["settings"]),
            "steps": tuple(
                Step(tuple(each["argv"]), tuple(each["undo"]), tuple(each["confirm"]))
                for each in fields["steps"]
            ),
        }
    )


def _option(fields: Mapping[str, Any]) -> Option:
    parameters = tuple(Parameter(**each) for each in fields["parameters"])
    return Option(**{**fields, "parameters": parameters})


def _kept(fields: Mapping[str, Any]) -> Kept:
    contents = {
        when: Content(**{**fields[when], "data": base64.b64decode(fields[when]["data"])})
        if fields[when]
        else None
        for when in ("before", "after")
    }
    return Kept(**{**fields, "path": _path(fields["path"]), **contents})


def _path(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not a path of a record")
    return path


def read_content(root: Root, path: str) -> Content | None:
    """A file as it is now, None where there is none.  Raises OSError for what is no plain file."""
    try:
        data, status = root.read_file(path, MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > MAX_FILE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return Content(data, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
