# SPDX-License-Identifier: Apache-2.0
"""Two starts at once are never admitted for the same room, and a promise ends by itself."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf_files
from doctor_support import GPU, HEALTHY, build
from infertune.base.errors import UsageError
from infertune.base.records import replace
from infertune.base.root import Root, Step
from infertune.base.units import GIB
from infertune.budget.admission import Asked, admit, check, release
from infertune.host.machine import read_machine
from infertune.pools import promised
from infertune.pools.facts import read_facts
from infertune.pools.promised import (
    LOCK,
    OF_ROOT,
    OF_UNITS,
    reservations,
    reserve,
    sweep,
    with_reservations,
)
from known_models import KNOWN

BIG = next(model for model in KNOWN if model.name == "gpt-oss 120B")  # 59 GiB on 96
ROUNDS = 50


class WithProcesses(Root):
    """A recorded machine whose processes are this kernel's, so that they really live and die."""

    def get(self, path: str) -> str | None:
        real = path.startswith("/proc/") and path.split("/")[2].isdecimal()
        return Root("/").get(path) if real or path == "/proc/uptime" else super().get(path)


@pytest.fixture
def machine(tmp_path: Path) -> Root:
    return WithProcesses(build(tmp_path / "machine", HEALTHY).base)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("model") / "m.gguf"
    return str(gguf_files.write(where, BIG.metadata(), BIG.tensors()))


def asked(name: str, model: str, *, force: bool = False) -> Asked:
    settings = {"ctx_size": "8192", "parallel": "1", "gpu_layers": "999", "cache_ram": "0"}
    return Asked(
        name=name,
        model=model,
        backend="vulkan",
        settings=settings,
        pid=os.getpid(),
        force=force,
    )


def starting(root: Root, name: str, model: str, go: int) -> tuple[int, int]:
    """A process that starts a server when ``go`` says so, and stays; its id, and what it says."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        os.close(out)
        os.read(go, 1)
        try:
            admit(root, read_machine(root), asked(name, model))
            os.write(into, b"admitted")
        except UsageError as error:
            os.write(into, error.message.encode())
        signal.pause()
    finally:
        os._exit(1)


def said(descriptor: int) -> str:
    try:
        return os.read(descriptor, 65536).decode()
    finally:
        os.close(descriptor)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_two_at_once_and_room_for_one(machine: Root, model: str, thorough: bool) -> None:
    """One is admitted, the other is told who holds the room; each round after a kill -9."""
    for _ in range(ROUNDS if thorough else ROUNDS // 5):
        go, start = os.pipe()
        processes = [starting(machine, name, model, go) for name in ("chat", "code")]
        os.write(start, b"xx")
        answers = {pid: said(out) for pid, out in processes}
        admitted = [pid for pid, answer in answers.items() if answer == "admitted"]
        refused = [answer for answer in answers.values() if answer != "admitted"]
        for pid, _ in processes:
            end(pid)
        os.close(go)
        os.close(start)
        assert len(admitted) == 1, answers
        assert refused[0].startswith("does not fit now: GTT: ")
        assert f"(pid {admitted[0]}), which is loading" in refused[0]
        assert reservations(machine) == ()


def test_what_was_taken_is_no_longer_promised(machine: Root, model: str) -> None:
    admit(machine, read_machine(machine), asked("chat", model))
    before = _reserved(machine)
    assert before > 58 * GIB
    # Somebody else's allocation changes nothing about it; its own does.
    proc = machine.at("/sys/class/kfd/kfd/proc")
    for pid, gib in ((1, 7), (os.getpid(), 20)):
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "vram_1").write_text(f"{gib * GIB}\n")
    nodes = machine.at("/sys/class/kfd/kfd/topology/nodes")
    for node in nodes.iterdir():
        (node / "gpu_id").write_text("1\n")
    assert before - _reserved(machine) == 20 * GIB


def _reserved(root: Root) -> int:
    facts = read_facts(root, read_machine(root))
    return with_reservations(root, facts, "vulkan").reserved


def test_a_promise_ends_with_time_with_release_and_with_its_process(
    machine: Root, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = admit(machine, read_machine(machine), asked("chat", model))
    assert [each.name for each in reservations(machine)] == ["chat"]
    for later, counts in ((800, 1), (901, 0), (-5, 0)):
        uptime = float((Root("/").get("/proc/uptime") or "0").split()[0]) + later
        monkeypatch.setattr("infertune.pools.promised.uptime", lambda _, now=uptime: now)
        assert len(reservations(machine)) == counts
    monkeypatch.undo()
    release(machine, admission)
    assert reservations(machine) == ()
    # The same number is not the same process.
    reserve(machine, OF_ROOT, "chat", os.getpid(), gpu=1, host=1)
    path = machine.at(f"{OF_ROOT}/chat.json")
    path.write_text(path.read_text().replace('"started_ticks": ', '"started_ticks": 1'))
    assert reservations(machine) == ()


@pytest.mark.parametrize(
    ("unit", "uid", "believed"),
    [
        ("infertune-server@chat", os.getuid(), True),
        ("user@1000", os.getuid(), True),
        ("infertune-server@chat", 65534, True),  # as root sees it (systemd 257)
        ("user@1000", 65534, False),
        ("infertune-server@chat", 4711, False),
    ],
)
def test_whose_file_speaks_for_a_process(
    unit: str, uid: int, believed: bool, machine: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = f"/infertune.slice/{unit}.service"
    monkeypatch.setattr("infertune.pools.promised.group_of", lambda *_: group)
    assert promised._is_its_owner(machine, os.getpid(), uid) is believed


class Loading(WithProcesses):
    """An engine that takes 10 GiB each time somebody looks at anything of it."""

    taken = 0

    def get(self, path: str) -> str | None:
        if path == f"/proc/{os.getpid()}/statm":
            self.taken += 10 * GIB
            return f"0 {self.taken // 4096} 0"
        if path == "/proc/meminfo":
            return f"MemTotal: {128 * GIB // 1024} kB\nMemAvailable: {self.left() // 1024} kB\n"
        return super().get(path)

    def left(self) -> int:
        return 120 * GIB - self.taken


def test_what_is_taken_while_somebody_looks_is_not_free(machine: Root) -> None:
    """Nor what was free when the machine was read: a launcher may have waited since."""
    root = Loading(machine.base)
    reserve(root, OF_ROOT, "chat", os.getpid(), gpu=0, host=50 * GIB)
    facts = read_facts(root, read_machine(root))
    for _ in range(6):
        now = with_reservations(root, facts, "cpu")
        assert now.available is not None
        assert now.available - now.reserved_ram <= 70 * GIB


def test_several_that_are_loading_are_named_together(machine: Root, model: str) -> None:
    for name in ("chat", "code"):
        reserve(machine, OF_ROOT, name, os.getpid(), gpu=55 * GIB, host=0)
    with pytest.raises(UsageError) as refused:
        admit(machine, read_machine(machine), replace(asked("third", model), pid=os.getppid()))
    us = os.getpid()
    named = f"promised to server 'chat' (pid {us}) and server 'code' (pid {us}), which are loading"
    assert named in refused.value.message


class WithoutOthers(WithProcesses):
    """As a unit sees it (ProtectProc=invisible): no process of another user."""

    def get(self, path: str) -> str | None:
        return None if path.startswith("/proc/1/") else super().get(path)


def test_a_unit_believes_what_root_runs_and_sees_what_units_run(
    machine: Root, tmp_path: Path
) -> None:
    gone = os.fork()
    if not gone:
        signal.pause()
    for directory, name in ((OF_ROOT, "run-7"), (OF_UNITS, "chat")):
        assert reserve(machine, directory, name, gone, gpu=1, host=1)
    unit = WithoutOthers(machine.base)
    assert {each.name for each in reservations(unit)} == {"run-7", "chat"}
    end(gone)
    assert [each.name for each in reservations(unit)] == ["run-7"]
    assert reservations(machine) == ()
    sweep(machine, OF_ROOT)  # as the daemon does before a start
    assert reservations(unit) == ()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOSPC])
def test_without_a_lock_there_is_no_turn_and_still_a_judge(
    number: int, machine: Root, model: str
) -> None:
    def hook(step: Step) -> None:
        if step.action == "lock":
            raise OSError(number, os.strerror(number))

    root = WithProcesses(machine.base, hook=hook)
    assert admit(root, read_machine(root), asked("chat", model)).reserved


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"name": 1}', b"x" * 5000, b'{"pid": 1e999}', b"\0"]
)
def test_what_is_no_reservation_promises_nothing(content: bytes, machine: Root) -> None:
    directory = machine.at(OF_ROOT)
    directory.mkdir(parents=True)
    (directory / "x.json").write_bytes(content)
    os.mkfifo(directory / "y.json")
    assert reservations(machine) == ()


def test_as_many_as_are_looked_at_are_bounded(machine: Root) -> None:
    directory = machine.at(OF_ROOT)
    directory.mkdir(parents=True)
    reserve(machine, OF_ROOT, "chat", os.getpid(), gpu=1, host=1)
    text = (directory / "chat.json").read_text()
    for number in range(1000):
        (directory / f"z{number}.json").write_text(text)
    begin = time.process_time()
    assert len(reservations(machine)) == 64
    assert time.process_time() - begin < 5


def test_force_says_what_it_overrides(machine: Root, model: str) -> None:
    machine.at(f"{GPU}/mem_info_gtt_used").unlink()
    machine.at(f"{GPU}/mem_info_gtt_used").write_text(f"{70 * GIB}\n")
    on = read_machine(machine)
    with pytest.raises(UsageError, match=r"^does not fit now: GTT: .*70 GiB are in use"):
        check(machine, on, asked("chat", model))
    remark = admit(machine, on, asked("chat", model, force=True)).remark
    assert remark
    assert remark.startswith("--force overrides: does not fit now: GTT: ")


def test_a_lock_that_is_held_ends_patience_and_not_the_start(
    machine: Root, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infertune.budget.admission._PATIENCE_S", 0.1)
    with machine.turn(LOCK, 1) as alone:
        assert alone
        admission = admit(machine, read_machine(machine), asked("chat", model))
    assert admission.reserved


def test_a_stranger_cannot_hold_the_lock(machine: Root) -> None:
    with machine.turn(LOCK, 1):
        assert machine.at(LOCK).stat().st_mode & 0o777 == 0o600


def test_a_full_run_starts_without_a_promise(
    tmp_path: Path, model: str, fail_at: Callable[[str, int], Root]
) -> None:
    root = fail_at(str(build(tmp_path / "m", HEALTHY).base), 28)  # ENOSPC
    assert admit(root, read_machine(root), asked("chat", model)).reserved is None


@pytest.fixture
def fail_at() -> Callable[[str, int], Root]:
    def made(base: str, number: int) -> Root:
        def hook(step: object) -> None:
            if "json" in str(step):
                raise OSError(number, os.strerror(number), str(step))

        return WithProcesses(base, hook=hook)

    return made
