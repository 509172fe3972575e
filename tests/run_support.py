# SPDX-License-Identifier: Apache-2.0
"""Runs the command line with a llama-server that behaves as told (fake_llama_server)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support import GENEROUS_S

REPOSITORY = Path(__file__).parents[1]
FAKE = REPOSITORY / "tests" / "fake_llama_server"


class Runner:
    """Runs the command line as a user would, with a server that behaves as told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = directory / "model.gguf"
        self.model.write_bytes(b"GGUF" + bytes(100_000))
        self.report = directory / "report"
        self.started: list[subprocess.Popen[str]] = []

    def server(self, *behaviour: str) -> str:
        words = ["--report", str(self.report), *behaviour]
        path = self.directory / "llama-server"
        quoted = " ".join(f"'{word}'" for word in words)
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I '{FAKE}' {quoted} -- \"$@\"\n")
        path.chmod(0o755)
        return str(path)

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        return self.infertune_process("run", *words, **options)

    def infertune_process(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "infertune", *words],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.started.append(process)
        return process

    def run(self, *words: str) -> tuple[int, str, str]:
        return self.infertune("run", *words)

    def infertune(self, *words: str) -> tuple[int, str, str]:
        process = self.infertune_process(*words)
        out, err = process.communicate(timeout=GENEROUS_S)
        return process.returncode, out, err

    def serve(self, *behaviour: str, words: Sequence[str] = ()) -> tuple[int, str, str]:
        """One question to a fake server, with the kernel's settings left alone."""
        server = self.server(*behaviour)
        return self.run(
            "long-context", "--launch-only", "--server", server, "--model", str(self.model), *words
        )

    def seen(self) -> dict[str, Any]:
        """What the fake server says of itself."""
        path = Path(f"{self.report}.done")
        wait_until(lambda: path.exists() or all(each.poll() is not None for each in self.started))
        assert path.exists(), self.started[-1].communicate()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        if self.report.with_name("report.done").exists() and alive(self.seen()["pid"]):
            os.kill(self.seen()["pid"], signal.SIGKILL)  # the test has failed already


def wait_until(condition: Callable[[], bool], seconds: float = GENEROUS_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
