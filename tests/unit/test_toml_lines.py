# SPDX-License-Identifier: Apache-2.0
"""Key lines: the same paths as tomllib, and the line each was written on."""

from __future__ import annotations

import json
import string
import tomllib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infertune.base.toml_lines import Path, key_lines


def paths(value: object, prefix: Path = ()) -> set[Path]:
    """Every key path and array index of a parsed document."""
    found: set[Path] = set()
    items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[call-overload]
    for key, inner in items:
        found.add((*prefix, key))
        if isinstance(inner, dict | list):
            found |= paths(inner, (*prefix, key))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb.c = 2", {("a",): 1, ("b",): 2, ("b", "c"): 2}),
        ("# x\n\n[t]\n  a = 1 # a = 2\n", {("t",): 3, ("t", "a"): 4}),
        ('"vm.swappiness" = 1', {("vm.swappiness",): 1}),
        ('"a\\u0062" . \'c d\' = 1', {("ab",): 1, ("ab", "c d"): 1}),
        ("a = { b = 1, c.d = [2] }", {("a",): 1, ("a", "b"): 1, ("a", "c"): 1,
                                     ("a", "c", "d"): 1, ("a", "c", "d", 0): 1}),
        ("a = [\n 1, # ]\n {x = 1},\n]\nb = 2", {("a",): 1, ("a", 0): 2, ("a", 1): 3,
                                              ("a", 1, "x"): 3, ("b",): 5}),
        ('a = """\nb = 1\n\\"""c""""\nb = 2', {("a",): 1, ("b",): 4}),
        ("a = '''\n'' ' [x]'''''\nb = 2", {("a",): 1, ("b",): 3}),
        ('a = "#\\"\\\\" # "\nb = 1979-05-27 07:32:00 # x\nc = +1_0.5e-3', {
            ("a",): 1, ("b",): 2, ("c",): 3}),
        ("[[a]]\nx = 1\n[a.b]\n[[a]]\n[[a.c]]\ny = 1", {
            ("a",): 1, ("a", 0): 1, ("a", 0, "x"): 2, ("a", 0, "b"): 3, ("a", 1): 4,
            ("a", 1, "c"): 5, ("a", 1, "c", 0): 5, ("a", 1, "c", 0, "y"): 6}),
        ("a = 1\r\nb = 2\r\n", {("a",): 1, ("b",): 2}),
        ("[ a . b ]\nx = []\ny = {}", {("a",): 1, ("a", "b"): 1, ("a", "b", "x"): 2,
                                     ("a", "b", "y"): 3}),
        ('a = "\u2028\x85"\nb = 1', {("a",): 1, ("b",): 2}),
        ("", {}),
        ("# only this", {}),
    ],
)  # fmt: skip
def test_lines_of_known_documents(text: str, expected: dict[Path, int]) -> None:
    assert key_lines(text) == expected
    assert set(expected) == paths(tomllib.loads(text))


@dataclass
class Writer:
    """Writes a document piece by piece and notes the line of each key it writes."""

    draw: st.DrawFn
    text: str = ""
    lines: dict[Path, int] = field(default_factory=dict)

    def put(self, text: str) -> None:
        self.text += text

    def note(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def one_of(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def gap(self) -> None:
        """White space that may stand anywhere within a line."""
        self.put(self.one_of("", "", " ", "\t "))

    def rest(self) -> None:
        """The end of a statement, and what may stand between two."""
        self.gap()
        self.put(self.one_of("\n", "\n", " # [x] = \"'{\n", "\n\n", "\n# '''\n", "\r\n"))

    def key(self, name: str) -> str:
        bare = name and all(c in string.ascii_letters + string.digits + "_-" for c in name)
        quoted = [json.dumps(name)]
        if bare:
            quoted.append(name)
        if "'" not in name and name.isprintable():
            quoted.append(f"'{name}'")
        return self.draw(st.sampled_from(quoted))

    def dotted(self, base: Path, names: tuple[str, ...]) -> None:
        for depth in range(len(names)):
            self.note((*base, *names[: depth + 1]))
        space = self.one_of("", " ")
        self.put(f"{space}.{space}".join(self.key(name) for name in names))

    def scalar(self) -> None:
        self.put(
            self.one_of(
                "1", "-0.5e3", "true", "0xff", "inf", "1979-05-27T07:32:00Z", "1979-05-27 07:32:00",
                '""', '"a#b"', '"\\""', '"\\\\"', "''", "'\\'", "'#'", '"]}"', '"x = 1"',
                '"""\n\n"""', '"""a\n"b" ""c"""', '"""x"""""', '"""\\"""\n[t]"""', '"""\\\n  x"""',
                "'''\n'''", "'''a''\n'b'''", "'''x'''''", "'''\n[[t]]\n# x'''",
            )
        )  # fmt: skip

    def value(self, path: Path, tree: object) -> None:
        if isinstance(tree, dict):
            self.inline(path, tree)
        elif isinstance(tree, list):
            self.array(path, tree)
        else:
            self.scalar()

    def inline(self, path: Path, tree: dict[str, object]) -> None:
        self.put("{")
        for number, (name, inner) in enumerate(tree.items()):
            self.put("," if number else "")
            self.gap()
            self.pair(path, name, inner)
            self.gap()
        self.put("}")

    def array(self, path: Path, tree: list[object]) -> None:
        self.put("[")
        for number, inner in enumerate(tree):
            self.put("," if number else "")
            self.put(self.one_of("", "\n", " # ]\n ", " "))
            self.note((*path, number))
            self.value((*path, number), inner)
            self.put(self.one_of("", "\n", " # ,\n"))
        self.put(self.one_of("", ",") if tree else "")
        self.put("]")

    def pair(self, table: Path, name: str, tree: object) -> None:
        names = [name]
        # {a = {b = 1}} may also be written a.b = 1.
        while isinstance(tree, dict) and len(tree) == 1 and self.draw(st.booleans()):
            (step,) = tree
            names.append(step)
            tree = tree[step]
        self.dotted(table, tuple(names))
        self.gap()
        self.put("=")
        self.gap()
        self.value((*table, *names), tree)

    def table(self, path: Path, names: tuple[str, ...], tree: dict[str, object]) -> None:
        """Pairs first, then what gets a header of its own."""
        later: list[str] = []
        for name, inner in tree.items():
            tables = isinstance(inner, list) and inner and all(isinstance(i, dict) for i in inner)
            if (isinstance(inner, dict) or tables) and self.draw(st.booleans()):
                later.append(name)
                continue
            self.pair(path, name, inner)
            self.rest()
        for name in later:
            inner = tree[name]
            items = inner if isinstance(inner, list) else [inner]
            for number, item in enumerate(items):
                below = (*names, name)
                self.gap()
                self.put("[[" if isinstance(inner, list) else "[")
                self.note((*path, name))
                below_path: Path = (*path, name)
                if isinstance(inner, list):
                    below_path = (*below_path, number)
                    self.note(below_path)
                self.gap()
                self.put(".".join(self.key(part) for part in below))
                self.put("]]" if isinstance(inner, list) else "]")
                self.rest()
                self.table(below_path, below, item)


NAMES = st.text(st.sampled_from("ab-_.'\"# =[]1é\u2028\\"), max_size=4)
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.none(),
        lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[Path, int]]:
    writer = Writer(draw)
    writer.table((), (), draw(TREES))
    return writer.text, writer.lines


@settings(max_examples=400, deadline=None)
@given(documents())
def test_lines_of_any_document(case: tuple[str, dict[Path, int]]) -> None:
    text, expected = case
    found = key_lines(text)
    assert set(found) == paths(tomllib.loads(text))
    assert found == expected
