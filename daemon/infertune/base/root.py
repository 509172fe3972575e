# SPDX-License-Identifier: Apache-2.0
"""The one door to /sys, /proc, /etc, /run and /dev.

Nothing else in infertune opens a file for writing (tests/unit/test_house.py
checks that).  ``Root("/")`` is this machine; ``Root(directory)`` is a recorded
one, on which everything runs the same way.  Paths are always given as on the
machine (``/proc/sys/vm/swappiness``).

Every effect is a named :class:`Step`.  A test hands in a hook that sees each
step before it happens and may raise an OSError, shorten a write or kill the
process.  There is deliberately no environment variable for it: a root daemon
must not have a switch that fakes errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from infertune.base import locks
from infertune.base.errors import UsageError
from infertune.base.recorded import as_the_kernel_would
from infertune.base.records import dataclass

_DESCRIPTORS = "/proc/self/fd"

MAX_READ = 4 * 1024 * 1024
"""Bound of one read.  /proc/cpuinfo of a 1024-thread machine is about 1.5 MiB."""


@dataclass(frozen=True, slots=True)
class Step:
    """One effect on the machine, before it happens."""

    action: str  # mkdir, create, write, fsync, rename, sync-directory, unlink, lock, keep-open
    path: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.action} {self.path}"


Hook = Callable[[Step], int | None]
"""Called before each effect.  Returns None, or how many bytes of a write may get through."""


class ShortWrite(OSError):
    """The kernel took only a part.  Never retried: for sysfs the rest is a second store."""

    def __init__(self, path: str, taken: int, size: int) -> None:
        super().__init__(errno.EIO, f"short write, {taken} of {size} bytes", path)


@dataclass(frozen=True, slots=True)
class Space:
    """Room on one file system."""

    device: int
    """Number of the file system; paths on the same one have the same."""
    free: int
    """Bytes that anybody may still take; what is kept for root is not among them."""
    read_only: bool


@dataclass
class KeptOpen:
    """A file kept open because its effect lasts as long as the descriptor (PM-QoS)."""

    path: str
    fd: int | None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Root:
    """Files of one machine, real or recorded."""

    def __init__(self, base: str | Path = "/", *, hook: Hook | None = None) -> None:
        self.base = Path(base)
        # Not by name: "//" and "/proc/1/root" are this machine too, and get no make-believe.
        self.live = self.base.exists() and self.base.samefile("/")
        self._hook = hook
        self._prefix = str(self.base).rstrip("/")

    def at(self, path: str) -> Path:
        """Where ``path`` of the machine lies on this file system."""
        return Path(self._at(path))

    def _at(self, path: str) -> str:
        # Text, for what only reads: most of a look at the machine was making Path of paths.
        if not path.startswith("/") or "\0" in path or ("/.." in path and ".." in path.split("/")):
            raise ValueError(f"not an absolute path: {path!r}")
        return self._prefix + path

    # -- reading -------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """The whole file, at most MAX_READ bytes.  Raises OSError as the kernel gave it."""
        fd = _open(self._at(path), os.O_RDONLY)
        try:
            parts: list[bytes] = []
            size = 0
            while size < MAX_READ and (part := os.read(fd, 65536)):
                parts.append(part)
                size += len(part)
            return b"".join(parts)
        except OSError as error:
            error.filename = path  # read(2) does not know the name
            raise
        finally:
            os.close(fd)

    def read_value(self, path: str, size: int) -> bytes:
        """At most ``size`` bytes from one single read (character devices such as PM-QoS)."""
        fd = _open(self._at(path), os.O_RDONLY)
        try:
            return os.read(fd, size)
        finally:
            os.close(fd)

    def read_small(self, path: str, limit: int) -> str:
        """A small text file as people write them (modprobe.d, a unit).  Raises OSError.

        Anything but a regular file of at most ``limit`` bytes of text is an error that says so:
        a FIFO would hang whoever reads it, and a large file is not what it seems.
        """
        with _plain(self._at(path), path, follow=True) as (fd, status):
            if status.st_size > limit:
                raise OSError(errno.EFBIG, f"Larger than {limit // 1024} KiB", path)
            data = os.read(fd, limit)
        if b"\0" in data:
            raise OSError(errno.EILSEQ, "Binary, not text", path)
        return data.decode("utf-8", "replace")

    def read_records(self, path: str, limit: int) -> bytes:
        """What a device gives one record at a time (/dev/kmsg), at most ``limit`` bytes.

        Raises OSError where it cannot be opened.
        """
        parts: list[bytes] = []
        size = 0
        fd = _open(self._at(path), os.O_RDONLY)
        try:
            while size < limit:
                try:
                    part = os.read(fd, 8192)  # CONSOLE_EXT_LOG_MAX of printk: no record is longer
                except BrokenPipeError:
                    continue  # records were overwritten meanwhile; the next read goes on after them
                except BlockingIOError:
                    break
                if not part:
                    break
                parts.append(part)
                size += len(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def modified(self, path: str) -> int | None:
        """When the file was last written, in seconds since 1970; None where there is none."""
        try:
            return int(os.stat(self._at(path)).st_mtime)
        except OSError:
            return None

    def read(self, path: str) -> str:
        """The file as text, without surrounding white space.  Raises OSError."""
        return self.read_bytes(path).decode("utf-8", "replace").strip("\0 \t\r\n")

    def get(self, path: str) -> str | None:
        """The file as text, or None where it cannot be read (absent, forbidden, driver says no)."""
        try:
            return self.read(path)
        except OSError:
            return None

    def get_int(self, path: str) -> int | None:
        """The file as an integer, or None where there is none."""
        text = self.get(path)
        try:
            return int(text, 0) if text else None
        except ValueError:
            return None

    def read_file(self, path: str, limit: int) -> tuple[bytes, os.stat_result]:
        """At most ``limit`` bytes of a regular file, and its status.

        Raises OSError: ELOOP for a symbolic link, EISDIR for a directory, EINVAL for a FIFO or
        a device.
        """
        return _read_plain(self._at(path), path, limit, follow=False)

    def read_part(self, path: str, offset: int, size: int) -> bytes:
        """At most ``size`` bytes (and MAX_READ) from ``offset`` of a regular file; less at its end.

        Raises OSError as ``read_file`` does.
        """
        with _plain(self._at(path), path, follow=False) as (fd, _):
            return os.pread(fd, min(size, MAX_READ), offset)

    def size(self, path: str) -> int:
        """Bytes of a regular file, as large as it may be.  Raises OSError as ``read_file`` does."""
        with _plain(self._at(path), path, follow=False) as (_, status):
            return status.st_size

    def digest(self, path: str) -> str:
        """SHA-256 of a regular file, as large as it may be.  Raises OSError as ``read_file``."""
        with (
            _plain(self._at(path), path, follow=False) as (fd, _),
            os.fdopen(fd, "rb", closefd=False) as file,
        ):
            import hashlib  # loads OpenSSL, and no daily verb needs it

            return hashlib.file_digest(file, "sha256").hexdigest()

    def space(self, path: str) -> Space:
        """Of the file system that a path lies on.  Raises OSError where there is none."""
        target = self._at(path)
        found = os.statvfs(target)
        free, read_only = found.f_bavail * found.f_frsize, bool(found.f_flag & os.ST_RDONLY)
        return Space(os.stat(target).st_dev, free, read_only)

    def exists(self, path: str) -> bool:
        """Whether there is something; what may not be looked at counts as not there."""
        try:
            os.stat(self._at(path))
        except OSError:
            return False
        return True

    def readlink(self, path: str) -> str | None:
        """Target of a symbolic link as written, or None."""
        try:
            return os.readlink(self._at(path))
        except OSError:
            return None

    def real(self, path: str) -> str:
        """``path`` with symbolic links resolved, as a path of the machine."""
        resolved = os.path.realpath(self._at(path))
        base = os.path.realpath(self._prefix or "/").rstrip("/")
        if not f"{resolved}/".startswith(f"{base}/"):
            raise ValueError(f"{path!r} leads out of the recorded tree")
        return resolved[len(base) :] or "/"

    def names(self, path: str) -> list[str]:
        """Sorted names in a directory; empty where there is none."""
        try:
            return sorted(os.listdir(self._at(path)))
        except OSError:
            return []

    def listed(self, path: str) -> list[str]:
        """Sorted names in a directory.  Raises OSError where it cannot be listed."""
        return sorted(os.listdir(self._at(path)))

    def glob(self, pattern: str) -> list[str]:
        """Existing paths that match, in natural order (cpu2 before cpu10)."""
        found = [""]
        for part in pattern.strip("/").split("/"):
            if any(sign in part for sign in "*?["):
                found = [f"{path}/{name}" for path in found for name in self._like(path, part)]
            else:
                found = [f"{path}/{part}" for path in found]
                found = [path for path in found if os.path.exists(self._at(path))]
        return sorted(found, key=_natural)

    def _like(self, directory: str, pattern: str) -> list[str]:
        try:
            return fnmatch.filter(os.listdir(self._at(directory or "/")), pattern)
        except OSError:
            return []

    def writable(self, path: str) -> bool:
        """Whether this process may open the file for writing."""
        return os.access(self._at(path), os.W_OK)

    # -- effects -------------------------------------------------------------

    def write_value(self, path: str, text: str) -> None:
        """Store one value in an existing sysfs or procfs file with one write.

        Raises OSError; a short write is an error (ShortWrite).
        """
        data = text.encode()
        taken = self._step("write", path, len(data))
        target = self._inside(path)
        flags = os.O_WRONLY | os.O_NOFOLLOW
        if self.live:
            fd = _open(target, flags)
        else:
            answer = as_the_kernel_would(self.read_bytes(path), data[:taken])
            fd = _open(target, flags | os.O_TRUNC)
        try:
            if self.live:
                self._write(fd, path, data, taken)
            else:
                os.write(fd, answer)
                if taken is not None and taken < len(data):
                    raise ShortWrite(path, taken, len(data))
        finally:
            os.close(fd)

    def replace(
        self,
        path: str,
        data: bytes,
        mode: int = 0o644,
        *,
        owner: tuple[int, int] | None = None,
        durable: bool = True,
    ) -> None:
        """Make the file hold ``data``, all of it or nothing, also across a power cut.

        New file beside it, write, fsync, rename, fsync of the directory.  ``owner`` is a user
        and a group id; without it the file is the caller's.  Without ``durable`` a power cut
        soon after may bring the old content back, whole (but not on FAT): for what may be old.
        Raises OSError; the old content is then still there.
        """
        target = self._inside(path)
        temporary = _successor(target)
        self._step("create", path)
        # Not written over: what is there may be another name of a file that counts.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with _closing(fd), _removed_if_it_fails(temporary, path):
            if owner is not None and owner != (os.fstat(fd).st_uid, os.fstat(fd).st_gid):
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)  # after the owner: a change of that clears set-user-id
            taken = self._step("write", path, len(data))
            self._write(fd, path, data, taken)
            self._step("fsync", path)
            os.fsync(fd)
            self._rename(temporary, target, path, fd, durable=durable)

    def append(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Put ``data`` at the end of a file, made where there is none, and make that durable.

        A power cut may leave a part of it: whoever reads takes whole lines only, and what is
        appended after a torn line starts on a new one.  Raises OSError.
        """
        target = self._inside(path)
        new = not os.path.lexists(target)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with _closing(_open(target, flags, mode)) as fd:
            _refuse_what_is_not_plain(os.fstat(fd).st_mode)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                data = b"\n" + data
            taken = self._step("write", path, len(data))
            self._write(fd, path, data, taken)
            self._step("fsync", path)
            os.fsync(fd)
        if new:
            self._sync_directory(os.path.dirname(path))

    def copy(self, path: str, to: str) -> None:
        """Make ``to`` a copy of a regular file with its mode and owner, whole or not there.

        Durable as with ``replace``.  Raises OSError; ``to`` is then what it was.
        """
        target = self._inside(to)
        temporary = _successor(target)
        with _plain(self.at(path), path, follow=False) as (source, status):
            self._step("create", to)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fd = _open(temporary, flags, 0o600)
            with _closing(fd), _removed_if_it_fails(temporary, to):
                now = os.fstat(fd)
                if (status.st_uid, status.st_gid) != (now.st_uid, now.st_gid):
                    os.fchown(fd, status.st_uid, status.st_gid)
                if stat.S_IMODE(status.st_mode) != stat.S_IMODE(now.st_mode):
                    os.fchmod(fd, stat.S_IMODE(status.st_mode))  # FAT has one mode for all
                taken = self._step("write", to, status.st_size)
                while part := os.read(source, 1024 * 1024):
                    if taken is not None and taken < len(part):
                        self._write(fd, to, part, taken)
                    while part:  # what a full disk does not take at once it refuses next
                        part = part[os.write(fd, part) :]
                self._step("fsync", to)
                os.fsync(fd)
                self._rename(temporary, target, to, fd)

    def rename(self, path: str, to: str) -> None:
        """Give a regular file another name on its file system, and make that durable.

        ``to`` is always what it was or what it becomes, also across a power cut.  Raises OSError.
        """
        source, target = self._inside(path), self._inside(to)
        with _closing(_open(source, os.O_RDONLY | os.O_NOFOLLOW)) as fd:
            self._rename(source, target, to, fd)

    def _rename(
        self, source: str, target: str, path: str, fd: int, *, durable: bool = True
    ) -> None:
        """Rename a file that is open as ``fd``; its new name always leads to a whole file.

        FAT has no journal.  A name is written with its file and not with its directory
        (vfat_rename in fs/fat/namei_vfat.c only marks the inode), and the file that was there
        gives its clusters away when nobody holds it any more.  In another order a power cut
        leaves a name that leads to free clusters; seen with systemd-boot's only entry.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                replaced = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.enter_context(_closing(replaced))
            self._step("rename", path)
            os.rename(source, target)
            if not durable:
                return
            self._step("fsync", path)
            os.fsync(fd)
            self._sync_directory(os.path.dirname(path))

    def sync(self, path: str) -> None:
        """What another program wrote to a regular file is on disk.  Raises OSError."""
        with _plain(self.at(path), path, follow=False) as (fd, _):
            self._step("fsync", path)
            os.fsync(fd)
        self._sync_directory(os.path.dirname(path))

    def unlink(self, path: str) -> None:
        """Remove a file and make that durable; one that is already gone is fine.

        A half-written successor that a killed ``replace`` left goes with it.
        """
        target = self._inside(path)
        there = [file for file in (target, _successor(target)) if os.path.exists(file)]
        if not there:
            return
        self._step("unlink", path)
        for file in there:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
        self._sync_directory(os.path.dirname(path))

    def discard(self, path: str) -> None:
        """Remove the half-written successor that a killed ``replace`` left beside a file."""
        left = _successor(self._inside(path))
        if os.path.exists(left):
            self._step("unlink", left)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
            self._sync_directory(os.path.dirname(path))

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory and its parents, and make that durable; an existing one is fine.

        What is made durable in it would else be lost with its name.  Raises OSError.
        """
        if os.path.isdir(self._at(path)):
            return
        self._step("mkdir", path)
        self._inside(path)
        missing = [each for each in _upwards(path) if not os.path.isdir(self._at(each))]
        for each in reversed(missing):
            # Whatever the caller's umask: reading verbs need no privilege, and nobody else may
            # write, not even for a moment.
            its_mode = mode if each == path else 0o755
            target = self.at(each)
            target.mkdir(its_mode, exist_ok=True)
            target.chmod(its_mode)
            try:
                self._sync_directory(os.path.dirname(each))
            except OSError as error:
                if error.errno != errno.EINVAL:  # a cgroup: its file system knows no fsync
                    raise

    def rmdir(self, path: str) -> None:
        """Remove an empty directory; one that is already gone is fine.  Raises OSError."""
        self._step("rmdir", path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._at(path))

    def keep_open(self, path: str, data: bytes) -> KeptOpen:
        """Write ``data`` and keep the file open until the result is closed.  Raises OSError."""
        taken = self._step("keep-open", path, len(data))
        if not self.live:
            # A recorded machine has no driver whose request could end with the descriptor.
            return KeptOpen(path, None)
        fd = _open(self._at(path), os.O_RDWR)
        try:
            self._write(fd, path, data, taken)
        except OSError:
            os.close(fd)
            raise
        return KeptOpen(path, fd)

    @contextlib.contextmanager
    def lock(self, path: str, owner: str, *, inherit: bool = False) -> Iterator[str | None]:
        """Hold an exclusive lock on ``path``; yields None, or the owner that has it already.

        The lock dies with the process, however it dies; with ``inherit``, and where it is killed,
        with the last program it started.  An open-file-description lock
        (Linux 3.15) rather than flock: ``lock_owner`` can ask for it without taking it.
        Only its owner may open the file: a shared lock takes no more than reading, and whoever
        has one keeps everybody else from the exclusive one.  It may have a second place
        (``locks.places``).
        """
        with contextlib.ExitStack() as locked:
            for place in locks.places(path):
                try:
                    if place != path:
                        self.mkdir(os.path.dirname(place))
                    holder = locked.enter_context(self._lock(place, owner, inherit=inherit))
                except OSError:
                    if place == path:
                        raise
                    continue  # a /var that takes no lock keeps nothing from going back
                if holder is not None:
                    yield holder
                    return
            yield None

    @contextlib.contextmanager
    def _lock(self, path: str, owner: str, *, inherit: bool) -> Iterator[str | None]:
        fd, writable = self._open_lock(path)
        try:
            try:
                if writable:
                    os.fchmod(fd, 0o600)
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, locks.whole_file(fcntl.F_WRLCK))
                else:
                    # The first keeps out who could write, the second who could not either.
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, locks.whole_file(fcntl.F_RDLCK))
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                yield locks.noted_owner(fd)
                return
            # The name is for people.  On a full /run the lock is held without it: what was
            # changed must be able to go back.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, owner.encode(), 0)
            os.set_inheritable(fd, inherit)
            try:
                yield None
            finally:
                if writable:
                    os.ftruncate(fd, 0)
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, locks.whole_file(fcntl.F_UNLCK))
        finally:
            os.close(fd)

    def _open_lock(self, path: str) -> tuple[int, bool]:
        """The file of a lock, and whether it may be written.

        A lock that is there is had on a read-only file system, too: what was changed must be
        able to go back.
        """
        try:
            self._step("lock", path)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            return _open(self._inside(path), flags, 0o600), True
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            try:
                return _open(self._inside(path), os.O_RDONLY | os.O_NOFOLLOW), False
            except FileNotFoundError:
                raise error from None

    @contextlib.contextmanager
    def turn(
        self, path: str, patience_s: float, *, descriptor: int | None = None
    ) -> Iterator[bool]:
        """Wait for an exclusive flock(2) on ``path``; yields False where patience ends before.

        Only its owner may open the file, so that nobody else can hold it; ``descriptor`` is the
        file opened by somebody who may (reading is enough for flock).  Raises OSError where it
        cannot be opened.
        """
        self._step("lock", path)
        own = descriptor is None
        fd = (
            _open(self._inside(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if descriptor is None
            else descriptor
        )
        try:
            got = _flock(fd, patience_s)
            try:
                yield got
            finally:
                if got:
                    fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            if own:
                os.close(fd)

    def lock_owner(self, path: str) -> str | None:
        """Who holds the lock on ``path`` right now, or None.  Does not take it.

        Whoever may not read the file is told that somebody does, and not who.
        """
        return locks.owner(path, self._at)

    # -- the steps themselves ------------------------------------------------

    def _step(self, action: str, path: str, size: int = 0) -> int | None:
        return self._hook(Step(action, path, size)) if self._hook else None

    def _inside(self, path: str) -> str:
        """Where an effect on ``path`` lands: in a recorded tree never outside of it, and never on
        a file system that is mounted into it (/proc and /sys of a chroot are this kernel's)."""
        target = self._at(path)
        if not self.live:
            base = self.base.resolve()
            real = next(each for each in Path(target).parents if each.exists()).resolve()
            if not real.is_relative_to(base) or real.stat().st_dev != base.stat().st_dev:
                raise OSError(errno.EXDEV, "outside the recorded tree", path)
        return target

    def _sync_directory(self, path: str) -> None:
        self._step("sync-directory", path)
        fd = os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _write(fd: int, path: str, data: bytes, taken: int | None) -> None:
        size = len(data)
        if taken is not None:
            data = data[:taken]
        written = os.write(fd, data)
        if written != size:
            raise ShortWrite(path, written, size)


def _open(path: str | Path, flags: int, mode: int = 0o644) -> int:
    # O_NONBLOCK: a FIFO, or a driver that waits, must not hang a root process.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _removed_if_it_fails(temporary: str, path: str) -> Iterator[None]:
    """``path`` is what an error is about, where it does not say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _flock(fd: int, patience_s: float) -> bool:
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.02)
        else:
            return True


def _upwards(path: str) -> list[str]:
    """``path`` and the directories above it, nearest first."""
    return [path, *map(str, PurePosixPath(path).parents)]


def _successor(target: str) -> str:
    # A fixed name: a leftover of a killed process is replaced, not collected.  Hidden, as
    # grub-mkconfig runs whatever else it finds in /etc/grub.d; and nobody else's.
    directory, name = os.path.split(target)
    return f"{directory}/.{name}.infertune"


def _natural(text: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]


def read_plain_file(path: Path, size: int, *, follow: bool) -> tuple[bytes, os.stat_result]:
    """At most ``size`` bytes of a regular file and its status, both from one descriptor.

    Raises OSError; ELOOP for a symbolic link unless ``follow``.
    """
    return _read_plain(path, str(path), size, follow=follow)


def changeable_by_others(path: Path, status: os.stat_result, base: Path) -> str | None:
    """What others than root may change of a file and its way from ``base``; None where nothing.

    ``status`` is the file's own, of the descriptor that was read.  Raises OSError.
    """
    if status.st_uid != 0 or status.st_mode & 0o022:
        return "this file"
    base = base.resolve()
    directory = path.parent.resolve()
    for each in (directory, *directory.parents):
        found = each.stat()
        # Above its own directory, what is root's cannot be put aside where only owners may.
        free = found.st_mode & 0o022 and (each == directory or not found.st_mode & stat.S_ISVTX)
        if found.st_uid != 0 or free:
            return "this directory" if each == directory else f"the way to it, {each}"
        if each == base:
            break
    return None


def _read_plain(
    path: str | Path, name: str, size: int, *, follow: bool
) -> tuple[bytes, os.stat_result]:
    with (
        _plain(path, name, follow=follow) as (fd, status),
        os.fdopen(fd, "rb", closefd=False) as file,
    ):
        return file.read(size), status


@contextlib.contextmanager
def _plain(path: str | Path, name: str, *, follow: bool) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file, open for reading, and its status; ``name`` is for errors.  Raises OSError.

    What is something else is never opened, only looked at (O_PATH): whoever owns a file that root
    reads may have put a link to a device there, and some act when they are opened (/dev/watchdog
    restarts the machine a minute later, a FIFO lets its writer go on).
    """
    last = os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        seen = os.open(path, os.O_PATH | last)
        try:
            _refuse_what_is_not_plain(os.fstat(seen).st_mode)
            fd = _reopened(seen, path, last)
        finally:
            os.close(seen)
    except OSError as error:
        error.filename = name
        raise
    try:
        yield fd, os.fstat(fd)
    finally:
        os.close(fd)


def _reopened(seen: int, path: str | Path, last: int) -> int:
    """For reading, the very file that was looked at, whatever is at its path by now."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(f"{_DESCRIPTORS}/{seen}", flags | os.O_CLOEXEC)
    except FileNotFoundError:
        # No /proc here (a chroot): what was at the path a moment ago is the best there is.
        return os.open(path, flags | last)


def _refuse_what_is_not_plain(mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def full_path(path: str) -> str:
    """A path the user named, from the root of this system.  Raises UsageError."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise UsageError(
            f"{path}: the current directory is gone", hint="give a path that starts with '/'"
        ) from None


def read_user_file(path: str, limit: int) -> bytes:
    """At most ``limit`` bytes of a file the user named, on this system.  Raises OSError."""
    with open(path, "rb") as file:
        return file.read(limit)


def write_user_file(path: str, data: bytes, *, force: bool = False, mode: int = 0o644) -> None:
    """Write a file the user named, on this system and not on a recorded one.

    An existing file is an error (FileExistsError) unless ``force``; one that others may read is
    closed to them where ``mode`` says so.  What cannot be written whole is not left there.  Raises
    OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    file = os.fdopen(_open(Path(path), flags, mode), "wb")
    try:
        with file:
            was = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(was) and was & 0o077 & ~mode:
                os.fchmod(file.fileno(), stat.S_IMODE(was) & mode)
            file.write(data)
    except OSError:
        if not force:  # it is ours, and half of it would be in the way of the next try
            os.unlink(path)
        raise


def lay_out(
    base: Path,
    *,
    directories: Iterable[str] = (),
    files: Mapping[str, tuple[bytes, int]],
    links: Mapping[str, str],
    times: Mapping[str, int] | None = None,
) -> None:
    """Build a recorded machine in the empty directory ``base``.

    ``files`` maps a path of the machine to content and permission bits, ``links`` to a target,
    ``times`` to when it was last written (seconds since 1970).
    Files come before links, so nothing is ever written through a link.  Raises OSError.
    """
    root = Root(base)
    for path in (*directories, *map(os.path.dirname, (*files, *links))):
        root.mkdir(path)
    for path, (data, mode) in files.items():
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(root.at(path), flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if times and path in times:
                os.utime(file.fileno(), (times[path], times[path]))
    for path, target in links.items():
        os.symlink(target, root.at(path))
