# SPDX-License-Identifier: Apache-2.0
"""Whose a listening socket is, and that nobody else is taken for the server."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infertune.base.errors import Busy, Failed, UsageError
from infertune.base.root import Root
from infertune.cli import serve
from infertune.host.sockets import Listener, listeners
from infertune.launch.ready import DEFAULT_PORT
from infertune.servers.declaration import Declaration
from infertune.servers.store import write_declaration

HERE = Root("/")


def listen(family: int, address: str, port: int = 0, *, v6only: bool = False) -> socket.socket:
    one = socket.socket(family)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    one.bind((address, port))
    one.listen()
    return one


def of(one: socket.socket) -> frozenset[Listener]:
    return frozenset({Listener(os.getuid(), os.fstat(one.fileno()).st_ino)})


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0"),
        (socket.AF_INET6, "::ffff:127.0.0.1"),
        (socket.AF_INET6, "::"),
    ],
)
def test_who_listens(family: int, address: str) -> None:
    with listen(family, address) as one:
        port = one.getsockname()[1]
        assert listeners(HERE, port) == of(one)
        # Both ends of a connection have the port too, and do not listen.
        with socket.create_connection(("127.0.0.1", port)), one.accept()[0]:
            assert listeners(HERE, port) == of(one)
    assert listeners(HERE, port) == frozenset()


def test_who_cannot_be_reached_does_not_count() -> None:
    with listen(socket.AF_INET, "127.0.0.2") as elsewhere:
        port = elsewhere.getsockname()[1]
        assert listeners(HERE, port) == frozenset()
        with (
            listen(socket.AF_INET6, "::", port, v6only=True),
            listen(socket.AF_INET, "127.0.0.1", port) as one,
        ):
            assert listeners(HERE, port) == of(one)


@pytest.fixture
def impostor() -> Iterator[int]:
    """A program that says it is ready on a port; gives the port."""

    class Yes(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Yes) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def daemon_says(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> None:
    """What the daemon says of the server ``chat``, one after the other."""
    left = list(answers)

    def call(member: str, signature: str = "", *arguments: Any) -> Any:
        assert member == "Servers"
        return [{"name": "chat", "state": "active", **(left.pop(0) if left[1:] else left[0])}]

    monkeypatch.setattr(serve, "_call", call)


def wait(port: int) -> float:
    return serve._wait(HERE, "chat", serve.Door("127.0.0.1", port, "/health"))


def test_a_refused_server_says_why(impostor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon_says(monkeypatch, {"state": "failed", "error": "does not fit now: RAM"})
    with pytest.raises(Failed, match=r"^chat: its unit is failed: does not fit now: RAM$"):
        wait(impostor)
    daemon_says(monkeypatch, {"state": "failed"})
    with pytest.raises(Failed, match=r"^chat: its unit is failed$") as failure:
        wait(impostor)
    assert failure.value.hint == "infertune logs chat"


def test_another_program_on_the_port_is_not_the_server(
    impostor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_says(monkeypatch, {"uid": os.getuid() + 1})
    with pytest.raises(Failed, match=f"another program's, of uid {os.getuid()}"):
        wait(impostor)
    # systemd knows the user a moment later.
    daemon_says(monkeypatch, {}, {"uid": os.getuid()})
    assert wait(impostor) >= 0
    daemon_says(monkeypatch, {})
    monkeypatch.setattr(serve, "_UID_S", 0.0)
    with pytest.raises(Failed, match="which user"):
        wait(impostor)


def test_a_socket_that_changes_meanwhile_is_not_believed(
    impostor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Listener(os.getuid(), 1)
    seen = [{mine}, {Listener(os.getuid(), 2)}, set(), {mine}, {mine}]
    monkeypatch.setattr(serve, "listeners", lambda root, port, at: frozenset(seen.pop(0)))
    door = serve.Door("127.0.0.1", impostor, "/health")
    answers = [serve._answers(HERE, "chat", door, os.getuid()) for _ in range(3)]
    assert answers == [False, False, True]


def declared(root: Root, name: str, port: int) -> None:
    write_declaration(root, Declaration(name, "quiet", "/m.gguf", port))


def context(root: Root, port: int | None) -> Any:
    return SimpleNamespace(root=root, args=SimpleNamespace(port=port, host="127.0.0.1"))


def test_a_declared_port_is_another_server_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def choose(wanted: int | None, reserved: Any, address: str) -> int:
        asked.append((wanted, sorted(reserved)))
        return 1

    monkeypatch.setattr(serve, "choose_port", choose)
    root = Root(tmp_path)
    etc = tmp_path / "etc/infertune/servers.d"
    etc.mkdir(parents=True)
    (etc / "boot.toml").write_text('profile = "quiet"\nport = 8081\n')
    (etc / "broken.toml").write_text("port = 8083\n")
    declared(root, "chat", 8080)
    serve._free_port(context(root, None), "other")
    # Its own port of the last time is free for it.
    serve._free_port(context(root, 8080), "chat")
    assert asked == [(None, [8080, 8081]), (8080, [8081])]
    with pytest.raises(UsageError, match="port 8081 is declared for server 'boot'"):
        serve._free_port(context(root, 8081), "other")


def test_ports_that_are_reserved_are_skipped() -> None:
    first = serve.choose_port(None)
    assert first >= DEFAULT_PORT
    assert serve.choose_port(None, [first]) > first


def test_one_serve_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/infertune").mkdir(parents=True)
    root = Root(tmp_path)
    monkeypatch.setattr(serve, "_TURN_S", 0.0)
    busy = pytest.raises(Busy, match=rf"busy: serve \(pid {os.getpid()}\)")
    with serve._declaring(root), busy, serve._declaring(root):
        pass
    with serve._declaring(root):
        pass
