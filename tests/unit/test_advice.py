# SPDX-License-Identifier: Apache-2.0
"""What infertune advises is what infertune accepts.

Every ``setting=value`` (and ``setting value``, where the value is no ordinary word) in a message,
a document or a profile's comment is held against the catalogue of knobs and settings.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.catalogue.values import Value
from infertune.profiles.profile import CATALOGUE, package_directory

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted({*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")})
MODULES = sorted(REPOSITORY.glob("daemon/infertune/**/*.py"))
PROFILES = sorted(package_directory().glob("*.toml"))

KNOWN: dict[str, Value] = {name: value for ids in CATALOGUE.values() for name, value in ids.items()}
SHORT = {name.rpartition(".")[2] for name in KNOWN}
"""Names in files of others: ``options ttm pages_limit=...``."""
QUOTED = {
    ("amd_iommu", "pt"),  # a value that does not exist: it is named to say so
    ("zswap.enabled", "0"),  # on the kernel command line, not in a profile
}
OUTPUT = "at launch, "
"""Lines of ``plan``: canonical values, not what is written into a profile."""

_OPEN = "\x00"
"""Stands for what a message fills in."""
_PLACEHOLDER = re.compile(rf"{_OPEN}|^[A-Z]+$|\.\.\.|…|^[{{<[]")
_VALUE = r"""("[^"\n]*"|'[^'\n]*'|[^\s"'`,;|)\]]+)"""
_GIVEN = re.compile(rf"(?<![\w.-])([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*) ?= ?{_VALUE}")
"""``ctx_size=4096``, ``ctx_size = "x"``"""
_SAID = re.compile(r"(?<![\w.-])([a-z][\w.]*[_.][\w.]*\w)`? `?([a-z][\w+-]*[\d+-]\w+)")
"""``spec_type draft-mtp``; without a digit or a hyphen the second may be any word."""


def advice(line: str) -> list[tuple[str, str]]:
    """Names and values in one line of text, settings or not."""
    return _GIVEN.findall(line) + _SAID.findall(line)


def lies(text: str) -> Iterator[str]:
    """What ``text`` advises and no profile may say."""
    for line in text.splitlines():
        if line.startswith(OUTPUT):
            continue
        for name, value in advice(line):
            if name in KNOWN:
                yield from _refused(name, value)
            elif near := _near(name):
                yield f"{name}={value}: there is no {name}, but {near}"


def _near(name: str) -> str | None:
    """The setting that is meant by a name; None where it is no misspelt one."""
    if name.rpartition(".")[2] in SHORT:
        return None
    return next(iter(difflib.get_close_matches(name, KNOWN, 1, 0.85)), None)


def _refused(name: str, value: str) -> Iterator[str]:
    bare = value.rstrip(".:").strip("\"'")
    if (name, bare) in QUOTED or _PLACEHOLDER.search(value):
        return
    try:
        configured = json.loads(value.rstrip(".:").replace("'", '"'))
    except ValueError:
        configured = bare
    try:
        KNOWN[name].parse(configured)
    except ValueError as error:
        yield f"{name}={value}: {error}"


def messages(module: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module, with its line; what is filled in is left open."""
    tree = ast.parse(module.read_text())
    nodes = list(ast.walk(tree))
    joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in ast.walk(node) if part is not node}
    for node in nodes:
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else _OPEN for p in node.values)
            yield node.lineno, "".join(map(str, parts))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_documents(page: Path) -> None:
    assert list(lies(page.read_text())) == []


def test_messages() -> None:
    found = [
        f"{module.relative_to(REPOSITORY)}:{line}: {lie}"
        for module in MODULES
        for line, text in messages(module)
        for lie in lies(text)
    ]
    assert found == []


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.stem)
def test_comments_of_profiles(profile: Path) -> None:
    comments = re.findall(r"#\s*(.*)$", profile.read_text(), re.MULTILINE)
    assert comments
    assert [lie for comment in comments for lie in lies(comment)] == []


# -- that a lie is seen ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lie"),
    [
        ("try spec_type draft-mpt, or none", "'draft-mpt' is not one of"),
        ("`spec_type` `draft-mtp2` helps", "'draft-mtp2' is not one of"),
        ("write cache_type_k=q8 first", "'q8' is not one of"),
        ("load_mode = 'no-mmap'.", "'no-mmap' is not one of"),
        ("ctxsize=4096 is enough", "there is no ctxsize, but ctx_size"),
        ("ctx_size=4k.", "'4k' is not a whole number"),
        ('ttm.pages_limit = "96 GB, at most"', "is not a size"),
        ("vm.swappinez = 10", "there is no vm.swappinez, but vm.swappiness"),
        ("set metrics=1", "1 is not true or false"),
        ("one line\nnice=-99: too nice", "-99 is out of range"),
    ],
)
def test_a_lie_is_seen(text: str, lie: str) -> None:
    [found] = lies(text)
    assert lie in found


@pytest.mark.parametrize(
    "text",
    [
        "spec_type=draft-mtp,ngram-mod",
        "spec_type needs model_draft",
        "cpus in a profile",
        'cpus = "physical cores, minus one"',
        "ctx_size=N, or ctx_size=...",
        "options ttm pages_limit=25165824, then amdttm.pages_limit=25165824",
        "HSA_ENABLE_SDMA=0 id=7 iommu=pt",
        "at launch, server: metrics=1",
    ],
)
def test_what_is_true_is_no_lie(text: str) -> None:
    assert list(lies(text)) == []


def test_a_lie_in_a_module_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        'FIX = (\n    "use load_mode"\n    "=mapped"\n)\n'
        "def say(kib):\n    return f'cache_type_k=q9 and ctx_size={kib}'\n"
    )
    found = [lie for _, text in messages(module) for lie in lies(text)]
    assert [lie.partition(":")[0] for lie in found] == ["load_mode=mapped", "cache_type_k=q9"]


def test_there_is_advice() -> None:
    """A pattern that finds nothing would find no lie."""
    in_messages = [text for module in MODULES for _, text in messages(module)]
    in_pages = [page.read_text() for page in PAGES]
    for texts, least in ((in_messages, 20), (in_pages, 30)):
        lines = (line for text in texts for line in text.splitlines())
        assert sum(name in KNOWN for line in lines for name, _ in advice(line)) >= least
