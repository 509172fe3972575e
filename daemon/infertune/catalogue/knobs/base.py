# SPDX-License-Identifier: Apache-2.0
"""What a knob is: one entry of data in a catalogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from infertune.base.records import dataclass
from infertune.catalogue.values import QosRequest, Value
from infertune.host.machine import Machine

Risk = Literal["safe", "power", "boot"]
"""power: may change heat, noise, or stability under load; boot: takes effect at the next boot."""

Time = Literal["now", "boot"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about the effect on inference, and who says so."""

    label: Literal["measured", "reported", "protective, unmeasured", "no effect found"]
    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting of the machine, as a catalogue entry."""

    id: str
    """Mirrors the kernel's own name; the key in a profile."""
    paths: tuple[str, ...]
    """Absolute paths; the first that exists is meant.  May hold ``*`` (one target each), ``{gpu}``
    (device directory of the inference GPU) or ``{ttm}`` (the TTM module that amdgpu holds)."""
    value: Value
    summary: str
    evidence: Evidence
    doc: str
    """Kernel document that defines it."""
    absent: str
    """What it means when the file is not there."""
    time: Time = "now"
    risk: Risk = "safe"
    choices_file: str | None = None
    """File beside it in which the kernel lists the words it accepts."""
    after: tuple[str, ...] = ()
    """Knobs that must be set before this one (and are restored after it)."""
    restore_after: tuple[str, ...] = ()
    """Knobs that must be restored before this one, where the reverse order would fail."""
    touches: tuple[str, ...] = ()
    """Knobs whose value the kernel may change when this one is written; restored with it."""
    locked_by: tuple[str, str] | None = None
    """A knob and a value: while that one has this value, this knob takes only the same word."""
    note: Callable[[Machine], str | None] = lambda _: None
    """Something to say out loud about this knob on this machine."""

    not_in_force: Callable[[Machine, str], str | None] = lambda _machine, _value: None
    """For a boot setting whose file holds the wanted value: why it is not in force all the same."""

    @property
    def while_open(self) -> bool:
        """Whether it is in force only while a process keeps the file open."""
        return isinstance(self.value, QosRequest)

    @property
    def family(self) -> str:
        return self.id.partition(".")[0]
