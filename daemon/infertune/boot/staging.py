# SPDX-License-Identifier: Apache-2.0
"""Stages a change for the next boot, and puts it back exactly.

Order: the record with every original, then the files (each replaced atomically), then the
commands that rebuild what is read at boot, then the record says *staged*.  Cut off at any
point, the record says what was under way, and ``undo`` (or the guard at the next start) puts
back what was there before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from infertune.boot import record
from infertune.boot.commands import Runner
from infertune.boot.loaders import Change
from infertune.boot.record import Content, Kept, Setting, Stage, Step
from infertune.errors import Busy, Failed, NotPermitted, UsageError, describe
from infertune.host.mounts import mounted
from infertune.host.system import boot_id
from infertune.root import Root

LOCK = "/run/infertune/boot.lock"


@contextlib.contextmanager
def lock(root: Root, owner: str) -> Iterator[None]:
    """Hold the boot settings of this machine.  Raises NotPermitted, Busy or Failed."""
    if root.live and os.geteuid() != 0:
        raise NotPermitted(
            "changing boot settings needs root; nothing was touched",
            hint="use sudo, or 'infertune boot plan' to see what would change",
        )
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(os.path.dirname(LOCK))
            name = f"{owner} (pid {os.getpid()})"
            # A rebuild outlives who is killed; a second one beside it would write the same file.
            holder = stack.enter_context(root.lock(LOCK, name, inherit=True))
        except PermissionError as error:
            raise NotPermitted(f"{describe(error)}; nothing was touched") from error
        except OSError as error:
            raise Failed(f"lock: {describe(error)}; nothing was touched") from error
        if holder is not None:
            raise Busy(f"busy: {holder} is at it; nothing was touched")
        yield


def stage(root: Root, profile: str, change: Change, run: Runner, *, by_hand: bool = False) -> Stage:
    """Stage ``change`` for the next boot.  The caller holds the lock.

    Raises Failed; what was there before is then there again.  Raises UsageError where something
    is staged already.
    """
    old = record.load(root)
    if old and old.in_force:
        raise UsageError(
            f"the boot settings of '{old.profile}' are {old.phase} already; nothing was touched",
            hint="infertune boot undo (it needs no reboot), then stage the other",
        )
    if old and old.phase in ("staging", "undoing"):
        undo(root, run)
        old = None
    place = mounted(root, record.PATH)
    if place and place.kind in ("tmpfs", "ramfs"):
        raise Failed(
            f"{record.PATH} would not outlive this boot: it lies in memory; nothing was touched",
            hint="without it nothing could be put back: /var must be on a disk",
        )
    try:
        new = _prepare(root, profile, change, by_hand)
        record.save(root, new)
    except OSError as error:
        raise _nothing(root, old, f"{describe(error)}") from error
    try:
        for directory in new.directories:
            root.mkdir(directory)
        for file in new.files:
            if file.after:
                _put(root, file.path, file.after)
        for setting in new.settings:
            root.write_value(setting.path, setting.after)
        for step in new.steps:
            run_step(run, step.argv)
        done = replace(new, phase="staged", files=tuple(_seen(root, f) for f in new.files))
        record.save(root, done)
    except (OSError, Failed, KeyboardInterrupt) as error:
        raise _roll_back(root, new, run, _why(error)) from error
    return done


@dataclass(frozen=True, slots=True)
class Undone:
    """What was put back."""

    profile: str
    left: tuple[str, ...] = ()
    """What a person has to look at, one sentence each."""


def undo(root: Root, run: Runner) -> Undone | None:
    """Put everything back; None where there is nothing.  The caller holds the lock.

    A file that somebody changed since, so that ours cannot be told from theirs, is named in the
    error.  Raises Failed; what is not back yet is still in the record, for another try.
    """
    old = record.load(root)
    if old is None:
        return None
    if old.over:
        with failing("the record is still there"):
            record.remove(root)
        return None if old.phase == "undone" else Undone(old.profile)
    left = put_back(root, old, run)
    with failing("everything is back, but that could not be noted"):
        forget(root, old)
    return Undone(old.profile, left)


def forget(root: Root, old: Stage) -> None:
    """End the record of a change that is put back.  Raises OSError."""
    if old.tried == boot_id(root) or old.boot_id != boot_id(root):
        # The running kernel was started with it: what it shows of it is ours, not somebody's.
        kept = replace(old, phase="undone", files=(), directories=(), settings=(), steps=())
        record.conclude(root, replace(kept, tried=boot_id(root)))
    else:
        record.remove(root)


def put_back(root: Root, old: Stage, run: Runner, *, leave: bool = False) -> tuple[str, ...]:
    """Files, firmware and what is built from them, as before.  Raises Failed.

    A file that somebody changed beyond telling is an error before anything is touched.  With
    ``leave`` (a machine that must start again), and once an undo is under way (what is back is
    its owner's), it is left as it is.  Answers with what was left, one sentence each.
    """
    foreign = _changed_by_others(root, old)
    if foreign and not leave and old.phase != "undoing":
        raise Failed(
            f"{', '.join(foreign.values())}; nothing was touched",
            hint="move your change away (it is not lost by that), or put the file back by hand",
        )
    left = [f"{what}, and is left" for what in foreign.values()]
    files = [file for file in old.files if file.path not in foreign]
    if old.in_force:
        # What a command edited is put back only if nobody else touched it since.
        files = [file for file in files if not file.edited or _is_ours(root, file)]
    with contextlib.suppress(OSError):
        # A full disk, or one that is read-only, must not keep the rest from going back: all of
        # it can be done twice, and most of it takes no room.
        record.save(root, replace(old, phase="undoing", files=tuple(files)))
    work = [partial(_restore, root, file) for file in reversed(files) if not file.edited]
    work += [partial(_remove_empty, root, directory) for directory in reversed(old.directories)]
    for step in old.steps:
        if step.undo and root.exists(step.undo[0]):
            work.append(partial(run_step, run, step.undo))
        elif step.undo:
            left.append(f"{step.undo[0]} is gone: what it built is not built anew")
    # After the command's own undo, which a kernel that was installed meanwhile needs.
    work += [partial(_restore, root, file) for file in files if file.edited]
    # Last: early in a start the driver is not there yet.
    work += [partial(root.write_value, each.path, each.before) for each in reversed(old.settings)]
    wrong = []
    for part in work:
        try:
            part()
        except OSError as error:
            wrong.append(describe(error))
        except Failed as error:
            wrong.append(error.message)
    if wrong:
        raise Failed(f"{'; '.join(wrong)}; 'infertune boot undo' tries again")
    return tuple(left)


def _prepare(root: Root, profile: str, change: Change, by_hand: bool) -> Stage:
    """The record to write before anything is touched.  Raises OSError."""
    files = [_kept(root, file.path, file.data, file.mode) for file in change.files]
    named = {file.path for file in change.files}
    for command in change.commands:
        for pattern in command.touches:
            for path in root.glob(pattern):
                if path not in named:
                    named.add(path)
                    files.append(Kept(path, record.read_content(root, path), None, edited=True))
    settings = []
    for option in change.options:
        if option.file:
            settings.append(Setting(option.file, root.read(option.file), option.value))
    return Stage(
        phase="staging",
        profile=profile,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        boot_id=boot_id(root),
        by_hand=by_hand,
        counted=change.counted,
        options=change.options,
        files=tuple(files),
        directories=_missing(root, [file.path for file in change.files]),
        settings=tuple(settings),
        steps=tuple(Step(c.argv, c.undo, c.confirm) for c in change.commands),
    )


def _kept(root: Root, path: str, data: bytes, mode: int) -> Kept:
    before = record.read_content(root, path)
    if before:
        return Kept(path, before, replace(before, data=data))
    return Kept(path, None, Content(data, mode, os.geteuid(), os.getegid()))


def _missing(root: Root, paths: Sequence[str]) -> tuple[str, ...]:
    missing: set[str] = set()
    for path in paths:
        directory = os.path.dirname(path)
        while directory != "/" and not root.exists(directory):
            missing.add(directory)
            directory = os.path.dirname(directory)
    return tuple(sorted(missing, key=len))


def _put(root: Root, path: str, content: Content) -> None:
    root.replace(path, content.data, content.mode, owner=(content.uid, content.gid))


def _remove_empty(root: Root, directory: str) -> None:
    with contextlib.suppress(OSError):
        root.rmdir(directory)  # somebody else's file keeps it


def _restore(root: Root, file: Kept) -> None:
    now = record.read_content(root, file.path)
    back = file.before if file.edited else without_ours(now, file)
    if back is None:
        root.unlink(file.path)
    elif now != back:
        _put(root, file.path, back)
    else:
        root.discard(file.path)


def without_ours(now: Content | None, file: Kept) -> Content | None:
    """A file of ours without what we added; None: not there.

    What somebody else added since stays.  Raises Failed where that cannot be told apart.
    """
    # A distribution's tool may have changed mode or owner; the words are what counts.
    if _data(now) in (_data(file.before), _data(file.after)):
        return file.before
    old, new = _data(file.before) or b"", _data(file.after) or b""
    if old and not old.endswith(b"\n"):
        old += b"\n"  # or their next line would stick to the last one
    start = _alike(old, new)
    end = _alike(old[start:][::-1], new[start:][::-1])
    ours, theirs = new[start : len(new) - end], old[start : len(old) - end]
    if now is None or theirs.strip() or now.data.count(ours) != 1:
        raise Failed(f"{file.path} was changed by someone else since")
    data = now.data.replace(ours, theirs)
    return replace(now, data=data) if data or file.before else None


def _alike(one: bytes, other: bytes) -> int:
    """How many leading bytes are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _data(content: Content | None) -> bytes | None:
    return content.data if content else None


def _seen(root: Root, file: Kept) -> Kept:
    """A file with what a command made of it."""
    return replace(file, after=record.read_content(root, file.path)) if file.edited else file


def _is_ours(root: Root, file: Kept) -> bool:
    try:
        return record.read_content(root, file.path) == file.after
    except OSError:
        return False


def _changed_by_others(root: Root, old: Stage) -> dict[str, str]:
    """Files of ours that somebody changed so that ours cannot be taken out; what is wrong."""
    found = {}
    for file in old.files:
        if file.edited:
            continue
        try:
            without_ours(record.read_content(root, file.path), file)
        except OSError as error:
            found[file.path] = f"{describe(error)}: it was changed by someone else since"
        except Failed as error:
            found[file.path] = error.message
    return found


def run_step(run: Runner, argv: Sequence[str]) -> None:
    try:
        ran = run(argv)
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from error
    if ran.code:
        raise Failed(f"{' '.join(argv)}: exit code {ran.code}: {ran.said}")


def _why(error: BaseException) -> str:
    if isinstance(error, Failed):
        return error.message
    return describe(error) if isinstance(error, OSError) else "interrupted"


def _nothing(root: Root, old: Stage | None, why: str) -> Failed:
    """An error before the first change; the record is as it was."""
    with contextlib.suppress(OSError):
        if old is None:
            record.remove(root)
        else:
            record.save(root, old)
    return Failed(f"{why}; nothing was touched")


def _roll_back(root: Root, new: Stage, run: Runner, why: str) -> Failed:
    try:
        put_back(root, new, run)
        record.remove(root)
    except (Failed, OSError) as error:
        return Failed(
            f"{why}; not everything could be put back: {_why(error)}",
            hint="'infertune boot undo' tries again; so does the guard at the next start",
        )
    return Failed(f"{why}; everything is as it was")


@contextlib.contextmanager
def failing(after: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(f"{describe(error)}; {after}") from error
    except Failed as error:
        raise Failed(f"{error.message}; {after}") from error
