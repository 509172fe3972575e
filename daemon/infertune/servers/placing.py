# SPDX-License-Identifier: Apache-2.0
"""Gives the running processes of an adopted unit their OOM score and priority, or takes them back.

``placing NAME``, in a unit of its own (systemd/infertune-adopted@.service): it may reach into
processes of others, which the daemon may not.  What is wanted stands in the daemon's book; what was
found is kept beside it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

from infertune.base.errors import Exit, Failed, InfertuneError
from infertune.base.names import NAME
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.cgroup import cgroup, group_of, processes_below
from infertune.host.processes import started_ticks, threads
from infertune.launch.place import nice, oom_score_adj, set_nice, set_oom_score_adj
from infertune.servers.adopted import Adopted, read_book
from infertune.servers.running import group_of_adopted

DIRECTORY = "/run/infertune-adopted"
_MAX_BYTES = 1024 * 1024
_MAX_TASKS = 8192
"""Of one unit; a server has some hundred threads."""


@dataclass(frozen=True, slots=True)
class Task:
    """A process, or one of its threads: with the time of its start, which one it is."""

    id: int
    started: int
    setting: str
    """``oom_score_adj`` (of a process) or ``nice`` (of a thread)."""


READ: dict[str, Callable[[Root, int], int]] = {"oom_score_adj": oom_score_adj, "nice": nice}
WRITE: dict[str, Callable[[Root, int, int], None]] = {
    "oom_score_adj": set_oom_score_adj,
    "nice": set_nice,
}


def place(root: Root, name: str) -> tuple[int, int]:
    """Make the processes of an adopted unit what the book says.

    Returns how many values were set, and how many put back.  A task that is gone meanwhile is
    nobody's; a value that is neither ours nor the first one is somebody else's and stays.
    """
    adopted = read_book(root).units.get(name)
    wanted = dict(adopted.wanted.processes) if adopted else {}
    tasks = set(_tasks(root, adopted)) if adopted else set()
    known = _read(root, name)
    kept = {t: each for t, each in known.items() if t in tasks and wanted.get(t.setting) == each[1]}
    gone = {task: each for task, each in known.items() if task not in kept}
    back = sum(_change(root, task, ours, original) for task, (original, ours) in gone.items())
    new: dict[Task, tuple[int, int]] = {}
    for task in sorted(tasks - kept.keys(), key=lambda each: each.id):
        if adopted and task.setting in wanted:
            with contextlib.suppress(OSError):
                new[task] = (_original(root, task, adopted), wanted[task.setting])
    # What was found is on disk before the first is changed.
    _write(root, name, {**known, **new})
    done = sum(_change(root, task, *each) for task, each in new.items())
    _write(root, name, {**kept, **new})
    return done, back


def _original(root: Root, task: Task, adopted: Adopted) -> int:
    """What to go back to: what it is, or its unit's own value where it was started with ours."""
    now = READ[task.setting](root, task.id)
    started_with_ours = now == adopted.wanted.processes[task.setting]
    return adopted.unit_values.get(task.setting, now) if started_with_ours else now


def _change(root: Root, task: Task, before: int, after: int) -> int:
    """1 where a task was changed; it must still be the one, and have the value it had before."""
    with contextlib.suppress(OSError):
        if started_ticks(root, task.id) == task.started:
            now = READ[task.setting](root, task.id)
            if now == before and now != after:
                WRITE[task.setting](root, task.id, after)
                return 1
    return 0


def _tasks(root: Root, adopted: Adopted) -> Iterator[Task]:
    mount, group = cgroup(root).mount, group_of_adopted(root, adopted)
    if not mount or not group:
        return

    def started(task: int) -> int | None:
        """None too where the number is another's by now: whoever starts them can end them."""
        ticks, own = started_ticks(root, task), group_of(root, task)
        return ticks if own and f"{mount}{own}/".startswith(f"{group}/") else None

    left = _MAX_TASKS
    for pid in processes_below(root, group):
        if (ticks := started(pid)) is None:
            continue
        if (left := left - 1) <= 0:
            return
        yield Task(pid, ticks, "oom_score_adj")
        for tid in threads(root, pid):
            if left > 0 and (ticks := started(tid)) is not None:
                left -= 1
                yield Task(tid, ticks, "nice")


def _read(root: Root, name: str) -> dict[Task, tuple[int, int]]:
    path = f"{DIRECTORY}/{name}.json"
    try:
        data, _ = root.read_file(path, _MAX_BYTES)
        return {
            Task(int(each[0]), int(each[1]), str(each[2])): (int(each[3]), int(each[4]))
            for each in json.loads(data)
            if each[2] in READ
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Failed(f"{path}: cannot be read: {error}") from None


def _write(root: Root, name: str, found: dict[Task, tuple[int, int]]) -> None:
    path = f"{DIRECTORY}/{name}.json"
    rows = [[t.id, t.started, t.setting, *values] for t, values in found.items()]
    if rows:
        root.mkdir(DIRECTORY, 0o700)
        root.replace(path, json.dumps(rows).encode(), 0o600)
    else:
        root.unlink(path)


def main() -> int:
    """``placing NAME``."""
    if len(sys.argv) != 2 or not NAME.fullmatch(sys.argv[1]):
        print("placing: takes the name of an adopted server", file=sys.stderr)
        return Exit.USAGE
    try:
        done, back = place(Root("/"), sys.argv[1])
    except (InfertuneError, OSError) as error:
        print(f"<3>{error}", file=sys.stderr)
        return Exit.FAILED
    print(f"{sys.argv[1]}: {done} set, {back} put back")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
