# SPDX-License-Identifier: Apache-2.0
"""The files a server reads beside its model: who may name them, and that its unit reaches them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from infertune.base.errors import DeclarationError, UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.cli import serve
from infertune.cli.main import main
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_root
from infertune.launch.binary import Server
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, resolve
from infertune.run import Job, Request, Result, Run, job_of
from infertune.servers.declaration import (
    Declaration,
    declaration_text,
    files,
    own_settings,
    parse_declaration,
    server_settings,
)
from infertune.servers.unit import drop_in, systemd_run_line
from infertune.service.setup import template

FIXTURE = str(Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot")
CHAT = Declaration("chat", "x", "/home/me/models/m.gguf", 8081, "vulkan", {})
DRAFTING = {"spec_type": "draft-simple", "model_draft": "/home/me/drafts/d.gguf"}


def machine() -> Machine:
    with open_root(FIXTURE) as root:
        return read_machine(root)


def desired(base: Path, server: str = "") -> Desired:
    """What a profile x with these server settings comes to."""
    profiles = base / "etc/infertune/profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    (profiles / "x.toml").write_text(f"extends = 'base'\n[server]\n{server}")
    return resolve(load_profile(Root(base), "x"), machine(), "vulkan")


def bound(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("BindReadOnlyPaths=")]
    return shlex.split(lines[0].partition("=")[2]) if lines else []


def test_files_of_profile_and_declaration(tmp_path: Path) -> None:
    wanted = desired(tmp_path, "mmproj = '/srv/p.gguf'\nmodel_draft = '/srv/other.gguf'")
    assert files(replace(CHAT, settings=DRAFTING), wanted) == {
        "model": "/home/me/models/m.gguf",
        "mmproj": "/srv/p.gguf",
        "model_draft": "/home/me/drafts/d.gguf",
    }
    assert files(replace(CHAT, model=None), desired(tmp_path)) == {}


def test_a_declaration_may_name_them() -> None:
    named = replace(CHAT, settings={**DRAFTING, "mmproj": '/m/my "p" ü 🙂.gguf'})
    assert parse_declaration("chat", declaration_text(named), "x.toml") == named


def test_the_unit_sees_each_directory_in_a_home_once(tmp_path: Path) -> None:
    wanted = desired(tmp_path, "mmproj = '/home/me/models/mmproj.gguf'")
    text = drop_in(replace(CHAT, settings=DRAFTING), wanted, python="/py")
    assert bound(text) == ["/home/me/models", "/home/me/drafts"]
    assert bound(drop_in(CHAT, wanted, python="/py")) == ["/home/me/models"]
    outside = replace(CHAT, model="/srv/m.gguf")
    assert bound(drop_in(outside, desired(tmp_path), python="/py")) == []


def test_the_equivalent_command_shows_them_too(tmp_path: Path) -> None:
    declaration = replace(CHAT, settings=DRAFTING)
    line = systemd_run_line(declaration, desired(tmp_path), ["/bin/x"], {}, template())
    [word] = [word for word in shlex.split(line) if "BindReadOnlyPaths" in word]
    assert bound(word.removeprefix("--property=")) == ["/home/me/models", "/home/me/drafts"]


def test_drafting_without_a_model_is_refused_before_a_unit_is_written(tmp_path: Path) -> None:
    lonely = replace(CHAT, settings={"spec_type": "draft-dflash"})
    with pytest.raises(UsageError, match="server 'chat': spec_type=draft-dflash needs model_draft"):
        drop_in(lonely, desired(tmp_path), python="/py")
    # Whoever names the model, the profile or the declaration.
    wanted = desired(tmp_path, "model_draft = '/srv/d.gguf'")
    assert "[Service]" in drop_in(lonely, wanted, python="/py")


def test_shares_of_a_declaration_are_of_this_machine(tmp_path: Path) -> None:
    given = replace(CHAT, settings={"cache_ram": "8GiB, at most 1%"})
    total = machine().memory.total_bytes
    assert total is not None
    expected = {"cache_ram": str(total // 100 // 2**20)}
    assert own_settings(given, machine()) == expected
    assert server_settings(given, desired(tmp_path), machine()).items() >= expected.items()


# -- serve -------------------------------------------------------------------------


def test_serve_declares_where_the_files_really_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_refuse_unreadable", lambda *_: None)
    for name in ("m", "d", "p"):
        (tmp_path / f"{name}.gguf").touch()
        (tmp_path / f"link-{name}").symlink_to(f"{name}.gguf")
    wanted = desired(tmp_path, f"mmproj = '{tmp_path}/link-p'")
    given = replace(
        CHAT,
        model=f"{tmp_path}/m.gguf",
        settings={"model_draft": f"{tmp_path}/link-d", "ctx_size": 4096},
    )
    found = serve._with_files_checked(given, wanted)
    assert found.model == f"{tmp_path}/m.gguf"
    assert found.settings == {
        "model_draft": f"{tmp_path}/d.gguf",
        "mmproj": f"{tmp_path}/p.gguf",
        "ctx_size": 4096,
    }


@pytest.mark.parametrize("what", ["model_draft", "mmproj"])
def test_serve_refuses_what_the_server_could_not_read(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.gguf"
    command = ["serve", "base", "--name", "chat", "--", f"{what}={path}"]

    def refused() -> str:
        assert main(command) == 2
        return capsys.readouterr().err.splitlines()[0]

    assert f"{what} {path}: No such file or directory" in refused()
    path.write_text("text")
    assert f"{what} {path}: not a GGUF file" in refused()
    path.write_bytes(b"GGUF")
    path.chmod(0o600)
    assert f"{what} {path}: the server runs as a user of its own, who may not read" in refused()
    path.chmod(0o644)
    tmp_path.chmod(0o700)
    assert f"{what} {path}: the server runs as a user of its own, who may not enter" in refused()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mmproj=p.gguf", "mmproj: 'p.gguf' is not an absolute path of a file"),
        ("mmporj=/p.gguf", "there is no server setting 'mmporj'; did you mean 'mmproj'?"),
        ("spec_type=draft-simple", "server 'chat': spec_type=draft-simple needs model_draft"),
        ("spec_type=mtp", "spec_type: 'mtp' is not one of none, draft-simple"),
    ],
)
def test_serve_says_what_is_wrong_in_one_line(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "base", "--name", "chat", "--", setting]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert len(out.err.splitlines()) == 1


# -- run ---------------------------------------------------------------------------


def test_run_looks_at_the_files_before_it_starts_anything(tmp_path: Path) -> None:
    server = Server(("/bin/x",), {}, None, "--mmproj FILE  file\n--port PORT  port\n", (), False)
    request = Request(profile="x", caller={}, settings={"mmproj": f"{tmp_path}/p.gguf"})
    one = Run(Root("/"), machine(), request, Result(profile="x"), MagicMock())
    with pytest.raises(UsageError, match=r"p\.gguf: No such file or directory"):
        job_of(one, server, "/m.gguf", desired(tmp_path))
    (tmp_path / "p.gguf").write_bytes(b"GGUF")
    argv = job_of(one, server, "/m.gguf", desired(tmp_path)).argv
    assert argv[argv.index("--mmproj") + 1] == f"{tmp_path}/p.gguf"
    one.request = replace(request, settings={"spec_type": "draft-simple"})
    with pytest.raises(UsageError, match="needs model_draft"):
        job_of(one, server, "/m.gguf", desired(tmp_path))


# -- a router ----------------------------------------------------------------------

ROUTER = replace(CHAT, model=None, settings={"models_dir": "/srv/models", "models_max": 2})
HELP = "--models-dir PATH  directory\n--models-preset PATH  file\n--models-max N  most\n"


def serving(tmp_path: Path, settings: dict[str, str], text: str = HELP, **more: Any) -> Job:
    server = Server(("/bin/x",), {}, None, f"{text}--port PORT  port\n--alias NAME  n\n", (), False)
    request = Request(profile="x", caller={}, settings=settings, **more)
    one = Run(Root("/"), machine(), request, Result(profile="x"), MagicMock())
    return job_of(one, server, None, desired(tmp_path))


def test_a_router_has_its_models_and_none_of_its_own(tmp_path: Path) -> None:
    check = MagicMock()
    job = serving(tmp_path, {"models_dir": "/srv/models", "models_max": "2"}, check=check)
    assert job.argv[1:3] == ("--host", "127.0.0.1")
    assert job.argv[5:9] == ("--models-dir", "/srv/models", "--models-max", "2")
    assert not {"--model", "--alias"} & set(job.argv)
    check.assert_not_called()  # there is no file to judge


def test_a_build_that_is_no_router_is_not_started(tmp_path: Path) -> None:
    """Without its flag it would be a router over what the user has downloaded."""
    with pytest.raises(UsageError, match="cannot be a router: this build has no --models-dir"):
        serving(tmp_path, {"models_dir": "/srv/models"}, "")


def test_a_profile_does_not_make_a_server_of_one_model_a_router(tmp_path: Path) -> None:
    server = Server(("/bin/x",), {}, None, HELP, (), False)
    request = Request(profile="x", caller={})
    one = Run(Root("/"), machine(), request, Result(profile="x"), MagicMock())
    with pytest.raises(UsageError, match=r"profile '.*' has models_dir, which is for a router"):
        job_of(one, server, "/m.gguf", desired(tmp_path, "models_dir = '/srv/models'"))


def test_a_router_is_declared(tmp_path: Path) -> None:
    text = declaration_text(ROUTER)
    assert parse_declaration("chat", text, "x.toml") == ROUTER
    assert ROUTER.router == {"models_dir": "/srv/models"}
    with pytest.raises(DeclarationError, match=r"x\.toml:3: 'model' and models_dir: a router"):
        parse_declaration("chat", declaration_text(replace(ROUTER, model="/m.gguf")), "x.toml")
    assert files(ROUTER, desired(tmp_path)) == {"models_dir": "/srv/models/"}


def test_a_router_s_unit_sees_its_directory_in_a_home(tmp_path: Path) -> None:
    at_home = replace(ROUTER, settings={"models_dir": "/home/me/models"})
    assert bound(drop_in(at_home, desired(tmp_path), python="/py")) == ["/home/me/models"]
    preset = replace(ROUTER, settings={"models_preset": "/home/me/llm/models.ini"})
    assert bound(drop_in(preset, desired(tmp_path), python="/py")) == ["/home/me/llm"]
    for home in ("/home/me", "/root", "/home"):
        with pytest.raises(UsageError, match="the server would be shown all of"):
            drop_in(replace(ROUTER, settings={"models_dir": home}), desired(tmp_path), python="/py")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models_max": 2}, "models_max is for a router, which needs models_dir or models_preset"),
        ({"models_dir": "/m", "alias": "x"}, "alias is for one model; models of a router have"),
        ({"models_preset": "/m.ini", "mmproj": "/p.gguf"}, "mmproj is for one model"),
    ],
)
def test_what_a_router_cannot_have(
    settings: dict[str, str | int | bool], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        drop_in(replace(ROUTER, settings=settings), desired(tmp_path), python="/py")


def test_serve_refuses_a_directory_that_the_router_could_not_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models"

    def refused(what: str = "models_dir") -> str:
        assert main(["serve", "base", "--name", "chat", "--", f"{what}={path}"]) == 2
        return capsys.readouterr().err.splitlines()[0]

    assert f"models_dir {path}: No such file or directory" in refused()
    path.write_text("[one]\n")
    assert f"models_dir {path}: not a directory" in refused()
    path.chmod(0o600)
    its_own = "the server runs as a user of its own, who may not"
    assert f"models_preset {path}: {its_own} read" in refused("models_preset")
    path.unlink()
    path.mkdir(mode=0o711)
    assert f"models_dir {path}: {its_own} list" in refused()
    path.chmod(0o744)
    assert f"models_dir {path}: {its_own} enter" in refused()
