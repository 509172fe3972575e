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
import types
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from infertune.base.errors import Failed, NotPermitted, describe
from infertune.base.records import dataclass, fields, is_dataclass
from infertune.base.root import MAX_READ, Root
from infertune.boot.change import NO_PART, Enforcer, Part, Sweep, Words
from infertune.boot.images import Built
from infertune.boot.options import Option

PATH = "/var/lib/infertune/boot"
FORMAT = 2
MAX_FILE = 1024 * 1024
T = TypeVar("T")

Phase = Literal[
    "staging", "staged", "trying", "keeping", "confirmed", "undoing", "undone", "failed"
]
"""staging, keeping, undoing: cut short, if nobody is at it.  keeping: the default is getting what
the trial has shown to boot.  undone: nothing of it is left but what the running kernel was booted
with.  failed: it was put back, because a boot was not confirmed; what could not be is still in
the record."""


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
    place: str = ""
    """Where in somebody else's file our words are (boot/words.py); empty: a file of ours."""
    briefly: bool = False
    """Whether it is back as soon as the images of its part are built."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A file of sysfs that hands a value to the firmware."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Step:
    """One command, with what takes it back and what makes it last."""

    argv: Words
    undo: Words
    confirm: Words
    makes: str = ""
    """As in Command."""


@dataclass(frozen=True, slots=True)
class Written:
    """One part of a change as it is on disk, and what takes it back."""

    files: tuple[Kept, ...] = ()
    directories: tuple[str, ...] = ()
    """Made for the files; outermost first."""
    images: tuple[Built, ...] = ()
    steps: tuple[Step, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.directories or self.images or self.steps)


NOTHING = Written()


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
    stack: str | None = None
    """The boot stack it was made for."""
    one_try: Enforcer = "guard"
    rescue: str = ""
    gpu: str | None = None
    """PCI ID of the GPU that was ready when it was staged."""
    seen: tuple[str, ...] = ()
    """Options that the kernel showed when it was staged."""
    options: tuple[Option, ...] = ()
    words: Words = ()
    """What is on the command line of it."""
    trial: Written = NOTHING
    """Beside the default entry, until it is confirmed."""
    planned: Part = NO_PART
    """What the default gets when the trial is confirmed; empty once it has it."""
    lasting: Written = NOTHING
    settings: tuple[Setting, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    theirs: tuple[str, ...] = ()
    """Files of the sweeps that had the words before us."""
    reason: str | None = None
    """Why it was put back."""
    tries: int = 0
    """How often putting it back has failed."""
    rebooted: bool = False
    """Whether the guard has rebooted the machine for that; it does so once."""

    @property
    def leftover(self) -> bool:
        """Whether anything of it is still to be put back."""
        return bool(self.trial or self.lasting or self.settings)

    @property
    def over(self) -> bool:
        """Everything is back; the record only says what the running kernel still shows, or why."""
        return self.phase in ("undone", "failed") and not self.leftover

    @property
    def in_force(self) -> bool:
        """Whether files of ours are on disk, as they should be."""
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
    files = (*stage.trial.files, *stage.lasting.files)
    kept = [each for file in files for each in (file.before, file.after) if each]
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
    text = json.dumps({"format": FORMAT, **_plain(stage)}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(data: bytes) -> Stage:
    """Raises ValueError, TypeError or KeyError for what is no whole record; Failed for another."""
    checksum, _, rest = data.partition(b" ")
    text = rest.removesuffix(b"\n")
    if not rest.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    found = json.loads(text)
    version = found.pop("format")
    if version == 1:
        found = _of_format_1(found)
    elif version != FORMAT:
        raise Failed(
            f"{PATH} is of another version of infertune (format {version}, this one has {FORMAT})",
            hint="'infertune boot undo' of that version ends it",
        )
    stage = _typed(Stage, found)
    for written in (stage.trial, stage.lasting):
        for path in (*(file.path for file in written.files), *written.directories):
            _check(path)
        for image in written.images:
            _check(image.path)
    return stage


def _of_format_1(found: dict[str, Any]) -> dict[str, Any]:
    """A record of 0.1.0: everything was written at stage, and there were no images."""
    names = ("files", "directories", "steps")
    lasting = {name: found.pop(name, []) for name in names}
    counted = found.pop("counted", False)
    return {**found, "lasting": lasting, "one_try": "loader" if counted else "guard"}


def _check(path: str) -> None:
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not a path of a record")


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and bytes as JSON has them."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _typed(kind: type[T], value: Any) -> T:
    """What ``_plain`` was given.  Raises ValueError or TypeError where it does not fit."""
    origin, inner = get_origin(kind), get_args(kind)
    found: Any = value
    if is_dataclass(kind):
        hints = _hints(kind)
        found = kind(**{name: _typed(hints[name], each) for name, each in value.items()})
    elif origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        found = tuple(_typed(inner[0], each) for each in value)
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"{value!r} is none of {', '.join(inner)}")
    elif origin is types.UnionType:
        [other] = [each for each in inner if each is not types.NoneType]
        found = None if value is None else _typed(other, value)
    elif kind is bytes:
        found = base64.b64decode(value)
    elif not isinstance(value, kind):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return found  # type: ignore[no-any-return]


def read_content(root: Root, path: str) -> Content | None:
    """A file as it is now, None where there is none.  Raises OSError for what is no plain file."""
    try:
        data, status = root.read_file(path, MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > MAX_FILE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return Content(data, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
