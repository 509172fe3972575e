# SPDX-License-Identifier: Apache-2.0
"""What a llama-server answers, token by token with log-probabilities, to be compared (gate.py).

Prompts go as token ids, so that two servers are asked the very same thing, and what differs between
their answers is not the text around them.  A *reference* is a server's greedy answer to each of the
``PREFIXES``.  Another server is made to *follow* it: it answers the same prompt, and from where it
differs the reference's own text is put before it at three later places, from each of which it goes
on.  So what went bad late is seen, too, and one near tie at the beginning does not hide the rest.

An accepted token of a draft comes with no list and a ``logprob`` of 0.0, which is not a probability
of one: it was never looked up (tools/server/server-context.cpp, "TODO: set result.probs").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass
from infertune.measure.questions import ITEMS, PREFIXES

Ask = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""Posts a document to a path of a server and gives what it answers.  Raises Failed."""

TOKENS = 24
"""Tokens of an answer."""
TOP = 5
"""Tokens whose log-probabilities are asked for at each place."""
LATER = 3
"""Places after the first difference from which a server goes on."""

_SCHEMA = "infertune.answers/1"
_MOST_PREFIXES = 1000
_ITEM_TOKENS = 6
_DECIMALS = 5
"""Of a log-probability: the rest is below what 32-bit sums give."""


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer."""

    token: int
    text: str
    top: tuple[tuple[int, float], ...]
    """Tokens and natural logarithms of their probabilities, the best first; empty where the server
    does not tell."""

    def logprob(self, token: int) -> float | None:
        """That of a token; None where it is not among the best."""
        return next((value for each, value in self.top if each == token), None)


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer to a prompt."""

    prompt: tuple[int, ...]
    text: str
    """The prompt, for people."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a server answers to everything."""

    answers: tuple[Answer, ...]
    solved: tuple[bool, ...]
    """Of each closed item whether it was solved; empty where they were not asked."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a server says after the first ``at`` tokens of the reference's answer."""

    at: int
    steps: tuple[Step, ...]


Followed = tuple[tuple[Stretch, ...], ...]
"""For each answer of a reference what another server said to it."""


class OtherVocabulary(Failed):
    """Two servers have other numbers for the same text: their answers cannot be compared."""


# -- asking -----------------------------------------------------------------------------


def refer(ask: Ask, prefixes: Sequence[str] = PREFIXES, *, items: bool = True) -> Reference:
    """A server's own answers, without its prompt cache.  Raises Failed."""
    answers = []
    for text in prefixes:
        prompt = _tokens(ask, text)
        answers.append(Answer(prompt, text, _steps(ask, prompt, TOKENS, cache=False)))
    return Reference(tuple(answers), solve(ask) if items else ())


def one_token(ask: Ask) -> None:
    """Have a server give a token, in the way in which it is to be asked.  Raises Failed."""
    _steps(ask, _tokens(ask, PREFIXES[0]), 1, cache=False)


def follow(
    ask: Ask,
    reference: Reference,
    *,
    cache: bool = False,
    at_once: int = 1,
    enough: Callable[[Answer, tuple[Stretch, ...]], bool] = lambda *_: False,
) -> Followed:
    """What a server says to the prompts of a reference, and to its text.

    ``cache``: with its prompt cache, which then holds the prompt.  ``at_once``: prompts that it
    works on together.  Stops early where ``enough`` says so of one answer.  Raises
    OtherVocabulary, and Failed.
    """

    def one(answer: Answer) -> tuple[Stretch, ...]:
        if _tokens(ask, answer.text) != answer.prompt:
            raise OtherVocabulary("the two servers have other tokens for the same text")
        return _follow_one(ask, answer, cache)

    found = []
    pool = ThreadPoolExecutor(at_once)
    try:
        for answer, stretches in zip(
            reference.answers, pool.map(one, reference.answers), strict=True
        ):
            found.append(stretches)
            if enough(answer, stretches):
                break
    finally:
        pool.shutdown(cancel_futures=True)
    return tuple(found)


def _follow_one(ask: Ask, answer: Answer, cache: bool) -> tuple[Stretch, ...]:
    wanted = tuple(step.token for step in answer.steps)

    def say(at: int, count: int) -> Stretch:
        return Stretch(at, _steps(ask, answer.prompt + wanted[:at], count, cache=cache))

    if cache:
        _steps(ask, answer.prompt, 1, cache=True)
    first = say(0, len(wanted))
    at = difference(answer, first)
    if at is None:
        return (first,)
    found = [first]
    if not first.steps[at].top:
        # A token out of a draft.  The first one after a prompt never is.
        found.append(say(at, 1))
    for place, end in pairwise((*later(at, len(wanted)), len(wanted))):
        found.append(say(place, end - place))
    return tuple(found)


def difference(answer: Answer, stretch: Stretch) -> int | None:
    """Where in the answer a stretch first differs from it; None where it does not."""
    for offset, step in enumerate(stretch.steps):
        if step.token != answer.steps[stretch.at + offset].token:
            return stretch.at + offset
    return None


def later(at: int, length: int) -> tuple[int, ...]:
    """Up to LATER places after ``at``, evenly over what is left of an answer."""
    left = length - at - 1
    return tuple(sorted({at + 1 + left * each // LATER for each in range(LATER)})) if left else ()


def solve(ask: Ask) -> tuple[bool, ...]:
    """Which of the closed items a server solves."""
    found = []
    for question, wanted in ITEMS:
        document = {
            **_GREEDY,
            "prompt": question,
            "n_predict": _ITEM_TOKENS,
            "stop": ["\n"],
            "cache_prompt": False,
        }
        said = ask("/completion", document).get("content")
        if not isinstance(said, str):
            raise _strange()
        found.append(solves(said, wanted))
    return tuple(found)


def solves(said: str, wanted: str) -> bool:
    """Whether an answer begins with the one that is right, and not with a longer word or number."""
    said = said.strip()
    rest = said[len(wanted) :]
    return said.startswith(wanted) and not rest[:1].isalnum()


_GREEDY: Mapping[str, Any] = {"temperature": 0, "top_k": 1, "seed": 1}


def _tokens(ask: Ask, text: str) -> tuple[int, ...]:
    found = ask("/tokenize", {"content": text, "add_special": True}).get("tokens")
    if not isinstance(found, list) or not found or not all(type(each) is int for each in found):
        raise _strange()
    return tuple(found)


def _steps(ask: Ask, prompt: Sequence[int], count: int, *, cache: bool) -> tuple[Step, ...]:
    document = {
        **_GREEDY,
        "prompt": list(prompt),
        "n_predict": count,
        "n_probs": TOP,
        "cache_prompt": cache,
        "ignore_eos": True,
        "return_tokens": True,
    }
    told = ask("/completion", document)
    try:
        steps = tuple(_step(each) for each in told["completion_probabilities"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _strange() from None
    if len(steps) != count:
        raise Failed(f"the server gave {len(steps)} of {count} tokens")
    if not steps[0].top:
        raise Failed("the server gives no log-probabilities")
    return steps


def _step(told: Mapping[str, Any]) -> Step:
    top = tuple(
        (int(each["id"]), round(float(each["logprob"]), _DECIMALS)) for each in told["top_logprobs"]
    )
    return Step(int(told["id"]), str(told["token"]), top[:TOP])


def _strange() -> Failed:
    return Failed("the server's answer is not one of llama-server's")


# -- keeping ----------------------------------------------------------------------------


def to_document(reference: Reference, about: Mapping[str, Any]) -> dict[str, Any]:
    """A reference as a sealed document; ``about``: whose answers these are."""
    return seal(
        {
            "schema": _SCHEMA,
            "about": dict(about),
            "answers": [
                {"text": each.text, "prompt": list(each.prompt), "steps": _written(each.steps)}
                for each in reference.answers
            ],
            "solved": list(reference.solved),
        }
    )


def from_document(document: Mapping[str, Any]) -> Reference:
    """A reference as it was kept.  Raises UsageError for one that was changed, or is none."""
    check_seal(document)
    try:
        if document["schema"] != _SCHEMA or len(document["answers"]) > _MOST_PREFIXES:
            raise ValueError
        answers = tuple(
            Answer(tuple(map(int, each["prompt"])), str(each["text"]), _read(each["steps"]))
            for each in document["answers"]
        )
        solved = tuple(map(bool, document["solved"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(f"not a document of schema {_SCHEMA}") from None
    if not answers or not all(each.steps and each.prompt for each in answers):
        raise UsageError("a reference without answers")
    return Reference(answers, solved)


def followed_document(followed: Followed) -> list[Any]:
    """What was said to a reference, as plain data."""
    return [[[each.at, _written(each.steps)] for each in stretches] for stretches in followed]


def followed_from(document: Any) -> Followed:
    """The way back.  Raises UsageError."""
    try:
        return tuple(
            tuple(Stretch(int(at), _read(steps)) for at, steps in stretches)
            for stretches in document
        )
    except (TypeError, ValueError, OverflowError):
        raise UsageError("not what a server said to a reference") from None


def fits(reference: Reference, followed: Followed) -> bool:
    """Whether this can have been said to the answers of a reference."""
    return len(followed) <= len(reference.answers) and all(
        stretches
        and all(
            each.at >= 0 and each.at + len(each.steps) <= len(answer.steps) for each in stretches
        )
        for answer, stretches in zip(reference.answers, followed, strict=False)
    )


def _written(steps: Sequence[Step]) -> list[Any]:
    return [[step.token, step.text, [list(each) for each in step.top]] for step in steps]


def _read(steps: Any) -> tuple[Step, ...]:
    return tuple(
        Step(int(token), str(text), tuple((int(each), float(value)) for each, value in top))
        for token, text, top in steps
    )


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the SHA-256 of what it says.

    It tells a slip, or an edit by hand; who means to deceive can seal anew.
    """
    return {**document, "sha256": digest(document)}


def check_seal(document: Mapping[str, Any]) -> None:
    """Raise UsageError where a document does not say what was sealed."""
    if document.get("sha256") != digest(document):
        raise UsageError(
            "its sha256 is not that of what it says: it was changed after it was measured",
            hint="measure again; a reference is not edited",
        )


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a document, without the field ``sha256``."""
    said = {name: value for name, value in document.items() if name != "sha256"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
