# SPDX-License-Identifier: Apache-2.0
"""What others may write where infertune reads costs nobody an answer, a device or a terminal."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import gguf_files
from doctor_support import HEALTHY, build
from infertune import launcher
from infertune.base.errors import Failed, UsageError
from infertune.base.root import Root, Step
from infertune.base.units import GIB, format_size
from infertune.budget.admission import Admission, Asked, admit, release, turn
from infertune.cli import serve
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.processes import process
from infertune.host.redaction import reduce_file
from infertune.host.servers import read_servers
from infertune.launch.client import chat, complete, how_to_talk
from infertune.pools.facts import read_facts
from infertune.pools.promised import (
    LOCK,
    OF_ROOT,
    OF_UNITS,
    reservations,
    reserve,
    with_reservations,
)
from infertune.server_files.block_yaml import NotUnderstood, load
from infertune.server_files.command_line import parse
from infertune.server_files.formats import preset
from known_models import KNOWN

# -- files that are not what they seem ---------------------------------------------------


@pytest.fixture
def guarded_fifo(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """A FIFO, and whether anybody has opened it: its writer waits for that, and no longer."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened = threading.Event()

    def write() -> None:
        os.close(os.open(fifo, os.O_WRONLY))
        opened.set()

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    yield fifo, lambda: opened.wait(0.1)
    os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    writer.join()


@pytest.mark.parametrize("how", ["small", "file"])
def test_what_is_no_file_is_never_opened(
    how: str, guarded_fifo: tuple[Path, Callable[[], bool]]
) -> None:
    """To open /dev/watchdog is enough to have the machine restart."""
    fifo, was_opened = guarded_fifo
    root = Root(fifo.parent)
    (fifo.parent / "link").symlink_to("fifo")
    with pytest.raises(OSError, match="not a regular file"):
        root.read_small("/link", 100) if how == "small" else root.read_file("/fifo", 100)
    assert not was_opened()


def test_files_are_read_where_proc_is_not_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infertune.base.root._DESCRIPTORS", "/not-there")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert Root(tmp_path).read_small("/link", 10) == "x"
    with pytest.raises(OSError, match="symbolic links"):
        Root(tmp_path).read_file("/link", 10)


def test_a_compose_file_that_is_a_link_to_a_device_is_not_opened(
    tmp_path: Path, guarded_fifo: tuple[Path, Callable[[], bool]]
) -> None:
    fifo, was_opened = guarded_fifo
    root = build(tmp_path / "machine", HEALTHY)
    home = root.at("/home/u")
    home.mkdir(parents=True)
    (home / "compose.yaml").symlink_to(fifo)
    assert "/home/u/compose.yaml" not in [server.path for server in read_servers(root)]
    assert not was_opened()


# -- files that start servers, in a home of anybody's --------------------------------------

UNIT = "/home/u/.config/systemd/user/a.service"
ENTRIES = ", ".join(f"k{number}: v" for number in range(12_000))
HOSTILE: dict[str, dict[str, str]] = {
    "anchors": {"/home/u/compose.yaml": f"services: {'&a ' * 3000}x\n"},
    "podman": {UNIT: f"[Service]\nExecStart={'podman exec x ' * 1100}ollama\n"},
    "toolbox": {UNIT: f"[Service]\nExecStart={'toolbox ' * 1900}ollama\n"},
    "merge": {
        "/home/u/compose.yaml": f"x: &a {{{ENTRIES}}}\nservices:\n"
        + "".join(f" s{number}:\n  <<: *a\n" for number in range(2000))
    },
    "preset": {
        UNIT: "[Service]\nExecStart=llama-server --models-preset /home/u/p.ini\n",
        "/home/u/p.ini": "[*]\n" + "k=1\n" * 8000 + "[a]\n" * 30_000,
    },
    "macro": {
        UNIT: "[Service]\nExecStart=llama-swap --config /home/u/c.yaml\n",
        "/home/u/c.yaml": f"macros:\n  a: {'x' * 150_000}\n"
        f"models:\n  m:\n    cmd: {'${a}' * 4000}\n",
    },
    "alias": {
        "/home/u/compose.yaml": f"x: &a [{', '.join(['-a'] * 30_000)}]\nservices:\n"
        + "".join(f" s{number}:\n  image: llama.cpp\n  command: *a\n" for number in range(1500))
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_users_files_hide_nobody_elses(name: str, tmp_path: Path) -> None:
    good = {"/etc/systemd/system/good.service": "[Service]\nExecStart=llama-server -m m.gguf\n"}
    root = build(tmp_path, HEALTHY, {**good, **HOSTILE[name]})
    began = time.process_time()
    found = read_servers(root)
    assert "/etc/systemd/system/good.service" in [server.path for server in found]
    assert time.process_time() - began < 4  # the preset took 38 s, the aliases 15


@pytest.mark.parametrize("name", ["merge", "macro", "preset"])
def test_one_users_files_take_little_memory(name: str) -> None:
    """They took 800 MiB, 600 MiB and more than 3 GiB."""
    path = next(path for path in HOSTILE[name] if path != UNIT)
    child = os.fork()
    if child == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 1024**2,) * 2)
        try:
            reduce_file(path, HOSTILE[name][path].encode())
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_preset_of_thousands_of_lines_is_not_taken_apart() -> None:
    with pytest.raises(NotUnderstood, match="more than 5000 lines"):
        preset("[a]\n" + "k=1\n" * 5000)


def test_thousands_of_anchors_are_not_followed() -> None:
    with pytest.raises(NotUnderstood, match="nested more than"):
        load("a: " + "&a " * 3000 + "x")


def test_a_wildcard_of_a_users_unit_does_not_walk_the_machine(tmp_path: Path) -> None:
    asked: list[str] = []

    class Watched(Root):
        def glob(self, pattern: str) -> list[str]:
            asked.append(pattern)
            return super().glob(pattern)

    lines = "".join(
        f"EnvironmentFile={pattern}\n" for pattern in ("/**/*.env", "/*/*/*/x.env", "/srv/l*.env")
    )
    build(
        tmp_path,
        HEALTHY,
        {
            UNIT: f"[Service]\nExecStart=llama-server $LLAMA_OPTS\n{lines}",
            "/srv/llama.env": "LLAMA_OPTS=--mlock\n",
            "/srv/other/x.env": "LLAMA_OPTS=--no-mmap\n",
        },
    )
    [server] = [each for each in read_servers(Watched(tmp_path)) if each.path == UNIT]
    assert server.flags == {"--mlock": ""}
    assert not [pattern for pattern in asked if "env" in pattern]


# -- reservations that a server has written -------------------------------------------------


class WithProcesses(Root):
    """A recorded machine whose processes are this kernel's."""

    def get(self, path: str) -> str | None:
        real = path.startswith("/proc/") and path.split("/")[2].isdecimal()
        return Root("/").get(path) if real or path == "/proc/uptime" else super().get(path)


@pytest.fixture
def machine(tmp_path: Path) -> Root:
    return WithProcesses(build(tmp_path / "machine", HEALTHY).base)


def written(root: Root, directory: str, **changed: object) -> Path:
    """A reservation of this very process, with some of it changed."""
    path = reserve(root, directory, "chat", os.getpid(), gpu=GIB, host=GIB)
    assert path
    file = root.at(path)
    text = json.dumps({**json.loads(file.read_text()), **changed})
    file.write_text(text.replace('"1e999"', "1e999"))
    return file


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": "1e999"},
        {"gpu": "1e999"},
        {"gpu": 10**3500},
        {"host": -1},
        {"gpu": True},
        {"gpu": 1.5},
        {"since": 10**3000},
        {"since": "NaN"},
        {"started_ticks": None},
        {"name": ["x"] * 2000},
    ],
    ids=str,
)
def test_a_hostile_reservation_promises_nothing(changed: dict[str, object], machine: Root) -> None:
    written(machine, OF_UNITS, **changed)
    facts = with_reservations(machine, read_facts(machine, read_machine(machine)), "vulkan")
    assert format_size(facts.reserved) == "0 B"


def test_its_name_drives_no_terminal(machine: Root) -> None:
    written(machine, OF_UNITS, name="a\n<0>kernel: \x1b[2J\u202e" + "x" * 2000)
    [one] = reservations(machine)
    assert one.who.isprintable()
    assert len(one.name) <= 64


def test_a_server_speaks_for_no_process_but_its_users(
    machine: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(machine, OF_UNITS)
    assert len(reservations(machine)) == 1
    monkeypatch.setattr("infertune.pools.promised.user_of", lambda *_: 61184)
    assert reservations(machine) == ()


def test_a_link_is_no_reservation(machine: Root) -> None:
    file = written(machine, OF_UNITS)
    file.rename(machine.at("/run/elsewhere"))
    file.symlink_to(machine.at("/run/elsewhere"))
    assert reservations(machine) == ()


@pytest.mark.parametrize(("directory", "believed"), [(OF_ROOT, 1), (OF_UNITS, 0)])
def test_who_cannot_see_roots_processes_still_sees_its_own(
    directory: str, believed: int, machine: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a unit, a server that was killed while it loaded keeps no other from its room."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert reserve(machine, directory, "chat", child.pid, gpu=GIB, host=GIB)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert reservations(machine) == ()
    real = WithProcesses.get
    monkeypatch.setattr(
        WithProcesses,
        "get",
        lambda self, path: None if path.startswith("/proc/1/") else real(self, path),
    )
    assert len(reservations(machine)) == believed


def test_an_odd_entry_costs_nobody_a_promise(machine: Root) -> None:
    directory = machine.at(OF_UNITS)
    (directory / "a.json").mkdir(parents=True)
    (directory / "b").mkdir()
    os.mkfifo(directory / "c.json")
    assert reserve(machine, OF_UNITS, "chat", os.getpid(), gpu=GIB, host=GIB)
    assert not (directory / "c.json").exists()


# -- a turn that cannot be had ---------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("action", ["mkdir", "lock"])
def test_a_start_goes_on_without_a_turn(number: int, action: str, tmp_path: Path) -> None:
    def hook(step: Step) -> None:
        if step.action == action:
            raise OSError(number, os.strerror(number), step.path)

    with turn(Root(tmp_path, hook=hook)) as alone:
        assert not alone


@pytest.mark.parametrize("what", ["link", "directory"])
def test_a_lock_that_is_none(what: str, tmp_path: Path) -> None:
    lock = tmp_path / LOCK[1:]
    lock.parent.mkdir(parents=True)
    lock.mkdir() if what == "directory" else lock.symlink_to("/dev/null")
    with turn(Root(tmp_path)) as alone:
        assert not alone


def test_what_fails_within_a_turn_is_not_mistaken_for_the_lock(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="model"), turn(Root(tmp_path)):
        raise PermissionError(errno.EACCES, "model")


ACTIONS = ("lock", "mkdir", "create", "write", "fsync", "rename", "sync-directory", "unlink")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("model") / "m.gguf"
    big = next(each for each in KNOWN if each.name == "gpt-oss 120B")
    return str(gguf_files.write(where, big.metadata(), big.tensors()))


def admitted(root: Root, model: str) -> Admission:
    settings = {"ctx_size": "8192", "parallel": "1", "gpu_layers": "999", "cache_ram": "0"}
    asked = Asked(name="chat", model=model, backend="vulkan", settings=settings, pid=os.getpid())
    return admit(root, read_machine(root), asked)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_start_goes_on_whatever_fails(
    action: str, number: int, model: str, machine: Root
) -> None:
    def hook(step: Step) -> None:
        if step.action == action:
            raise OSError(number, os.strerror(number), step.path)

    failing = WithProcesses(machine.base, hook=hook)
    admission = admitted(failing, model)
    # Either there is a promise that can be taken back, or there is none.
    assert bool(admission.reserved) == bool(reservations(machine))
    release(machine, admission)
    assert reservations(machine) == ()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_start_that_is_killed_leaves_room_for_the_next(
    action: str, model: str, machine: Root
) -> None:
    def hook(step: Step) -> None:
        if step.action == action:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        failing = WithProcesses(machine.base, hook=hook)
        release(failing, admitted(failing, model))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert reservations(machine) == ()
    assert admitted(machine, model).reserved
    assert [each.name for each in machine.at(OF_ROOT).iterdir()] == ["chat.json"]


def test_fit_refuses_what_serve_would(
    machine: Root, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(machine.base), "fit", model, "--", "spec_type=draft-eagle3"]
    assert main(arguments) == 2
    assert "needs model_draft" in capsys.readouterr().err


# -- words of others, on a terminal and in the journal -----------------------------------------


def test_a_programs_name_drives_no_terminal(tmp_path: Path) -> None:
    comm = tmp_path / "proc/7/comm"
    comm.parent.mkdir(parents=True)
    comm.write_text("a\n\x1b[2J\x1b]0;b\x07\n")
    assert process(Root(tmp_path), 7).name == "a\\n\\x1b[2J\\x1b]0;b\\x07"


def test_the_launcher_writes_no_line_for_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise UsageError("held by 'a\n<0>kernel: \x1b[2J'", hint="b\n<1>c")

    monkeypatch.setattr(launcher, "find_declaration", fails)
    monkeypatch.setattr(sys, "argv", ["launcher", "chat"])
    assert launcher.main() == 2
    launcher._Log().say("tight: 'a\n<0>x\x1b'")
    out, err = capsys.readouterr()
    assert err == "<3>held by 'a; <0>kernel: \\x1b[2J'; b; <1>c\n"
    assert out == "tight: 'a; <0>x\\x1b'\n"


def test_serve_says_what_is_tight_without_driving_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, HEALTHY)
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr(serve, "check", lambda *_: Admission("tight: held by '\x1b[2J'"))
    monkeypatch.setattr(serve, "_with_files_checked", lambda declaration, _: declaration)
    main(["--root", str(tmp_path), "serve", "big-moe", "--model", str(model)])
    err = capsys.readouterr().err
    assert "infertune: tight: held by '\\x1b[2J'" in err


# -- a server that answers nonsense -------------------------------------------------------------


class Nonsense(BaseHTTPRequestHandler):
    body = b""
    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(200):
                self.wfile.write(self.body)
                Nonsense.sent += len(self.body)
                if len(self.body) < 100_000:
                    break
        except OSError:
            pass  # the client has had enough

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def nonsense() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Nonsense) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _event(event: Any) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    "body",
    [
        _event({"choices": {"a": 1}, "tokens": 5}),
        _event({"choices": 5, "tokens": {}, "content": 7}),
        _event({"choices": [5], "stop": []}),
        _event({"choices": [{"delta": "x"}], "usage": [1]}),
        _event({"choices": [{"delta": {"content": 5, "reasoning_content": [1]}}], "content": {}}),
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: " + b"x" * (1 << 20),  # and on, without an end of the line
    ],
    ids=range(7),
)
def test_a_server_that_answers_nonsense(ask: Any, body: bytes, nonsense: str) -> None:
    Nonsense.body, Nonsense.sent = body, 0
    with pytest.raises(Failed, match="the server"):
        ask(nonsense, "x", 2)
    assert Nonsense.sent < 50 << 20  # of 200 MiB; what the sockets hold is less


@pytest.mark.parametrize("count", ["x", -4, 1e999, True, [1]], ids=str)
def test_a_count_that_is_none_is_not_taken(count: object, nonsense: str) -> None:
    delta = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}
    Nonsense.body = _event(delta) + _event({"choices": [], "usage": {"completion_tokens": count}})
    assert chat(nonsense, "x", 2).tokens == 1


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (b'{"data": ' + b"[" * 100_000, ""),
        (b'{"data": [{"id": {"a": 1}}]}', ""),
        (b'{"data": [{"id": "a\\n\\u001b[2J"}]}', 'model "a\\n\\x1b[2J"'),
    ],
    ids=range(3),
)
def test_a_name_of_nonsense(models: bytes, shown: str, nonsense: str) -> None:
    Nonsense.body = models
    lines = how_to_talk(nonsense)
    assert all(line.isprintable() for line in lines)
    assert shown in "".join(lines)


def test_a_line_of_wrappers_is_one_command() -> None:
    command = parse("podman exec a podman exec b llama-server -m x.gguf")
    assert command
    assert command.program == "llama-server"
