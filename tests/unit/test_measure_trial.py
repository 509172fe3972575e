# SPDX-License-Identifier: Apache-2.0
"""Samples: what is asked, what does not count, and what they come to."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import Failed
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.measure import trial
from infertune.measure.client import Target, Timed
from infertune.measure.conditions import Baseline, Between
from infertune.measure.figures import decode_per_s, finds, interval, percentile, row
from infertune.measure.prompts import Prompts
from infertune.measure.trial import (
    Bench,
    Load,
    Sample,
    collect,
    enough_tokens,
    faults,
    foreign_cores,
    refuse_a_busy_machine,
    servers_at,
    somebody_else_answers,
)
from talking_server import Canned, talking

CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={}, major_faults=0, cpu_khz=None, gpu_hz=None,
    throttled=None, others_on_gpu=0, others_in_server=None, busiest=(),
)  # fmt: skip
LOAD = Load(depth=0, slots=1, tokens=3)


@pytest.fixture
def server() -> Iterator[Canned]:
    with talking() as one:
        events: list[dict[str, Any]] = [{"content": "x", "tokens": [n]} for n in range(3)]
        timings = {"cache_n": 0, "prompt_n": 512, "prompt_ms": 5.0}
        one.events = (*events, {"content": "", "tokens": [], "stop": True, "timings": timings})
        one.pause_s = 0.005
        one.pages["/tokenize"] = {"tokens": list(range(2000))}
        yield one


def bench(server: Canned, root: Path, **more: Any) -> Bench:
    target = Target(server.url, "llama-server", slots=2)
    return Bench(Root(root), target, (1,), Prompts(7), **more)


# -- one sample -----------------------------------------------------------------------


def test_a_sample_asks_for_a_prompt_of_the_size(server: Canned, tmp_path: Path) -> None:
    one = bench(server, tmp_path)
    found = one.sample(Load(100, 1, 3))
    assert found.kept
    assert server.asked[1]["prompt"] == list(range(612))
    assert (len(found.answers), found.prompts) == (1, (0,))
    assert found.answers[0].tokens == 3


def test_slots_are_asked_at_once_and_no_prompt_twice(server: Canned, tmp_path: Path) -> None:
    server.pages["/tokenize"] = (404, {})  # and where the engine does not tokenize, text will do
    one = bench(server, tmp_path)
    one.warm_up(LOAD)
    first, second = one.sample(replace(LOAD, slots=2)), one.sample(replace(LOAD, slots=2))
    assert first.prompts + second.prompts == (1, 2, 3, 4)
    assert len(first.answers) == 2
    assert isinstance(server.asked[1]["prompt"], str)


def test_the_first_answer_sets_the_deadline(server: Canned, tmp_path: Path) -> None:
    one = bench(server, tmp_path)
    assert one.deadline_s == trial.WARMUP_S
    one.warm_up(LOAD)
    assert one.deadline_s == trial.LEAST_S


def test_a_request_that_fails_fails_the_sample(server: Canned, tmp_path: Path) -> None:
    server.events = ({"error": {"message": "out of slots"}},)
    with pytest.raises(Failed, match="out of slots"):
        bench(server, tmp_path).sample(replace(LOAD, slots=2))


def test_a_cached_prompt_does_not_count() -> None:
    good = Timed((0.1, 0.2, 0.3), 3, 512, 1)
    assert faults([good], LOAD) == []
    assert (
        "40 tokens of the prompt in its cache" in faults([replace(good, cached_tokens=40)], LOAD)[0]
    )
    assert "2 tokens came, 3 were" in faults([good, replace(good, tokens=2)], LOAD)[0]
    assert faults([replace(good, cached_tokens=None)], LOAD) == []


def test_requests_of_others_do_not_count(server: Canned, tmp_path: Path) -> None:
    server.pages["/slots"] = [{"id": 0, "is_processing": True}]
    found = bench(server, tmp_path, busy=True).sample(LOAD)
    assert not found.kept
    assert found.reasons == ("the server worked on 1 requests of others",)


def test_what_others_took_is_not_judged_where_the_server_is_not_seen(
    server: Canned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = replace(CALM, foreign_cpu=0.9, busiest=("cc 1.0",))
    monkeypatch.setattr(trial, "between", lambda *_: loud)
    seen = bench(server, tmp_path)
    assert not seen.sample(LOAD).kept
    unseen = replace(seen, servers=())
    found = unseen.sample(LOAD)
    assert found.kept
    assert found.between.foreign_cpu is None, "the server's own time is in it"
    assert replace(seen, busy=True).sample(LOAD).kept


def test_its_document_has_every_time(server: Canned, tmp_path: Path) -> None:
    found = bench(server, tmp_path).sample(LOAD).document()
    assert len(found["answers"][0]["times_s"]) == 3
    assert (found["kept"], found["reasons"], found["load"]["depth"]) == (True, [], 0)
    assert "foreign_cpu" in found["conditions"]


def test_enough_tokens() -> None:
    assert enough_tokens(None) == 64
    assert enough_tokens(1.0) == 64
    assert enough_tokens(0.02) == 100
    assert enough_tokens(0.0001) == 512


# -- as many as are wanted ------------------------------------------------------------


class Scripted:
    """Samples with these conditions, one after the other."""

    def __init__(self, *found: Between) -> None:
        self.found = iter(found)
        self.baselines: list[Baseline | None] = []

    def sample(self, load: Load, baseline: Baseline | None = None) -> Sample:
        self.baselines.append(baseline)
        between = next(self.found)
        reasons = tuple(trial.contamination(between, baseline))
        return Sample(load, (0,), (Timed((0.1, 0.2), 2, None, None),), 0.2, between, reasons)


def collected(wanted: int, *found: Between) -> tuple[list[Sample], str | None, Scripted]:
    scripted = Scripted(*found)
    told: list[int] = []
    count: Callable[[Sequence[Sample]], None] = lambda samples: told.append(len(samples))  # noqa: E731
    samples, stopped = collect(scripted, LOAD, wanted, count)  # type: ignore[arg-type]
    assert told == list(range(1, len(samples) + 1))
    return samples, stopped, scripted


def test_what_does_not_count_is_taken_again() -> None:
    loud = replace(CALM, foreign_cpu=0.5, busiest=("make 0.9",))
    samples, stopped, _ = collected(2, CALM, loud, CALM)
    assert [each.kept for each in samples] == [True, False, True]
    assert stopped is None


def test_too_much_thrown_away_cannot_decide() -> None:
    loud = replace(CALM, foreign_cpu=0.5, busiest=("make 0.9",))
    samples, stopped, _ = collected(3, CALM, loud, loud, loud)
    assert len(samples) == 4
    assert stopped is not None
    assert "cannot decide: 3 samples did not count, most as others took 50%" in stopped
    assert "make 0.9" in stopped


def test_the_first_samples_say_what_is_usual() -> None:
    slow = replace(CALM, cpu_khz=3_000_000)
    usual = replace(CALM, cpu_khz=4_000_000)
    samples, _, scripted = collected(5, slow, *[usual] * 3, slow, usual)
    assert scripted.baselines[:4] == [None] * 4
    assert [each.kept for each in samples] == [True] * 4 + [False, True]


# -- figures --------------------------------------------------------------------------


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(each) for each in range(1, 201)]
    assert percentile(values, 50) == 100
    assert percentile(values, 99) == 198
    assert percentile([3.0, 1.0, 2.0], 99) == 3
    assert percentile([5.0], 50) == 5
    assert percentile([], 50) is None


def test_decode_is_of_all_slots_together() -> None:
    first, second = Timed((1.0, 1.5, 2.0), 3, None, None), Timed((1.5, 2.0, 3.0), 3, None, None)
    one = Sample(LOAD, (0,), (first,), 2.0, CALM, ())
    assert decode_per_s(one) == pytest.approx(2 / 1.0)
    assert decode_per_s(replace(one, answers=(first, second))) == pytest.approx(4 / 2.0)
    assert decode_per_s(replace(one, answers=(Timed((1.0,), 1, None, None),))) is None


def test_an_interval_needs_samples() -> None:
    assert interval([]) == (None, None)
    assert interval([50.0] * 5) == (None, None)
    assert interval([50.0] * 6) == pytest.approx((50, 50))
    low, high = interval([48, 49, 50, 51, 52, 49.5, 50.5, 50])
    assert low is not None
    assert high is not None
    assert 48 <= low < 50 < high <= 52


def test_what_can_be_found_takes_eight_pairs() -> None:
    assert finds([50.0] * 15) is None
    assert finds([50.0] * 16) == pytest.approx(0.03), "never less than what a verdict is about"
    wild = finds([50.0, 60.0, 40.0, 55.0] * 4)
    assert wild is not None
    assert wild > 0.1


def test_a_row_is_of_what_counts() -> None:
    good = Sample(LOAD, (0,), (Timed((0.5, 0.6, 0.7), 3, 512, 0, 0.25),), 0.7, CALM, ())
    bad = replace(good, answers=(Timed((9.0, 9.9), 2, 512, 0),), reasons=("cc",))
    found = row(LOAD, [good, bad, good])
    assert (found.kept, found.discarded, found.ttft_p99_s) == (2, 1, 0.5)
    assert found.tpot_p50_s == pytest.approx(0.1)
    assert found.prefill_per_s == 512 / 0.25
    assert found.decode_per_s == pytest.approx(10)
    assert found.pair_s == pytest.approx(1.4)
    assert (found.decode_low, found.finds) == (None, None)
    nothing = row(LOAD, [bad])
    assert (nothing.kept, nothing.ttft_p50_s, nothing.decode_per_s) == (0, None, None)


# -- whose process it is ----------------------------------------------------------------


def test_who_listens_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert servers_at(Root("/"), "127.0.0.1", port) == {os.getpid()}
        assert servers_at(Root("/"), "box.lan", port) == frozenset()
    assert servers_at(Root("/"), "127.0.0.1", port) == frozenset()


def test_a_server_in_whose_place_somebody_else_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert not somebody_else_answers(Root("/"), "127.0.0.1", port, os.getpid())
        assert not somebody_else_answers(Root("/"), "127.0.0.1", port, os.getppid())
        with subprocess.Popen(["sleep", "600"]) as other:
            found = somebody_else_answers(Root("/"), "127.0.0.1", port, other.pid)
            other.kill()
        assert found


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpus = tmp_path / "sys/devices/system/cpu"
    cpus.mkdir(parents=True)
    (cpus / "online").write_text("0-3\n")
    found = replace(CALM, foreign_cpu=0.2, busiest=("make 0.80",))
    monkeypatch.setattr(trial, "foreign_cores", lambda *_: found)
    with pytest.raises(Failed, match=r"others take 0\.8 of 4 CPUs \(make 0\.80\)") as refused:
        refuse_a_busy_machine(Root(tmp_path), (), 0.5)
    assert "--busy" in (refused.value.hint or "")
    found = replace(CALM, foreign_cpu=0.1)
    refuse_a_busy_machine(Root(tmp_path), (), 0.5)
    found = replace(CALM, foreign_cpu=None)
    refuse_a_busy_machine(Root(tmp_path), (), 0.5)


def test_what_others_do_now_is_looked_at() -> None:
    found = foreign_cores(Root("/"), (os.getpid(),), 0.02)
    assert found.foreign_cpu is None or 0 <= found.foreign_cpu <= 1
