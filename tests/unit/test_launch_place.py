# SPDX-License-Identifier: Apache-2.0
"""Placement of a process: the cgroup on a recorded tree, the rest on a real child."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.root import Root, Step
from infertune.host.cgroup import Cgroup
from infertune.launch.place import Placed, place, why_no_group

V2 = Cgroup(version=2, mount="/sys/fs/cgroup", controllers=("cpuset", "cpu", "memory"))
NONE = Cgroup(version=1, mount=None, controllers=())
CHILD = 4242


class Kernel:
    """cgroup v2 as far as one group needs it: files that appear, and processes that move."""

    def __init__(self, base: Path, own: str, processes: set[int]) -> None:
        self.root = Root(base, hook=self.step)
        self.base = base
        self.own = f"/sys/fs/cgroup{own}"
        self.fail: dict[str, int] = {}
        self.put("/proc/self/cgroup", f"0::{own or '/'}\n")
        self.put(f"{self.own}/cgroup.controllers", "cpuset cpu memory pids\n")
        self.put(f"{self.own}/cgroup.subtree_control", "\n")
        self.put(f"{self.own}/cgroup.procs", "".join(f"{pid}\n" for pid in processes))

    def put(self, path: str, text: str) -> None:
        file = self.base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(self, path: str) -> str:
        return (self.base / path.lstrip("/")).read_text().strip()

    def step(self, step: Step) -> None:
        group, _, name = step.path.rpartition("/")
        if name in self.fail and step.action == "write":
            raise OSError(self.fail[name], os.strerror(self.fail[name]))
        if step.action == "mkdir":
            for file in ("cgroup.procs", "memory.min", "memory.swap.max", "cpu.weight"):
                self.put(f"{step.path}/{file}", "0\n")
            self.put(f"{step.path}/cgroup.procs", "")
            self.put(f"{step.path}/cpuset.cpus", "\n")
        if step.action == "rmdir":  # the kernel's own files do not keep a group
            for path in (self.base / step.path.lstrip("/")).iterdir():
                path.unlink()
        is_control = name == "cgroup.subtree_control" and step.action == "write"
        if is_control and group != "/sys/fs/cgroup" and self.read(f"{group}/cgroup.procs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if name == "cgroup.procs" and group != self.own:
            self.put(f"{self.own}/cgroup.procs", "")


def outcome(placed: tuple[Placed, ...], name: str) -> Placed:
    [one] = [each for each in placed if each.id == name]
    return one


SETTINGS = {"memory_min": "4294967296", "memory_swap_max": "0", "cpu_weight": "500"}


def test_whether_there_will_be_a_group_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Kernel(tmp_path, "/mine", {os.getpid()}).root
    assert why_no_group(root, V2, SETTINGS) is None
    assert why_no_group(root, NONE, SETTINGS) == "cgroup v2 is not what this system uses"
    assert why_no_group(root, V2, {"nice": "5"}) is not None
    monkeypatch.setattr(Root, "writable", lambda _, path: path != "/sys/fs/cgroup/mine")
    why = why_no_group(root, V2, SETTINGS)
    assert why == "no group of its own may be made here (Permission denied)"
    placed, group = place(root, V2, os.getpid(), SETTINGS, no_group=why)
    assert group is None
    assert {(each.outcome, each.why) for each in placed} == {("absent", why)}


def test_a_group_below_the_root_group(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "", {1, 2, os.getpid()})
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert [each.outcome for each in placed] == ["applied"] * 3
    assert group
    assert group.path == f"/sys/fs/cgroup/infertune-{CHILD}"
    assert kernel.read(f"{group.path}/memory.min") == "4294967296"
    assert kernel.read(f"{group.path}/cgroup.procs") == str(CHILD)
    assert kernel.read("/sys/fs/cgroup/cgroup.subtree_control") == "+cpu +memory"
    kernel.put(f"{group.path}/cgroup.procs", "")  # the child ends
    group.remove()
    assert not kernel.root.exists(group.path)
    assert kernel.read("/sys/fs/cgroup/cgroup.subtree_control") == "-cpu -memory"


def test_memory_min_holds_only_as_far_as_the_groups_above_grant_it(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "/a.slice/b.scope", {os.getpid()})
    kernel.put("/sys/fs/cgroup/a.slice/memory.min", "1048576\n")
    kernel.put("/sys/fs/cgroup/a.slice/b.scope/memory.min", "max\n".replace("max", "8589934592"))
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert group
    one = outcome(placed, "memory_min")
    assert (one.outcome, one.got) == ("clamped", "1048576")
    assert one.why
    assert "/sys/fs/cgroup/a.slice has memory.min 1048576" in one.why


def test_in_a_scope_of_our_own_we_make_room_by_moving_aside(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "/b.scope", {os.getpid(), CHILD})
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert group
    assert group.waiting_room == "/sys/fs/cgroup/b.scope/infertune-self"
    assert outcome(placed, "cpu_weight").outcome == "applied"
    kernel.put(f"{group.path}/cgroup.procs", "")
    group.remove()
    assert kernel.read("/sys/fs/cgroup/b.scope/cgroup.procs") == str(os.getpid())
    assert not kernel.root.exists(group.waiting_room)


def test_a_group_with_other_processes_gives_nothing_and_says_what_would(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "/session.scope", {os.getpid(), 77})
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert group is None
    assert {each.outcome for each in placed} == {"absent"}
    assert all("systemd-run --scope -p Delegate=yes" in (each.why or "") for each in placed)
    assert kernel.root.names(kernel.own) == [
        "cgroup.controllers",
        "cgroup.procs",
        "cgroup.subtree_control",
    ]


def test_a_rejected_value_names_the_errno_and_stops_nothing(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "", {1})
    kernel.fail["memory.swap.max"] = errno.EINVAL
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert group
    one = outcome(placed, "memory_swap_max")
    assert (one.outcome, one.why) == ("rejected", "EINVAL: Invalid argument")
    assert outcome(placed, "cpu_weight").outcome == "applied"


def test_a_process_that_may_not_be_moved(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "", {1})
    kernel.fail["cgroup.procs"] = errno.EACCES
    placed, group = place(kernel.root, V2, CHILD, SETTINGS)
    assert group is None
    assert "may not be moved (Permission denied)" in (placed[0].why or "")
    assert not kernel.root.exists(f"/sys/fs/cgroup/infertune-{CHILD}")


def test_groups_left_by_a_killed_infertune_go_away(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "", {1})
    kernel.put("/sys/fs/cgroup/infertune-11/cgroup.procs", "")
    kernel.put("/sys/fs/cgroup/infertune-12/cgroup.procs", "12\n")
    place(kernel.root, V2, CHILD, SETTINGS)
    names = kernel.root.names("/sys/fs/cgroup")
    assert "infertune-11" not in names
    assert "infertune-12" in names


@pytest.fixture
def child() -> Iterator[int]:
    """A process that waits to be placed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    yield pid
    os.close(write)
    os.waitpid(pid, 0)


def test_without_cgroups_the_process_is_given_what_it_can_be(child: int) -> None:
    cpu = max(os.sched_getaffinity(0))
    settings = {"cpus": str(cpu), "nice": "5", "memlock": "65536", "memory_min": "1"}
    placed, group = place(Root(), NONE, child, settings)
    assert group is None
    assert [each.outcome for each in placed] == ["applied", "applied", "applied", "absent"]
    assert os.sched_getaffinity(child) == {cpu}
    assert os.getpriority(os.PRIO_PROCESS, child) == 5
    limits = Path(f"/proc/{child}/limits").read_text()
    [locked] = [line for line in limits.splitlines() if line.startswith("Max locked memory")]
    assert locked.split()[3:5] == ["65536", "65536"]
    assert "cgroup v2 is not what this system uses" in (placed[3].why or "")


def test_a_cpu_that_is_not_there_is_rejected(child: int) -> None:
    placed, _ = place(Root(), NONE, child, {"cpus": "1000"})
    assert placed[0].outcome == "rejected"
    assert (placed[0].why or "").startswith("EINVAL")
