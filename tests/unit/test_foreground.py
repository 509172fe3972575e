# SPDX-License-Identifier: Apache-2.0
"""A server of ``infertune run`` is one like the others while it lasts, and nothing afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infertune.base.records import asdict
from infertune.base.root import Root
from infertune.exporter.servers import asked
from infertune.servers import running
from infertune.servers.foreground import RUNS, Foreground, foreground, forget, note

GROUP = "/sys/fs/cgroup/user.slice/session-1.scope/infertune-77"
ONE = Foreground("long-context", 77, GROUP, True, 8080)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    files = {
        "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
        f"{GROUP}/cgroup.procs": "77\n78\n",
        "etc/infertune/servers.d/chat.toml": 'profile = "quiet"\nport = 8081\n',
    }
    for path, text in files.items():
        (tmp_path / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.lstrip("/")).write_text(text)
    return Root(tmp_path)


def procs(root: Root, text: str) -> None:
    root.at(f"{GROUP}/cgroup.procs").write_text(text)


def test_it_is_a_server_while_it_lasts(root: Root) -> None:
    note(root, ONE)
    assert foreground(root) == (ONE,)
    assert running.units(root) == (running.Unit("infertune run", "run:long-context", GROUP),)
    assert running.processes(root, running.units(root)) == dict.fromkeys(
        (77, 78), "run:long-context"
    )
    found = {name: each.port for name, each in asked(root).items()}
    assert found == {"chat": 8081, "run:long-context": 8080}
    forget(root, 77)
    assert running.units(root) == ()
    assert asked(root).keys() == {"chat"}
    assert not root.exists(RUNS)


def test_one_without_a_group_of_its_own_has_a_port_alone(root: Root) -> None:
    note(root, Foreground("quiet", 78, GROUP, False, 9000))
    assert running.units(root) == ()
    assert asked(root)["run:quiet"].port == 9000


def test_what_was_killed_left_nothing_that_counts(root: Root) -> None:
    note(root, ONE)
    procs(root, "")
    assert foreground(root) == ()
    procs(root, "90\n")
    later = Foreground("quiet", 90, GROUP, True, None)
    note(root, later)
    assert foreground(root) == (later,)
    assert root.names(RUNS) == ["90.json"], "and the next one takes it away"


def test_what_is_no_file_keeps_no_word_from_being_left(root: Root) -> None:
    root.at(f"{RUNS}/0.json").mkdir(parents=True)
    note(root, ONE)
    assert foreground(root) == (ONE,)


def test_two_under_one_profile_are_one_series(root: Root) -> None:
    note(root, ONE)
    note(root, Foreground("long-context", 78, GROUP, True, 8082))
    assert [each.port for each in foreground(root)] == [8080]


@pytest.mark.parametrize(
    "change",
    [
        {"profile": "../x"}, {"profile": 5}, {"pid": "77"}, {"pid": True}, {"port": 0},
        {"port": 2**40}, {"port": "80"}, {"group": "/etc"}, {"group": "/sys/fs/cgroup/../x"},
        {"group": "/sys/fs/cgroup/\0"}, {"group": "/sys/fs/cgroup/\ud800"},
        {"group": None},
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours(change: dict[str, object], root: Root) -> None:
    directory = root.at(RUNS)
    directory.mkdir(parents=True)
    (directory / "77.json").write_text(json.dumps({**asdict(ONE), **change}))
    assert foreground(root) == ()
    for text in ("", "[]", "{", "[" * 9999, "5"):
        (directory / "77.json").write_text(text)
        assert foreground(root) == ()
    for number in range(200):
        (directory / f"{number}.json").write_text(json.dumps(asdict(ONE)))
    assert len(foreground(root)) == 1


def test_who_may_not_write_there_runs_all_the_same(root: Root, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no directory")
    note(root, ONE)
    forget(root, 77)
    assert foreground(root) == ()
