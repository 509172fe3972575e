# SPDX-License-Identifier: Apache-2.0
"""What the documents and hints say of the world is so."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.errors import Exit
from infertune.cli.base import Command
from infertune.cli.main import commands
from infertune.cli.parser import build_parser
from infertune.cli.verbs import VERBS
from infertune.profiles.config import CONFIG_KEYS
from infertune.servers.declaration import KEYS

REPOSITORY = Path(__file__).resolve().parents[2]
PLACES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "daemon", "scripts", "packaging")


def texts() -> Iterator[tuple[str, str]]:
    for place in PLACES:
        path = REPOSITORY / place
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if each.is_file() and each.suffix not in (".png", ".pyc"):
                yield str(each.relative_to(REPOSITORY)), each.read_text("utf-8")


def from_an_index(line: str) -> bool:
    """Whether a line has pip look for our name at an index: not in a path, and no --no-index."""
    said = re.search(r"pip install\b(.*)", line)
    if not said or "--no-index" in line:
        return False
    words = [word.strip("'\"`,;:()") for word in said[1].split()]
    return any(re.match(r"infertune(\[|$|[=<>~])", word) for word in words)


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("$ /opt/x/bin/pip install 'infertune[daemon]'", True),
        ("hint=\"pip install 'infertune[exporter]'\"", True),
        ("$ pip install infertune", True),
        ("$ pip install -U infertune==0.1.0", True),
        ("$ pip install './infertune[daemon]'", False),
        ("$ pip install --no-index --find-links dist 'infertune[daemon]'", False),
        ("$ pip install '.[embedded]'", False),
    ],
)
def test_the_search_finds_what_it_should(line: str, bad: bool) -> None:
    assert from_an_index(line) is bad


def test_nobody_is_sent_to_an_index_for_our_name() -> None:
    """Whoever registers the name there would run their program as root."""
    found = [
        f"{place}:{number}"
        for place, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if from_an_index(line)
    ]
    assert not found


def test_a_reconstructed_machine_is_not_called_recorded() -> None:
    text = (REPOSITORY / "tests/fixtures/strix-halo-128.snapshot").read_text()
    assert text.splitlines()[1].startswith("# Reconstructed, not recorded")
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    before = readme[: readme.index("--root tests/fixtures/strix-halo-128.snapshot")]
    assert "a machine reconstructed from published values" in before[-600:]
    assert "recorded machine" not in readme


def every(group: tuple[Command, ...]) -> Iterator[Command]:
    for command in group:
        yield command
        yield from every(command.subcommands)


def test_help_has_no_escapes_of_another_format() -> None:
    for command in every(commands()):
        for words in (command.help, command.description):
            assert "\\" not in words, command.name
    assert "\\" not in build_parser(commands()).format_help()


def test_the_manual_page_has_every_exit_code_as_it_is() -> None:
    page = (REPOSITORY / "docs/man/infertune.1").read_text()
    codes = page[page.index(".SH EXIT STATUS") : page.index(".SH EXAMPLES")]
    assert re.findall(r"^\.B (\d)", codes, re.M) == [
        str(code) for name, code in vars(Exit).items() if name.isupper()
    ]
    assert "planned" not in page.lower()


def test_every_manual_page_is_formatted_without_a_complaint_and_installed() -> None:
    groff = shutil.which("groff")
    metadata = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    shared = metadata["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    for page in sorted((REPOSITORY / "docs/man").iterdir()):
        assert shared[f"docs/man/{page.name}"] == f"share/man/man{page.name[-1]}/{page.name}"
        text = page.read_text()
        assert "`" not in text, page.name
        if groff:
            done = subprocess.run(
                [groff, "-man", "-Tutf8", "-ww", "-z", page], capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert not done.stderr, page.name


def test_the_page_on_files_has_every_key_that_they_may_have() -> None:
    page = (REPOSITORY / "docs/man/infertune.profile.5").read_text().replace("\\-", "-")
    for key in (*KEYS, *CONFIG_KEYS):
        assert f"\n.B {key.name}\n" in page


def test_what_security_points_to_is_there() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target
    assert not re.search(r"\S@\S+\.\w", text)
    assert "privately to the maintainers" not in text


def test_the_pages_say_which_servers_are_watched() -> None:
    for page in ("README.md", "docs/watching.md"):
        text = " ".join((REPOSITORY / page).read_text().split())
        assert "root's `infertune run`" in text, page
        assert "adopt" in text, page
        assert "your-server.md#a-server-in-the-foreground" in text, page
    assert "\n## A server in the foreground\n" in (REPOSITORY / "docs/your-server.md").read_text()


def test_the_evidence_can_be_made_again() -> None:
    page = (REPOSITORY / "docs/evidence.md").read_text()
    for script in re.findall(r"`(?:pytest )?((?:benchmarks|tests)/\S+?\.py)", page):
        assert (REPOSITORY / script).is_file(), script
    results = re.findall(r"\]\(\.\./(benchmarks/results/[^)]+)\)", page)
    assert results
    for result in results:
        assert (REPOSITORY / result).is_file(), result
    for words in re.findall(r"`infertune ([^`]+)`", page):
        assert words.split()[0] in VERBS
