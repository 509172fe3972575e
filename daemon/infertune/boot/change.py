# SPDX-License-Identifier: Apache-2.0
"""What staging does on one machine, as values: nothing of it has happened yet.

A change has two parts.  ``trial`` is written at stage, beside the entry that the loader starts by
default, and is started once; ``lasting`` is what the default gets after confirmation.  Where no
loader can start something once, ``trial`` is empty and ``lasting`` is written at stage, for the
guard to put back.
"""

from __future__ import annotations

from typing import Literal

from infertune.base.records import dataclass
from infertune.boot.options import Option

Words = tuple[str, ...]
"""Words of a kernel command line."""

Enforcer = Literal["loader", "guard", "nobody"]
"""Who sees to it that a change is tried once.  loader: the boot loader itself starts it once, and
what it starts after that is clean.  guard: a unit early in the boot puts it back, so the kernel
must get that far.  nobody: what is done by hand."""

AT_THE_TRY: Words = ("panic=30", "rd.shell=0", "rd.emergency=reboot")
"""Beside the options at the one boot that tries them: what stops there reboots by itself.

A kernel that panics waits for ever by default; ``panic`` is seconds until it reboots, and
initramfs-tools takes it for its own shell, too (kernel-parameters.txt, initramfs-tools(7)).  The
others are dracut's (dracut.cmdline(7)).
"""


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file of ours, whole: nobody else writes to it, and it goes when the change goes."""

    path: str
    data: bytes
    mode: int = 0o644
    """For a file that is not there yet; an existing one keeps its own."""
    briefly: bool = False
    """Needed only while the images of the same part are built."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Words added to somebody else's file, and taken out of it again wherever they are by then."""

    path: str
    place: str
    """Where in the file: an id of boot/words.py."""
    words: Words
    base: str = ""
    """What a file that is not there yet starts with."""
    briefly: bool = False
    """As in NewFile."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Files which may hold the words by the time they are taken out: entries made meanwhile."""

    pattern: str
    place: str


@dataclass(frozen=True, slots=True)
class Shelter:
    """Commands that make the kept image the loader's default, and that make it so no longer."""

    on: tuple[str, ...]
    off: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """What a boot loader starts and a tool of the distribution builds: an initramfs or a UKI.

    The tool may write it in place, for minutes, so a copy of the old one lies beside it until the
    new one is confirmed (see boot/images.py).
    """

    path: str
    kind: Literal["initramfs", "uki"]
    build: tuple[str, ...]
    """The tool, as it is run to build this image."""
    holds: tuple[str, ...]
    """What has to be in it afterwards: names of files in an initramfs, words of a UKI."""
    look: tuple[str, ...] = ()
    """What lists an initramfs; empty: it cannot be looked into."""
    trial: str = ""
    """Where the new one lies until it is confirmed; empty: at ``path``, the old one beside it."""
    shelter: Shelter | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A program of the system to run after files and images are written."""

    argv: tuple[str, ...]
    why: str
    undo: tuple[str, ...] = ()
    """What takes it back, after the files are; empty for nothing."""
    confirm: tuple[str, ...] = ()
    """What makes it last, once the machine has booted with it."""
    makes: str = ""
    """A file without which there is nothing to take back; empty: that is not known."""
    touches: tuple[str, ...] = ()
    """Files it edits or makes, as patterns: what was there is kept."""
    rewrites: tuple[str, ...] = ()
    """Images that it builds anew, as patterns: there must be room for the largest."""


@dataclass(frozen=True, slots=True)
class Part:
    """Files, edits, images and commands, in the order in which they are done."""

    files: tuple[NewFile, ...] = ()
    edits: tuple[Edit, ...] = ()
    images: tuple[Image, ...] = ()
    commands: tuple[Command, ...] = ()

    @property
    def texts(self) -> tuple[NewFile | Edit, ...]:
        """What is written as text."""
        return (*self.files, *self.edits)

    def __bool__(self) -> bool:
        return bool(self.files or self.edits or self.images or self.commands)

    def __add__(self, other: Part) -> Part:
        return Part(
            self.files + other.files,
            self.edits + other.edits,
            self.images + other.images,
            self.commands + other.commands,
        )


NO_PART = Part()


@dataclass(frozen=True, slots=True)
class Way:
    """How one machine takes words on its kernel's command line."""

    lasting: Part = NO_PART
    trial: Part = NO_PART
    one_try: Enforcer = "guard"
    rescue: str = ""
    """What brings back a machine that does not boot with them."""
    sweeps: tuple[Sweep, ...] = ()
    manual: tuple[str, ...] = ()
    """What a person has to do instead, with the exact lines."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that staging does on one machine."""

    stack: str | None
    evidence: tuple[str, ...] = ()
    """Why it is taken for that boot stack."""
    options: tuple[Option, ...] = ()
    words: Words = ()
    lasting: Part = NO_PART
    trial: Part = NO_PART
    one_try: Enforcer = "guard"
    rescue: str = ""
    sweeps: tuple[Sweep, ...] = ()
    manual: tuple[str, ...] = ()
    by_hand: tuple[Option, ...] = ()
    """Options that only a person can set here."""
    notes: tuple[str, ...] = ()

    @property
    def now(self) -> Part:
        """What is done at stage."""
        return self.trial or self.lasting


def by_hand(instruction: str, notes: tuple[str, ...] = ()) -> Way:
    """A way that a person has to go."""
    return Way(one_try="nobody", manual=(instruction,), notes=notes)
