# SPDX-License-Identifier: Apache-2.0
"""A program that is not infertune's llama-server, as a unit of infertune's: only root names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from infertune import launcher
from infertune.base.errors import DeclarationError, UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.cli import serve
from infertune.cli.main import main
from infertune.exporter.servers import asked
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_root
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from infertune.servers.declaration import (
    Declaration,
    declaration_text,
    files,
    parse_declaration,
)
from infertune.servers.store import find_declaration
from infertune.servers.unit import drop_in

FIXTURE = str(Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot")
WORDS = ("/opt/vllm/bin/vllm", "serve", "/srv/models/q w", "--api-key", "secret")
VLLM = Declaration("v", "quiet", None, 8000, "auto", {}, engine="vllm", command=WORDS)


def machine() -> Machine:
    with open_root(FIXTURE) as root:
        return read_machine(root)


def text(words: str, more: str = "") -> str:
    return f'profile = "quiet"\nport = 8000\nexec = {words}\n{more}'


def test_a_command_is_declared() -> None:
    assert parse_declaration("v", declaration_text(VLLM), "x.toml") == VLLM
    # What it is, is seen by what it starts; or said.
    found = parse_declaration("v", text('["/opt/bin/ollama", "serve"]'), "x.toml")
    assert found.engine == "ollama"
    found = parse_declaration("v", text('["/opt/own"]', 'engine = "sglang"'), "x.toml")
    assert found.engine == "sglang"


def test_many_words_are_declared() -> None:
    words = ("/opt/vllm", *(f"--{number:0>900}" for number in range(9)))
    many = replace(VLLM, command=words)
    assert parse_declaration("v", declaration_text(many), "x.toml") == many


@pytest.mark.parametrize(
    ("words", "more", "says"),
    [
        ('"/bin/sh -c x"', "", "x:3: exec is a list of words"),
        ("[]", "", "x:3: exec is a list of words"),
        ("[1]", "", "x:3: exec is a list of words"),
        ('["vllm", "serve"]', "", "x:3: 'exec': 'vllm' is not the whole path of a program"),
        ('["/opt/../bin/vllm"]', "", "is not the whole path of a program"),
        ('["/opt/vllm", "\\u001b[2J"]', "", "'exec': a word has control characters"),
        (
            '["/opt/own"]',
            "",
            "x:3: .* does not know which engine '/opt/own' is: add engine = one of llama-s",
        ),
        ('["/opt/own"]', 'engine = "own"', "x:4: 'engine' is one of"),
        ('["/opt/vllm"]', 'model = "/m.gguf"', "x:4: 'model' does not go with 'exec'"),
        ('["/opt/vllm"]', 'host = "0.0.0.0"', "x:4: 'host' does not go with 'exec'"),
        ('["/opt/vllm"]', "flags = []", "x:4: 'flags' does not go with 'exec'"),
        ('["/opt/vllm"]', "[settings]\nctx_size = 1", "'settings' does not go with 'exec'"),
        ('["/opt/vllm"]', 'unit = "a.service"', "x:3: 'exec' does not go with 'unit'"),
        ('["/opt/vllm"]', "nonsense = 1", "x:4: unknown key 'nonsense'"),
    ],
)
def test_commands_that_are_refused(words: str, more: str, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        parse_declaration("v", text(words, more), "x")


def test_who_may_change_its_declaration_names_the_program(tmp_path: Path) -> None:
    """So nobody but root may."""
    file = tmp_path / "etc/infertune/servers.d/v.toml"
    file.parent.mkdir(parents=True)
    file.write_text(declaration_text(VLLM))
    root = Root(tmp_path)
    root.live = True
    assert find_declaration(root, "v") == VLLM
    file.chmod(0o666)
    with pytest.raises(DeclarationError, match="others than root may change this file"):
        find_declaration(root, "v")


def test_its_unit_is_as_closed_as_any(tmp_path: Path) -> None:
    profile = load_profile(Root(tmp_path), "long-context")
    wanted = resolve(profile, machine(), "vulkan")
    assert files(VLLM, wanted) == {}
    made = drop_in(VLLM, wanted, python="/py")
    assert "MemoryMin=" in made
    assert "ExecStart=" not in made
    assert "secret" not in made
    at_home = replace(VLLM, command=("/home/me/vllm",))
    with pytest.raises(UsageError, match="'v': /home/me/vllm: a unit sees no homes"):
        drop_in(at_home, wanted, python="/py")


def test_its_engine_is_the_one_that_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "etc/infertune/servers.d/v.toml"
    file.parent.mkdir(parents=True)
    file.write_text(declaration_text(VLLM))
    found = asked(Root(tmp_path))["v"]
    assert found.engine is not None
    assert (found.port, found.engine.id) == (8000, "vllm")


def a_program(directory: Path, name: str) -> Path:
    program = directory / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_the_launcher_becomes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the unit's user, with the profile's variables; its words do not go to the journal."""
    declared = replace(VLLM, command=(str(a_program(tmp_path, "vllm")), *WORDS[1:]))
    become: list[Any] = []
    monkeypatch.setenv("LD_PRELOAD", "x.so")
    monkeypatch.setattr("sys.argv", ["launcher", "v"])
    monkeypatch.setattr(launcher, "find_declaration", lambda root, name: declared)
    monkeypatch.setattr(launcher, "read_machine", lambda root: machine())
    monkeypatch.setattr(launcher, "keep_apart", lambda: None)
    monkeypatch.setattr(launcher, "_close_turn", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *given: become.append(given) or 0)
    assert launcher.main() == 0
    [(path, argv, env)] = become
    assert (path, tuple(argv)) == (declared.command[0], declared.command)
    assert "LD_PRELOAD" not in env
    said = capsys.readouterr().out
    assert "not checked whether it fits" in said
    assert "secret" not in said


def test_a_program_that_cannot_be_started_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = a_program(tmp_path, "vllm")
    program.write_text("no program\n")
    declared = replace(VLLM, command=(str(program), *WORDS[1:]))
    monkeypatch.setattr("sys.argv", ["launcher", "v"])
    monkeypatch.setattr(launcher, "find_declaration", lambda root, name: declared)
    monkeypatch.setattr(launcher, "read_machine", lambda root: machine())
    monkeypatch.setattr(launcher, "keep_apart", lambda: None)
    monkeypatch.setattr(launcher, "_close_turn", lambda: None)
    assert launcher.main() == 2  # which systemd does not start again
    said = capsys.readouterr()
    assert said.err == f"<3>{program}: Exec format error\n"
    assert "secret" not in said.out


# -- serve -------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", "base", "--name", "v", *words]) == 2
    return capsys.readouterr().err.splitlines()[0]


def test_serve_takes_a_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = a_program(tmp_path, "vllm")
    a_program(tmp_path, "own")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "--port is missing" in refused(capsys, "--", "vllm", "serve", "m")
    line = refused(capsys, "--port", "18999", "--model", "/m.gguf", "--", "vllm", "serve", "m")
    assert "--model is for llama-server" in line
    words = ["--port", "18999", "--host", "192.0.2.7", "--", "vllm", "serve", "m"]
    assert "--host is for llama-server" in refused(capsys, *words)
    assert "--engine is for a program after --" in refused(capsys, "--engine", "vllm")
    line = refused(capsys, "--port", "\u0661\u0668\u0669\u0669\u0669")
    assert "is not a port; write 1024 to 65535" in line
    assert "no program and no server setting 'nonsense'" in refused(capsys, "--", "nonsense")
    line = refused(capsys, "--port", "18999", "--", "own", "x")
    assert line.endswith(f"infertune does not know which engine '{tmp_path}/own' is")
    words = ["--port", "18999", "--print", "--", "vllm", "serve", "m"]
    assert main(["serve", "base", "--name", "v", *words]) == 0
    line = capsys.readouterr().out
    assert line.rstrip().endswith(f"-- {program} serve m")
    assert "--property=NoNewPrivileges=yes" in line


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "base", "--print", "--api-key-file", ""],
        ["serve", "base", "--print", "--model="],
        ["run", "base", "--model", ""],
        ["adopt", "ollama", "--profile", ""],
    ],
)
def test_an_empty_option_is_not_one_that_is_missing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A key file whose name a script did not find would leave the server without a key."""
    assert main(words) == 2
    assert "it is empty" in capsys.readouterr().err


def test_what_it_serves_is_told_by_its_engine() -> None:
    assert serve._what({"engine": "vllm", "model": None}) == "vllm"
    assert serve._what({"engine": "llama-server", "model": None}) == "the embedded model"
    assert serve._what({"engine": "llama-server", "model": "/m.gguf"}) == "/m.gguf"
    assert serve._what({"unit": "a.service", "engine": None, "model": None}) == "a.service"
    assert serve._what({"error": "no"}) == "no"
