# SPDX-License-Identifier: Apache-2.0
"""The program of a server's unit: what it tells the journal and systemd where it refuses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infertune import launcher
from infertune.base.errors import UsageError


def test_why_it_refuses_is_the_units_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        launcher._tell(UsageError("does not fit now:\nREADY=1", hint="infertune fit"))
        assert systemd.recv(4096) == b"STATUS=does not fit now:; READY=1"
    assert capsys.readouterr().err == "<3>does not fit now:; READY=1; infertune fit\n"


def test_it_takes_one_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["launcher"])
    assert launcher.main() == 2
    assert "takes the name" in capsys.readouterr().err
