# SPDX-License-Identifier: Apache-2.0
"""``infertune tune`` on this kernel, with servers that are as fast as they are told to be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import GENEROUS_S

REPOSITORY = Path(__file__).parents[2]
FAKE = REPOSITORY / "tests" / "fake_llama_server"
BASELINE = "threads=1 flash_attn=on load_mode=none spec_type=ngram-simple"
"""With what leaves few candidates: each of them is started a dozen times."""
PLANTED = "--slow-without=--ubatch-size=512"


class Tuner:
    """Runs the verb as a user would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = directory / "model.gguf"
        self.model.write_bytes(b"GGUF" + bytes(1000))
        self.report = directory / "report"
        self.state = directory / "state"
        self.started: list[subprocess.Popen[str]] = []

    def server(self, *behaviour: str) -> str:
        path = self.directory / "llama-server"
        words = ("--report", str(self.report), "--token-s", "0.002", "--forget", *behaviour)
        quoted = " ".join(f"'{word}'" for word in words)
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I '{FAKE}' {quoted} -- \"$@\"\n")
        path.chmod(0o755)
        return str(path)

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "infertune", "tune", *words],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY / "daemon"),
                "PYTHONDONTWRITEBYTECODE": "1",
                "XDG_STATE_HOME": str(self.state),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def tune(self, *behaviour: str) -> tuple[str, ...]:
        server = self.server("--differs-with=--rope-freq-scale", "--tokens", "8", *behaviour)
        options = ("--server", server, "--tokens", "8", "--busy", "--seed", "1")
        return (str(self.model), *options, "--", *BASELINE.split())

    def __call__(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=GENEROUS_S)
        return process.returncode, out, err

    def left(self) -> bool:
        """Whether the last server still runs."""
        seen: dict[str, Any] = json.loads(Path(f"{self.report}.done").read_text())
        return Path(f"/proc/{seen['pid']}").exists()


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Tuner]:
    one = Tuner(tmp_path)
    yield one
    for each in one.started:
        if each.poll() is None:
            each.kill()
        each.communicate()
    if Path(f"{one.report}.done").exists():
        assert not one.left()


def test_a_planted_improvement_is_proposed_and_checked(runner: Tuner) -> None:
    code, out, err = runner(*runner.tune(PLANTED))
    assert code == 0, out + err
    lines = out.splitlines()
    run = Path(lines[0].removeprefix("kept in "))
    assert "Proposed: " in out
    assert "7 check: a planted error, rope_freq_scale=0.9, which must be refused" in out
    assert "ubatch_size = 512  # found" in (run / "tuned.toml").read_text()
    assert "| `ubatch_size=512` |" in (run / "report.md").read_text()
    checked = subprocess.run(
        [sys.executable, "-B", "-m", "infertune", "profile", "check", str(run / "tuned.toml")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr

    # Once more, by who was not there: all of it is in the log.
    code, out, err = runner("--check", str(run), "--server", runner.server(), "--json")
    document = json.loads(out)
    assert (code, document["accepted"], document["word"]) == (0, True, "helps"), err
    assert document["proposed"]["ubatch_size"] == "512"

    (run / "proposed.toml").write_text("[server]\nthreads = 8\n")
    code, out, err = runner("--check", str(run), "--server", runner.server())
    assert (code, out) == (2, "")
    assert "was changed after it was proposed" in err


def test_killed_it_leaves_no_server_and_goes_on(runner: Tuner) -> None:
    process = runner.start(*runner.tune(PLANTED))
    assert process.stdout is not None
    run = process.stdout.readline().strip().removeprefix("kept in ")
    while "2 answers" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    end = time.monotonic() + GENEROUS_S
    while runner.left():
        assert time.monotonic() < end
        time.sleep(0.05)
    code, out, err = runner("--resume", run, "--server", f"{runner.directory}/llama-server")
    assert code == 0, out + err
    assert "Proposed: " in out
    assert "ubatch_size = 512  # found" in Path(run, "tuned.toml").read_text()
    assert "1 parts: threads" not in out, "it was done already"


def test_ctrl_c_ends_it(runner: Tuner) -> None:
    process = runner.start(*runner.tune(PLANTED))
    assert process.stdout is not None
    while "1 parts" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 130
    assert err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--goal", "fun"), "invalid choice"),
        (("--", "threads=none"), "threads"),
        (("--resume", "/nowhere"), "not a measurement"),
        (("--check", "/nowhere"), "is not there"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(
    runner: Tuner, words: tuple[str, ...], said: str
) -> None:
    code, out, err = runner("--server", runner.server(), "--busy", *words)
    assert code in (2, 3)
    assert out == ""
    assert said in err
