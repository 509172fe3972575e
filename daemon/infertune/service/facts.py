# SPDX-License-Identifier: Apache-2.0
"""What the daemon knows of machine and profiles, for as long as that is true.

The hardware is read again after an event of a device, and each time where those are not watched.
What the kernel tells nobody of is read each time, and so are units, marks and names on the bus of
other tuners; names of processes, which tell of one that somebody started by hand, once in NAMES_S.
A profile is read again when a file it came from, or a directory where one could be that counts
before it, is not what it was (stat).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.machine import Machine, read_machine
from infertune.host.processes import comms
from infertune.profiles.profile import SEARCH_PATH, Profile, package_directory, read_profile

NAMES_S = 60.0
"""How long the names of processes count: a program without a unit is told of that much later."""

SETTLED_NS = 2_000_000_000
"""How old a file must be to be known by its times: two changes within one tick of the kernel's
clock look like one."""

MAX_PROFILES = 16

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A profile, and what its files and their directories look like from outside."""

    profile: Profile
    stamps: dict[str, Stamp | None]
    trusted: dict[str, Stamp | None]
    """The ways to them, of which only counts whose they are."""

    def holds(self) -> bool:
        return all(_stamp(path) == stamp for path, stamp in self.stamps.items()) and all(
            _owner(path) == owner for path, owner in self.trusted.items()
        )


class Facts:
    """The machine and its profiles, read as rarely as is right."""

    def __init__(
        self,
        root: Root,
        *,
        soon: Callable[[Callable[[], None]], object] | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``soon`` calls something when the present work is done; facts are the same until then.

        None where nobody can say when that is.
        """
        self._root = root
        self._soon = soon
        self._now_ns = now_ns
        self._watched = False
        self._hardware: Machine | None = None
        self._machine: Machine | None = None
        self._names: tuple[float, frozenset[str]] | None = None
        self._profiles: dict[str, _Known] = {}

    def watch(self) -> None:
        """From now on ``device_changed`` is called for every event of a device."""
        self._watched = True
        self.device_changed()

    def device_changed(self) -> None:
        """A CPU, a GPU, a module or another device came, went or changed."""
        self._hardware = self._machine = None

    def tuner_changed(self) -> None:
        """A program that sets the same knobs came to the bus or left it."""
        self._names = self._machine = None

    def machine(self) -> Machine:
        """The machine as it is now."""
        if self._machine is not None:
            return self._machine
        found = read_machine(self._root, self._hardware, self._running())
        self._hardware = found if self._watched else None
        if self._soon:
            self._machine = found
            self._soon(self._forget_the_moment)
        return found

    def _forget_the_moment(self) -> None:
        self._machine = None

    def _running(self) -> frozenset[str]:
        if self._names and self._watched and time.monotonic() - self._names[0] < NAMES_S:
            return self._names[1]
        names = comms(self._root)
        self._names = (time.monotonic(), names)
        return names

    def profile(self, name: str) -> Profile:
        """The profile of that name.  Raises what load_profile does."""
        known = self._profiles.get(name)
        if known and known.holds():
            return known.profile
        self._profiles.pop(name, None)
        begin_ns = self._now_ns()
        directories = [*map(str, map(self._root.at, SEARCH_PATH)), str(package_directory())]
        trusted = {path: _owner(path) for each in directories for path in _way_to(each)}
        profile, files = read_profile(self._root, name)
        stamps = {path: _stamp(path) for path in (*directories, *files)}
        # What changed after this began, or in the same tick of the kernel's clock, has a new time.
        if self._watched and all(max(s[-2:]) < begin_ns - SETTLED_NS for s in stamps.values() if s):
            if len(self._profiles) >= MAX_PROFILES:
                self._profiles.clear()
            self._profiles[name] = _Known(profile, stamps, trusted)
        return profile


def _stamp(path: str) -> Stamp | None:
    """What changes when a file or a directory does; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_size, *times)


def _owner(path: str) -> Stamp | None:
    """Which directory it is, and whose; entries of it come and go."""
    stamp = _stamp(path)
    return stamp and stamp[:4]


def _way_to(directory: str) -> list[str]:
    """The directories above one, where it really is."""
    path = os.path.realpath(directory)
    above = []
    while path != "/":
        path = os.path.dirname(path)
        above.append(path)
    return above
