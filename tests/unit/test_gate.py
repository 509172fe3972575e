# SPDX-License-Identifier: Apache-2.0
"""The gate: what keeps the answers passes, what changes them does not.

Servers are made up here: a table of random numbers in the place of a model.
``test_gate_recorded.py`` has answers of real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from infertune.base.errors import Failed, UsageError
from infertune.measure import gate
from infertune.measure.answers import (
    LATER,
    TOKENS,
    Ask,
    OtherVocabulary,
    Reference,
    digest,
    follow,
    followed_document,
    followed_from,
    from_document,
    later,
    refer,
    solves,
    to_document,
)
from infertune.measure.arm import Arm
from infertune.measure.compare import Outcome, harmless, judge, lay
from infertune.measure.gate import Drift
from infertune.measure.questions import ITEMS, PREFIXES
from made_server import VOCABULARY, Made, Turn, noise, nothing
from support import GENEROUS_S


def served(others: Mapping[str, Made], base: Made | None = None) -> Callable[[Arm], Any]:
    """Serves by the value of a setting that is none of the base's: ``cache_type_k``."""

    @contextmanager
    def serve(arm: Arm) -> Iterator[Ask]:
        if arm.settings.get("flash_attn") == "off" or "ubatch_size" in arm.settings:
            yield Made(noise(0.05, seed=7))
        else:
            yield others.get(arm.settings.get("cache_type_k", ""), base or Made())

    return serve


def judged(other: Made, *, numbers: bool = True, base: Made | None = None, **more: str) -> Outcome:
    serve = served({"x": other}, base)
    arm = Arm("m", {"parallel": "1"})
    ground = lay(serve, arm, lambda _: None, again=1)
    changed = Arm("m", {**arm.settings, "cache_type_k": "x", **more})
    return judge(serve, ground, changed, numbers=numbers, say=lambda _: None)


def words(outcome: Outcome) -> dict[str, str]:
    return {each.gate[:2]: each.word for each in outcome.verdicts}


def reference(count: int = 4) -> tuple[Made, Reference]:
    server = Made()
    return server, refer(server, PREFIXES[:count], items=False)


# -- what passes, and what does not --------------------------------------------------------


def test_the_same_answers_are_accepted_and_nothing_more_is_asked() -> None:
    other = Made()
    outcome = judged(other)
    assert words(outcome) == {"G0": "pass", "G1": "pass"}
    assert outcome.accepted
    assert not any(isinstance(each.get("prompt"), str) for each in other.seen), "no closed items"


def test_near_ties_that_turn_are_accepted() -> None:
    outcome = judged(Made(noise(0.05)), numbers=False)
    assert words(outcome) == {"G0": "pass", "G1": "not asked", "G2": "pass"}
    assert outcome.accepted


def test_what_changes_numbers_on_purpose_is_asked_more() -> None:
    outcome = judged(Made(noise(0.05)))
    assert words(outcome) == {
        "G0": "pass",
        "G1": "not asked",
        "G2": "pass",
        "G3": "pass",
        "G4": "pass",
    }
    assert outcome.accepted


def test_other_answers_are_refused() -> None:
    outcome = judged(Made(noise(3)), numbers=False)
    assert words(outcome)["G2"] == "refused"
    assert outcome.decided
    assert not outcome.accepted


def test_numbers_that_moved_too_far_are_refused_though_all_differences_are_near() -> None:
    outcome = judged(Made(noise(0.3)))
    assert words(outcome)["G2"] == "pass"
    assert words(outcome)["G3"] == "refused"
    assert not outcome.accepted


def test_items_that_are_no_longer_solved_refuse() -> None:
    outcome = judged(Made(noise(0.05), solved=36))
    assert words(outcome)["G3"] == "pass"
    assert words(outcome)["G4"] == "refused"
    assert not outcome.accepted


def test_a_model_that_solves_too_little_is_not_judged_by_its_numbers_alone() -> None:
    outcome = judged(Made(noise(0.05), solved=9), base=Made(solved=9))
    assert words(outcome)["G4"] == "cannot judge"
    assert not outcome.accepted
    assert not outcome.decided


def bad_after(place: int) -> Turn:
    """Two near ties turned at the beginning of an answer, and a state that goes bad later."""
    small, large = noise(0.05), noise(5)

    def turn(context: list[int], token: int) -> float:
        begun = next(len(each) for each in map(_tokens, PREFIXES) if context[: len(each)] == each)
        return (large if len(context) - begun >= place else small)(context, token)

    return turn


def _tokens(text: str) -> list[int]:
    return [each % VOCABULARY for each in text.encode()]


def test_a_state_that_goes_bad_late_is_seen_behind_the_first_difference() -> None:
    late = Made(bad_after(TOKENS - 2))
    outcome = judged(late, numbers=False)
    found = [
        each for one in outcome.followed for each in gate.differences(outcome.ground.reference, one)
    ]
    assert words(outcome)["G2"] == "refused"
    assert any(each.at >= TOKENS - 2 and not each.close for each in found)


def test_a_server_that_answers_otherwise_from_its_cache_is_refused() -> None:
    class Forgetful(Made):
        def __call__(self, path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
            self.turn = noise(4) if document.get("cache_prompt") else nothing
            return super().__call__(path, document)

    assert words(judged(Forgetful(), numbers=False))["G2"] == "refused"


def test_a_server_that_answers_otherwise_at_its_slots_is_refused() -> None:
    class Crowded(Made):
        def __init__(self) -> None:
            super().__init__()
            self.threads: set[int] = set()
            self.bad = noise(4)

        def __call__(self, path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
            self.threads.add(threading.get_ident())
            alive = self.threads & {each.ident for each in threading.enumerate()}
            self.turn = self.bad if len(alive) > 1 else nothing
            return super().__call__(path, document)

    assert judged(Crowded(), numbers=False).accepted, "one at a time it is right"
    assert not judged(Crowded(), numbers=False, parallel="4").accepted


def test_as_many_prompts_are_asked_together_as_there_are_slots() -> None:
    plain, asked = reference()
    together = threading.Barrier(2)

    def ask(path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        if path == "/completion":
            together.wait(GENEROUS_S)  # breaks where nobody comes
        return plain(path, document)

    assert len(follow(ask, asked, at_once=2)) == 4


# -- drafts --------------------------------------------------------------------------------


def test_a_draft_that_keeps_the_answers_is_accepted() -> None:
    assert judged(Made(drafts=True)).accepted


def test_a_drafter_that_changes_answers_is_refused() -> None:
    """What it says comes without a list; asked alone for that very token, the server is right."""

    class Wrong(Made):
        def __call__(self, path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
            told = super().__call__(path, document)
            for each in told.get("completion_probabilities", ()):
                if not each["top_logprobs"]:
                    each["id"] = (each["id"] + VOCABULARY // 2) % VOCABULARY
            return told

    assert words(judged(Wrong(drafts=True)))["G2"] == "refused"


def test_a_token_without_a_list_is_no_certain_one() -> None:
    server, asked = reference()
    found = gate.drift(asked, [follow(Made(drafts=True), asked)])
    assert found is not None
    assert found.mean == 0
    assert found.same_top == 1
    assert server.seen


# -- the reference -------------------------------------------------------------------------


class Unsteady(Made):
    """Another answer each time it is started."""

    started = 0

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def begin(self) -> None:
        self.started += 1
        self.turn = noise(self.size, seed=self.started)


def itself(size: float) -> gate.Verdict:
    server = Unsteady(size)

    @contextmanager
    def serve(_: Arm) -> Iterator[Ask]:
        server.begin()
        yield server

    ground = lay(serve, Arm("m", {}), lambda _: None, again=2)
    return gate.itself(ground.reference, ground.again)


def test_a_reference_that_contradicts_itself_judges_nobody() -> None:
    assert itself(4).word == "cannot judge"


def test_a_reference_with_near_ties_of_its_own_judges() -> None:
    found = itself(0.05)
    assert found.word == "pass"
    assert "near ties" in found.why


def test_a_reference_that_was_not_asked_again_judges_nobody() -> None:
    _, asked = reference()
    assert gate.itself(asked, ()).word == "cannot judge"


def test_other_tokens_for_the_same_text_are_no_answer_to_compare() -> None:
    _, asked = reference()
    with pytest.raises(OtherVocabulary, match="other tokens"):
        follow(Made(shift=1), asked)


def test_a_server_that_was_not_asked_to_the_end_is_not_accepted() -> None:
    server, asked = reference()
    whole = follow(server, asked)
    assert gate.identical(asked, [whole]).word == "pass"
    assert gate.identical(asked, []).word == "not asked"
    assert gate.near(asked, []).word == "cannot judge"
    for short in (whole[:-1], (*whole[:-1], ())):
        assert gate.identical(asked, [short]).word == "not asked"
        assert gate.near(asked, [short]).word == "cannot judge"


# -- the numbers ---------------------------------------------------------------------------

FLOOR = Drift(500, 0.05, 0.4, 0.97)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (Drift(500, 0.1, 0.8, 0.95), "pass"),
        (Drift(500, 0.101, 0.8, 0.95), "refused"),
        (Drift(500, 0.1, 0.81, 0.95), "refused"),
        (Drift(500, 0.1, 0.8, 0.949), "refused"),
        (None, "cannot judge"),
    ],
)
def test_numbers_may_move_twice_as_far_as_what_is_harmless(
    changed: Drift | None, word: str
) -> None:
    assert gate.numbers(changed, FLOOR).word == word


def test_twice_nothing_would_refuse_everything() -> None:
    none = Drift(500, 0.0, 0.0, 1.0)
    assert gate.numbers(Drift(500, 0.02, 0.2, 1.0), none).word == "pass"
    assert gate.numbers(Drift(500, 0.021, 0.2, 1.0), none).word == "refused"
    assert gate.numbers(Drift(500, 0.02, 0.2, 1.0), None).word == "cannot judge"


@pytest.mark.parametrize(
    ("lost", "won", "word"),
    [(0, 0, "pass"), (2, 0, "pass"), (3, 0, "refused"), (5, 4, "pass"), (5, 1, "refused")],
)
def test_as_many_items_must_be_solved(lost: int, won: int, word: str) -> None:
    before = [True] * lost + [False] * won + [True] * 20
    after = [False] * lost + [True] * won + [True] * 20
    assert gate.tasks(before, after).word == word


def test_few_solved_items_say_nothing() -> None:
    assert gate.tasks([True] * 9 + [False] * 31, [True] * 40).word == "cannot judge"
    assert gate.tasks([True] * 10, [True] * 10).word == "pass"
    assert gate.tasks([True] * 20, []).word == "cannot judge"


def test_mcnemar_is_exact() -> None:
    """Against the binomial distribution, counted by hand."""
    assert gate.mcnemar(0, 0) == 1
    assert gate.mcnemar(5, 0) == 1 / 32
    assert gate.mcnemar(4, 0) == 1 / 16
    assert gate.mcnemar(8, 1) == 10 / 512
    assert gate.mcnemar(1, 8) == 511 / 512


def test_floor_is_the_most_of_what_is_harmless() -> None:
    found = gate.floor([Drift(10, 0.1, 0.2, 0.99), Drift(20, 0.05, 0.4, 0.98)])
    assert found == Drift(20, 0.1, 0.4, 0.98)


def test_what_is_harmless_is_no_setting_that_the_server_has_already() -> None:
    assert harmless({}) == ({"flash_attn": "off"}, {"ubatch_size": "32"})
    assert harmless({"flash_attn": "off", "ubatch_size": "32"}) == (
        {"flash_attn": "on"},
        {"ubatch_size": "64"},
    )


# -- asking and keeping --------------------------------------------------------------------


def test_places_after_a_difference() -> None:
    assert later(0, 24) == (1, 8, 16)
    assert later(22, 24) == (23,)
    assert later(23, 24) == ()
    assert all(len(later(at, TOKENS)) <= LATER for at in range(TOKENS))


@pytest.mark.parametrize(
    ("said", "right"),
    [(" 47", True), ("47.", True), (" 47\n", True), ("470", False), ("", False), ("x 47", False)],
)
def test_an_item_is_solved_by_the_one_right_answer(said: str, right: bool) -> None:
    assert solves(said, "47") is right


def test_forty_items_and_24_beginnings_none_of_them_twice() -> None:
    assert len({question for question, _ in ITEMS}) == len(ITEMS) == 40
    assert len(set(PREFIXES)) == len(PREFIXES) == 24


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"completion_probabilities": []},
        {"completion_probabilities": [{"id": 1}]},
        {"completion_probabilities": [{"id": 1, "token": "a", "top_logprobs": []}] * TOKENS},
    ],
)
def test_an_answer_that_is_none_is_one_line(told: Mapping[str, Any]) -> None:
    with pytest.raises(Failed):
        refer(lambda path, _: {"tokens": [1]} if path == "/tokenize" else told, items=False)


def test_answers_are_kept_and_come_back() -> None:
    server, asked = reference()
    assert from_document(to_document(asked, {"model": "m"})) == asked
    said = follow(Made(noise(0.5)), asked)
    assert followed_from(followed_document(said)) == said
    assert server.seen


def changed_in(document: dict[str, Any]) -> list[dict[str, Any]]:
    first = document["answers"][0]
    step = first["steps"][0]
    return [
        {**document, "solved": [True] * 40},
        {**document, "about": {}},
        {**document, "answers": [{**first, "steps": [[step[0] + 1, *step[1:]]]}]},
        {name: value for name, value in document.items() if name != "sha256"},
    ]


def test_a_reference_that_was_edited_is_refused() -> None:
    _, asked = reference()
    for edited in changed_in(to_document(asked, {"model": "m"})):
        with pytest.raises(UsageError, match="sha256"):
            from_document(edited)


def test_a_document_of_another_kind_is_refused() -> None:
    for other in ({"schema": "infertune.answers/1", "answers": []}, {"schema": "x"}):
        sealed = {**other, "sha256": digest(other)}
        with pytest.raises(UsageError):
            from_document(sealed)
    for wrong in (3, [3], [[[0, [[1]]]]]):
        with pytest.raises(UsageError):
            followed_from(wrong)
