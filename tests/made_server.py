# SPDX-License-Identifier: Apache-2.0
"""A server whose model is a table of random numbers, for tests of what compares answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from infertune.measure.questions import ITEMS

VOCABULARY = 60

Turn = Callable[[list[int], int], float]
"""What a server adds to the score of a token, by what stands before it."""


def nothing(_: list[int], __: int) -> float:
    return 0.0


def noise(size: float, seed: int = 1) -> Turn:
    """Random numbers of this standard deviation, the same for the same text."""
    return lambda context, token: random.Random(f"{seed} {context[-8:]} {token}").gauss(0, size)


class Made:
    """A server whose model is a table; it answers as llama-server does."""

    def __init__(
        self, turn: Turn = nothing, *, drafts: bool = False, solved: int = 40, shift: int = 0
    ) -> None:
        self.turn = turn
        self.drafts = drafts
        self.solved = solved
        self.shift = shift
        self.seen: list[Mapping[str, Any]] = []

    def __call__(self, path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        self.seen.append(document)
        if path == "/tokenize":
            words = document["content"].encode()
            return {"tokens": [each % VOCABULARY + self.shift for each in words]}
        prompt = document["prompt"]
        if isinstance(prompt, str):
            number = [question for question, _ in ITEMS].index(prompt)
            return {"content": f" {ITEMS[number][1]}" if number < self.solved else " no"}
        context, told = list(prompt), []
        for place in range(document["n_predict"]):
            top = self.best(context)
            token = top[0][0]
            listed = top[: document["n_probs"]] if not (self.drafts and place % 3) else []
            told.append(
                {
                    "id": token,
                    "token": f"<{token}>",
                    "logprob": 0.0,
                    "top_logprobs": [{"id": each, "logprob": value} for each, value in listed],
                }
            )
            context.append(token)
        return {"completion_probabilities": told}

    def best(self, context: list[int]) -> list[tuple[int, float]]:
        """The same scores for the same last four tokens, as a model's for the same text."""
        if self.turn is nothing:
            return _plain(tuple(context[-4:]))
        table = _table(tuple(context[-4:]))
        return _sorted([score + self.turn(context, each) for each, score in enumerate(table)])


@cache
def _table(context: tuple[int, ...]) -> list[float]:
    rng = random.Random(str(context))
    return [rng.gauss(0, 3) for _ in range(VOCABULARY)]


@cache
def _plain(context: tuple[int, ...]) -> list[tuple[int, float]]:
    return _sorted(_table(context))


def _sorted(scores: list[float]) -> list[tuple[int, float]]:
    total = math.log(sum(map(math.exp, scores)))
    return sorted(
        ((each, value - total) for each, value in enumerate(scores)), key=lambda pair: -pair[1]
    )
