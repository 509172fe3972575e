# SPDX-License-Identifier: Apache-2.0
"""Ports, progress, and how much of a file is in memory."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest

from infertune.base.errors import UsageError
from infertune.base.root import Root
from infertune.launch import residency
from infertune.launch.ready import Progress, choose_port, oom_kills
from infertune.launch.residency import cachestat, file_size, mincore, model_files, resident

SIZE = 3 * 2**20 + 5


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(SIZE))
    return str(path)


def test_a_file_just_written_is_resident(model: str) -> None:
    assert resident([model]) == SIZE
    assert file_size([model]) == SIZE


def test_both_ways_to_ask_agree(model: str) -> None:
    fd = os.open(model, os.O_RDWR)
    try:
        by_pages = mincore(fd, SIZE)
        assert by_pages is not None
        assert SIZE <= by_pages < SIZE + 2**16
        if (by_range := cachestat(fd)) is not None:
            assert by_range == by_pages
    finally:
        os.close(fd)


def test_dropped_pages_are_seen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(model, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    by_default = resident([model])
    monkeypatch.setattr(residency, "cachestat", lambda _: None)
    assert by_default == resident([model])
    if by_default == SIZE:
        pytest.skip("this file system keeps pages in memory (tmpfs)")
    assert by_default == 0


def test_all_parts_of_a_split_model(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"big[x]-0000{number}-of-00003.gguf").write_bytes(b"GGUF")
    files = model_files(str(tmp_path / "big[x]-00001-of-00003.gguf"))
    assert len(files) == 3
    assert file_size(files) == 12


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            choose_port(port)
    assert choose_port(port) == port


def test_progress_is_one_line_on_a_terminal_and_rare_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, plain = Terminal(), io.StringIO()
    for out in (terminal, plain):
        progress = Progress(out)
        progress.show("half")
        assert not progress.due()
        progress.show("all")
        progress.done()
    assert terminal.getvalue() == "\r\x1b[Khalf\r\x1b[Kall\r\x1b[K"
    assert plain.getvalue() == "half\nall\n"


def test_oom_kills_are_unknown_where_the_kernel_does_not_count(tmp_path: Path) -> None:
    assert oom_kills(Root(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    assert oom_kills(Root(tmp_path)) == 7
