# SPDX-License-Identifier: Apache-2.0
"""Verdicts are kept, shown, and called stale when what they depend on has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.measure import verdicts
from infertune.measure.statistics import HELPS, NO_EFFECT, UNDECIDED
from infertune.measure.store import OF_ROOT
from infertune.measure.verdicts import (
    QUIET,
    WHOLE,
    Measured,
    Thing,
    load,
    package,
    save,
    sentence,
    stale,
    stamp,
)

ONE = Measured(
    profile="low-latency", setting="nice", value="-10", arm=QUIET, word=HELPS,
    estimate=0.041, low=0.02, high=0.06, pairs=8, day="2026-11-28", kernel="7.1.3",
    backend="vulkan",
    model=Thing(name="gemma-3-270m", path="/models/g.gguf", stamp=None),
    server=Thing(name="b11669", path="/usr/bin/llama-server", stamp=None),
)  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Root:
    for path, size in (("models/g.gguf", 700), ("usr/bin/llama-server", 50)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"x" * size)
        os.utime(tmp_path / path, (1e9, 1e9))
    return Root(tmp_path)


def measured(root: Root) -> Measured:
    """One, with the files as they are now."""
    things = {
        name: replace(thing, stamp=stamp(root, thing.path or ""))
        for name, thing in (("model", ONE.model), ("server", ONE.server))
    }
    return replace(ONE, **things)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "measured here 2026-11-28: +4 % (2..6), quiet, gemma-3-270m"),
        ({"busy": True}, "+4 % (2..6), quiet, among others' work, gemma-3-270m"),
        ({"word": NO_EFFECT, "low": -0.012, "high": 0.02}, ": no effect shown (-1..2), quiet"),
        ({"word": NO_EFFECT, "low": -0.002, "high": 0.02}, ": no effect shown (0..2), quiet"),
        ({"word": UNDECIDED}, ": cannot decide, quiet"),
        ({"low": None, "high": None}, ": helps, quiet"),
        (
            {"arm": "cpu", "keeps": 0.853, "bare": 0.31},
            "helps, keeps 0.85x of the quiet machine's tokens/s, without it 0.31x, busy neighbours",
        ),
    ],
)
def test_what_is_said(change: dict[str, object], text: str) -> None:
    assert text in sentence(replace(ONE, **change))


def test_it_is_stale_when_something_changed(root: Root, tmp_path: Path) -> None:
    one = measured(root)
    assert stale(root, one, "7.1.3", "-10") == []
    assert stale(root, one, None) == []
    assert stale(root, one, "7.2.0") == ["the kernel was 7.1.3"]
    assert stale(root, one, "7.1.3", "-5") == ["the value was -10"]
    (tmp_path / "models/g.gguf").write_bytes(b"y")
    assert stale(root, one, "7.1.3") == ["the model was another (gemma-3-270m)"]
    (tmp_path / "usr/bin/llama-server").write_bytes(b"newer")
    assert "the server was another (b11669)" in stale(root, one, "7.1.3")
    # Who may not look, or has the disk elsewhere, cannot say that it is another.
    (tmp_path / "usr/bin/llama-server").unlink()
    (tmp_path / "models/g.gguf").unlink()
    assert stale(root, one, "7.1.3") == []
    assert sentence(one, ["the kernel was 7.1.3"]).endswith("; stale: the kernel was 7.1.3")


def test_a_package_is_known_by_its_version(monkeypatch: pytest.MonkeyPatch, root: Root) -> None:
    here = package("pytest")
    assert here.name == f"pytest {pytest.__version__}"
    one = replace(measured(root), server=here)
    assert stale(root, one, "7.1.3") == []
    monkeypatch.setattr(verdicts, "_version", lambda _: "0.1")
    assert stale(root, one, "7.1.3") == [f"the server was another ({here.name})"]


def test_a_newer_one_takes_the_place_of_its_key(root: Root) -> None:
    old = replace(ONE, estimate=0.5)
    save(root, OF_ROOT, "m", [old, replace(ONE, setting=WHOLE, value=None)])
    save(root, OF_ROOT, "m", [replace(ONE, day="2026-11-29")])
    found = load(root, ["/nowhere", OF_ROOT], "m")
    assert [(one.setting, one.day, one.estimate) for one in found] == [
        ("nice", "2026-11-29", 0.041),
        (WHOLE, "2026-11-28", 0.041),
    ]
    assert load(root, [OF_ROOT], "another machine") == []


def test_it_does_not_grow_for_ever(root: Root) -> None:
    save(root, OF_ROOT, "m", [replace(ONE, setting=f"s{at}") for at in range(600)])
    found = {one.setting for one in load(root, [OF_ROOT], "m")}
    assert found == {f"s{at}" for at in range(88, 600)}


@pytest.mark.parametrize(
    "change",
    [
        {"word": "wonderful"},
        {"estimate": "much"},
        {"pairs": None},
        {"model": "gemma"},
        {"model": {"name": 5, "path": None, "stamp": None}},
        {"day": "x" * 5000},
        {"more": 1},
    ],
)
def test_what_is_not_ours_is_not_shown(
    root: Root, tmp_path: Path, change: dict[str, object]
) -> None:
    save(root, OF_ROOT, "m", [ONE, replace(ONE, setting="other")])
    file = tmp_path / f"{OF_ROOT.lstrip('/')}/m/verdicts.json"
    document = json.loads(file.read_text())
    document["verdicts"][0] |= change
    file.write_text(json.dumps(document))
    assert [one.setting for one in load(root, [OF_ROOT], "m")] == ["other"]
    for text in ("", "[]", '{"schema": 1}', '{"schema": "infertune.verdicts/1"}', "[" * 9999):
        file.write_text(text)
        assert load(root, [OF_ROOT], "m") == []
