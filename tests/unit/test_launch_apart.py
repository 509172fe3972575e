# SPDX-License-Identifier: Apache-2.0
"""Two servers of one user cannot reach each other, and the exporter still sees both."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune import launcher
from infertune.base.errors import UsageError
from infertune.launch import apart
from infertune.launch.apart import available, keep_apart
from infertune.profiles.resolve import Desired
from infertune.run import Job
from infertune.servers.declaration import Declaration
from support import desired

REPOSITORY = Path(__file__).resolve().parents[2]
_NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38

needs_landlock = pytest.mark.skipif(not available(), reason="no Landlock with scopes here")


@contextlib.contextmanager
def _server(*, alone: bool) -> Iterator[tuple[int, socket.socket]]:
    """A process that does what it is told, in a domain of its own or in none, as a unit's."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 70
        with contextlib.suppress(BaseException):
            ours.close()
            _become_nobody()
            said = keep_apart() if alone else None
            theirs.send(str(said).encode())
            while words := theirs.recv(100).decode().split():
                theirs.send(_tried(words[0], int(words[1])).encode())
            code = 0
        os._exit(code)
    theirs.close()
    try:
        ours.settimeout(60)
        assert ours.recv(1000) == b"None"
        yield pid, ours
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _become_nobody() -> None:
    """No capability (CAP_PERFMON reads environ and maps of anybody), and the same user for all."""
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _tried(what: str, pid: int) -> str:
    """What comes of reaching for a process; SIGCONT does nothing to one that runs."""
    try:
        if what == "signal":
            os.kill(pid, signal.SIGCONT)
        elif what == "fdinfo":
            os.listdir(f"/proc/{pid}/fdinfo")
        else:
            os.close(os.open(f"/proc/{pid}/{what}", os.O_RDWR if what == "mem" else os.O_RDONLY))
    except OSError as error:
        return type(error).__name__
    return "done"


def _ask(server: socket.socket, what: str, pid: int) -> str:
    server.send(f"{what} {pid}".encode())
    return server.recv(100).decode()


WHAT = ("mem", "environ", "maps", "fdinfo", "signal")


@needs_landlock
def test_one_server_reaches_no_other() -> None:
    with (
        _server(alone=True) as (_, one),
        _server(alone=True) as (other, _),
        _server(alone=False) as (exporter, _),
    ):
        for pid in (other, exporter):
            came = {what: _ask(one, what, pid) for what in WHAT}
            assert came == dict.fromkeys(WHAT, "PermissionError")


@needs_landlock
def test_it_still_reaches_itself_and_the_exporter_it() -> None:
    with _server(alone=True) as (pid, one), _server(alone=False) as (_, exporter):
        for asked in (one, exporter):
            for what in ("environ", "fdinfo", "smaps_rollup", "signal"):
                assert _ask(asked, what, pid) == "done", what


@needs_landlock
def test_without_a_domain_they_are_open_to_each_other() -> None:
    """What it is for: otherwise the first test would show nothing."""
    with _server(alone=False) as (_, one), _server(alone=False) as (other, _):
        for what in ("environ", "fdinfo", "signal"):  # mem is Yama's to refuse
            assert _ask(one, what, other) == "done"


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (-1, 5):
        monkeypatch.setattr(apart._libc, "syscall", lambda *_, v=version: v)
        assert keep_apart() == "the kernel has no Landlock with scopes (Linux 6.12)"


@pytest.mark.parametrize("why", [None, "the kernel has none"])
def test_the_server_is_apart_before_it_is_one(
    why: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After it was admitted, which takes a look at the others; and a start goes on without."""
    done: list[str] = []

    job = Job("/bin/server", ("/bin/server",), {}, prewarm=lambda: done.append("prewarm"))

    def prepare(*_: object) -> tuple[Desired, Job]:
        done.append("admitted")
        return desired("p", {}), job

    def apart() -> str | None:
        done.append("apart")
        return why

    declared = Declaration("chat", "p", None, 8080)
    monkeypatch.setattr("sys.argv", ["launcher", "chat"])
    monkeypatch.setattr(launcher, "find_declaration", lambda *_: declared)
    monkeypatch.setattr(launcher, "own_settings", lambda *_: {})
    monkeypatch.setattr(launcher, "prepare", prepare)
    monkeypatch.setattr(launcher, "_close_turn", lambda: done.append("turn"))
    monkeypatch.setattr(launcher, "keep_apart", apart)
    monkeypatch.setattr(os, "execve", lambda *_: done.append("server"))
    launcher.main()
    assert done == ["admitted", "turn", "apart", "prewarm", "server"]
    told = "not kept apart from other servers: the kernel has none" in capsys.readouterr().out
    assert told == (why is not None)


def test_who_is_refused_needs_no_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise UsageError("no")

    monkeypatch.setattr("sys.argv", ["launcher", "chat"])
    monkeypatch.setattr(launcher, "find_declaration", refused)
    monkeypatch.setattr(launcher, "keep_apart", lambda: pytest.fail("entered a domain"))
    assert launcher.main() == 2


def test_the_unit_lets_it() -> None:
    text = (REPOSITORY / "systemd" / "infertune-server@.service").read_text()
    calls = "landlock_create_ruleset landlock_restrict_self"
    assert f"\nSystemCallFilter={calls}\n" in text
    assert "\nNoNewPrivileges=yes\n" in text
