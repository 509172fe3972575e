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
from dataclasses import replace
from datetime import UTC, datetime

from infertune.boot import record
from infertune.boot.commands import Runner
from infertune.boot.loaders import Change
from infertune.boot.record import Content, Kept, Setting, Stage, Step
from infertune.engine import boot_id
from infertune.errors import Busy, Failed, NotPermitted, UsageError
from infertune.root import Root
from infertune.transaction import describe

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
            holder = stack.enter_context(root.lock(LOCK, f"{owner} (pid {os.getpid()})"))
        except PermissionError as error:
            raise NotPermitted(f"{describe(error)}; nothing was touched") from error
        except OSError as error:
            raise Failed(f"lock: {describe(error)}; nothing was touched") from error
        if holder is not None:
            raise Busy(f"busy: {holder} is at it; nothing was touched")
        yield


def stage(root: Root, profile: str, change: Change, run: Runner, *, by_hand: bool = False) -> Stage:
    """Stage ``change`` for the next boot.  The caller holds the lock.

    Raises Failed; what was there before is then there again.
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


def undo(root: Root, run: Runner) -> Stage | None:
    """Put everything back; None where there is nothing.  The caller holds the lock.

    A file that somebody changed since is left, and named in the error.  Raises Failed; what is
    not back yet is still in the record, for another try.
    """
    old = record.load(root)
    if old is None:
        return None
    if old.phase in ("undone", "failed"):
        with failing("the record is still there"):
            record.remove(root)
        return None if old.phase == "undone" else old
    put_back(root, old, run)
    with failing("everything is back, but the record is still there"):
        forget(root, old)
    return old


def forget(root: Root, old: Stage) -> None:
    """End the record of a change that is put back.  Raises OSError."""
    if old.tried == boot_id(root) or old.boot_id != boot_id(root):
        # The running kernel was started with it: what it shows of it is ours, not somebody's.
        kept = replace(old, phase="undone", files=(), directories=(), settings=(), steps=())
        record.save(root, replace(kept, tried=boot_id(root)))
    else:
        record.remove(root)


def put_back(root: Root, old: Stage, run: Runner) -> None:
    """Files, firmware and what is built from them, as before.  Raises Failed."""
    foreign = _changed_by_others(root, old)
    if foreign and old.phase != "undoing":
        raise Failed(
            f"{', '.join(foreign)} was changed by someone else since; nothing was touched",
            hint="move your change away (it is not lost by that), or put the file back by hand",
        )
    with failing("'infertune boot undo' tries again"):
        if old.in_force:
            # What a command edited is put back only if nobody else touched it since.
            ours = [file for file in old.files if not file.edited or _is_ours(root, file)]
            old = replace(old, files=tuple(ours))
        record.save(root, replace(old, phase="undoing"))
        for file in reversed([file for file in old.files if not file.edited]):
            _restore(root, file)
        for directory in reversed(old.directories):
            with contextlib.suppress(OSError):
                root.rmdir(directory)  # somebody else's file keeps it
        for setting in reversed(old.settings):
            root.write_value(setting.path, setting.before)
        for step in old.steps:
            if step.undo:
                run_step(run, step.undo)
        # After the command's own undo, which a kernel that was installed meanwhile needs.
        for file in old.files:
            if file.edited:
                _restore(root, file)


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


def _restore(root: Root, file: Kept) -> None:
    if file.before is None:
        root.unlink(file.path)
    elif record.read_content(root, file.path) != file.before:
        _put(root, file.path, file.before)
    else:
        root.discard(file.path)


def _seen(root: Root, file: Kept) -> Kept:
    """A file with what a command made of it."""
    return replace(file, after=record.read_content(root, file.path)) if file.edited else file


def _is_ours(root: Root, file: Kept) -> bool:
    try:
        return record.read_content(root, file.path) == file.after
    except OSError:
        return False


def _changed_by_others(root: Root, old: Stage) -> list[str]:
    """Files of ours that hold neither what we wrote nor what was there before."""
    found = []
    for file in old.files:
        if file.edited:
            continue
        try:
            now = record.read_content(root, file.path)
        except OSError as error:
            found.append(describe(error))
            continue
        # A distribution's tool may have changed mode or owner; the words are what counts.
        same = [each.data if each else None for each in (file.before, file.after)]
        if (now.data if now else None) not in same:
            found.append(file.path)
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
