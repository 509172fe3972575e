# SPDX-License-Identifier: Apache-2.0
"""Samples outlive a kill at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from infertune.base.errors import Failed
from infertune.base.root import Root, Step
from infertune.measure.store import OF_ROOT, Store, directory_of, model_key, runs
from support import Counter

HERE = f"{OF_ROOT}/m/abc/20261129T050000Z-bench"


def test_samples_come_back_in_order(tmp_path: Path) -> None:
    store = Store(Root(tmp_path), HERE)
    store.begin({"seed": 1})
    for number in range(3):
        store.add({"n": number})
    assert store.run()["seed"] == 1
    assert [each["n"] for each in store.samples()] == [0, 1, 2]
    assert [each.path for each in runs(Root(tmp_path), OF_ROOT, "m", "abc")] == [HERE]


def test_a_sample_is_on_disk_before_the_next(tmp_path: Path) -> None:
    Store(Root(tmp_path), HERE).begin({})
    counter = Counter()
    Store(Root(tmp_path, hook=counter), HERE).add({"n": 1})
    assert [step.action for step in counter.steps] == ["write", "fsync", "sync-directory"]


def test_a_torn_line_costs_one_sample(tmp_path: Path) -> None:
    store = Store(Root(tmp_path), HERE)
    store.begin({})
    store.add({"n": 1})

    def cut(step: Step) -> int | None:
        return 4 if step.action == "write" else None

    with pytest.raises(OSError, match="short write"):
        Store(Root(tmp_path, hook=cut), HERE).add({"n": 2})
    store.add({"n": 3})
    assert [each["n"] for each in store.samples()] == [1, 3]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    store = Store(Root(tmp_path), HERE)
    store.begin({})
    other = tmp_path / "other"
    other.write_text("mine\n")
    (tmp_path / HERE.lstrip("/") / "samples.jsonl").symlink_to(other)
    with pytest.raises(OSError, match="symbolic"):
        store.add({"n": 1})
    assert other.read_text() == "mine\n"
    assert store.samples() == []


def test_a_model_is_known_by_what_is_in_its_files(tmp_path: Path) -> None:
    root = Root(tmp_path)
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF" + bytes(100_000))
    other.write_bytes(b"GGUF" + bytes(99_999) + b"1")
    (tmp_path / "link.gguf").symlink_to("one.gguf")  # as the cache of Hugging Face has them
    key = model_key(root, ["/one.gguf"])
    assert model_key(root, ["/link.gguf"]) == key
    assert model_key(root, ["/other.gguf"]) != key
    assert model_key(root, ["/one.gguf", "/one.gguf"]) != key
    with pytest.raises(FileNotFoundError):
        model_key(root, ["/none.gguf"])


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="is not a measurement"):
        Store(Root(tmp_path), HERE).run()


@pytest.mark.parametrize(
    ("environment", "root", "where"),
    [
        ({}, True, OF_ROOT),
        ({"XDG_STATE_HOME": "/s"}, False, "/s/infertune/measurements"),
        ({"XDG_STATE_HOME": "/s"}, True, "/s/infertune/measurements"),
        ({"XDG_STATE_HOME": "s"}, False, "/h/.local/state/infertune/measurements"),
        ({}, False, "/h/.local/state/infertune/measurements"),
    ],
)
def test_where_measurements_are(environment: dict[str, str], root: bool, where: str) -> None:
    assert directory_of(environment, "/h", root=root) == where
