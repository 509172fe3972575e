# SPDX-License-Identifier: Apache-2.0
"""``infertune gate`` on this kernel: servers are started, judged, and ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import GENEROUS_S

REPOSITORY = Path(__file__).parents[2]
FAKE = REPOSITORY / "tests" / "fake_llama_server"


class Judge:
    """Runs the verb as a user would, with a server that behaves as told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = directory / "model.gguf"
        self.model.write_bytes(b"GGUF" + bytes(1000))
        self.report = directory / "report"

    def server(self, *behaviour: str) -> str:
        path = self.directory / "llama-server"
        quoted = " ".join(f"'{word}'" for word in ("--report", str(self.report), *behaviour))
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I '{FAKE}' {quoted} -- \"$@\"\n")
        path.chmod(0o755)
        return str(path)

    def start(self, words: str, *behaviour: str) -> subprocess.Popen[str]:
        before, _, after = words.partition("-- ")
        given = ["gate", str(self.model), "--server", self.server(*behaviour), *before.split()]
        return subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-m",
                "infertune",
                *given,
                *(["--", *after.split()] if after else []),
            ],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon"), "COLUMNS": "80"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, words: str, *behaviour: str) -> tuple[int, str, str]:
        with self.start(words, *behaviour) as process:
            out, err = process.communicate(timeout=GENEROUS_S)
            return process.returncode, out, err

    def left(self) -> bool:
        """Whether the last server still runs."""
        seen = json.loads(Path(f"{self.report}.done").read_text())
        return Path(f"/proc/{seen['pid']}").exists()


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Judge]:
    one = Judge(tmp_path)
    yield one
    if Path(f"{one.report}.done").exists():
        assert not one.left()


def test_what_keeps_the_answers_is_accepted(runner: Judge) -> None:
    code, out, err = runner("-- cache_type_k=q8_0")
    assert (code, out.splitlines()[-1]) == (0, "accepted: cache_type_k=q8_0"), err
    assert re.search(r"^G0 itself +pass", out, re.M)
    assert re.search(r"^G1 identical +pass", out, re.M)
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_drafter_that_changes_answers_is_refused(runner: Judge) -> None:
    words = f"-- spec_type=draft-simple model_draft={runner.model}"
    code, out, err = runner(words, "--differs-with=--spec-draft-model")
    assert code == 1, err
    assert re.search(r"^G2 near ties +refused", out, re.M)
    assert "\nrefused: spec_type=draft-simple" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    assert runner(words)[0] == 0, "one that keeps them passes"


def test_one_document(runner: Judge) -> None:
    code, out, err = runner("--json -- cache_type_k=q8_0", "--differs-with=--cache-type-k")
    document = json.loads(out)
    assert (code, err) == (1, "")
    assert document["accepted"] is False
    assert document["differences"][0]["close"] is False
    assert document["other"]["settings"]["cache_type_k"] == "q8_0"
    assert document["reference"]["settings"] == {"ctx_size": "4096", "parallel": "1"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing to judge"),
        ("-- cache_typ_k=q8_0", "there is no server setting 'cache_typ_k'"),
        ("-- cache_type_k=q9", "'q9' is not one of"),
        ("--both parallel=x -- cache_type_k=q8_0", "parallel"),
        ("-- repack=false", "repack = 0: "),
        ("-- spec_type=draft-simple", "needs model_draft"),
    ],
)
def test_what_cannot_be_judged_is_said_in_a_line(runner: Judge, words: str, said: str) -> None:
    code, out, err = runner(words)
    assert (code, out) == (2, "")
    assert said in err.replace("\n  ", " ")


def test_a_server_that_dies_is_one_line(runner: Judge) -> None:
    code, out, err = runner("-- cache_type_k=q8_0", "--die", "SIGILL")
    assert (code, out) == (3, "")
    assert "illegal instruction" in err


def test_a_server_that_ignores_sigterm_is_killed(runner: Judge) -> None:
    code, _, err = runner("-- cache_type_k=q8_0", "--ignore-sigterm")
    assert code == 0, err
    assert not runner.left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_server_is_left_behind(runner: Judge, number: int) -> None:
    process = runner.start("-- cache_type_k=q8_0", "--load-seconds", "600", "--ignore-sigterm")
    end = time.monotonic() + GENEROUS_S
    while not Path(f"{runner.report}.done").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=GENEROUS_S)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    while runner.left():
        assert time.monotonic() < end
        time.sleep(0.05)
