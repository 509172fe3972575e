# SPDX-License-Identifier: Apache-2.0
"""Prompts that no server has seen: from a seed and a number, each number once.

A server that has had a prompt before answers faster: its prompt cache, and speculation by n-grams,
which remembers what it generated after the same words (ngram-mod: all of a repeated answer's tokens
accepted, none of the first).  A measurement that repeats its prompts shows a gain that nobody has.
"""

from __future__ import annotations

import random

_LIST = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education river mountain engine "
    "window bridge garden letter market memory metal paper price road season shape stone summer "
    "table train valley voice winter yellow narrow gentle sudden bright hollow distant careful "
    "simple heavy quiet broken wooden silver early former usual ready strange is was has said "
    "went made came saw knew took found gave told felt left kept held brought wrote stood lost "
    "paid met ran set sat spoke lay led grew read spent won taught sold fell built sent drew "
    "the the the the a a of of and and to in that it for on with as at by from but or an when "
    "where while after before under over between through against without because although"
)
"""Common words; most tokenizers have each as one token."""
WORDS = tuple(_LIST.split())
_SENTENCE = (6, 16)


def text(seed: int, number: int, words: int) -> str:
    """Sentences of ``words`` random words: the same for the same seed and number, else another.

    They differ from their first word on, so that no prefix can be taken from a cache.
    """
    rng = random.Random(f"{seed}/{number}")  # noqa: S311 - no secret
    found = [f"Note {rng.randrange(10**9)}."]
    while words > 0:
        sentence = rng.choices(WORDS, k=min(words, rng.randint(*_SENTENCE)))
        words -= len(sentence)
        found.append(f"{' '.join(sentence).capitalize()}.")
    return " ".join(found)


class Prompts:
    """Hands out numbers of prompts, none twice."""

    def __init__(self, seed: int, first: int = 0) -> None:
        self.seed = seed
        self.next = first

    def take(self, count: int = 1) -> list[int]:
        """The next ``count`` numbers."""
        taken = list(range(self.next, self.next + count))
        self.next += count
        return taken
