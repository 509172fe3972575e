# SPDX-License-Identifier: Apache-2.0
"""Stages a change for the next boot, keeps it, and puts it back exactly.

Order: the record with every original, then files (each replaced atomically), then images, then
the commands that rebuild what is read at boot, then the record says *staged*.  Cut off at any
point, the record says what was under way, and ``undo`` (or the guard at the next boot) puts
back what was there before.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from infertune.base.errors import Busy, Failed, NotPermitted, UsageError, cause, describe
from infertune.base.records import dataclass, field, replace
from infertune.base.root import Root
from infertune.boot import images, originals, record, words
from infertune.boot.change import AT_THE_TRY, Change, Edit, NewFile, Part, Sweep, Words
from infertune.boot.commands import Runner, run_step
from infertune.boot.images import Built
from infertune.boot.record import Content, Kept, Setting, Stage, Step, Written
from infertune.boot.state import live
from infertune.host.mounts import mounted
from infertune.host.system import boot_id

LOCK = "/run/infertune/boot.lock"

TRIES = 2
"""How often putting back is tried without a person: a tool that fails twice fails at every boot."""


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


# -- stage -------------------------------------------------------------------------


def stage(
    root: Root,
    profile: str,
    change: Change,
    run: Runner,
    *,
    by_hand: bool = False,
    gpu: str | None = None,
) -> Stage:
    """Stage ``change`` for the next boot.  The caller holds the lock.

    Raises Failed; what was there before is then there again.  Raises UsageError where something
    is staged already.
    """
    old = _ready(root, run)
    try:
        new = _prepare(root, profile, change, by_hand, gpu)
        images.ask_room(root, change.now.images)
        for command in (*change.trial.commands, *change.lasting.commands):
            images.ask_room_for_tool(root, command)
        record.save(root, new)
    except (OSError, Failed) as error:
        raise _nothing(root, old, cause(error)) from error
    try:
        written = new.trial if change.trial else new.lasting
        written = _write(root, change.now, written, run)
        for setting in new.settings:
            root.write_value(setting.path, setting.after)
        done = _holding(replace(new, phase="staged"), change, written)
        record.save(root, done)
    except (OSError, Failed, KeyboardInterrupt) as error:
        raise _roll_back(root, new, run, cause(error)) from error
    return done


def _ready(root: Root, run: Runner) -> Stage | None:
    """The record that a new one replaces.  Raises where nothing can be staged now."""
    old = record.load(root)
    if old and old.in_force:
        raise UsageError(
            f"the boot settings of '{old.profile}' are {old.phase} already; nothing was touched",
            hint="infertune boot undo (it needs no reboot), then stage the other",
        )
    if old and old.leftover:
        undo(root, run)
        old = None
    place = mounted(root, record.PATH)
    if place and place.kind in ("tmpfs", "ramfs"):
        raise Failed(
            f"{record.PATH} would not outlive this boot: it lies in memory; nothing was touched",
            hint="without it nothing could be put back: /var must be on a disk",
        )
    originals.clear(root)  # of a change whose record is gone
    return old


def _prepare(root: Root, profile: str, change: Change, by_hand: bool, gpu: str | None) -> Stage:
    """The record to write before anything is touched.  Raises OSError."""
    firmware = [option for option in change.options if option.file]
    stage = Stage(
        phase="staging",
        profile=profile,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        boot_id=boot_id(root),
        by_hand=by_hand,
        stack=change.stack,
        one_try=change.one_try,
        rescue=change.rescue,
        gpu=gpu,
        seen=tuple(each.id for each in change.options if live(root, each) is not None),
        options=change.options,
        words=change.words,
        planned=change.lasting if change.trial else Part(),
        settings=tuple(Setting(o.file, root.read(o.file), o.value) for o in firmware if o.file),
        sweeps=change.sweeps,
        theirs=tuple(path for path, _ in _swept(root, change.sweeps, change.words)),
    )
    return _holding(stage, change, _originals(root, change.now))


def _holding(stage: Stage, change: Change, written: Written) -> Stage:
    return replace(stage, trial=written) if change.trial else replace(stage, lasting=written)


def _originals(root: Root, part: Part) -> Written:
    """What a part will write, with what is there now.  Raises OSError."""
    files = [_kept(root, each) for each in part.texts]
    files = [file for file in files if file.before or file.after]
    named = {file.path for file in files}
    for command in part.commands:
        for pattern in command.touches:
            # A path without a wildcard may be made by the command.
            for path in root.glob(pattern) or ([] if "*" in pattern else [pattern]):
                if path not in named:
                    named.add(path)
                    files.append(Kept(path, record.read_content(root, path), None, edited=True))
    ours = [file.path for file in files if not file.edited]
    return Written(
        tuple(files),
        _missing(root, ours),
        tuple(map(images.planned, part.images)),
        tuple(Step(c.argv, c.undo, c.confirm, c.makes) for c in part.commands),
    )


def _kept(root: Root, new: NewFile | Edit) -> Kept:
    if isinstance(new, NewFile):
        before = record.read_content(root, new.path)
        after = _made(before, new.data, new.mode)
        return Kept(new.path, before, after, briefly=new.briefly)
    path = _counted(root, new.path) or new.path
    before = record.read_content(root, path)
    if before and b"\0" in before.data:
        raise Failed(f"{path} is not a text file")
    if before is None and not new.base:
        return Kept(path, None, None, place=new.place)  # it is gone since this was planned
    text = words.add(new.place, _text(before) or new.base, new.words)
    after = _made(before, text.encode("utf-8", "surrogateescape"), 0o644)
    return Kept(path, before, after, place=new.place, briefly=new.briefly)


def _made(before: Content | None, data: bytes, mode: int) -> Content:
    if before:
        return replace(before, data=data)
    return Content(data, mode, os.geteuid(), os.getegid())


def _write(root: Root, part: Part, written: Written, run: Runner) -> Written:
    """Do what a part says.  Raises OSError or Failed."""
    for directory in written.directories:
        root.mkdir(directory)
    for file in written.files:
        if file.after and not file.edited:
            _put(root, file.path, file.after)
    built = tuple(images.build(root, image, run) for image in part.images)
    lasting = [file for file in written.files if not file.briefly]
    for file in written.files:
        if file.briefly:
            _restore(root, file, ())
    for step in written.steps:
        run_step(run, step.argv)
    seen = [_seen(root, file) for file in lasting]
    return replace(written, files=(*seen, *_new_of(root, part, seen)), images=built)


def _seen(root: Root, file: Kept) -> Kept:
    """A file with what a command made of it."""
    return replace(file, after=record.read_content(root, file.path)) if file.edited else file


def _new_of(root: Root, part: Part, known: Sequence[Kept]) -> list[Kept]:
    """Files that a command has made."""
    paths = {file.path for file in known}
    patterns = [pattern for command in part.commands for pattern in command.touches]
    made = [path for pattern in patterns for path in root.glob(pattern) if path not in paths]
    return [Kept(path, None, record.read_content(root, path), edited=True) for path in made]


# -- keep --------------------------------------------------------------------------


def keep(root: Root, stage: Stage, run: Runner) -> Stage:
    """Make last what this boot has shown to work.  The caller holds the lock.

    Raises Failed; the trial is then as it was.  Killed in it, it can be called again.
    """
    if stage.planned:
        stage = _give_default(root, stage, run)
    for image in stage.lasting.images:
        images.confirm(root, image)
    for step in stage.lasting.steps:
        if step.confirm:
            run_step(run, step.confirm)
    work = _Undoing(root, run, stage)
    work.take_back("trial")
    work.settle()
    # What of the trial could not be removed is still in the record, for undo.
    done = replace(work.stage, phase="confirmed", tried=boot_id(root))
    record.save(root, done)
    return done


def _give_default(root: Root, stage: Stage, run: Runner) -> Stage:
    """What the trial has shown to boot, for the default entry; the trial is still there.

    Raises OSError, or Failed.
    """
    if stage.lasting:  # killed while it was at it
        stage = _without_lasting(root, stage, run)
    # The image that the trial was started from becomes the default's; it is not built again.
    part = replace(stage.planned, images=())
    keeping = replace(stage, phase="keeping", lasting=_originals(root, part), tried=boot_id(root))
    record.save(root, keeping)
    try:
        lasting = _write(root, part, keeping.lasting, run)
        for image in stage.trial.images:
            images.confirm(root, image)
    except (OSError, Failed, KeyboardInterrupt) as error:
        _without_lasting(root, keeping, run)
        raise Failed(f"{cause(error)}; it is still on trial") from error
    given = replace(
        keeping,
        planned=Part(),
        lasting=replace(lasting, images=stage.trial.images),
        trial=replace(stage.trial, images=()),
    )
    record.save(root, given)
    return given


def _without_lasting(root: Root, stage: Stage, run: Runner) -> Stage:
    """Only the trial, as before ``keep``.  Raises Failed."""
    work = _Undoing(root, run, stage)
    work.take_back("lasting")
    if work.wrong:
        raise Failed(f"{'; '.join(work.wrong)}; 'infertune boot undo' puts everything back")
    back = replace(work.stage, phase="trying")
    record.save(root, back)
    return back


# -- undo --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Undone:
    """What was put back."""

    profile: str
    left: tuple[str, ...] = ()
    """What a person has to look at, one sentence each."""
    anew: tuple[str, ...] = ()
    """Images that were rebuilt instead of put back, and why, one sentence each."""


def undo(root: Root, run: Runner, *, force: bool = False) -> Undone | None:
    """Put everything back; None where there is nothing.  The caller holds the lock.

    A file that another program changed since, so that ours cannot be told from theirs, is named
    in the error.  Raises Failed; what is not back yet is still in the record, for another try.
    With ``force`` what cannot be put back is named, and forgotten.
    """
    old = record.load(root)
    if old is None:
        with contextlib.suppress(OSError):
            root.discard(record.PATH)  # of a stage that was killed before it began
        return None
    if old.over:
        with failing("the record is still there"):
            record.remove(root)
        return None if old.phase == "undone" else Undone(old.profile)
    now, left, anew = put_back(root, old, run, leave=force)
    if now.leftover:
        wrong = "; ".join(left)
        if not force:
            raise Failed(
                f"{wrong}; 'infertune boot undo' tries again",
                hint="'infertune boot undo --force' forgets what cannot be put back",
            )
        now = replace(now, trial=Written(), lasting=Written(), settings=())
    with failing("everything is back, but that could not be noted"):
        forget(root, now)
    return Undone(old.profile, left, anew)


def forget(root: Root, old: Stage) -> None:
    """End the record of a change that is put back.  Raises OSError."""
    originals.clear(root)
    if old.tried == boot_id(root) or old.boot_id != boot_id(root):
        # The running kernel was booted with it: what it shows of it is ours, not another's.
        record.conclude(root, replace(old, phase="undone", tried=boot_id(root), planned=Part()))
    else:
        record.remove(root)


def put_back(
    root: Root, old: Stage, run: Runner, *, leave: bool = False
) -> tuple[Stage, tuple[str, ...], tuple[str, ...]]:
    """Files, images, firmware and what is built from them, as before.

    Answers with what is still to be put back, with what a person has to know, and with which
    images were rebuilt, one sentence each.  A file that another program changed beyond telling
    is an error (Failed) before anything is touched.  With ``leave`` (a machine that must reboot),
    and once an undo is under way (what is back is its owner's), it is left as it is.
    """
    foreign = _changed_by_others(root, old)
    if foreign and not leave and old.phase not in ("undoing", "failed"):
        raise Failed(
            f"{', '.join(foreign.values())}; nothing was touched",
            hint="move your change away (it is not lost by that), or put the file back by hand",
        )
    left = tuple(f"{what}, and is left" for what in foreign.values())
    work = _Undoing(root, run, replace(_untouched(root, old, foreign), phase="undoing"))
    work.note()
    # What the default boots is mended first.
    for part in ("lasting", "trial"):
        work.take_back(part)
    work.sweep()
    # Last: early in a boot the driver is not there yet.
    work.firmware()
    if work.wrong:
        work.stage = replace(work.stage, tries=old.tries + 1)
        work.note()
    return work.stage, (*left, *work.left, *work.wrong), tuple(work.anew)


def _untouched(root: Root, old: Stage, foreign: dict[str, str]) -> Stage:
    """Without the files that stay as they are."""

    def mine(written: Written) -> Written:
        files = [file for file in written.files if file.path not in foreign]
        if old.in_force:
            # What a command edited is put back only if nobody else touched it since.
            files = [file for file in files if not file.edited or _is_ours(root, file)]
        return replace(written, files=tuple(files))

    return replace(old, trial=mine(old.trial), lasting=mine(old.lasting))


@dataclass
class _Undoing:
    """Takes a change back piece by piece; what is back is no longer in ``stage``."""

    root: Root
    run: Runner
    stage: Stage
    wrong: list[str] = field(default_factory=list)
    """What could not be put back and why; it is still in ``stage``."""
    left: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)

    def note(self) -> None:
        # A full disk, or one that is read-only, must not keep the rest from going back: all of
        # it can be done twice, and most of it takes no room.
        with contextlib.suppress(OSError):
            record.save(self.root, self.stage)

    def take_back(self, part: str) -> None:
        """``trial`` or ``lasting``: files, what tools built of them, and what tools edited."""
        written = self._written(part)
        for file in reversed(written.files):
            if not file.edited:
                self._piece(part, "files", file, partial(self._restore, file))
        if all(file.edited for file in self._written(part).files):
            for directory in reversed(written.directories):
                with contextlib.suppress(OSError):
                    self.root.rmdir(directory)  # another program's file keeps it
            self._now(part, replace(self._written(part), directories=()))
        for image in written.images:
            self._piece(part, "images", image, partial(self._image, image))
            self.note()
        for step in written.steps:
            if step.undo and not self.root.exists(step.undo[0]):
                self.left.append(f"{step.undo[0]} is gone: what it built is not rebuilt")
                self._piece(part, "steps", step, lambda: None)
            else:
                self._piece(part, "steps", step, partial(self._undo, step))
            # It may take minutes: a power cut in the next one must not run this one again.
            self.note()
        # After the command's own undo, which a kernel that was installed meanwhile needs.
        for file in written.files:
            if file.edited:
                self._piece(part, "files", file, partial(self._restore, file))

    def sweep(self) -> None:
        """Take the words out of entries that were made, renamed or rewritten meanwhile."""
        given = self.stage.words
        for path, place in _swept(self.root, self.stage.sweeps, given):
            if path not in self.stage.theirs:
                change = partial(words.remove, place, words=given, singly=False)
                self._done(partial(_rewrite, self.root, path, change))

    def settle(self) -> None:
        """Entries that were made from the trial's command line keep only what lasts of it."""
        given = self.stage.words
        for path, place in _swept(self.root, self.stage.sweeps, (*given, *AT_THE_TRY)):
            self._done(partial(_rewrite, self.root, path, partial(words.add, place, words=given)))

    def firmware(self) -> None:
        keep = []
        for each in reversed(self.stage.settings):
            if not self._done(partial(self.root.write_value, each.path, each.before)):
                keep.append(each)
        self.stage = replace(self.stage, settings=tuple(reversed(keep)))

    def _restore(self, file: Kept) -> None:
        _restore(self.root, file, self.stage.words)

    def _image(self, built: Built) -> None:
        if said := images.restore(self.root, built, self.run):
            self.anew.append(said)

    def _undo(self, step: Step) -> None:
        if step.undo and not is_gone(self.root, step.makes):
            run_step(self.run, step.undo)

    def _piece(self, part: str, name: str, piece: object, work: Callable[[], None]) -> None:
        if self._done(work):
            rest = tuple(e for e in getattr(self._written(part), name) if e is not piece)
            self._now(part, replace(self._written(part), **{name: rest}))

    def _written(self, part: str) -> Written:
        return self.stage.trial if part == "trial" else self.stage.lasting

    def _now(self, part: str, written: Written) -> None:
        which = {"trial": written} if part == "trial" else {"lasting": written}
        self.stage = replace(self.stage, **which)  # type: ignore[arg-type]

    def _done(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except OSError as error:
            self.wrong.append(describe(error))
        except Failed as error:
            self.wrong.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        else:
            return True
        return False


def _swept(root: Root, sweeps: Sequence[Sweep], given: Words) -> Iterator[tuple[str, str]]:
    """Files that hold the words as they were put in, with the place where."""
    for sweep in sweeps if given else ():
        for path in root.glob(sweep.pattern):
            with contextlib.suppress(OSError):
                text = _text(record.read_content(root, path))
                if words.remove(sweep.place, text, given, singly=False) != text:
                    yield path, sweep.place


def _rewrite(root: Root, path: str, change: Callable[[str], str]) -> None:
    now = record.read_content(root, path)
    if now:
        text = change(_text(now))
        _put(root, path, replace(now, data=text.encode("utf-8", "surrogateescape")))


_ENTRIES = "/loader/entries/"
_COUNTERS = re.compile(r"\+\d+(-\d+)?(?=\.(?:conf|efi)$)")


def _counted(root: Root, path: str) -> str | None:
    """A file under the name that boot counting gave it (Automatic Boot Assessment of systemd)."""
    if root.exists(path) or (_ENTRIES not in path and "/EFI/Linux/" not in path):
        return path
    bare = _COUNTERS.sub("", path)
    stem, dot, ending = bare.rpartition(".")
    same = root.glob(f"{stem}*{dot}{ending}")
    return next((each for each in same if _COUNTERS.sub("", each) == bare), None)


def is_gone(root: Root, path: str) -> bool:
    """Whether others of its directory are there, and it is not."""
    names = root.names(os.path.dirname(path)) if path else []
    return bool(names) and os.path.basename(path) not in names


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


def _restore(root: Root, file: Kept, given: Words) -> None:
    path = _counted(root, file.path)
    if path is None:
        root.discard(file.path)
        return  # an entry that went with its kernel, or was never there
    now = record.read_content(root, path)
    back = file.before if file.edited else without_ours(now, file, given)
    if back is None:
        root.unlink(path)
    elif now != back:
        _put(root, path, back)
    else:
        root.discard(path)


def without_ours(now: Content | None, file: Kept, given: Words = ()) -> Content | None:
    """A file without what we added; None: not there.

    What another program added since stays.  Raises Failed where that cannot be told apart.
    """
    # A distribution's tool may have changed mode or owner; the words are what counts.
    if _data(now) in (_data(file.before), _data(file.after)):
        return file.before
    if file.before is None and _ENTRIES in file.path and not file.place:
        return None  # an entry of ours, whatever grubby or tuned have put into every one since
    if file.place:
        if now is None:
            return None
        text = words.remove(file.place, _text(now), given)
        return replace(now, data=text.encode("utf-8", "surrogateescape"))
    old, new = _data(file.before) or b"", _data(file.after) or b""
    if old and not old.endswith(b"\n"):
        old += b"\n"  # or their next line would stick to the last one
    start = _alike(old, new)
    end = _alike(old[start:][::-1], new[start:][::-1])
    ours, theirs = new[start : len(new) - end], old[start : len(old) - end]
    if now is None or theirs.strip() or now.data.count(ours) != 1:
        raise Failed(f"{file.path} was changed by another program since")
    data = now.data.replace(ours, theirs)
    return replace(now, data=data) if data or file.before else None


def _alike(one: bytes, other: bytes) -> int:
    """How many leading bytes are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _data(content: Content | None) -> bytes | None:
    return content.data if content else None


def _text(content: Content | None) -> str:
    return content.data.decode("utf-8", "surrogateescape") if content else ""


def _is_ours(root: Root, file: Kept) -> bool:
    try:
        return record.read_content(root, file.path) == file.after
    except OSError:
        return False


def _changed_by_others(root: Root, old: Stage) -> dict[str, str]:
    """Files of ours that were changed so that ours cannot be taken out; what is wrong."""
    found = {}
    for file in (*old.trial.files, *old.lasting.files):
        if file.edited:
            continue
        path = _counted(root, file.path)
        if path is None:
            continue
        try:
            without_ours(record.read_content(root, path), file, old.words)
        except OSError as error:
            found[file.path] = f"{describe(error)}: it was changed by another program since"
        except Failed as error:
            found[file.path] = error.message
    return found


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
        now, wrong, _ = put_back(root, new, run)
        if not now.leftover:
            record.remove(root)
            return Failed(f"{why}; everything is as it was")
        why_not = "; ".join(wrong)
    except (Failed, OSError) as error:
        why_not = cause(error)
    return Failed(
        f"{why}; not everything could be put back: {why_not}",
        hint="'infertune boot undo' tries again; so does the guard at the next boot",
    )


@contextlib.contextmanager
def failing(after: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(f"{describe(error)}; {after}") from error
    except Failed as error:
        raise Failed(f"{error.message}; {after}") from error
