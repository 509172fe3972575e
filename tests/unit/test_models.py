# SPDX-License-Identifier: Apache-2.0
"""Models by name: where they are looked for, which one is meant, and what is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import gguf_files
from infertune.base.errors import UsageError
from infertune.base.root import Root
from infertune.cli.main import main
from infertune.host import models
from infertune.host.machine import read_machine
from infertune.host.models import Model, find_models, places, real_path, shown_directory
from infertune.host.snapshot import open_root
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from infertune.servers.declaration import Declaration
from infertune.servers.models import model_path, named, with_its_model
from infertune.servers.unit import drop_in
from known_models import KNOWN

HOME = "/home/me"
HUB = f"{HOME}/.cache/huggingface/hub"
REPOSITORY = f"{HUB}/models--ggml-org--gemma-3-4b-it-GGUF"
STRIX_HALO = str(Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot")


def put(base: Path, path: str, size: int = 1) -> Path:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    return file


def link(base: Path, path: str, target: str) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)


def found(base: Path, *more: str) -> dict[str, Model]:
    every = find_models(Root(base), places({}, [HOME, *more]))
    assert len({each.path for each in every}) == len(every)
    return {each.path: each for each in every}


def hub(base: Path, revision: str = "abc", blob: str = "1f", name: str = "gemma-Q4_K_M") -> str:
    """One file in a cache of Hugging Face: a link to a blob."""
    put(base, f"{REPOSITORY}/blobs/{blob}", 7)
    path = f"{REPOSITORY}/snapshots/{revision}/{name}.gguf"
    link(base, path, f"../../blobs/{blob}")
    return path


def test_where_models_are_kept() -> None:
    assert places({}, [HOME]) == (
        HUB,
        f"{HOME}/.cache/llama.cpp",
        f"{HOME}/.lmstudio/models",
        f"{HOME}/.cache/lm-studio/models",
        f"{HOME}/models",
        "/srv/models",
    )
    moved = {"HF_HOME": "/data/hf", "LLAMA_CACHE": "/data/llama", "HF_HUB_CACHE": "relative"}
    assert places(moved, [])[:2] == ("/data/hf/hub", "/data/llama")
    assert places({}, []) == ("/srv/models",)


def test_every_layout(tmp_path: Path) -> None:
    in_hub = hub(tmp_path)
    put(tmp_path, f"{HOME}/.cache/llama.cpp/ggml-org_gpt-oss-20b-GGUF_gpt-oss-20b-mxfp4.gguf", 3)
    put(tmp_path, f"{HOME}/.lmstudio/models/unsloth/Qwen3-GGUF/Qwen3-Q8_0.gguf", 4)
    put(tmp_path, "/srv/models/big-00002-of-00002.gguf", 10)
    put(tmp_path, "/srv/models/big-00001-of-00002.gguf", 20)
    put(tmp_path, "/srv/models/half-00001-of-00003.gguf", 5)
    put(tmp_path, "/srv/models/much-00001-of-99999.gguf", 5)
    put(tmp_path, "/srv/models/mmproj-F16.gguf")
    put(tmp_path, "/srv/models/.hidden.gguf")
    put(tmp_path, "/srv/models/readme.txt")
    (tmp_path / "srv/models/dir.gguf").mkdir()
    every = found(tmp_path)
    shown = {(each.name, each.repository, each.bytes, each.missing) for each in every.values()}
    assert shown == {
        ("gemma-Q4_K_M", "ggml-org/gemma-3-4b-it-GGUF", 7, 0),
        ("gpt-oss-20b-mxfp4", "ggml-org/gpt-oss-20b-GGUF", 3, 0),
        ("Qwen3-Q8_0", "unsloth/Qwen3-GGUF", 4, 0),
        ("big", None, 30, 0),
        ("half", None, 5, 2),
        ("much", None, 5, 99998),
    }
    assert in_hub in every
    assert "/srv/models/big-00001-of-00002.gguf" in every


def test_an_old_revision_is_passed_over(tmp_path: Path) -> None:
    old, new = hub(tmp_path, "old", "1f"), hub(tmp_path, "new", "2e")
    assert found(tmp_path).keys() == {old, new}
    put(tmp_path, f"{REPOSITORY}/refs/main").write_text("new\n")
    assert found(tmp_path).keys() == {new}
    # The same blob under two revisions is one model.
    (tmp_path / f"{REPOSITORY}/refs/main".lstrip("/")).unlink()
    hub(tmp_path, "third", "2e")
    assert len(found(tmp_path)) == 2


def test_what_says_the_revision_is_a_file(tmp_path: Path) -> None:
    """Whoever may write below /srv/models could have the daemon wait for a pipe without an end."""
    there = hub(tmp_path, "here", "1f")
    main = put(tmp_path, f"{REPOSITORY}/refs/main")
    secret = put(tmp_path, "/root/secret")
    secret.write_text("there\n")
    main.unlink()
    main.symlink_to(secret)
    assert found(tmp_path).keys() == {there}
    main.unlink()
    os.mkfifo(main)
    fed = os.open(main, os.O_RDWR | os.O_NONBLOCK)  # so that the test has an end in any case
    try:
        os.write(fed, b"there\n" * 50)
        assert found(tmp_path).keys() == {there}
    finally:
        os.close(fed)


def test_nothing_leads_out_of_its_place(tmp_path: Path) -> None:
    secret = put(tmp_path, "/root/secret.gguf")
    link(tmp_path, "/srv/models/out.gguf", str(secret))
    link(tmp_path, "/srv/models/up.gguf", "../../root/secret.gguf")
    link(tmp_path, "/srv/models/dir", str(secret.parent))
    link(tmp_path, f"{REPOSITORY}/snapshots/abc/x.gguf", str(secret))
    link(tmp_path, "/srv/models/loop", ".")
    link(tmp_path, "/srv/models/gone.gguf", "none.gguf")
    os.mkfifo(tmp_path / "srv/models/fifo.gguf")
    assert found(tmp_path) == {}
    # Within the place a link is a name like another.
    put(tmp_path, "/srv/models/a/real.gguf")
    link(tmp_path, "/srv/models/z.gguf", "a/real.gguf")
    assert len(found(tmp_path)) == 1


def test_where_everybody_may_write_nothing_is_found(tmp_path: Path) -> None:
    mine = put(tmp_path, "/srv/models/open/a.gguf")
    put(tmp_path, "/srv/models/open/below/b.gguf")
    assert len(found(tmp_path)) == 2
    mine.parent.chmod(0o1777)
    assert found(tmp_path) == {}


def test_what_is_found_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        put(tmp_path, f"/srv/models/{number:02}.gguf")
    deep = "/srv/models/" + "d/" * 9
    put(tmp_path, f"{deep}x.gguf")
    assert len(found(tmp_path)) == 30
    monkeypatch.setattr(models, "MOST_MODELS", 7)
    assert len(found(tmp_path)) == 7
    monkeypatch.setattr(models, "_ENTRIES", 3)
    assert len(found(tmp_path)) <= 3


A = Model("Qwen3-30B-Q4_K_M", "/a/1.gguf", "unsloth/Qwen3-30B-GGUF", 1, 0)
B = Model("Qwen3-30B-Q8_0", "/a/2.gguf", "unsloth/Qwen3-30B-GGUF", 1, 0)
C = Model("half", "/a/3.gguf", None, 1, 2)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen3-30B-Q4_K_M", A),
        ("qwen3-30b-q8_0.gguf", B),
        ("unsloth/Qwen3-30B-GGUF:Q8_0", B),
        ("unsloth/qwen3-30b-gguf:q4_k_m", A),
    ],
)
def test_names(name: str, model: Model) -> None:
    assert named([A, B, C], name) is model


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unsloth/Qwen3-30B-GGUF", "is 2 models: /a/1.gguf, /a/2.gguf$"),
        ("unsloth/Qwen3-30B-GGUF:Q8", "there is no file and no model 'unsloth"),
        ("Qwen3-30B-Q5_0", "no model 'Qwen3-30B-Q5_0'; did you mean 'Qwen3-30B-"),
        ("half", "/a/3.gguf: 2 of its parts are missing"),
        ("x\x1b[2J", r"no model 'x\\x1b\[2J'"),
        (":Q8_0", "there is no file and no model"),
    ],
)
def test_names_that_are_none_or_more_than_one(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        named([A, B, C], name)


def test_many_choices_are_one_line_with_an_end() -> None:
    many = [Model("x", f"/m/{number}.gguf", None, 1, 0) for number in range(1000)]
    with pytest.raises(UsageError) as failure:
        named(many, "x")
    assert failure.value.message.endswith("/m/4.gguf, and 995 more")


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "here.gguf")
    put(tmp_path, "models/mine-00001-of-00001.gguf")
    assert model_path("here.gguf", {}) == f"{tmp_path}/here.gguf"
    for path in ("/none.gguf", "./none.gguf", "../none.gguf"):
        assert model_path(path, {}) == os.path.abspath(path)
    assert model_path("mine", {}) == f"{tmp_path}/models/mine-00001-of-00001.gguf"
    with pytest.raises(UsageError, match="there is no file and no model 'nothing'"):
        model_path("nothing", {})


def test_a_file_of_a_hub_keeps_its_name_and_its_unit_sees_the_blobs(tmp_path: Path) -> None:
    path = str(tmp_path / hub(tmp_path).lstrip("/"))
    assert real_path(path) == path
    assert shown_directory(path) == str(tmp_path / REPOSITORY.lstrip("/"))
    plain = put(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").symlink_to(plain)
    assert real_path(str(tmp_path / "b.gguf")) == str(plain)
    assert shown_directory("/srv/models/a.gguf") == "/srv/models"
    # One that leads out of its repository is what it leads to.
    out = f"{REPOSITORY}/snapshots/abc/out.gguf"
    link(tmp_path, out, str(plain))
    assert real_path(str(tmp_path / out.lstrip("/"))) == str(plain)


def test_the_unit_of_a_model_in_a_cache_sees_its_repository_alone() -> None:
    with open_root(STRIX_HALO) as root:
        quiet = resolve(load_profile(root, "quiet"), read_machine(root), "rocm")
    model = f"{REPOSITORY}/snapshots/abc/gemma.gguf"
    text = drop_in(Declaration("one", "quiet", model, 8080), quiet, python="/usr/bin/python3")
    assert f'BindReadOnlyPaths="{REPOSITORY}"\n' in text


def test_a_declaration_names_models_of_the_machine_only(tmp_path: Path) -> None:
    root = Root(tmp_path)
    put(tmp_path, "/srv/models/a/chat.gguf")
    put(tmp_path, f"{HOME}/models/private.gguf")
    (tmp_path / "root/models").mkdir(parents=True)
    put(tmp_path, "/root/models/private.gguf")
    chat = Declaration("one", "quiet", "chat", 8080)
    assert with_its_model(root, chat).model == "/srv/models/a/chat.gguf"
    for same in (None, "/srv/models/other.gguf"):
        plain = Declaration("one", "quiet", same, 8080)
        assert with_its_model(root, plain) is plain
    with pytest.raises(UsageError, match="'one': there is no file and no model of /srv/models"):
        with_its_model(root, Declaration("one", "quiet", "private", 8080))


def test_the_list_says_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "SUDO_UID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--root", STRIX_HALO, "models"]) == 0
    assert capsys.readouterr().out == "no models where they are usually kept\n"
    (tmp_path / "models").mkdir()
    model = next(iter(KNOWN))
    gguf_files.write(tmp_path / "models/good.gguf", model.metadata(), model.tensors())
    (tmp_path / "models/bad.gguf").write_bytes(b"no model")
    assert main(["--root", STRIX_HALO, "models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "SIZE", "TYPE", "FITS", "FROM"]
    assert [line.split()[0] for line in lines[1:]] == ["bad", "good"]
    assert "unreadable" in lines[1]
    assert main(["--root", STRIX_HALO, "models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    bad, good = document["models"]
    assert bad["verdict"] is None
    assert "bad.gguf" in bad["error"]
    assert good["verdict"] in ("fits", "tight", "does not fit")
    assert good["error"] is None
    # As long as they are: neither name is cut, and no line is longer than a terminal.
    name, owner = "Qwen3-Coder-30B-A3B-Instruct-UD-Q4_K_XL", "unsloth/Qwen3-Coder-30B-A3B-GGUF"
    hub = f".cache/huggingface/hub/models--{owner.replace('/', '--')}/snapshots/1"
    (tmp_path / hub).mkdir(parents=True)
    (tmp_path / "models/good.gguf").rename(tmp_path / hub / f"{name}.gguf")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--root", STRIX_HALO, "models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["bad", name, owner]
    assert max(map(len, lines)) <= 80
