# SPDX-License-Identifier: Apache-2.0
"""Servers in the foreground: what ``infertune run`` leaves word of while it lasts.

One small file for each, of root's: a run of another user cannot write there, and is not told of.
Whether it still lasts is asked of its control group, which whoever sees no process of others sees.
"""

from __future__ import annotations

import contextlib
import json

from infertune.base.names import NAME
from infertune.base.records import asdict, dataclass
from infertune.base.root import Root
from infertune.host.cgroup import processes_of

RUNS = "/run/infertune/runs"
_MAX_FILES = 64
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Foreground:
    """A server, or a command, that ``infertune run`` has started."""

    profile: str
    pid: int
    group: str
    """Path of the control group that the process is in."""
    own: bool
    """Whether that group is its alone."""
    port: int | None
    """Where it answers on loopback; None where that is not known."""

    @property
    def name(self) -> str:
        """``run:PROFILE``; no other server can be called that."""
        return f"run:{self.profile}"


def note(root: Root, one: Foreground) -> None:
    """Leave word of a run; whoever may not, does not.  Words of runs that were killed go."""
    with contextlib.suppress(OSError):
        root.mkdir(RUNS)
        for file, each in _files(root):
            if each is None or not _lasts(root, each):
                with contextlib.suppress(OSError):  # of a directory, say
                    root.unlink(f"{RUNS}/{file}")
        root.replace(f"{RUNS}/{one.pid}.json", json.dumps(asdict(one)).encode())


def forget(root: Root, pid: int) -> None:
    """A run is over."""
    with contextlib.suppress(OSError):
        root.unlink(f"{RUNS}/{pid}.json")
        root.rmdir(RUNS)


def foreground(root: Root) -> tuple[Foreground, ...]:
    """Runs that last, one for each name.  Never raises."""
    found: dict[str, Foreground] = {}
    for _, each in _files(root):
        if each and _lasts(root, each):
            found.setdefault(each.name, each)
    return tuple(found.values())


def _files(root: Root) -> list[tuple[str, Foreground | None]]:
    files = [name for name in root.names(RUNS) if name.endswith(".json")][:_MAX_FILES]
    return [(name, _read(root, f"{RUNS}/{name}")) for name in files]


def _lasts(root: Root, one: Foreground) -> bool:
    return one.pid in processes_of(root, one.group)


def _read(root: Root, path: str) -> Foreground | None:
    """None for what is half written, or of another version."""
    try:
        data, _ = root.read_file(path, _MAX_BYTES)
        known = json.loads(data)
        profile, pid, group, port = (known[key] for key in ("profile", "pid", "group", "port"))
        if not NAME.fullmatch(profile) or type(pid) is not int or not _is_a_group(group):
            return None
        if port is not None and (type(port) is not int or not 0 < port < 65536):
            return None
        return Foreground(profile, pid, group, known["own"] is True, port)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_a_group(path: object) -> bool:
    if not isinstance(path, str) or not path.isprintable():  # no NUL, no half of a character
        return False
    return path.startswith("/sys/fs/cgroup/") and ".." not in path
