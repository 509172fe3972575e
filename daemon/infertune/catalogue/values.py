# SPDX-License-Identifier: Apache-2.0
"""Value types: how a setting is configured, read and written.

A value has three forms.  *Configured*: what a profile says (``true``,
``"1GiB"``).  *Canonical*: the text infertune compares, journals and prints
(``"1"``, ``"1048576"``).  *Raw*: the bytes of the kernel file
(``always [madvise] never``).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from infertune.base.records import dataclass
from infertune.base.units import parse_size
from infertune.host.machine import Machine


class Value(ABC):
    """How one kind of kernel value is configured, read and written."""

    unit_bytes: int | None = None
    """Of an amount of memory: the bytes of what its canonical form counts."""

    @abstractmethod
    def parse(self, configured: object, machine: Machine | None = None) -> str:
        """Canonical form of what a profile says.

        ``machine`` is needed for shares such as ``"1%"``; without it those are
        only checked.  Raises ValueError with a sentence that says what is right.
        """

    @abstractmethod
    def decode(self, raw: bytes) -> str:
        """Canonical form of what the kernel file says.  Raises ValueError if it makes no sense."""

    def encode(self, canonical: str, raw: bytes) -> str:
        """What to write so that the file, which now holds ``raw``, comes to mean ``canonical``."""
        del raw
        return canonical

    def satisfied(self, live: str, want: str) -> bool:
        """Whether a machine that says ``live`` already is what ``want`` asks for."""
        return live == want

    def choices(self, raw: bytes) -> tuple[str, ...] | None:
        """The words this kernel offers, where the file itself says so."""
        del raw
        return None

    @abstractmethod
    def accepts(self) -> str:
        """One phrase for documents and error messages: what may be configured."""


@dataclass(frozen=True)
class Choice(Value):
    """One word of a list; the kernel marks the chosen one with brackets, or writes only that."""

    words: tuple[str, ...]

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        if not isinstance(configured, str) or configured not in self.words:
            raise ValueError(f"{configured!r} is not one of {', '.join(self.words)}")
        return configured

    def decode(self, raw: bytes) -> str:
        text = raw.decode("utf-8", "replace").strip()
        marked = re.findall(r"\[([^\]]+)\]", text)
        if len(marked) == 1:
            return str(marked[0])
        if marked or len(text.split()) != 1:
            raise ValueError(f"'{text[:60]}' has no single chosen word")
        return text

    def choices(self, raw: bytes) -> tuple[str, ...] | None:
        text = raw.decode("utf-8", "replace")
        if "[" not in text:
            return None
        return tuple(word.strip("[]") for word in text.split())

    def accepts(self) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True)
class Integer(Value):
    """A whole number with bounds; ``unit`` is for people."""

    low: int
    high: int
    unit: str = ""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        if isinstance(configured, bool) or not isinstance(configured, int):
            raise ValueError(f"{configured!r} is not a whole number; {self.accepts()}")
        if not self.low <= configured <= self.high:
            raise ValueError(f"{configured} is out of range; {self.accepts()}")
        return str(configured)

    def decode(self, raw: bytes) -> str:
        # int() with base 10: procfs writes plain decimals, and "010" must not become 8.
        return str(int(raw.decode("ascii").strip(), 10))

    def accepts(self) -> str:
        return f"{self.low} to {self.high}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Size(Value):
    """An amount of memory, which the kernel counts in units of ``unit_bytes``."""

    unit_bytes: int
    low_bytes: int
    high_bytes: int
    unit: str
    step_bytes: int = 1
    """Shares are rounded down to multiples of this."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if not isinstance(configured, str):
            raise ValueError(f"{configured!r} is not a size; write '512MiB' or '2%'")
        if "%" in configured and machine is None:
            parse_size(configured, total=0)
            return configured
        total = machine.memory.total_bytes if machine else None
        size = parse_size(configured, total=total, step=self.step_bytes)
        if not self.low_bytes <= size <= self.high_bytes:
            raise ValueError(f"'{configured}' is out of range; {self.accepts()}")
        return str(size // self.unit_bytes)

    def decode(self, raw: bytes) -> str:
        return str(int(raw.decode("ascii").strip(), 10))

    def accepts(self) -> str:
        low, high = self.low_bytes // 2**20, self.high_bytes // 2**20
        return f"a size such as '512MiB' or '2%', {low} MiB to {high} MiB"


@dataclass(frozen=True)
class Switch(Value):
    """On or off; sysfs writes 1/0 (``Integer`` files) or Y/N (module parameters)."""

    on: str = "1"
    off: str = "0"

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        if not isinstance(configured, bool):
            raise ValueError(f"{configured!r} is not true or false")
        return self.on if configured else self.off

    def decode(self, raw: bytes) -> str:
        text = raw.decode("ascii").strip()
        if text not in (self.on, self.off):
            raise ValueError(f"'{text[:20]}' is neither {self.on} nor {self.off}")
        return text

    def accepts(self) -> str:
        return "true, false"


@dataclass(frozen=True)
class Table(Choice):
    """One entry of a numbered table whose current entry carries a star (pp_power_profile_mode).

    Entries stand in rows or in columns, depending on the GPU generation; around
    them are numbers of other kinds.  So only the known words count.
    """

    fixed: tuple[str, ...] = ()
    """Words that may be current but cannot be chosen by their number alone."""

    def _entries(self, raw: bytes) -> dict[str, tuple[int, bool]]:
        names = "|".join(map(re.escape, self.words + self.fixed))
        found = re.finditer(rf"(\d+)\s+({names})\b\s?(\*?)", raw.decode("utf-8", "replace"))
        return {match[2]: (int(match[1]), bool(match[3])) for match in found}

    def decode(self, raw: bytes) -> str:
        current = [name for name, (_, starred) in self._entries(raw).items() if starred]
        if len(current) != 1:
            raise ValueError("the table marks no single known entry as current")
        return current[0]

    def encode(self, canonical: str, raw: bytes) -> str:
        entries = self._entries(raw)
        if canonical not in entries:
            raise ValueError(f"the table has no entry {canonical}")
        return str(entries[canonical][0])

    def choices(self, raw: bytes) -> tuple[str, ...] | None:
        return tuple(name for name in self._entries(raw) if name not in self.fixed)


@dataclass(frozen=True)
class QosRequest(Integer):
    """A PM-QoS request: four bytes, in force as long as the file is open.

    Reading gives the limit that all requests together ask for
    (Documentation/power/pm_qos_interface.rst).
    """

    unit: str = "µs"

    def decode(self, raw: bytes) -> str:
        if len(raw) != 4:
            raise ValueError(f"{len(raw)} bytes instead of four")
        return str(int.from_bytes(raw, "little", signed=True))

    def satisfied(self, live: str, want: str) -> bool:
        # The file shows the strictest of all requests: a stricter one of somebody else will do.
        return int(live) <= int(want)

    def to_bytes(self, canonical: str) -> bytes:
        return int(canonical).to_bytes(4, "little", signed=True)
