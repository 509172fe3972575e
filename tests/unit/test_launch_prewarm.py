# SPDX-License-Identifier: Apache-2.0
"""Reading a model ahead: in which order, in which steps, and when it leaves it.

The page cache is made up: a file of a test may lie where everything is in memory.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.cli.main import main
from infertune.host.devices import Disk, disk_of
from infertune.launch import prewarm as module
from infertune.launch import residency
from infertune.launch.prewarm import prewarm
from infertune.launch.process import start
from infertune.launch.residency import model_files
from support import GENEROUS_S

MIB = 2**20
GIB = 2**30
PIECE = 4 * MIB


class Kernel:
    """A machine of 16 GiB with one disk, and what it was asked to read."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.root = Root(base / "machine")
        self.asked: list[tuple[str, int, int]] = []
        self.cached = 0
        self.keeps = True
        self.look: Callable[[], None] = lambda: None
        """Runs after every piece."""
        self.paused = 0.0
        self.memory(8 * GIB)
        self.stalled(0)
        monkeypatch.setattr(module, "_LOOK", PIECE)
        monkeypatch.setattr(module, "resident", lambda _: self.cached)
        monkeypatch.setattr(module, "cachestat", self._cachestat)
        monkeypatch.setattr(os, "posix_fadvise", self._fadvise)
        monkeypatch.setattr(module.time, "sleep", self._sleep)

    def put(self, path: str, text: str) -> None:
        file = self.base / "machine" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def memory(self, available: int) -> None:
        text = f"MemTotal: {16 * 2**20} kB\nMemAvailable: {available // 1024} kB\n"
        self.put("/proc/meminfo", text)

    def stalled(self, microseconds: int) -> None:
        text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={microseconds}\n"
        self.put("/proc/pressure/memory", text)

    def disk(
        self, file: Path, *, rotating: bool, reading_ms: int = 0, ahead_kib: int = 128
    ) -> None:
        device = file.stat().st_dev
        queue = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue"
        self.put(f"{queue}/rotational", f"{int(rotating)}\n")
        self.put(f"{queue}/read_ahead_kb", f"{ahead_kib}\n")
        self.put(f"{os.path.dirname(queue)}/stat", f"100 0 800 {reading_ms} 0 0 0 0 0 5 5\n")

    def files(self, *sizes: int) -> list[str]:
        """A model of so many parts."""
        for number, size in enumerate(sizes, 1):
            name = f"m-{number:05}-of-{len(sizes):05}.gguf" if len(sizes) > 1 else "m.gguf"
            with (self.base / name).open("wb") as file:
                file.write(b"GGUF")
                file.truncate(size)
        found = model_files(str(next(iter(sorted(self.base.glob("*.gguf"))))))
        assert len(found) == len(sizes)
        return found

    def _fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), offset, length))
        self.cached += length

    def _cachestat(self, _fd: int, _offset: int, length: int) -> int:
        self.look()
        return length if self.keeps else length // 4

    def _sleep(self, seconds: float) -> None:
        self.paused += seconds


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_parts_are_read_one_after_the_other_and_whole(kernel: Kernel) -> None:
    files = kernel.files(5 * MIB, 9 * MIB, MIB)
    done = prewarm(kernel.root, files)
    assert (done.outcome, done.why) == ("read", None)
    assert done.bytes == done.read == done.after == 15 * MIB
    at: dict[str, int] = {}
    for name, offset, length in kernel.asked:
        assert at.get(name, 0) == offset
        at[name] = offset + length
    assert [(os.path.basename(each), os.stat(each).st_size) for each in files] == [*at.items()]


@pytest.mark.parametrize(
    ("ahead_kib", "step"),
    [(128, 128 * 1024), (8192, 4 * MIB), (0, 128 * 1024), (2048, 2 * MIB)],
)
def test_a_call_asks_for_no_more_than_the_kernel_reads(
    kernel: Kernel, ahead_kib: int, step: int
) -> None:
    [file] = kernel.files(6 * MIB)
    kernel.disk(Path(file), rotating=False, ahead_kib=ahead_kib)
    prewarm(kernel.root, [file])
    assert max(length for _, _, length in kernel.asked) == step


def test_what_is_in_memory_is_not_read(kernel: Kernel) -> None:
    kernel.cached = 99 * MIB
    done = prewarm(kernel.root, kernel.files(100 * MIB))
    assert (done.outcome, done.read, kernel.asked) == ("resident", 0, [])


def test_what_does_not_fit_beside_the_reserve_is_not_begun(kernel: Kernel) -> None:
    files = kernel.files(100 * MIB)
    kernel.memory(GIB + 100 * MIB - 4096)  # a sixteenth of 16 GiB is left alone
    done = prewarm(kernel.root, files)
    assert (done.outcome, kernel.asked) == ("skipped", [])
    assert "do not fit" in (done.why or "")
    # A part of it fits, if that is all that is asked for.
    done = prewarm(kernel.root, files, most=50 * MIB)
    assert (done.outcome, done.read) == ("read", 50 * MIB)
    assert "50 MiB" in (done.why or "")


def test_an_engine_that_copies_needs_the_room_twice(kernel: Kernel) -> None:
    files = kernel.files(100 * MIB)
    kernel.memory(GIB + 199 * MIB)
    done = prewarm(kernel.root, files, copied=True)
    assert (done.outcome, kernel.asked) == ("skipped", [])
    assert "engine's own copy" in (done.why or "")
    assert prewarm(kernel.root, files, copied=True, always=True).outcome == "read"


def test_memory_that_gets_short_on_the_way_ends_it(kernel: Kernel) -> None:
    files = kernel.files(3 * PIECE)
    kernel.look = lambda: kernel.memory(GIB)
    done = prewarm(kernel.root, files)
    assert (done.outcome, done.read) == ("stopped", PIECE)
    assert "do not fit" in (done.why or "")
    assert 5 < kernel.paused < 20, "it is patient, and not for ever"


def test_stalls_are_waited_out(kernel: Kernel) -> None:
    files = kernel.files(3 * PIECE)
    stalls = iter([0, 10**9, 10**9, 10**9])
    kernel.look = lambda: kernel.stalled(next(stalls))
    done = prewarm(kernel.root, files)
    assert (done.outcome, done.read) == ("read", 3 * PIECE)
    assert 0 < kernel.paused < 1


def test_stalls_that_go_on_end_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    files = kernel.files(3 * PIECE)
    stalled = [0]

    def sleep(seconds: float) -> None:
        stalled[0] += 10**9
        kernel.stalled(stalled[0])

    kernel.look = lambda: sleep(0)
    monkeypatch.setattr(module.time, "sleep", sleep)
    done = prewarm(kernel.root, files)
    assert (done.outcome, done.read) == ("stopped", PIECE)
    assert "waits for memory" in (done.why or "")


def test_a_kernel_that_keeps_nothing_is_not_asked_for_more(kernel: Kernel) -> None:
    kernel.keeps = False
    done = prewarm(kernel.root, kernel.files(3 * PIECE))
    assert (done.outcome, done.read) == ("stopped", 0)
    assert "no memory for more" in (done.why or "")
    assert sum(length for _, _, length in kernel.asked) == PIECE


@pytest.mark.parametrize(
    ("rotating", "busy_ms", "always", "outcome"),
    [
        (True, 150, False, "skipped"),
        (True, 150, True, "read"),
        (True, 10, False, "read"),
        (False, 150, False, "read"),
    ],
)
def test_a_disk_that_turns_is_left_to_who_reads_from_it(
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    rotating: bool,
    busy_ms: int,
    always: bool,
    outcome: str,
) -> None:
    [file] = kernel.files(MIB)
    kernel.disk(Path(file), rotating=rotating)
    later = lambda _: kernel.disk(Path(file), rotating=rotating, reading_ms=busy_ms)  # noqa: E731
    monkeypatch.setattr(module.time, "sleep", later)
    assert prewarm(kernel.root, [file], always=always).outcome == outcome


def test_what_is_not_known_is_not_held_against_it(kernel: Kernel) -> None:
    for path in ("proc/meminfo", "proc/pressure/memory"):
        (kernel.base / "machine" / path).unlink()
    assert prewarm(kernel.root, kernel.files(2 * PIECE)).outcome == "read"


def test_nobody_waits_for_it_and_the_server_is_not_its_parent(tmp_path: Path) -> None:
    """In the process that becomes the server; what came of it is in the server's output."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + bytes(MIB))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # It comes to an end only after the server has begun.
    paths = [str(model)]
    slow = lambda: (gate.read_bytes(), prewarm(Root("/"), paths))[1]  # noqa: E731
    done = tmp_path / "done"
    look = "read some < /proc/$$/task/$$/children; echo children: $some"
    script = f"{look}; echo x > {gate}; while [ ! -e {done} ]; do sleep 0.05; done"
    child = start(
        ("/bin/sh", "-c", script),
        {"PATH": os.environ["PATH"]},
        lambda _: None,
        capture=True,
        before=lambda: module.apart(slow),
        keep=module.LINE,
    )
    assert child.tail
    end = time.monotonic() + GENEROUS_S
    while not child.tail.kept and time.monotonic() < end:
        time.sleep(0.02)
    done.touch()
    assert child.wait() == 0
    assert "children:" in child.last_lines()
    [line] = child.tail.kept
    assert re.match(r"prewarm: (read|resident): ", line)
    assert "after 100 %" in line


def test_a_file_that_is_gone_is_no_harm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module._report(lambda: prewarm(Root("/"), [str(tmp_path / "none")]))
    assert capfd.readouterr().out == "prewarm: left out: No such file or directory\n"


@pytest.mark.parametrize(
    ("settings", "backend", "comes_to"),
    [
        ({}, "cpu", None),
        ({"prewarm": "off"}, "cpu", None),
        ({"prewarm": "auto"}, "cpu", (False, False)),
        ({"prewarm": "auto", "load_mode": "mmap"}, "cpu", (False, False)),
        ({"prewarm": "auto", "load_mode": "none"}, "cpu", "load_mode none"),
        ({"prewarm": "auto", "load_mode": "none"}, "vulkan", (True, False)),
        ({"prewarm": "on", "load_mode": "none"}, "cpu", (False, True)),
        ({"prewarm": "auto"}, "vulkan", (True, False)),
        ({"prewarm": "on"}, "rocm", (True, True)),
        ({"prewarm": "on", "load_mode": "dio"}, "cpu", "load_mode dio"),
    ],
)
def test_what_a_server_asks_for(
    tmp_path: Path, settings: dict[str, str], backend: str, comes_to: tuple[bool, bool] | str | None
) -> None:
    model = str(tmp_path / "m.gguf")
    said: list[str] = []
    found = module.for_server(Root("/"), model, settings, backend, said.append)
    if isinstance(comes_to, tuple):
        work = found.args[0]  # type: ignore[union-attr]
        assert work.args[1:] == ([model],)
        assert (work.keywords["copied"], work.keywords["always"]) == comes_to
        assert said == []
    else:
        assert found is None
        assert [comes_to in each for each in said] == ([True] if comes_to else [])


def test_a_router_and_the_files_beside_a_model(tmp_path: Path) -> None:
    said: list[str] = []
    assert module.for_server(Root("/"), None, {"prewarm": "auto"}, "cpu", said.append) is None
    assert "router" in said[0]
    settings = {"prewarm": "auto", "mmproj": "/m/p.gguf"}
    found = module.for_server(Root("/"), "/m/m.gguf", settings, "cpu", said.append)
    assert found.args[0].args[1] == ["/m/m.gguf", "/m/p.gguf"]  # type: ignore[union-attr]


def test_a_partition_has_the_queue_of_its_disk(tmp_path: Path) -> None:
    disk = tmp_path / "sys/devices/pci/sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "sda1").mkdir()
    (disk / "queue/rotational").write_text("1\n")
    (disk / "queue/read_ahead_kb").write_text("512\n")
    (disk / "stat").write_text("9 0 9 77 0 0 0 0 0 0 0\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/8:1").symlink_to("../../devices/pci/sda/sda1")
    assert disk_of(Root(tmp_path), os.makedev(8, 1)) == Disk(True, 512, 77)
    assert disk_of(Root(tmp_path), os.makedev(8, 2)) is None


def test_a_virtio_disk_is_not_believed_that_it_turns(tmp_path: Path) -> None:
    for name, number in (("vda", 1), ("sdb", 2)):
        disk = tmp_path / f"sys/devices/{name}/queue"
        disk.mkdir(parents=True)
        (disk / "rotational").write_text("1\n")
        (tmp_path / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"sys/dev/block/254:{number}").symlink_to(f"../../devices/{name}")
    root = Root(tmp_path)
    assert disk_of(root, os.makedev(254, 1)) == Disk(False, None, None)
    assert disk_of(root, os.makedev(254, 2)) == Disk(True, None, None)


def test_the_verb(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = kernel.files(5 * MIB, 9 * MIB)
    assert main(["prewarm", first, "--max", "6MiB"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"14 MiB +0 % +43 % +6 MiB", out), out
    assert "no more than 6 MiB" in out
    kernel.cached = 0
    assert main(["prewarm", first, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "infertune.prewarm/1"
    [model] = document["models"]
    assert model["files"] == [first, second]
    assert (model["bytes"], model["read"], model["outcome"]) == (14 * MIB, 14 * MIB, "read")
    monkeypatch.setattr(module, "_no_room", lambda *_: "no room")
    kernel.cached = 0
    assert main(["prewarm", first]) == 1
    assert "no room" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"GGU", b"#!/bin/sh\n"])
def test_the_verb_reads_models_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert main(["prewarm", str(tmp_path / "x.gguf")]) == 2
    assert "not a GGUF file" in capsys.readouterr().err
    assert main(["prewarm", str(tmp_path / "missing.gguf")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["--root", str(tmp_path), "prewarm", "x"]) == 2
    assert "this machine only" in capsys.readouterr().err


def test_a_kernel_that_does_not_tell_is_not_taken_for_one_that_says_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.5, or where a unit does not let it; mincore(2) says yes of files of others."""
    (tmp_path / "m.gguf").write_bytes(bytes(100_000))
    monkeypatch.setattr(residency, "cachestat", lambda _: None)
    assert residency.resident([str(tmp_path / "m.gguf")]) == 100_000
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert residency.resident([str(tmp_path / "m.gguf")]) is None
