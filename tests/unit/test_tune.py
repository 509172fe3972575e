# SPDX-License-Identifier: Apache-2.0
"""The search: it finds what is there, proposes nothing where nothing is, and goes on after a kill.

Servers and clocks are made up; ``tests/host/test_tune_command.py`` starts servers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass, field, replace
from infertune.base.root import Root
from infertune.measure import answers, compare
from infertune.measure.answers import Ask
from infertune.measure.arm import Arm, Serve
from infertune.measure.check import (
    EVIDENCE,
    PROFILE,
    REFERENCE,
    Checked,
    Checker,
    evidence_of,
    open_log,
    read_proposal,
)
from infertune.measure.conditions import Between
from infertune.measure.pairs import Comparison, Taken
from infertune.measure.questions import PREFIXES, UNSEEN
from infertune.measure.space import MOST, Candidate, candidates, canonical, together
from infertune.measure.statistics import HARMS, HELPS, NO_EFFECT, UNDECIDED
from infertune.measure.told import profile, report
from infertune.measure.tune import SPEED_SHARE, Job, Row, Tuning, read_document
from infertune.profiles.profile import check_file
from made_server import Made, noise

CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={}, major_faults=0, cpu_khz=None, gpu_hz=None,
    throttled=False, others_on_gpu=0, others_in_server=0, busiest=(),
)  # fmt: skip
JOB = Job("/m.gguf", {"threads": 1, "parallel": 1}, "latency", 1, 4, 8, False)
Settings = Mapping[str, str]


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many there are is for real models."""
    monkeypatch.setattr(compare, "PREFIXES", PREFIXES[:3])
    monkeypatch.setattr("infertune.measure.check._ASKED", UNSEEN[:4])


@dataclass(slots=True)
class Machine:
    """Servers that start, answer and take time by their settings."""

    seconds: Callable[[Settings], float] = lambda _: 1.0
    answers: Callable[[Settings], Made] = lambda _: Made()
    refused: frozenset[str] = frozenset()
    """Settings that this server does not take."""
    sigma: float = 0.01
    started: list[Arm] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    # -- as a Starter

    @contextmanager
    def serve(self, arm: Arm) -> Iterator[Ask]:
        if found := self.refused & arm.settings.keys():
            raise UsageError(f"{min(found)}: this llama-server has no such flag")
        self.started.append(arm)
        yield self.answers(arm.settings)

    def paced(self, *_: float) -> Serve:
        return self.serve


@dataclass(slots=True)
class Clock:
    """Timer without a server."""

    machine: Machine
    arms: dict[str, Arm] = field(default_factory=dict)
    deadline_s: float | None = None
    salt: str = ""

    def take(self, comparison: Comparison, block: int, at: int) -> Taken:
        arm = self.arms[comparison.arms[at]]
        self.machine.timed.append(comparison.arms[at])
        rng = random.Random(f"{self.salt} {comparison.name} {block} {at}")
        took = self.machine.seconds(arm.settings) * math.exp(rng.gauss(0, self.machine.sigma))
        if self.deadline_s is not None and took > self.deadline_s:
            raise Failed(f"no whole answer in {self.deadline_s:g} s")
        return Taken({"answer_s": took}, CALM, took)


def tuning(machine: Machine, path: Path, job: Job = JOB, left: bool = True) -> Tuning:
    root = Root("/")
    path.mkdir(exist_ok=True)
    return Tuning(
        root,
        machine,
        Clock(machine),
        job,
        open_log(root, str(path)),
        lambda _: None,
        lambda _: left,
    )  # type: ignore[arg-type]


def search(machine: Machine, path: Path, job: Job = JOB) -> tuple[str | None, dict[str, Row]]:
    one = tuning(machine, path, job)
    found = one.run()
    return found.name if found else None, {each.name: each for each in one.rows}


def two_threads_are_better(settings: Settings) -> float:
    return {"1": 2.0, "2": 1.0, "3": 1.3, "4": 1.5}[settings["threads"]]


# -- what is tried -------------------------------------------------------------------------


def test_nothing_is_tried_that_the_baseline_has() -> None:
    baseline = {"threads": 4, "flash_attn": "on", "ubatch_size": 512}
    names = [each.name for each in candidates(baseline, cores=4)]
    assert names[:2] == ["threads=3", "threads=2"]
    assert not {"threads=4", "flash_attn=on", "ubatch_size=512"} & set(names)
    assert len(names) <= MOST


@pytest.mark.parametrize("cores", [1, 2, 16, 64])
def test_candidates_are_few_valid_and_different(cores: int) -> None:
    found = candidates({}, cores)
    assert 0 < len(found) <= MOST
    assert len({each.name for each in found}) == len(found)
    assert all(canonical(each.settings) for each in found)


def test_winners_together_have_each_setting_once_that_of_the_better_one() -> None:
    one, two, three = (
        Candidate({"threads": 2}),
        Candidate({"threads": 3}),
        Candidate({"flash_attn": "on"}),
    )
    assert together([one, two, three]).settings == {"threads": 2, "flash_attn": "on"}


# -- what is found -------------------------------------------------------------------------


def test_a_planted_improvement_is_found(tmp_path: Path) -> None:
    name, rows = search(Machine(two_threads_are_better), tmp_path)
    assert name == "threads=2"
    assert rows["threads=2"].word == "applied"
    assert rows["threads=2"].change == pytest.approx(1.0, abs=0.05)
    assert rows["threads=4"].word == "reverted"
    assert rows["flash_attn=on"].word == "reverted"


def test_two_that_help_are_proposed_together(tmp_path: Path) -> None:
    def seconds(settings: Settings) -> float:
        gain = 0.8 if settings.get("flash_attn") == "on" else 1.0
        return two_threads_are_better(settings) * gain

    name, rows = search(Machine(seconds), tmp_path)
    assert name == "threads=2 flash_attn=on"
    assert [each for each, row in rows.items() if row.word == "applied"] == [
        "threads=2",
        "flash_attn=on",
    ]


def test_mere_noise_does_not_get_in_beside_what_helps(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, sigma=0.15)
    found = []
    for seed in range(6):
        (path := tmp_path / str(seed)).mkdir()
        one = tuning(machine, path, replace(JOB, seed=seed))
        one.timer = Clock(machine, salt=str(seed))  # type: ignore[assignment]
        best = one.run()
        found.append(best.name if best else None)
    assert found == ["threads=2"] * 6


def test_two_that_harm_each_other_are_not_proposed_together(tmp_path: Path) -> None:
    def seconds(settings: Settings) -> float:
        on, two = settings.get("flash_attn") == "on", settings["threads"] == "2"
        return 5.0 if on and two else 1.8 if on else two_threads_are_better(settings)

    name, _ = search(Machine(seconds), tmp_path)
    assert name == "threads=2"


def test_nothing_is_proposed_where_nothing_is_faster(tmp_path: Path) -> None:
    name, rows = search(Machine(), tmp_path)
    assert name is None
    assert {each.word for each in rows.values()} == {"reverted"}


def other_answers(settings: Settings) -> Made:
    return Made(noise(4)) if settings.get("cache_type_k") == "q8_0" else Made()


def test_what_changes_the_answers_is_never_timed(tmp_path: Path) -> None:
    machine = Machine(
        lambda settings: 0.1 if "cache_type_k" in settings else 1.0, answers=other_answers
    )
    name, rows = search(machine, tmp_path)
    assert name is None
    assert rows["cache_type_k=q8_0 cache_type_v=q8_0"].why.startswith("G2 near ties: refused")
    assert machine.timed
    assert not any("q8_0" in each for each in machine.timed)


def test_what_the_server_does_not_take_is_skipped_and_said(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, refused=frozenset({"spec_type"}))
    name, rows = search(machine, tmp_path)
    assert name == "threads=2"
    assert rows["spec_type=ngram-simple"].word == "skipped"
    assert "no such flag" in rows["spec_type=ngram-simple"].why


def test_what_takes_too_long_is_dropped(tmp_path: Path) -> None:
    def seconds(settings: Settings) -> float:
        return 1000.0 if settings.get("flash_attn") == "on" else two_threads_are_better(settings)

    name, rows = search(Machine(seconds), tmp_path)
    assert name == "threads=2"
    assert rows["flash_attn=on"].why == "no whole answer in 20 s"


def test_what_is_slower_is_dropped_after_two_pairs(tmp_path: Path) -> None:
    machine = Machine(lambda settings: 1.5 if settings.get("flash_attn") == "on" else 1.0)
    search(machine, tmp_path)
    assert machine.timed.count("flash_attn=on") == 2
    assert machine.timed.count("ubatch_size=512") == 4


def test_no_candidate_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better)
    one = tuning(machine, tmp_path, left=False)
    assert one.run() is None
    assert {each.why for each in one.rows} == {"no time was left to judge it"}
    assert not machine.timed


def test_no_candidate_is_timed_when_the_time_for_that_is_over(tmp_path: Path) -> None:
    one = tuning(Machine(two_threads_are_better), tmp_path)
    one.time_left = lambda share: share != SPEED_SHARE
    assert one.run() is None
    assert {each.why for each in one.rows} == {"no time was left to measure it"}


def test_a_machine_on_which_nothing_differs_from_itself_is_needed(tmp_path: Path) -> None:
    class Drifting(Clock):
        def take(self, comparison: Comparison, block: int, at: int) -> Taken:
            taken = Clock.take(self, comparison, block, at)
            return replace(taken, figures={"answer_s": taken.figures["answer_s"] * (1 + at)})

    one = tuning(Machine(), tmp_path)
    one.timer = Drifting(one.timer.machine)  # type: ignore[attr-defined, assignment]
    with pytest.raises(Failed, match="cannot measure now"):
        one.run()


def test_a_baseline_that_contradicts_itself_is_no_reference(tmp_path: Path) -> None:
    starts = iter(range(1000))
    machine = Machine(answers=lambda _: Made(noise(4, seed=next(starts))))
    with pytest.raises(Failed, match="no reference"):
        search(machine, tmp_path)


# -- killed, and gone on -------------------------------------------------------------------


class Killed(BaseException):
    """kill -9: nothing after it is done."""


def killed_after(machine: Machine, path: Path, lines: int) -> None:
    one = tuning(machine, path)
    add, left = one.log.store.add, iter(range(lines))

    def counted(sample: Mapping[str, Any]) -> None:
        if next(left, None) is None:
            raise Killed
        add(sample)

    one.log.store.add = counted  # type: ignore[method-assign]
    with pytest.raises(Killed):
        one.run()


def test_killed_at_every_step_it_finds_the_same_and_repeats_nothing(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=other_answers)
    wanted = search(machine, tmp_path / "whole")
    whole = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    steps = [json.loads(line).get("step") for line in whole]
    assert {str(each)[0] for each in steps if each} == {"0", "1", "2", "5"}
    for lines in range(0, len(whole), 3):
        path = tmp_path / str(lines)
        killed_after(machine, path, lines)
        assert search(machine, path) == wanted, f"killed after {lines} lines"
        again = (path / "samples.jsonl").read_text().splitlines()
        done = [json.loads(line).get("step") for line in again]
        assert [each for each in done if each] == [each for each in steps if each]


def test_a_line_that_was_torn_is_done_again(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better)
    wanted = search(machine, tmp_path / "whole")
    killed_after(machine, tmp_path / "torn", 5)
    log = tmp_path / "torn" / "samples.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    assert search(machine, tmp_path / "torn") == wanted


# -- the last phase ------------------------------------------------------------------------


def honest(settings: Settings) -> Made:
    """A server that gives other answers with another rope scaling, as a real one does."""
    return Made(noise(4)) if "rope_freq_scale" in settings else Made()


def proposed(path: Path, machine: Machine, candidate: Candidate | None = None) -> Candidate:
    one = tuning(machine, path)
    found = one.run()
    assert found is not None
    found = candidate or found
    write(path, one, found)
    return found


def write(path: Path, one: Tuning, candidate: Candidate) -> None:
    text = profile(one.job, candidate, [], str(path))
    reference = read_document(Root("/"), f"{path}/{REFERENCE}")["sha256"]
    one.log.store.write(PROFILE, text)
    evidence = evidence_of(one.job, candidate, text, reference, one.log.steps)
    one.log.store.write_json(EVIDENCE, evidence)


def check(path: Path, machine: Machine) -> Checked:
    root = Root("/")
    proposal, log = read_proposal(root, str(path)), open_log(root, str(path))
    return Checker(machine, Clock(machine), proposal, log, lambda _: None, lambda _: True).run()  # type: ignore[arg-type]


def test_a_sound_proposal_is_accepted(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    machine.timed.clear()
    found = check(tmp_path, machine)
    assert found.accepted
    assert found.word == HELPS
    assert machine.timed.count("tuned") >= 8, "in fresh pairs"


def test_a_gate_that_refuses_nothing_proves_nothing(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better)  # the planted error changes nothing here
    proposed(tmp_path, machine)
    machine.timed.clear()
    with pytest.raises(Failed, match=r"did not refuse rope_freq_scale=0\.9"):
        check(tmp_path, machine)
    assert not machine.timed


def test_a_server_that_takes_no_planted_error_proves_nothing(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    machine.refused = frozenset({"rope_freq_scale", "cache_type_k"})
    with pytest.raises(Failed, match="no error could be planted"):
        check(tmp_path, machine)


def test_answers_that_differ_for_prompts_it_has_not_seen_are_refused(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    machine.answers = lambda settings: Made(noise(4)) if settings["threads"] == "2" else Made()
    machine.answers = _all(machine.answers, honest)
    found = check(tmp_path, machine)
    assert (found.accepted, found.word) == (False, "refused")
    assert found.found is None, "it is not timed"


def _all(*made: Callable[[Settings], Made]) -> Callable[[Settings], Made]:
    """The first of them that is not what the table says."""
    return lambda settings: next(
        (one for each in made if (one := each(settings)).turn.__name__ != "nothing"), Made()
    )


@pytest.mark.parametrize(
    ("seconds", "sigma", "word"),
    [(1.0, 0.01, NO_EFFECT), (1.5, 0.01, HARMS), (1.0, 0.5, UNDECIDED)],
)
def test_a_tie_keeps_the_baseline(tmp_path: Path, seconds: float, sigma: float, word: str) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    machine.seconds = lambda settings: seconds if settings["threads"] == "2" else 1.0
    machine.sigma = sigma
    found = check(tmp_path, machine)
    assert (found.accepted, found.word) == (False, word)


def test_a_check_that_was_killed_goes_on(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    first = check(tmp_path, machine)
    machine.timed.clear()
    machine.started.clear()
    again = check(tmp_path, machine)
    assert (again.accepted, again.word) == (first.accepted, first.word)
    assert not machine.timed
    assert not machine.started


def edit(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / name).read_text())
    change(document)
    (path / name).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EVIDENCE, lambda found: found["candidate"].update(cache_type_k="q4_0")),
        (EVIDENCE, lambda found: found["steps"].clear()),
        (EVIDENCE, lambda found: found.update(reference_sha256="0" * 64)),
        (EVIDENCE, lambda found: found.pop("sha256")),
        (REFERENCE, lambda found: found["reference"]["answers"].pop()),
        (REFERENCE, lambda found: found.update(harmless=None, sha256="0" * 64)),
    ],
)
def test_what_was_edited_is_refused(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    edit(tmp_path, name, change)
    with pytest.raises(UsageError):
        read_proposal(Root("/"), str(tmp_path))


def test_a_profile_that_was_edited_is_refused(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path, machine)
    file = tmp_path / PROFILE
    file.write_text(file.read_text().replace("threads = 2", "threads = 3"))
    with pytest.raises(UsageError, match="was changed after it was proposed"):
        read_proposal(Root("/"), str(tmp_path))


def test_a_reference_of_another_run_is_refused(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better, answers=honest)
    proposed(tmp_path / "one", machine)
    job = replace(JOB, baseline={"threads": 3, "parallel": 1})
    tuning(machine, tmp_path / "other", job).phase_0()
    (tmp_path / "one" / REFERENCE).write_bytes((tmp_path / "other" / REFERENCE).read_bytes())
    with pytest.raises(UsageError, match="of another server"):
        read_proposal(Root("/"), str(tmp_path / "one"))


def test_who_edits_and_seals_anew_is_refused_by_the_gate(tmp_path: Path) -> None:
    """q8_0 keys were refused by the search; here somebody proposes them all the same."""
    machine = Machine(two_threads_are_better, answers=_all(other_answers, honest))
    proposed(tmp_path, machine, Candidate({"cache_type_k": "q8_0", "cache_type_v": "q8_0"}))
    found = check(tmp_path, machine)
    assert (found.accepted, found.word) == (False, "refused")
    assert "G2" in found.why


def test_a_reference_that_was_edited_stops_a_run_that_goes_on(tmp_path: Path) -> None:
    machine = Machine(two_threads_are_better)
    killed_after(machine, tmp_path, 5)
    edit(tmp_path, REFERENCE, lambda found: found["again"].pop())
    with pytest.raises(UsageError, match="sha256"):
        search(machine, tmp_path)


# -- what is left for people ---------------------------------------------------------------


def test_the_profile_is_one_that_infertune_takes(tmp_path: Path) -> None:
    job = replace(JOB, baseline={"threads": 1, "warmup": False, "flash_attn": "auto"})
    gates = [{"gate": "G1 identical", "word": "pass", "why": "all\nthe same"}]
    text = profile(job, Candidate({"threads": 2}), gates, "/runs/1")
    (tmp_path / "tuned.toml").write_text(text)
    found, problems = check_file(Root("/"), str(tmp_path / "tuned.toml"))
    assert found is not None
    assert not problems
    assert {name for _, name in found.general} == {"threads", "warmup", "flash_attn"}
    assert "# G1 identical: pass: all" in text
    assert "threads = 2  # found" in text


def test_the_report_tells_the_way() -> None:
    rows = [Row("threads=2", "applied", "faster", 0.5), Row("a|b", "skipped", "no | flag")]
    text = report(JOB, rows, "Proposed: threads=2.", "b1")
    assert "| `threads=2` | +50% | applied | faster |" in text
    assert "| `a\\|b` | - | skipped | no \\| flag |" in text


def test_seal_is_over_all_of_it() -> None:
    sealed = answers.seal({"a": 1})
    with pytest.raises(UsageError):
        answers.check_seal({**sealed, "b": 2})
