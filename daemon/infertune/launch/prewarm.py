# SPDX-License-Identifier: Apache-2.0
"""Read a model's files into the page cache, beside a server that only sets itself up yet.

An engine prepares its devices, reads, and prepares again, on one thread; read ahead from outside,
the file is there by the time it is asked for.  Nothing waits for it, nothing is copied, and what is
warm already costs a look.  Read by the server's own user, in its own control group: it sees no more
than the server does, and the pages are charged to who needs them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import format_size
from infertune.catalogue.server_settings import PREWARM, files_of
from infertune.host.devices import Disk, disk_of
from infertune.host.memory import meminfo, pressure
from infertune.launch.residency import cachestat, file_size, model_files, resident
from infertune.pools.judge import system_reserve

WARM = 0.98
"""Share of a file from which on there is nothing to do."""
_STEP = 4 * 2**20
_UNKNOWN_STEP = 128 * 1024
"""Bytes for a call; the kernel reads no more for one than the disk's read-ahead (mm/readahead.c).
128 KiB is the kernel's default of that."""
_LOOK = 256 * 2**20
"""Bytes between two looks at memory."""
_STALLED = 0.01
"""Share of the time that something waits for memory, from which on we wait, too."""
_PAUSE_S, _PAUSES = 0.25, 40
_OTHERS_S, _OTHERS_READ = 0.2, 0.25
"""How long a disk is looked at, and which share of it reads may take for it to be ours alone."""
LINE = "prewarm: "
"""What a line about it begins with, in the output of a server."""

Outcome = Literal["read", "resident", "skipped", "stopped"]
"""``resident``: there was nothing to do; ``stopped``: a part was read."""


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of the files of one model."""

    bytes: int
    """Of all its files."""
    before: int | None
    """Bytes that were in memory; None where the kernel does not tell."""
    after: int | None
    read: int
    """Bytes that the kernel was asked for."""
    seconds: float
    outcome: Outcome
    why: str | None = None
    """Why not all of it was read."""

    def line(self) -> str:
        """For a log."""
        sizes = f"{format_size(self.read)} of {format_size(self.bytes)} in {self.seconds:.1f} s"
        before, after = share(self.before, self.bytes), share(self.after, self.bytes)
        why = f"; {self.why}" if self.why else ""
        return f"{LINE}{self.outcome}: {sizes}, in memory before {before}, after {after}{why}"


def share(part: int | None, whole: int) -> str:
    """Per cent of a file, as people read it."""
    return "not known" if part is None else f"{100 * part / whole if whole else 100:.0f} %"


def prewarm(
    root: Root,
    paths: Sequence[str],
    *,
    most: int | None = None,
    copied: bool = False,
    always: bool = False,
) -> Warmed:
    """Have the kernel read these files, in this order, as far as memory allows.

    ``most``: bytes to read at most.  ``copied``: whether the engine copies what it reads, so that
    there must be room for that, too.  ``always``: also where it is not sure to help: without that
    room, and from a rotating disk that others read.  Raises OSError for a file that cannot be read.
    """
    began = time.monotonic()
    total = file_size(list(paths))
    before = resident(list(paths))

    def warmed(outcome: Outcome, read: int, why: str | None = None) -> Warmed:
        after = resident(list(paths)) if read else before
        return Warmed(total, before, after, read, time.monotonic() - began, outcome, why)

    if before is not None and before >= WARM * total:
        return warmed("resident", 0)
    left = total if most is None else min(total, most)
    disk = disk_of(root, os.stat(paths[0]).st_dev)
    why = _no_room(root, left)
    if why is None and not always:
        why = _no_room_for_both(root, left) if copied else None
        why = why or _others_read(root, disk, paths[0])
    if why:
        return warmed("skipped", 0, why)
    read = 0
    look = _Look(root)
    for piece in _pieces(paths, left):
        if read and (why := look.why_stop(left - read)):
            return warmed("stopped", read, why)
        if not piece.ask(_step(disk)):
            return warmed("stopped", read, "the kernel has no memory for more")
        read += piece.length
    why = f"no more than {format_size(left)} were asked for" if left < total else None
    return warmed("read", read, why)


def for_server(
    root: Root,
    model: str | None,
    settings: Mapping[str, str],
    backend: str,
    say: Callable[[str], None],
) -> Callable[[], None] | None:
    """What has the files of a server with these settings read, for the process that becomes it.

    None where that is not wanted, or cannot help, and then it says why.
    """
    wanted, load_mode = settings.get(PREWARM, "off"), settings.get("load_mode")
    if wanted == "off":
        return None
    why = None
    if model is None:
        why = "a router reads its models when they are asked for"
    elif load_mode == "dio":
        why = "load_mode dio reads past the page cache"
    elif load_mode == "none" and backend == "cpu" and wanted == "auto":
        # Measured: slower by a quarter in the median (benchmarks/results/prewarm-start-*.md).
        why = "with load_mode none the server itself reads one piece after the other"
    if why or model is None:
        say(f"{PREWARM} = {wanted} left out: {why}")
        return None
    every = dict.fromkeys((model, *files_of(settings).values()))
    files = [file for path in every for file in model_files(path)]
    # On the CPU a mapped file is the memory of the model.
    copied, always = backend != "cpu", wanted == "on"
    return partial(apart, partial(prewarm, root, files, copied=copied, always=always))


def apart(work: Callable[[], Warmed]) -> None:
    """Do it in a process that nobody waits for; what came of it is a line of our output.

    For a process that is about to become the server, and has one thread.
    """
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    # Of a second one the server is not the parent: it need not know of its end.
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            _report(work)
    os._exit(0)


def _report(work: Callable[[], Warmed]) -> None:
    try:
        line = work().line()
    except OSError as error:
        line = f"{LINE}left out: {error.strerror}"
    os.write(1, f"{line}\n".encode())


def _no_room(root: Root, size: int) -> str | None:
    """Why that many bytes have no room in memory; what is not known is not held against them."""
    info = meminfo(root)
    available, total = info.get("MemAvailable"), info.get("MemTotal")
    if available is None or total is None or size <= available - system_reserve(total):
        return None
    return (
        f"{format_size(size)} do not fit into the {format_size(available)} of memory that are "
        f"available, of which {format_size(system_reserve(total))} are left alone"
    )


def _no_room_for_both(root: Root, size: int) -> str | None:
    """Why a file should not take the room that the engine allocates for its copy of it."""
    why = _no_room(root, 2 * size)
    return f"with the engine's own copy of it, {why}" if why else None


def _others_read(root: Root, disk: Disk | None, path: str) -> str | None:
    """Why a disk that turns is left to others: two readers are slower than one after the other."""
    if disk is None or not disk.rotating or disk.reading_ms is None:
        return None
    time.sleep(_OTHERS_S)
    later = disk_of(root, os.stat(path).st_dev)
    if later is None or later.reading_ms is None:
        return None
    busy = (later.reading_ms - disk.reading_ms) / 1000 / _OTHERS_S
    return "its disk turns, and something else reads from it" if busy > _OTHERS_READ else None


def _step(disk: Disk | None) -> int:
    """Bytes for one call."""
    ahead = disk.read_ahead_kib if disk else None
    return min(ahead * 1024, _STEP) if ahead else _UNKNOWN_STEP


class _Look:
    """Whether memory allows to go on."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._at, self._stalled = time.monotonic(), self._stalled_s()

    def why_stop(self, rest: int) -> str | None:
        """Wait while memory is short, though not for long; why to stop if it stays so."""
        for number in range(_PAUSES):
            why = _no_room(self._root, rest) or self._others_wait()
            if why is None:
                return None
            if number < _PAUSES - 1:
                time.sleep(_PAUSE_S)
        return why

    def _others_wait(self) -> str | None:
        now, stalled = time.monotonic(), self._stalled_s()
        passed, waited = now - self._at, stalled - self._stalled
        self._at, self._stalled = now, stalled
        return "the machine waits for memory" if waited > _STALLED * passed else None

    def _stalled_s(self) -> float:
        lines = pressure(self._root)["memory"]
        return next((each.stalled_seconds for each in lines if each.share == "some"), 0.0)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a file, as much as is read between two looks at memory."""

    fd: int
    offset: int
    length: int

    def ask(self, step: int) -> bool:
        """Have it read.  False where the kernel kept less than half of what was asked."""
        end = self.offset + self.length
        for at in range(self.offset, end, step):
            os.posix_fadvise(self.fd, at, min(step, end - at), os.POSIX_FADV_WILLNEED)
        kept = cachestat(self.fd, self.offset, self.length)
        return kept is None or kept >= self.length // 2


def _pieces(paths: Sequence[str], left: int) -> Iterator[_Piece]:
    """The first ``left`` bytes of the files, one after the other, each open while it is read."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = min(os.fstat(fd).st_size, left)
            for offset in range(0, size, _LOOK):
                yield _Piece(fd, offset, min(_LOOK, size - offset))
        finally:
            os.close(fd)
        left -= size
