# SPDX-License-Identifier: Apache-2.0
"""scripts/mutants and its table: what it believes, and that SECURITY.md says the same."""

from __future__ import annotations

import ast
import re
import runpy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "mutants"))
MUTANTS = SCRIPT["parse"](SCRIPT["TABLE"].read_text())
SECURITY = (REPOSITORY / "SECURITY.md").read_text()
PLACES = {"unit", "host", "guest", "hardware"}


def functions(directory: str) -> set[str]:
    """Names of the tests in a directory, as pytest finds them."""
    return {
        node.name
        for path in (REPOSITORY / "tests" / directory).glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_")
    }


KNOWN = {"unit": functions("unit"), "host": functions("host"), "guest": functions("vm")}


def rows() -> Mapping[str, dict[str, set[str]]]:
    """Tests of SECURITY.md's tables, by row and by where they run."""
    found: dict[str, dict[str, set[str]]] = {}
    about = SECURITY[SECURITY.index("## What is promised") :]
    for line in about.splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if heading := re.fullmatch(r"\| \*\*(.+)\*\*", cells[0]):
            assert heading[1] not in found
            found[heading[1]] = defaultdict(set)
        elif (where := cells[0].removeprefix("| ")) in PLACES:
            found[list(found)[-1]][where] |= set(re.findall(r"`(test_\w+)`", line))
    return found


ROWS = rows()


# -- the tables ----------------------------------------------------------------------


def test_the_rows_are_there() -> None:
    assert [row for row in ROWS if row.startswith("G")] == [f"G{n}" for n in range(1, 20)]
    assert len(ROWS) >= 19 + 17 + 9
    assert len(MUTANTS) >= 40


def test_every_test_that_security_names_is_there() -> None:
    anywhere = set().union(*KNOWN.values())
    assert set(re.findall(r"`(test_\w+)`", SECURITY)) <= anywhere
    for row, places in ROWS.items():
        for where, tests in places.items():
            assert tests <= KNOWN.get(where, set()), (row, where)


def test_every_row_has_its_mutants_and_they_kill_the_tests_it_names() -> None:
    killed: dict[str, set[str]] = defaultdict(set)
    for mutant in MUTANTS:
        for row in mutant.rows:
            killed[row] |= {re.split(r"::|\[", test)[1] for test in mutant.tests}
    assert killed == {row: places["unit"] for row, places in ROWS.items()}


def test_what_is_to_be_taken_away_is_there_once() -> None:
    assert SCRIPT["missing"](MUTANTS, REPOSITORY) == []


def test_the_tests_of_the_table_are_of_the_files_it_says() -> None:
    for mutant in MUTANTS:
        for test in mutant.tests:
            path, name = test.split("::")
            assert f"def {name.partition('[')[0]}(" in (REPOSITORY / path).read_text(), test


# -- the script ----------------------------------------------------------------------

ENTRY = """
[[mutant]]
id = "one"
rows = ["G1"]
file = "a.py"
find = "x"
replace = "y"
tests = ["tests/unit/test_a.py::test_a"]
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENTRY + ENTRY, "one is there twice"),
        (ENTRY.replace('find = "x"\n', ""), "one: lacks a key, or has one too many: find"),
        (ENTRY + 'reason = "x"', "one: .*: reason"),
        (ENTRY.replace('"y"', '"x"'), "without a row, a test or a change"),
        (ENTRY.replace('["G1"]', "[]"), "without a row, a test or a change"),
    ],
)
def test_an_entry_that_is_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SCRIPT["parse"](text)


def test_a_text_that_is_gone_or_there_twice_is_an_error(tmp_path: Path) -> None:
    table = SCRIPT["parse"](ENTRY)
    assert SCRIPT["missing"](table, tmp_path) == ["one: a.py: No such file or directory"]
    for text, times in (("", 0), ("xx", 2)):
        (tmp_path / "a.py").write_text(text)
        [problem] = SCRIPT["missing"](table, tmp_path)
        assert problem == f"one: a.py has the text to find {times} times, not once"
    (tmp_path / "a.py").write_text("x")
    assert SCRIPT["missing"](table, tmp_path) == []


@pytest.mark.parametrize(
    ("code", "said", "what"),
    [
        (1, "1 failed in 0.1s", "red"),
        (1, "ERROR at teardown of test_a\n1 passed, 1 error", "red"),
        (1, "ERROR at setup of test_a\n1 error in 0.1s", "broken"),
        (0, "1 passed in 0.1s", "green"),
        (0, "1 passed, 2 skipped in 0.1s", "green"),
        (0, "1 skipped in 0.1s", "skipped"),
        (2, "Interrupted: 1 error during collection", "broken"),
        (4, "ERROR: not found: test_a", "broken"),
        (5, "no tests ran in 0.1s", "broken"),
    ],
)
def test_what_pytest_s_end_means(code: int, said: str, what: str) -> None:
    assert SCRIPT["outcome"](code, said) == what


@pytest.mark.parametrize(
    ("results", "word", "unseen"),
    [
        ({"a": "red", "b": "red"}, "red", []),
        ({"a": "red", "b": "timeout"}, "timeout", []),
        ({"a": "red", "b": "green"}, "SURVIVED", ["b"]),
        ({"a": "skipped", "b": "red"}, "skipped", ["a"]),
        ({"a": "broken"}, "broken", ["a"]),
    ],
)
def test_every_test_of_an_entry_must_go_red(
    results: dict[str, str], word: str, unseen: list[str]
) -> None:
    assert SCRIPT["verdict"](results.items()) == (word, unseen)


def test_quick_is_one_for_each_row() -> None:
    chosen = SCRIPT["chosen"](MUTANTS, [], True)
    assert {row for mutant in chosen for row in mutant.rows} == ROWS.keys()
    assert len(chosen) <= len(ROWS)
    with pytest.raises(ValueError, match="no such entry: nothing"):
        SCRIPT["chosen"](MUTANTS, ["nothing"], False)


TREE = {
    "a.py": "def may() -> bool:\n    return False\n",
    "tests/test_a.py": "import a\n\ndef test_may_not() -> None:\n    assert not a.may()\n\n"
    "def test_nothing() -> None:\n    pass\n",
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\n',
}


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A repository of one protection, one test that sees it, and one that does not."""
    for path, text in TREE.items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_text(text)
    yield tmp_path / "tree"
    assert (tmp_path / "tree/a.py").read_text() == TREE["a.py"], "not put back"


def test_a_protection_that_is_seen_missing_and_one_that_is_not(tree: Path) -> None:
    tests = ("tests/test_a.py::test_may_not", "tests/test_a.py::test_nothing")
    assert [SCRIPT["run_test"](tree, test, 60)[0] for test in tests] == ["green", "green"]
    mutant: Any = SCRIPT["Mutant"]("one", ("G1",), "a.py", "False", "True", tests)
    results = SCRIPT["run_mutant"](tree, mutant)
    assert [(test, result) for test, result, _ in results] == [
        (tests[0], "red"),
        (tests[1], "green"),
    ]


def test_a_test_that_hangs_is_stopped(tree: Path) -> None:
    (tree / "tests/test_b.py").write_text("import time\n\ndef test_b():\n    time.sleep(600)\n")
    assert SCRIPT["run_test"](tree, "tests/test_b.py::test_b", 2)[0] == "timeout"
