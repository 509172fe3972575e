# SPDX-License-Identifier: Apache-2.0
"""Every bad profile is refused with its line, before anything is touched.

Each file of tests/bad-profiles says in its first line what to expect:
``# expect: [FILE:]LINE: piece of the message``, with ``-`` for no line.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infertune.base.errors import ProfileError
from infertune.base.root import Root, Step
from infertune.cli.main import main
from infertune.profiles.profile import (
    MAX_BYTES,
    Profile,
    check_profile,
    load_profile,
    package_directory,
)

CORPUS = Path(__file__).resolve().parents[1] / "bad-profiles"
BAD = sorted(path.stem for path in CORPUS.glob("*.toml"))
EXPECT = re.compile(r"# expect: (?:(?P<file>[\w.-]+\.toml):)?(?P<line>\d+|-): (?P<says>.*)")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine whose administrator wrote the whole corpus."""
    base = tmp_path_factory.mktemp("machine")
    admin = base / "etc/infertune/profiles"
    admin.mkdir(parents=True)
    for path in CORPUS.glob("*.toml"):
        shutil.copy(path, admin)
    shutil.copytree(CORPUS / "parents", base / "usr/lib/infertune/profiles")
    return base


@pytest.fixture(autouse=True)
def nothing_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any effect on the machine fails the test."""

    def refuse(self: Root, action: str, path: str, size: int = 0) -> None:
        pytest.fail(f"touched the machine: {Step(action, path, size)}")

    monkeypatch.setattr(Root, "_step", refuse)


def test_the_corpus_is_there() -> None:
    assert len(BAD) >= 70


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("verb", [["profile", "check"], ["apply"]], ids=["check", "apply"])
def test_refused(
    name: str, verb: list[str], machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = (CORPUS / f"{name}.toml").read_bytes().partition(b"\n")[0].decode()
    expected = EXPECT.fullmatch(head)
    assert expected, f"{name} does not say what to expect"
    assert main(["--root", str(machine), *verb, name]) == 2
    out, err = capsys.readouterr()
    message = (out if verb[0] == "profile" else err.removeprefix("infertune: ")).splitlines()[0]
    file = expected["file"] or f"{name}.toml"
    line = "" if expected["line"] == "-" else f":{expected['line']}"
    where = re.match(r"/[\w/]+/profiles/(.*?): ", message)
    assert where, message
    assert where[1] == f"{file}{line}"
    assert expected["says"] in message
    assert len(message) < 600
    assert message.isprintable()


def test_every_problem_is_listed(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(machine), "profile", "check", "several"])
    lines = capsys.readouterr().out.splitlines()
    found = [re.sub(r"^.*several.toml:(\d+): (\S+ \S+).*", r"\1 \2", line) for line in lines]
    assert found == ["3 unknown knob", "5 'ctx_size': 'x'", "7 'nice': 99", "3 problems"]
    with pytest.raises(ProfileError) as caught:
        load_profile(Root(machine), "several")
    assert caught.value.line == 3
    assert caught.value.hint == "3 problems in all; see 'infertune profile check several'"


def test_parents_come_after_the_child(machine: Path) -> None:
    admin = machine / "etc/infertune/profiles"
    (admin / "child.toml").write_text("extends = 'broken'\nx = 1\n")
    _, problems = check_profile(Root(machine), "child")
    assert [(Path(p.file).name, p.line) for p in problems] == [
        ("child.toml", 2),
        ("broken.toml", 4),
    ]


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/x", "Long-Context", "", "a" * 65, "long.context"]
)
def test_names_that_are_none(name: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(machine), "apply", name]) == 2
    assert capsys.readouterr().err


def test_missing_profile_did_you_mean(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(machine), "profile", "show", "long-contxt"]) == 2
    assert "did you mean 'long-context'?" in capsys.readouterr().err


# -- files that are not plain files ------------------------------------------------


@pytest.fixture
def admin(tmp_path: Path) -> Path:
    directory = tmp_path / "etc/infertune/profiles"
    directory.mkdir(parents=True)
    return directory


def refusal(admin: Path, name: str = "bad") -> str:
    profile, problems = check_profile(Root(admin.parents[2]), name)
    assert profile is None
    [problem] = problems
    return problem.message


def test_fifo_does_not_hang(admin: Path) -> None:
    os.mkfifo(admin / "bad.toml")
    assert refusal(admin).endswith("bad.toml: cannot be read: not a regular file")


def test_directory(admin: Path) -> None:
    (admin / "bad.toml").mkdir()
    assert "cannot be read" in refusal(admin)


@pytest.mark.parametrize("target", ["/etc/passwd", "good.toml", "nowhere", "bad.toml"])
def test_symbolic_link(admin: Path, target: str) -> None:
    (admin / "good.toml").write_text("")
    (admin / "bad.toml").symlink_to(target)
    assert "is a symbolic link" in refusal(admin)


def test_too_large(admin: Path) -> None:
    (admin / "bad.toml").write_text("#\n" * (MAX_BYTES // 2))
    assert check_profile(Root(admin.parents[2]), "bad")[0]
    (admin / "bad.toml").write_text("#\n" * (MAX_BYTES // 2) + "#")
    assert "is larger than 256 KiB" in refusal(admin)


def test_unreadable(admin: Path) -> None:
    (admin / "bad.toml").write_text("")
    (admin / "bad.toml").chmod(0)
    if os.access(admin / "bad.toml", os.R_OK):
        pytest.skip("root reads everything")
    assert "Permission denied" in refusal(admin)


class Live(Root):
    """A directory that claims to be this machine."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.live = True


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
@pytest.mark.parametrize(
    ("file", "directory", "owner", "says"),
    [
        (0o644, 0o755, 0, None),
        (0o600, 0o700, 0, None),
        (0o664, 0o755, 0, "others than root may change this file"),
        (0o646, 0o755, 0, "others than root may change this file"),
        (0o644, 0o777, 0, "others than root may change this directory"),
        (0o644, 0o755, 1000, "others than root may change this file"),
    ],
)
def test_who_may_change_it(
    admin: Path, file: int, directory: int, owner: int, says: str | None
) -> None:
    (admin / "some.toml").write_text("")
    os.chown(admin / "some.toml", owner, 0)
    (admin / "some.toml").chmod(file)
    admin.chmod(directory)
    _, problems = check_profile(Live(admin.parents[2]), "some")
    assert [says in problem.message for problem in problems if says] == [True] * bool(says)
    assert bool(problems) == bool(says)
    assert check_profile(Root(admin.parents[2]), "some")[0], "a recorded machine has no owners"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
def test_who_may_change_the_way_to_it(admin: Path) -> None:
    (admin / "some.toml").write_text("")
    admin.parent.chmod(0o777)
    _, [problem] = check_profile(Live(admin.parents[2]), "some")
    assert re.search("may change the way to it, .*/etc/infertune$", problem.message)
    admin.parent.chmod(0o755)
    assert check_profile(Live(admin.parents[2]), "some")[0]


# -- anything else -------------------------------------------------------------------

TEXTS = [path.read_text() for path in sorted(package_directory().glob("*.toml"))]
PIECES = st.sampled_from(
    ["", *"\n\"'{}[]=.,# \0\x1bé", "'''", "[[", "true", "-1", "1e9", "nan", "2026-01-01", "'%'"]
)
NONSENSE = st.sampled_from(
    ["9" * 5000, "0x" + "f" * 6000, "[now]\n", "[server]\n", "[[backend]]\n", "extends = 'quiet'\n"]
)


def meaning(profile: Profile) -> object:
    return [
        (key, given.configured, given.required)
        for layer in (profile.general, *profile.by_backend.values())
        for key, given in layer.items()
    ]


def parsed(text: str) -> object:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES | NONSENSE | st.text(max_size=8)),
        min_size=1,
        max_size=4,
    ),
)
def test_a_damaged_profile_is_refused_or_means_what_it_says(
    text: str, edits: list[tuple[float, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "damaged"
    directory = base / "etc/infertune/profiles"
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "damaged.toml"
    file.write_text(text)
    before = load_profile(Root(base), "damaged")
    damaged = text
    for where, length, piece in edits:
        start = int(where * len(damaged))
        damaged = damaged[:start] + piece + damaged[start + length :]
    file.write_bytes(damaged.encode("utf-8", "surrogatepass"))
    after, problems = check_profile(Root(base), "damaged")
    if after is None:
        assert all(p.line is None or 1 <= p.line <= damaged.count("\n") + 1 for p in problems)
        return
    if parsed(damaged) == parsed(text):
        assert meaning(after) == meaning(before)
    else:
        assert parsed(damaged) is not None
