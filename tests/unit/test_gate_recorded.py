# SPDX-License-Identifier: Apache-2.0
"""The gate over answers of real servers: SmolLM2-135M Q4_1 on llama.cpp b11549, on a CPU.

``scripts/record-answers`` has recorded them.  What is refused here a search for speed would take.
The model is Apache-2.0.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import Failed
from infertune.measure.answers import Ask
from infertune.measure.arm import Arm
from infertune.measure.compare import Outcome, judge, lay

FILE = Path(__file__).parents[1] / "fixtures" / "answers" / "smollm2-135m.json.gz"
BASE = {"ctx_size": "2048", "parallel": "1", "threads": "1", "warmup": "0"}


@cache
def servers() -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = json.loads(gzip.decompress(FILE.read_bytes()))
    return found["servers"]


@contextmanager
def replay(arm: Arm) -> Iterator[Ask]:
    other = {each: value for each, value in sorted(arm.settings.items()) if BASE.get(each) != value}
    answers = servers()[json.dumps([arm.model, other])]

    def ask(path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = answers[json.dumps([path, document], sort_keys=True)]
        except KeyError:
            raise Failed("this was not recorded") from None
        return found

    yield ask


def judged(model: str, numbers: bool, **settings: str) -> Outcome:
    ground = lay(replay, Arm("model", BASE), lambda _: None, again=1)
    arm = Arm(model, {**BASE, **settings})
    return judge(replay, ground, arm, numbers=numbers, say=lambda _: None)


def test_flash_attention_off_is_harmless() -> None:
    outcome = judged("model", False, flash_attn="off")
    assert outcome.accepted
    assert outcome.verdicts[1].word == "not asked", "it does change the text"


@pytest.mark.parametrize("settings", [("cache_type_k",), ("cache_type_k", "cache_type_v")])
def test_q8_0_is_accepted(settings: tuple[str, ...]) -> None:
    outcome = judged("model", True, **dict.fromkeys(settings, "q8_0"))
    assert outcome.accepted
    assert [each.gate[:2] for each in outcome.verdicts] == ["G0", "G1", "G2", "G3", "G4"]


def test_speculation_by_ngrams_says_the_same() -> None:
    outcome = judged("model", True, spec_type="ngram-simple")
    assert outcome.accepted
    assert [each.word for each in outcome.verdicts] == ["pass", "pass"]


@pytest.mark.parametrize(
    ("model", "settings", "gate"),
    [
        ("model", {"cache_type_k": "q4_0"}, "G2"),
        ("model", {"rope_freq_scale": "0.9"}, "G3"),
        ("requantised", {}, "G2"),
    ],
)
def test_what_changes_the_answers_is_refused(
    model: str, settings: Mapping[str, str], gate: str
) -> None:
    outcome = judged(model, True, **settings)
    assert outcome.decided
    assert not outcome.accepted
    assert [each.gate[:2] for each in outcome.verdicts if each.word == "refused"] == [gate]
