# SPDX-License-Identifier: Apache-2.0
"""Whether model servers work.

Which servers are up is told by inotify: systemd makes a control group for a unit that starts and
removes it with its last process.  Only while one is up is the clock asked: every two seconds, how
much CPU time its group has used.  That works for any engine and for a container, and no server is
asked anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic

from infertune.base.records import dataclass, field
from infertune.base.root import Root
from infertune.host.cgroup import cpu_time_used
from infertune.servers.running import RUN, places, units
from infertune.service.demand import Demand
from infertune.service.inotify import Groups

LOOK_S = 2.0
"""Between two looks at servers that are up."""
_SETTLE_S = 0.2
"""From an event to its look: who makes groups without an end causes no more looks than that."""
_LEAST_S = 1.0
"""A look sooner than that after another says nothing of how busy a server is."""
_BUSY = 0.02
"""Share of one CPU from which a server works.  One that idles uses a few milliseconds for each
scrape of its metrics; one that answers from the GPU samples and launches on the CPU."""


class Load:
    """Whether servers work, from how much CPU time they have used.  Pure."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._seen: dict[str, tuple[float, int]] = {}
        self._worked: float | None = None

    def look(self, now: float, used: Mapping[str, int]) -> bool:
        """Take in the microseconds that each server which is up has used; whether they work.

        What a server had used when it was first seen says nothing of now.
        """
        for gone in self._seen.keys() - used.keys():
            del self._seen[gone]
        for name, microseconds in used.items():
            at, before = self._seen.get(name, (now, microseconds))
            if microseconds < before:  # it was started again
                before = 0
            passed = now - at
            if 0 < passed < _LEAST_S:
                continue
            if passed and microseconds - before >= _BUSY * 1e6 * passed:
                self._worked = now
            self._seen[name] = (now, microseconds)
        return self._worked is not None and now - self._worked < self._idle_s

    def next_look(self, now: float) -> float | None:
        """Seconds until there is something to see; None: not before a server comes up."""
        if self._seen:
            return LOOK_S
        left = 0.0 if self._worked is None else self._worked + self._idle_s - now
        return left if left > 0 else None


@dataclass(slots=True)
class _Watching:
    """What lasts as long as a demand is watched."""

    demand: Demand
    load: Load
    groups: Groups
    timer: asyncio.TimerHandle | None = field(default=None)


class Watch:
    """Says whether servers work, as long as somebody wants to know."""

    def __init__(self, root: Root, say: Callable[[bool], None]) -> None:
        """``say``: told after each look whether servers work."""
        self._root = root
        self._say = say
        self._watching: _Watching | None = None

    def follow(self, demand: Demand | None) -> None:
        """Watch for this demand, or not any more.  Raises OSError."""
        if (self._watching and self._watching.demand) == demand:
            return
        self.close()
        if demand is None:
            return
        groups = Groups()
        self._watching = _Watching(demand, Load(demand.idle_s), groups)
        self.look()

    def _heard(self) -> None:
        one = self._watching
        assert one is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(one.groups.fd)
        if one.timer:
            one.timer.cancel()
        one.timer = loop.call_later(_SETTLE_S, self.look)

    def look(self) -> None:
        """Look now: a group came or went, a unit was adopted, or it is time."""
        one = self._watching
        if one is None:
            return
        loop = asyncio.get_running_loop()
        one.groups.drain()
        one.groups.watch([self._root.at(each) for each in places(self._root)])
        loop.add_reader(one.groups.fd, self._heard)
        now = monotonic()
        working = one.load.look(now, used(self._root))
        if one.timer:
            one.timer.cancel()
        due = one.load.next_look(now)
        one.timer = None if due is None else loop.call_later(due, self.look)
        self._say(working)

    def close(self) -> None:
        """Watch no more."""
        one, self._watching = self._watching, None
        if one is None:
            return
        if one.timer:
            one.timer.cancel()
        asyncio.get_running_loop().remove_reader(one.groups.fd)
        one.groups.close()


def used(root: Root) -> dict[str, int]:
    """Microseconds of CPU time by server that is up; one in the foreground has its own profile."""
    own = (each for each in units(root) if each.server and each.name != RUN)
    found = {each.server: cpu_time_used(root, each.cgroup) for each in own}
    return {name: time for name, time in found.items() if time is not None}
