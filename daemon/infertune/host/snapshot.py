# SPDX-License-Identifier: Apache-2.0
"""A machine as one plain-text file: recorded by ``infertune snapshot``, replayed by ``--root``.

A person must be able to review it before sending it anywhere, so it is text, one entry per
file, and holds nothing that was not read::

    # infertune snapshot 1
    # Recorded on Linux 7.1.3, 2026-11-22

    Path: /proc/sys/vm/swappiness
    Mode: 644
    Lines: 1
    60

    Path: /etc/modprobe.d/ttm.conf
    Mode: 644
    Modified: 2026-11-22T10:00:00Z
    Lines: 1
    options ttm pages_limit=25165824

    Path: /sys/class/drm/card1/device/driver
    SymlinkTo: ../../../../bus/pci/drivers/amdgpu

    Directory: /sys/module/ttm

    # end of snapshot

``Lines: 0`` is a file that is empty, or of which only the existence counted.  Where the last
line does not end in a newline the header says ``Lines: 1 without final newline``.  ``Modified``
stands where somebody asked when the file was written, in UTC.  A byte that
is not printable text is written ``\\xNN``, a backslash ``\\\\``.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import NoReturn

from infertune.base.errors import NotPermitted, SnapshotError, UsageError
from infertune.base.records import dataclass, field
from infertune.base.root import MAX_READ, Root, lay_out, read_user_file
from infertune.host.privacy import MAC, UUID, names_of
from infertune.host.system import hostname
from infertune.host.tuners import TUNERS

MAGIC = "# infertune snapshot 1"
END = "# end of snapshot"
MAX_SIZE = 16 * 1024 * 1024
"""Bound of an archive: a 1024-thread machine has some 12,000 entries and about 2 MiB."""
MAX_ENTRIES = 50_000
_UNENDED = " without final newline"
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass
class Archive:
    """What a snapshot holds, by path of the machine."""

    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    times: dict[str, int] = field(default_factory=dict)
    """When a file was last written, in seconds since 1970, where somebody asked."""


# -- replaying -------------------------------------------------------------------


@contextlib.contextmanager
def open_root(path: str) -> Iterator[Root]:
    """The machine ``--root`` means: ``/``, a directory tree, or a snapshot file.

    Raises UsageError where there is no such path, NotPermitted where the caller may not read it,
    SnapshotError for a damaged file.
    """
    if os.path.isdir(path):
        # Else everything in it would be absent, and much of it "fine".
        if not os.access(path, os.R_OK | os.X_OK):
            raise NotPermitted(f"--root {path}: you may not read this directory")
        yield Root(os.path.realpath(path))
    elif os.path.isfile(path):
        with open_snapshot(path) as root:
            yield root
    else:
        raise UsageError(
            f"--root {path}: neither a directory nor a file",
            hint="give '/', a directory, or a file made by 'infertune snapshot FILE'",
        )


@contextlib.contextmanager
def open_snapshot(path: str) -> Iterator[Root]:
    """The recorded machine, on a temporary directory that is gone afterwards.

    Raises SnapshotError, NotPermitted.
    """
    try:
        data = read_user_file(path, MAX_SIZE + 1)
    except PermissionError as error:
        raise NotPermitted(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_SIZE:
        raise SnapshotError(f"{path}: larger than a snapshot may be ({MAX_SIZE >> 20} MiB)")
    archive = parse(data, path)
    with tempfile.TemporaryDirectory(prefix="infertune-") as directory:
        base = Path(directory).resolve()
        try:
            lay_out(
                base,
                directories=sorted(archive.directories),
                files=archive.files,
                links=archive.links,
                times=archive.times,
            )
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be unpacked: {error.strerror}") from error
        yield Root(base)


def parse(data: bytes, name: str) -> Archive:
    """The archive in ``data``; ``name`` is the file for messages.

    Raises SnapshotError ``name:line: ...`` for anything that is not exactly the format.
    """
    try:
        return _Parser(data.decode(), name).run()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SnapshotError(f"{name}:{line}: not UTF-8 text") from error


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self.lines = text.split("\n")
        if self.lines[-1] == "":
            self.lines.pop()
        self.name = name
        self.at = 0  # number of the line that was taken last, counted from 1
        self.archive = Archive()
        self.seen: dict[str, str] = {}  # path to kind
        self.parents: set[str] = {"/"}

    def fail(self, message: str) -> NoReturn:
        raise SnapshotError(f"{self.name}:{self.at}: {message}")

    def take(self) -> str:
        if self.at >= len(self.lines):
            self.at = len(self.lines)
            self.fail(f"the file is cut off: it does not end in '{END}'")
        self.at += 1
        return self.lines[self.at - 1]

    def header(self, key: str) -> str:
        line = self.take()
        if not line.startswith(f"{key}: "):
            self.fail(f"'{key}: ' expected, not '{line[:40]}'")
        return line[len(key) + 2 :]

    def run(self) -> Archive:
        if self.take() != MAGIC:
            self.fail(f"not a snapshot: the first line is not '{MAGIC}'")
        while (line := self.take()) != END:
            if line and not line.startswith("#"):
                self.entry(line)
        if self.at < len(self.lines):
            self.at += 1
            self.fail(f"there is more after '{END}'")
        return self.archive

    def entry(self, line: str) -> None:
        key, _, path = line.partition(": ")
        if key == "Directory":
            self.claim(path, key)
            self.archive.directories.add(path)
        elif key == "Path":
            self.claim(path, key)
            upcoming = self.lines[self.at] if self.at < len(self.lines) else ""
            if upcoming.startswith("SymlinkTo: "):
                self.link(path)
            else:
                self.file(path)
        else:
            self.fail(f"'Path: ' or 'Directory: ' expected, not '{line[:40]}'")

    def claim(self, path: str, kind: str) -> None:
        """Take ``path`` for this entry: plain, new, and below nothing but directories."""
        if (
            not path.startswith("/")
            or path != posixpath.normpath(path)
            or path.startswith("//")
            or not path.isprintable()
            or len(path) > 1024
            or max(map(len, path.split("/"))) > 200
            or path == "/"
        ):
            self.fail(f"'{path[:60]}' is not a plain absolute path")
        if len(self.seen) >= MAX_ENTRIES:
            self.fail(f"more than {MAX_ENTRIES} entries")
        if path in self.seen:
            self.fail(f"{path} is in the file twice")
        if kind != "Directory" and path in self.parents:
            self.fail(f"{path} is a directory of an earlier entry")
        parent = posixpath.dirname(path)
        while parent not in self.parents:
            if self.seen.get(parent, "Directory") != "Directory":
                self.fail(f"{path} lies below {parent}, which is not a directory")
            self.parents.add(parent)
            parent = posixpath.dirname(parent)
        self.seen[path] = kind

    def link(self, path: str) -> None:
        target = self.header("SymlinkTo")
        parts = target.split("/")
        climbs = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
        # ".." may only lead: in the middle it could climb through another link.
        if not target.isprintable() or not {"", ".", ".."}.isdisjoint(parts[climbs:]):
            self.fail(f"'{target[:60]}' is not a plain relative link")
        if climbs > path.count("/") - 1:
            self.fail(f"'{target[:60]}' leads out of the recorded machine")
        self.archive.links[path] = target

    def file(self, path: str) -> None:
        mode = self.header("Mode")
        if not re.fullmatch(r"[0-7]{3}", mode):
            self.fail(f"'{mode[:20]}' is not a mode such as 644")
        upcoming = self.lines[self.at] if self.at < len(self.lines) else ""
        if upcoming.startswith("Modified: "):
            self.archive.times[path] = self.time(self.header("Modified"))
        count = self.header("Lines")
        ended = not count.endswith(_UNENDED)
        count = count.removesuffix(_UNENDED)
        if not re.fullmatch(r"0|[1-9][0-9]{0,6}", count) or (count == "0" and not ended):
            self.fail(f"'{count[:20]}' is not a number of lines")
        raw = [self.unescape(self.take()) for _ in range(int(count))]
        data = b"\n".join(raw) + (b"\n" if raw and ended else b"")
        if len(data) > MAX_READ:
            self.fail(f"{path} is larger than infertune reads")
        # The owner may always read: a recorded 0200 must not hide the content from its replay.
        self.archive.files[path] = (data, int(mode, 8) | 0o400)

    def time(self, text: str) -> int:
        try:
            moment = datetime.strptime(text, _TIME).replace(tzinfo=UTC)
        except ValueError:
            self.fail(f"'{text[:30]}' is not a time such as 2026-11-22T10:00:00Z")
        return int(moment.timestamp())

    def unescape(self, line: str) -> bytes:
        parts = re.split(r"\\(\\|x[0-9a-f]{2}|)", line)
        data = bytearray(parts[0].encode())
        for escape, text in zip(parts[1::2], parts[2::2], strict=True):
            if not escape:
                self.fail(r"a lone backslash; write \\ or \xNN")
            data += b"\\" if escape == "\\" else bytes.fromhex(escape[1:])
            data += text.encode()
        return bytes(data)


# -- recording -------------------------------------------------------------------


def record(
    root: Root, read: Callable[[Root], None], more: Mapping[str, bytes] | None = None
) -> str:
    """The snapshot of everything that ``read`` looks at on ``root``, private facts left out.

    ``read`` is given a Root that notes each file, link and directory it is asked for.  ``more``
    are files that this machine does not have and a replay needs, by path.
    """
    recorder = _Recorder(root.base)
    read(recorder)
    for path, data in (more or {}).items():
        recorder.note(path, data, 0o444)
    archive = recorder.archive
    for path in archive.unreadable & archive.files.keys():
        del archive.files[path]
    archive.times = {path: at for path, at in archive.times.items() if path in archive.files}
    archive = _without_user_names(archive)
    # As recorded: a self-built kernel may carry the host's name.
    release, _ = archive.files.get("/proc/sys/kernel/osrelease", (b"unknown", 0))
    kernel = release.decode("utf-8", "replace").strip()
    how = "Recorded on" if root.live else "Copied from a recorded machine:"
    today = datetime.now(UTC).date().isoformat()
    return render(archive, [f"{how} Linux {kernel}, {today}.", *PRIVACY])


_HOME = re.compile(r"/home/([^/\s\"']+)")


def _without_user_names(archive: Archive) -> Archive:
    """Home directories by number, /home/user1 for the first, also where a file names one."""
    texts = [data.decode("utf-8", "surrogateescape") for data, _ in archive.files.values()]
    paths = [*archive.files, *archive.links, *archive.directories, *archive.unreadable]
    homes = {name for text in (*paths, *texts) for name in _HOME.findall(text)}
    names = {name: f"user{n}" for n, name in enumerate(sorted(homes, key=_by_number), 1)}

    def named(text: str) -> str:
        return _HOME.sub(lambda found: f"/home/{names[found[1]]}", text)

    def content(data: bytes) -> bytes:
        return named(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    if not names:
        return archive
    return Archive(
        files={named(path): (content(data), mode) for path, (data, mode) in archive.files.items()},
        links={named(path): target for path, target in archive.links.items()},
        directories={named(path) for path in archive.directories},
        unreadable={named(path) for path in archive.unreadable},
        times={named(path): at for path, at in archive.times.items()},
    )


def render(archive: Archive, header: list[str]) -> str:
    """The archive as text; ``header`` says where it comes from."""
    out = [MAGIC, *(f"# {line}" for line in header)]
    out += [f"# Not readable when recorded: {path}" for path in sorted(archive.unreadable)]
    paths = {*archive.files, *archive.links, *archive.directories}
    above = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    for path in sorted(paths, key=_by_number):
        # A link something was read through is recorded as the directory it leads to.
        if path in archive.links and path not in above:
            out += ["", f"Path: {path}", f"SymlinkTo: {archive.links[path]}"]
        elif path in archive.files:
            data, mode = archive.files[path]
            out += ["", f"Path: {path}", f"Mode: {mode:03o}"]
            if path in archive.times:
                moment = datetime.fromtimestamp(archive.times[path], UTC)
                out.append(f"Modified: {moment.strftime(_TIME)}")
            out += _content(data)
        elif path not in above:
            out += ["", f"Directory: {path}"]
    return "\n".join([*out, "", END]) + "\n"


def _by_number(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _content(data: bytes) -> list[str]:
    if not data:
        return ["Lines: 0"]
    ended = data.endswith(b"\n")
    lines = (data[:-1] if ended else data).split(b"\n")
    return [f"Lines: {len(lines)}{'' if ended else _UNENDED}", *map(_escape, lines)]


def _escape(line: bytes) -> str:
    # surrogateescape keeps bytes that are not UTF-8 apart, one by one.
    text = line.decode("utf-8", "surrogateescape").replace("\\", "\\\\")
    return "".join(
        char
        if char.isprintable() or char == "\t"
        else "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text
    )


class _Recorder(Root):
    """A Root that notes what it is asked for."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.archive = Archive()
        self._redact = _Redaction(Root(base))

    def read_bytes(self, path: str) -> bytes:
        return self._noted(path, super().read_bytes)

    def read_value(self, path: str, size: int) -> bytes:
        # Noted whole, not as the first bytes of it: somebody else may ask for more.
        return self._noted(path, lambda where: super(_Recorder, self).read_value(where, size))

    def _noted(self, path: str, read: Callable[[str], bytes]) -> bytes:
        try:
            data = read(path)
        except PermissionError:
            self.archive.unreadable.add(path)
            raise
        self.note(path, data, self._mode(path))
        return data

    def note(self, path: str, data: bytes, mode: int) -> None:
        """Take a file into the archive, what is private left out."""
        kept = self._redact(path, data)
        if kept is not None:
            name, content = kept
            self.archive.files[name] = (content, mode)
        elif self.archive.files.get(path, (b"", 0))[0]:
            del self.archive.files[path]  # that it is there may have been asked for too

    def read_small(self, path: str, limit: int) -> str:
        text = ""

        def read(where: str) -> bytes:
            nonlocal text
            text = super(_Recorder, self).read_small(where, limit)
            return text.encode()

        self._noted(path, read)
        return text

    def read_file(self, path: str, limit: int) -> tuple[bytes, os.stat_result]:
        status: list[os.stat_result] = []

        def read(where: str) -> bytes:
            data, found = super(_Recorder, self).read_file(where, limit)
            status.append(found)
            return data

        return self._noted(path, read), status[0]

    def read_records(self, path: str, limit: int) -> bytes:
        return self._noted(path, lambda where: super(_Recorder, self).read_records(where, limit))

    def modified(self, path: str) -> int | None:
        at = super().modified(path)
        if at is not None:
            self.archive.times[path] = at
            self._note_presence(path)
        return at

    def exists(self, path: str) -> bool:
        there = super().exists(path)
        if there:
            self._note_presence(path)
        return there

    def names(self, path: str) -> list[str]:
        names = super().names(path)
        # Only directories: of a file among them nothing is known until it is read.
        for each in (path, *(f"{path}/{name}" for name in names)):
            if self.at(each).is_dir():
                self._note_presence(each)
        return names

    def readlink(self, path: str) -> str | None:
        target = super().readlink(path)
        if target is not None:
            # As seen from where the link is recorded: the way there went through other links.
            parent = posixpath.dirname(path)
            goal = posixpath.normpath(posixpath.join(super().real(parent), target))
            self.archive.links[path] = posixpath.relpath(goal, parent)
        return target

    def real(self, path: str) -> str:
        self.readlink(path)
        return super().real(path)

    def _note_presence(self, path: str) -> None:
        # Names of processes and originals of configuration files: not even that they are there.
        if re.match(r"/proc/\d|/var/lib/infertune/", path) or path in self.archive.links:
            return
        if self.at(path).is_dir():
            self.archive.directories.add(path)
        else:
            self.archive.files.setdefault(path, (b"", self._mode(path)))

    def _mode(self, path: str) -> int:
        return stat.S_IMODE(self.at(path).stat().st_mode) & 0o777


# -- privacy -----------------------------------------------------------------------

PRIVACY = (
    "Left out: serial numbers, MAC addresses, UUIDs, the host name, the names of users and models,",
    "the names and ids of processes, and the values of kernel parameters that are not about",
    "hardware or tuning.",
)

_NO_UUID = b"00000000-0000-0000-0000-000000000000"
_UUID = re.compile(UUID.encode(), re.IGNORECASE)
_MAC = re.compile(MAC.encode(), re.IGNORECASE)
_UNIQUE = re.compile(rb"^(unique_id|hive_id) +\d+$", re.MULTILINE)
"""KFD properties that number this one GPU."""

_SECRET_FILES = re.compile(
    r"(serial|asset_tag|uuid|machine-id|hostname|unique_id|address)$|/shadow|\.key$|\.pem$"
)
"""Files whose content is never recorded, should somebody read one."""

_TUNER_COMMS = frozenset(comm.encode() for tuner in TUNERS for comm in tuner.comms)


class _Redaction:
    """Decides what of a file goes into the archive, and under which name."""

    def __init__(self, root: Root) -> None:
        self._host = re.compile(names_of(hostname(root)).encode(), re.IGNORECASE)
        self._processes: dict[str, str] = {}

    def __call__(self, path: str, data: bytes) -> tuple[str, bytes] | None:
        """Path and content to record, or None for nothing."""
        # Imported by whoever records: it takes longer than most verbs, which import this module.
        from infertune.host.redaction import reduce_file

        if re.match(r"/proc/\d", path):
            return self._process(path, data)
        part = reduce_file(path, data)
        if part is None:
            return None
        data = part
        if path == "/proc/cmdline":
            data = f"{redact_cmdline(data.decode('utf-8', 'replace'))}\n".encode()
        elif path == "/proc/cpuinfo":
            # All that is read of it stands in the first CPU's block.
            data = data.partition(b"\n\n")[0].rstrip(b"\n") + b"\n"
        elif path == "/proc/self/mounts":
            data = _lines(data, rb"\S+ \S+ cgroup2? .*")
        elif path.endswith("/os-release"):
            data = _lines(data, rb"(?:ID|ID_LIKE|VARIANT_ID|(?:PRETTY_)?NAME|VERSION\w*)=.*")
        elif _SECRET_FILES.search(path):
            data = b"redacted\n"
        elif path.startswith("/sys/class/dmi/") or path == "/proc/sys/kernel/osrelease":
            data = self._host.sub(b"redacted", data)
        data = _UUID.sub(_NO_UUID, data)
        data = _MAC.sub(b"00:00:00:00:00:00", data)
        return path, _UNIQUE.sub(rb"\1 0", data)

    def _process(self, path: str, data: bytes) -> tuple[str, bytes] | None:
        """A process is recorded only if it is a known tuner, and under a made-up id."""
        if not path.endswith("/comm") or data.strip() not in _TUNER_COMMS:
            return None
        name = self._processes.setdefault(path, f"/proc/{1001 + len(self._processes)}/comm")
        return name, data


def _lines(data: bytes, pattern: bytes) -> bytes:
    """The lines of ``data`` that match as a whole."""
    return b"".join(line for line in data.splitlines(True) if re.fullmatch(pattern, line.strip()))


def redact_cmdline(text: str) -> str:
    """Every parameter's name, the value only where it is known to hold nothing private.

    What follows ``--`` is for init, not for the kernel, and is dropped.
    """
    from infertune.host.redaction import PLAIN_PARAMETERS

    shown = []
    for word in re.findall(r'(?:"[^"]*"|[^\s"])+', text):
        if word == "--":
            break
        name, equals, _ = word.partition("=")
        if not re.fullmatch(r"[A-Za-z][\w.-]{0,60}", name):
            shown.append("redacted")
        elif not equals or PLAIN_PARAMETERS.fullmatch(name):
            shown.append(word)
        else:
            shown.append(f"{name}=redacted")
    return " ".join(shown)
