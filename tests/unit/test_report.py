# SPDX-License-Identifier: Apache-2.0
"""``infertune report``: what is in it, what is not, and what hostile names do to it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from infertune.base.root import Root
from infertune.cli import report as verb
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.privacy import cleaned, cleaner
from infertune.measure.store import OF_ROOT, machine_key
from infertune.measure.verdicts import Measured, Thing, save
from infertune.views import report
from infertune.views.html import html
from infertune.views.markdown import markdown
from infertune.views.page import CELL, ROWS
from support import build

REPOSITORY = Path(__file__).resolve().parents[2]
SERVING = REPOSITORY / "tests" / "golden" / "strix-halo-128-serving.snapshot"

HOSTILE = (
    "</td><script src=//evil.test>x</script>\"'><img onerror=y>&lt;|`[a](b)\u202e\x1b[31m\n# h"
)
SERVER = {
    "name": "gpt", "state": "failed", "profile": "big-moe", "port": 8080,
    "model": "/home/alice/models/gpt.gguf", "engine": "llama-server", "error": "exit code 1",
}  # fmt: skip
VERDICT = {
    "setting": "vm.swappiness", "found": "no effect shown (-1..2)", "profile": "long-context",
    "value": "10", "arm": "quiet", "verdict": "no effect shown", "estimate": 0.004, "low": -0.01,
    "high": 0.02, "pairs": 24, "keeps": None, "bare": None, "day": "2026-11-28",
    "model": "gemma", "stale": ["the kernel was 7.1.2"],
}  # fmt: skip
PROBE = {"name": "reclaim", "state": "attached", "why": "", "programs": ["reclaim_begin"]}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A report's document, with a server and a probe beside what the recorded machine has."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["--root", str(SERVING), "report", "--json"]) == 0
    found: dict[str, Any] = json.loads(output.getvalue())
    return {**found, "servers": [SERVER], "probes": [PROBE], "verdicts": [VERDICT]}


class Tags(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


OURS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "section", "p", "span"),
    *("i", "b", "small", "table", "thead", "tbody", "tr", "th", "td", "a"),
}


def everywhere(document: Any, instead: Callable[[str], str]) -> Any:
    """A document with every text in it replaced; what the page looks for in it stays."""
    if isinstance(document, str):
        known = {"error", "warning", "info", "now", "now, ROCm", "next boot", "GTT"}
        return document if document in known else instead(document)
    if isinstance(document, dict):
        return {key: everywhere(each, instead) for key, each in document.items()}
    if isinstance(document, list):
        return [everywhere(each, instead) for each in document]
    return document


def test_hostile_texts_are_text(document: dict[str, Any]) -> None:
    page = report.page(everywhere(document, lambda text: text + HOSTILE))
    seen = Tags(html(page))
    assert seen.tags <= OURS
    assert {name for name, _ in seen.attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "href", "rel"),
    }
    assert "gpt</td><script src=//evil.test>" in seen.text
    assert "\u202e" not in seen.text
    assert "\x1b" not in seen.text
    text = markdown(page)
    assert not re.search(r"(?<!\\)[<`](?!!-- -->|https://)", text)
    assert "\n# h" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for above, below in pairwise(rows):
        if set(above) <= set("|- "):  # the rows below a rule have as many cells as it has
            assert len(re.findall(r"(?<!\\)\|", below)) == above.count("|")


def test_it_loads_and_runs_nothing(document: dict[str, Any]) -> None:
    text = html(report.page(document))
    seen = Tags(text)
    assert seen.tags <= OURS
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in seen.attributes
    links = [value for name, value in seen.attributes if name in ("href", "src")]
    assert links
    assert all(link and link.startswith("https://") for link in links)
    assert "url(" not in text
    assert "@import" not in text


def test_an_address_that_is_none_is_no_link(document: dict[str, Any]) -> None:
    finding = document["doctor"]["findings"][0]
    bad = {**finding, "sources": [{"text": "here", "url": "javascript:alert(1)"}]}
    page = report.page({**document, "doctor": {**document["doctor"], "findings": [bad]}})
    assert not [name for name, _ in Tags(html(page)).attributes if name == "href"]
    assert "here, javascript:alert(1)" in Tags(html(page)).text


def test_it_says_what_matters(document: dict[str, Any]) -> None:
    text = " ".join(Tags(html(report.page(document))).text.split())
    for said in (
        "Framework Desktop", "7.1.3-200.fc44.x86_64", "Profile long-context for vulkan, applied",
        "Drift: vm.swappiness is external, now 100", "gpt", "failed", "exit code 1", "reclaim",
        "40 GiB in use; the kernel's default, half of RAM", "GPU memory is the kernel's default",
        "Read it before you show it to anyone", "no effect shown (-1..2)", "the kernel was 7.1.2",
    ):  # fmt: skip
        assert said in text


def test_without_any_part_it_says_why() -> None:
    parts = ("machine", "status", "servers", "doctor", "boot", "probes", "versions", "verdicts")
    empty = dict.fromkeys(parts) | {"infertune": "1", "at": "now", "host_name": None}
    page = report.page({**empty, "unknown": {part: f"no {part} here" for part in parts}})
    text = Tags(html(page)).text
    assert all(f"no {part} here" in text for part in parts)


def test_what_grows_has_an_end(document: dict[str, Any]) -> None:
    many = [{**SERVER, "name": "x" * 10_000}] * (ROWS + 7)
    text = html(report.page({**document, "servers": many}))
    assert "... and 7 more" in text
    assert "x" * (CELL + 1) not in text


# -- what is private -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--api-key s3cret --port 1", "--api-key (left out) --port 1"),
        ("--api-key=s3cret", "--api-key (left out)"),
        ("--hf-token hf_x --n-predict 5", "--hf-token (left out) --n-predict 5"),
        ("LLAMA_API_KEY=s3cret x", "LLAMA_API_KEY=(left out) x"),
        ('"token": "a b c", "n": 1', '"token=(left out), "n": 1'),
        ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer (left out)"),
        ("it is sk-proj-abcdefghijkl", "it is (left out)"),
        ("hf_abcdefghijklmnop", "(left out)"),
        ("http://me:word@host/x", "http://(left out)@host/x"),
        ("/home/alice/m.gguf, /var/home/bob", "~/m.gguf, ~"),
        ("root=UUID=12345678-1234-1234-1234-123456789abc", "root=UUID=(left out)"),
        ("aa:BB:cc:dd:ee:ff", "(left out)"),
        ("at Box7.example.org, box7", "at (left out), (left out)"),
        ("box77 sandbox7", "box77 sandbox7"),
        ("max_tokens=512, keys: 3, 12 tokens", "max_tokens=512, keys: 3, 12 tokens"),
        ("vm.swappiness is 100", "vm.swappiness is 100"),
    ],
)
def test_what_is_private_is_left_out(text: str, shown: str) -> None:
    clean = cleaner("box7.example.org")
    assert clean(text) == shown
    assert clean(shown) == shown
    assert cleaned({"a": [text, 1, None]}, clean) == {"a": [shown, 1, None]}


def test_a_host_without_a_name_takes_no_words_away() -> None:
    assert cleaner("")("a b") == "a b"
    assert cleaner("a")("a b") == "a b"


def tree(base: Path) -> str:
    build(base)
    (base / "proc/sys/kernel/hostname").write_text("secrethost\n")
    (base / "proc/sys/kernel/osrelease").write_text("7.1.3-secrethost\n")
    (base / "proc/cmdline").write_text("quiet root=/dev/sda7 x.password=hunter2 -- --token t0p\n")
    return str(base)


@pytest.mark.parametrize("how", [["-o", "-"], ["--markdown"], ["--json"]])
def test_nobody_is_named(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path)
    main(["--root", root, "report", *how])
    text = capsys.readouterr().out
    assert "7.1.3" in text
    for private in ("secrethost", "sda7", "hunter2", "t0p"):
        assert private not in text
    main(["--root", root, "report", *how, "--host-name"])
    assert "secrethost" in capsys.readouterr().out


def test_what_was_measured_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path)
    thing = Thing(name="gemma", path=None, stamp=None)
    one = Measured(
        profile="long-context", setting="vm.swappiness", value="10", arm="quiet",
        word="no effect shown", estimate=0.004, low=-0.01, high=0.02, pairs=24, day="2026-11-28",
        kernel="7.1.2", backend="cpu", model=thing, server=thing,
    )  # fmt: skip
    save(Root(tmp_path), OF_ROOT, machine_key(read_machine(Root(tmp_path))), [one])
    main(["--root", root, "report", "--json"])
    [found] = json.loads(capsys.readouterr().out)["verdicts"]
    assert found == {**VERDICT, "stale": ["the kernel was 7.1.2"]}


def test_neither_users_nor_addresses_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**SERVER, "host": "192.168.7.7", "unit": "x.service", "user": "alice"}
    monkeypatch.setattr(verb, "said", lambda ctx, *words: {"servers": [found]})
    [one] = verb._server_list(None)  # type: ignore[arg-type]
    assert one == SERVER


# -- the file ------------------------------------------------------------------------


def written(path: Path) -> tuple[str, int]:
    return path.read_text(), stat.S_IMODE(path.stat().st_mode)


def test_the_file_is_its_owner_s_and_replaces_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "machine")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "infertune-report.html"
    old = os.umask(0)
    try:
        assert main(["--root", root, "report"]) == 0
        assert written(file)[1] == 0o600
        said = capsys.readouterr().out
        assert "readable by you alone" in said
        assert "Read it before you show it to anyone" in said
        file.write_text("mine")
        file.chmod(0o644)
        assert main(["--root", root, "report"]) == 2
        assert written(file) == ("mine", 0o644)
        assert "exists already" in capsys.readouterr().err
        assert main(["--root", root, "report", "--force"]) == 0
        text, mode = written(file)
        assert text.startswith("<!DOCTYPE html>")
        assert mode == 0o600
    finally:
        os.umask(old)


def test_where_it_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "machine")
    assert main(["--root", root, "report", "-o", str(tmp_path / "no/x.html")]) == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("more", [["-o", "x"], ["--markdown"]])
def test_json_is_printed(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", tree(tmp_path / "machine"), "report", "--json", *more]) == 2
    assert "--json prints the document" in capsys.readouterr().err


def test_one_part_that_fails_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = verb.said

    def broken(ctx: Any, *words: str) -> dict[str, Any]:
        if words == ("doctor",):
            raise ZeroDivisionError("/home/alice broke it")
        return said(ctx, *words)

    monkeypatch.setattr(verb, "said", broken)
    assert main(["--root", tree(tmp_path / "machine"), "report", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["doctor"] is None
    assert document["unknown"]["doctor"] == "a bug: ZeroDivisionError: ~ broke it"
    assert document["machine"]["kernel"]
