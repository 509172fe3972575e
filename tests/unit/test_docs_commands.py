# SPDX-License-Identifier: Apache-2.0
"""Commands in README and docs: each is one that there is, or is marked as of another system.

Ours are held against the command line's own parser, files against the checkout; those that only
look are run on a recorded machine.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.errors import UsageError
from infertune.cli import parser
from infertune.cli.main import commands, main

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("docs/*/*.md")]
)
RECORDED = "tests/fixtures/strix-halo-128.snapshot"
MARKS = ("<!-- other distribution -->", "<!-- hardware -->")
OF_THE_SYSTEM = {
    "ansible-playbook", "apt-get", "cat", "cd", "curl", "dmesg", "git", "grep", "journalctl", "ln",
    "pip", "promtool", "pytest", "python3", "systemctl", "systemd-cgtop", "tuned-adm",
}  # fmt: skip
LOOK_ONLY = {"machine", "knobs", "doctor", "profiles", "profile", "plan", "status", "boot"}
"""Verbs that are run; of boot only plan and status."""


def blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Code blocks, fenced or indented, and whether they are marked as of another system."""
    marked = False
    fenced: list[str] | None = None
    for line in text.splitlines():
        if fenced is not None:
            if line.startswith("```"):
                yield "\n".join(fenced), marked
                fenced, marked = None, False
            else:
                fenced.append(line)
        elif line.startswith("```"):
            console = line in ("```console", "```sh")
            fenced = [] if console else None
            if fenced is None:
                fenced = ["# not commands"]
        elif line in MARKS:
            marked = True
        elif line.startswith("    "):
            yield line[4:], marked


def found() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each command that is not marked."""
    for page in PAGES:
        for block, marked in blocks(page.read_text()):
            lines = block.splitlines()
            if marked or lines[:1] == ["# not commands"]:
                continue
            shown = any(line.startswith("$ ") for line in lines)
            for line in lines:
                if shown and not line.startswith("$ "):
                    continue  # output
                text = re.sub(r"\s+#.*$", "", line.removeprefix("$ ")).strip()
                if shown or re.match(r"(infertune|scripts/\w+|systemctl|python3)\b", text):
                    with contextlib.suppress(ValueError):  # prose in an indented line
                        yield str(page.relative_to(REPOSITORY)), shlex.split(text.split(" | ")[0])


COMMANDS = list(found())


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(w) for _, w in COMMANDS])
def test_a_command_is_one_that_there_is(page: str, words: list[str]) -> None:
    words = [word for word in words if word != "sudo"]
    name = words[0].rpartition("/")[2] if words[0].endswith("/infertune") else words[0]
    if name.startswith(("scripts/", "./")):
        assert (REPOSITORY / name).is_file(), page
    elif name == "infertune":
        parse(page, words[1:])
    elif name == "infertune-exporter":
        assert set(words[1:]) <= {"--once", "--help"}
    else:
        assert name.rpartition("/")[2] in OF_THE_SYSTEM, f"{page}: {' '.join(words)}"


def parse(page: str, words: list[str]) -> None:
    ours = words[: words.index("--")] if "--" in words else words
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parser.parse(commands(), ours or ["overview"])  # as main() has it
        except UsageError as wrong:
            pytest.fail(f"{page}: infertune {shlex.join(words)}: {wrong.message}")


HARMLESS = sorted(
    {
        tuple(words[1:])
        for _, words in COMMANDS
        if words[0] == "infertune"
        and len(words) > 1
        and words[1] in LOOK_ONLY
        and (words[1] != "boot" or words[2:3] in (["plan"], ["status"]))
        and not {"PROFILE", "MODEL", "NAME"} & set(words)
    }
)


@pytest.mark.parametrize("words", HARMLESS, ids=" ".join)
def test_what_only_looks_answers(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    code = main(["--root", RECORDED, *words] if "--root" not in words else list(words))
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    assert captured.out
