# SPDX-License-Identifier: Apache-2.0
"""Builds with wrong results are said at run and serve, not by the doctor alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

import gguf_files
from doctor_support import HEALTHY, build
from infertune.cli import serve
from infertune.cli.base import Context
from infertune.doctor.at_launch import warnings
from infertune.doctor.rules import RULES
from infertune.doctor.surroundings import LlamaServer
from infertune.host.machine import read_machine
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from infertune.run import Request, Result, Run, prepare
from known_models import KNOWN

BAD, GOOD = "10566 (0123abc)", "0.7.0 (build 11669, commit 1234567)"


def test_which_rules_are_said() -> None:
    said = {rule.id for rule in RULES.values() if rule.at_launch}
    assert said == {"llama-wrong-logits", "llama-mixed-answers"}
    assert all(RULES[each].severity == "error" for each in said)


def test_only_of_the_backend_that_is_used(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY)
    found = warnings(root, BAD, ["rocm"])
    assert [each.partition(":")[0] for each in found] == ["error", "error"]
    assert "b10566 with ROCm computes wrong logits" in found[0]
    assert "(infertune doctor --rule llama-wrong-logits)" in found[0]
    assert warnings(root, BAD, ["vulkan"]) == ()
    assert warnings(root, GOOD, ["rocm"]) == ()
    assert warnings(root, None, ["rocm"]) == ()


class Heard:
    """An audience that remembers what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> object:
        return lambda _: None


def test_a_run_says_it_of_its_own_server(tmp_path: Path) -> None:
    root = build(tmp_path / "machine", HEALTHY)
    small = next(model for model in KNOWN if model.name == "Llama 3.1 8B")
    model = gguf_files.write(tmp_path / "m.gguf", small.metadata(), small.tensors())
    server = tmp_path / "llama-server"
    server.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "--help) echo '--port N'; echo '--model F'; echo '--list-devices';;\n"
        f"--version) echo 'version: {BAD}';;\n"
        "--list-devices) echo 'Available devices:'; echo '  ROCm0: AMD (98304 MiB)';;\nesac\n"
    )
    server.chmod(0o755)
    request = Request(
        profile="base",
        caller=dict(os.environ),
        backend="rocm",
        model=str(model),
        server=str(server),
    )
    heard = Heard()
    one = Run(root, read_machine(root), request, Result("base"), heard)  # type: ignore[arg-type]
    prepare(one)
    assert any("computes wrong logits" in line for line in heard.lines), heard.lines


def test_serve_says_it_of_the_server_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "llama_server", lambda _: LlamaServer(BAD, ("rocm", "cpu")))
    root = build(tmp_path, HEALTHY)
    desired = resolve(load_profile(root, "base"), read_machine(root), "rocm")
    ctx = Context(root, argparse.Namespace(json=False))
    serve._warn(ctx, desired)
    assert capsys.readouterr().err == ""  # a recorded machine has no server of its own to ask
    root.live = True
    serve._warn(ctx, desired)
    assert "computes wrong logits" in capsys.readouterr().err
