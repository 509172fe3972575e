# SPDX-License-Identifier: Apache-2.0
"""The journal of original values, which makes every change undoable.

A journal is one small document: a header line, one line per changed file, and
a closing line with the count and a checksum of the whole.  Every line carries
its own CRC-32.  The document is replaced atomically (see Root.replace) before
the first change of a transaction and again after the last, so each state on
disk is complete; a flipped byte or a missing end is always seen, and the lines
that are undamaged stay usable.

The same document is kept twice.  Kernel values die with the boot, so it lives in
/run, and carries the boot id: values of an earlier boot are never restored.  Its
copy in /var/lib is there when /run is lost, and tells after an unclean reboot
what was in force.

This module reads; store.py writes.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from infertune.base.locks import MACHINE_LOCK
from infertune.base.records import asdict, dataclass, replace
from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS
from infertune.host.system import boot_id

RUNTIME = "/run/infertune/journal"
PERSISTENT = "/var/lib/infertune/journal"
LOCK = MACHINE_LOCK
"""Of the machine: whoever changes it holds this."""
FORMAT = 1

STATES = ("idle", "applied", "running", "interrupted", "degraded")

MAX_BYTES = 2 * 1024 * 1024
"""Of writing and of reading, and less than Root.read_bytes gives.  A journal of 192 CPUs with
every knob set is about 150 KiB."""


@dataclass(frozen=True, slots=True)
class Record:
    """One changed file."""

    knob: str
    path: str
    original: str
    """Canonical value to go back to: the last one that was not ours."""
    ours: str | None
    """What infertune wrote, as the kernel gave it back; for a touched file what it became."""
    want: str | None
    """What the profile asked for; None for a file that only changed along with another."""
    settled: bool
    """False while a write is under way: then the file may hold anything of ours."""


@dataclass(frozen=True, slots=True)
class Journal:
    """Everything infertune has changed in one boot."""

    boot_id: str
    profile: str
    backend: str
    owner: str
    """Verb that wrote it, with its process id: ``apply (pid 4711)``."""
    since: str
    """Time of the last apply, ISO 8601, UTC, to the second."""
    held: bool
    """True while a process must be alive for it to be in force (``run``)."""
    without: tuple[str, ...]
    """Knobs that were left out of the profile."""
    earlier: str | None
    """Profile that was applied before one that is held, and is again when that ends."""
    confirm_by: float | None
    """CLOCK_BOOTTIME in seconds at which it goes back unless confirmed; None for never."""
    records: tuple[Record, ...]

    @property
    def settled(self) -> bool:
        return all(record.settled for record in self.records)

    @property
    def interrupted(self) -> bool:
        """Whether it is in force only while a process lives, or was while it was written."""
        return self.held or not self.settled

    def by_path(self) -> dict[str, Record]:
        return {record.path: record for record in self.records}

    def with_records(self, records: Iterable[Record]) -> Journal:
        return replace(self, records=tuple(records))


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was found on disk."""

    journal: Journal | None
    """What can be trusted of it; None where there is nothing."""
    damage: tuple[str, ...] = ()
    """One sentence per defect; empty for an intact or absent journal."""


def dump(journal: Journal) -> bytes:
    """The document of a journal."""
    about = {name: getattr(journal, name) for name in _HEADER}
    header = {"format": FORMAT, "boot": journal.boot_id, **about}
    # The boot id is in every line: a line must stand on its own when the header is lost.
    lines = [header, *({"boot": journal.boot_id, **asdict(r)} for r in journal.records)]
    body = b"".join(map(_line, lines))
    return body + _line({"end": len(journal.records), "crc": f"{zlib.crc32(body):08x}"})


def parse(data: bytes) -> Loaded:
    """Read a document back; whatever cannot be trusted is left out and said."""
    damage: list[str] = []
    header: dict[str, Any] | None = None
    records: list[Record] = []
    boots: set[str] = set()
    ended = False
    lines = data.split(b"\n")
    if lines.pop() != b"":
        damage.append("the last line is cut off")
    position = 0
    for number, line in enumerate(lines, start=1):
        fields = _fields(line)
        body = data[:position]
        position += len(line) + 1
        if fields is None:
            damage.append(f"line {number} is damaged")
        elif ended:
            damage.append(f"line {number} is after the end")
        elif "end" in fields:
            ended = True
            if fields != {"end": number - 2, "crc": f"{zlib.crc32(body):08x}"}:
                damage.append("the closing line does not fit the rest")
        elif "format" in fields:
            header = {"format": fields.pop("format"), **_about(fields)}
            boots.add(str(fields.get("boot")))
            wrong = [name for name in _HEADER if name in fields and name not in header]
            damage += [f"line {number}: {name} is not what it must be" for name in wrong]
        else:
            boots.add(str(fields.pop("boot", None)))
            record = _record(fields)
            if record is None:
                damage.append(f"line {number} is not a record of this version")
            else:
                records.append(record)
    if not ended:
        damage.append("the closing line is missing")
    if header is not None and header.get("format") != FORMAT:
        damage.append(f"format {header.get('format')} is not known to this version")
        return Loaded(None, tuple(damage))
    if header is None:
        damage.append("the header is missing")
    if len(boots) != 1:
        if boots:
            damage.append("lines of different boots are mixed")
        return Loaded(None, tuple(damage))
    about = {name: unsaid for name, (_, unsaid) in _HEADER.items()}
    about.update((name, value) for name, value in (header or {}).items() if name in about)
    about["without"] = tuple(about["without"])
    journal = Journal(boot_id=boots.pop(), **about, records=tuple(records))
    return Loaded(journal, tuple(damage))


def read_file(root: Root, path: str) -> Loaded:
    """What a journal file holds.  Raises OSError only where it exists and cannot be read."""
    try:
        data = root.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return Loaded(None)
    except IsADirectoryError:
        return Loaded(None, ("a directory is in its place",))
    if len(data) > MAX_BYTES:
        return Loaded(None, ("the file is far larger than any journal",))
    return parse(data)


def set_aside(root: Root, *paths: str) -> tuple[str, ...]:
    """Damaged journals that were set aside earlier and are still there."""
    return tuple(aside for path in paths for aside in root.glob(f"{path}.damaged-*"))


def load(root: Root, read: Callable[[str], Loaded] | None = None) -> Loaded:
    """What is in force in this boot.  Raises OSError; the copy is read only where it counts.

    ``read`` gives what a file holds, to whoever has read it already.
    """
    read = read or partial(read_file, root)
    runtime, boot = read(RUNTIME), boot_id(root)
    if runtime.journal and runtime.journal.boot_id == boot and not runtime.damage:
        return runtime
    return in_force(runtime, read(PERSISTENT), boot)


def in_force(runtime: Loaded, lasting: Loaded, boot: str | None) -> Loaded:
    """What counts in a boot of what the two places hold; values of an earlier one are gone.

    The copy speaks where the journal is lost or damaged.  Damage is told where it matters: not
    that of the copy beside a journal that is whole.
    """
    runtime, lasting = (
        Loaded(None) if each.journal and each.journal.boot_id != boot else each
        for each in (runtime, lasting)
    )
    if runtime.journal and not runtime.damage:
        return runtime
    if lasting.journal and not (lasting.damage and runtime.journal):
        return Loaded(lasting.journal, runtime.damage + lasting.damage)
    return Loaded(runtime.journal, runtime.damage or lasting.damage)


def left_unclean(lasting: Journal | None, boot: str | None) -> Journal | None:
    """What was in force when an earlier boot ended, with the records that are risky.

    None where there were none, or the end was a clean one: that reverts, and leaves no copy.
    """
    if lasting is None or lasting.boot_id == boot:
        return None
    risky = [r for r in lasting.records if r.knob in KNOBS and KNOBS[r.knob].risk != "safe"]
    return lasting.with_records(risky) if risky else None


@dataclass(frozen=True, slots=True)
class Found:
    """Both places and the lock as they are at one moment: whoever shows the state asks this."""

    boot: str | None
    runtime: Loaded
    lasting: Loaded
    aside: tuple[str, ...]
    """Damaged journals that were set aside."""
    holder: str | None
    """Who is changing the machine; None for nobody."""

    @property
    def journal(self) -> Journal | None:
        """What is in force."""
        return in_force(self.runtime, self.lasting, self.boot).journal

    @property
    def damaged(self) -> int:
        """Journals that are damaged, or were and are set aside."""
        return len(self.aside) + bool(self.runtime.damage) + bool(self.lasting.damage)

    @property
    def outdated(self) -> bool:
        """Whether the journal is of an earlier boot."""
        return self.runtime.journal is not None and self.runtime.journal.boot_id != self.boot

    @property
    def unclean(self) -> Journal | None:
        """What was in force when an earlier boot ended without warning, if it was risky."""
        return left_unclean(self.lasting.journal, self.boot)

    @property
    def state(self) -> str:
        """One of STATES."""
        journal = self.journal
        if self.damaged:
            return "degraded"
        if journal is None:
            return "idle"
        if self.holder is not None:
            return "running"
        return "interrupted" if journal.interrupted else "applied"


def find(root: Root) -> Found:
    """What both places hold.  Raises OSError where one cannot be read; takes no lock."""
    return Found(
        boot=boot_id(root),
        runtime=read_file(root, RUNTIME),
        lasting=read_file(root, PERSISTENT),
        aside=set_aside(root, RUNTIME, PERSISTENT),
        holder=root.lock_owner(LOCK),
    )


def _record(fields: dict[str, Any]) -> Record | None:
    """The record that a line's fields make, if they make one."""
    try:
        record = Record(**fields)
    except TypeError:
        return None
    texts = (record.knob, record.path, record.original)
    unsure = (record.ours, record.want)
    sound = (
        all(map(_is_text, texts))
        and all(text is None or _is_text(text) for text in unsure)
        and isinstance(record.settled, bool)
        and record.path.startswith("/")
        and "\0" not in record.path
        and ".." not in record.path.split("/")
    )
    return record if sound else None


def _is_text(value: object) -> bool:
    """Whether it is text; JSON can also name halves of characters, which no file has."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_time(value: object) -> bool:
    """Whether it is a number of seconds that a clock can show."""
    return isinstance(value, int | float) and 0 <= value < 2**40


_HEADER: Mapping[str, tuple[Callable[[Any], bool], Any]] = {
    "profile": (_is_text, "unknown"),
    "backend": (_is_text, "unknown"),
    "owner": (_is_text, "unknown"),
    "since": (_is_text, "unknown"),
    "held": (lambda value: isinstance(value, bool), False),
    "without": (lambda value: isinstance(value, list) and all(map(_is_text, value)), ()),
    "earlier": (lambda value: value is None or _is_text(value), None),
    "confirm_by": (lambda value: value is None or _is_time(value), None),
}
"""What the first line says beside the boot: what it must be, and what counts where it is not."""


def _about(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says, without what is not of its kind: a checksum is not a check."""
    return {
        name: value for name, value in fields.items() if name in _HEADER and _HEADER[name][0](value)
    }


def _line(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _fields(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    # Compared as text: "AB" for "ab" would be the same number and still a flipped byte.
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
