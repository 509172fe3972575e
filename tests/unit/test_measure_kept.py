# SPDX-License-Identifier: Apache-2.0
"""Files of measurements that were edited: what is wrong in them is found when they are read."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import UsageError
from infertune.base.records import asdict
from infertune.base.root import Root
from infertune.cli.against import _read
from infertune.cli.gate import model_at_hand
from infertune.measure import pairs, trial, verdicts
from infertune.measure.client import Timed, base_of
from infertune.measure.conditions import Between
from infertune.measure.figures import rows_of
from infertune.measure.pairs import Comparison, Runner, Taken
from infertune.measure.store import Store
from infertune.measure.tune import Job, Log, job_of

CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={"cpu": 0.1}, major_faults=0, cpu_khz=None, gpu_hz=None,
    throttled=False, others_on_gpu=0, others_in_server=0, busiest=("x",),
)  # fmt: skip
EVIL: tuple[Any, ...] = (
    None, True, -1, 0, float("nan"), float("inf"), 10**400, "", "a\x00b", "\ud800", "package:",
    [], {}, [[]], ["x"], {"a": 1},
)  # fmt: skip


def edits(document: Any) -> Iterator[Any]:
    """The document with each of its parts in turn replaced, or left out."""
    for place in places(document):
        *way, last = place
        for evil in EVIL:
            edited = copy.deepcopy(document)
            inside(edited, way)[last] = evil
            yield edited
        edited = copy.deepcopy(document)
        del inside(edited, way)[last]
        yield edited


def places(document: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    parts = document.items() if isinstance(document, dict) else enumerate(document)
    for name, part in parts:
        if isinstance(part, dict | list):
            yield from places(part, (*way, name))
        else:
            yield (*way, name)


def inside(document: Any, way: list[Any]) -> Any:
    for each in way:
        document = document[each]
    return document


def plain(document: Any) -> Any:
    return json.loads(json.dumps(document))


def test_an_edited_verdict_neither_fails_nor_gives_what_is_no_json(tmp_path: Path) -> None:
    thing = verdicts.Thing(name="m", path="/nowhere/m", stamp="1-1")
    one = verdicts.Measured(
        profile="p", setting="s", value="1", arm="quiet", word="helps", estimate=0.1, low=0.0,
        high=0.2, pairs=8, day="2026-11-28", kernel="k", backend="cpu", model=thing, server=thing,
    )  # fmt: skip
    (tmp_path / "m").mkdir()
    for edited in edits(plain(asdict(one))):
        text = json.dumps({"schema": verdicts.SCHEMA, "verdicts": [edited]})
        (tmp_path / "m" / "verdicts.json").write_text(text)
        for found in verdicts.load(Root("/"), [str(tmp_path)], "m"):
            verdicts.sentence(found, verdicts.stale(Root("/"), found, "k2", "2"))
            json.dumps(asdict(found), allow_nan=False)


def test_an_edited_pair_is_none_or_can_be_judged() -> None:
    line = plain(pairs.line_of(pairs.Sample("c", 0, 0, Taken({"decode_tps": 10.0}, CALM, 3.0))))
    assert pairs.sample_of(line) is not None
    other = [pairs.sample_of({**line, "block": block, "arm": 1}) for block in range(8)]
    for edited in edits(line):
        mine = [
            pairs.sample_of({**edited, "block": block} if "block" in edited else edited)
            for block in range(8)
        ]
        earlier = [each for each in (*mine, *other) if each is not None]
        runner = Runner("1", never, lambda _: None, earlier)
        found = runner.run(Comparison("c", ("a", "b"), most=8), lambda: False)
        runner.learn(found)
        json.dumps([found.seconds, asdict(found.verdict)], allow_nan=False)


def never(*_: Any) -> Taken:
    raise AssertionError("nothing is to be measured")


def test_an_edited_sample_of_a_bench_gives_no_figures_that_are_none() -> None:
    answer = Timed((0.1, 0.2, 0.3), 3, 512, 0, None)
    line = trial.Sample(trial.Load(0, 1, 64), (1,), (answer,), 0.4, CALM, ()).document()
    assert rows_of([plain(line)])
    for edited in edits(plain(line)):
        json.dumps([asdict(each) for each in rows_of([edited] * 8)], allow_nan=False)


def test_an_edited_job_is_none() -> None:
    job = Job("/m.gguf", {"threads": 1}, "latency", 1, 4, 8, 512, False, [{"threads": 2}])
    kept = plain(asdict(job))
    assert job_of(kept) == job
    for edit in (
        {"model": "m\x00"},
        {"goal": "x"},
        {"tokens": 0},
        {"baseline": {"no": 1}},
        {"x": 1},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            job_of({**kept, **edit})


@pytest.mark.parametrize(
    "line",
    [
        {"step": "0 reference"},
        {"step": "1 parts threads=1", "why": 1},
        {"step": "2 answers threads=1", "accepted": "yes", "gates": [], "why": ""},
        {"step": "5 speed threads=1", "gains": [float("nan")], "why": None},
        {"step": "rows", "rows": [{"name": "x"}]},
        {"step": "8 nothing"},
    ],
)
def test_a_step_that_no_search_has_left_is_done_again(line: Any, tmp_path: Path) -> None:
    store = Store(Root("/"), str(tmp_path))
    store.add(line)
    store.add({"step": "1 parts threads=2", "why": None})
    log = Log(store)
    log.read()
    assert log.steps.keys() == {"1 parts threads=2"}


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://\u2100/", "http://127.0.0.1:0", "http://me:secret@127.0.0.1:1"]
)
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    with pytest.raises(UsageError) as told:
        base_of(url)
    assert "secret" not in told.value.message


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_gate_and_tune_give_a_server_no_model_that_is_none(path: str) -> None:
    with pytest.raises(UsageError, match="model"):
        model_at_hand(path)


def test_a_run_of_another_user_names_no_program_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(Root("/"), str(tmp_path)).begin({"asked": {"server": "/tmp/theirs"}})
    assert _read(Root("/"), str(tmp_path)) == {"server": "/tmp/theirs"}
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(UsageError, match="another user's"):
        _read(Root("/"), str(tmp_path))
