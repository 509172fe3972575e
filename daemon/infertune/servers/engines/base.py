# SPDX-License-Identifier: Apache-2.0
"""What an inference engine is, and what one reading of it says.  Pure.

An engine is asked by a conversation: a generator that yields the path it wants to know next, is
handed the answer, and returns a Reading.  Who carries it out (the exporter) bounds bytes, seconds
and the number of questions.

**A conversation changes nothing.**  No path in it may load a model, wake one that sleeps, or make
the engine take it for used; each entry says by which document or source that is so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

from infertune.base.records import dataclass, field
from infertune.base.units import printable_line

MODEL_STATES = ("loaded", "loading", "sleeping", "unloaded", "failed")
"""What a model can be.  ``sleeping``: the engine has it, its weights are out of memory."""

MAX_ASKED = 16
"""Models of one engine whose values are asked for one by one."""
_NAME_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    state: str
    """``up``, or why there is no text: ``loading``, ``no-metrics``, ``denied``, ``timeout``,
    ``unreachable``, ``not-understood``."""
    text: str = ""

    @property
    def is_there(self) -> bool:
        return self.state == "up"

    def document(self) -> dict[str, Any]:
        """The object of JSON it is.  Raises ValueError."""
        found = json.loads(self.text)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found


@dataclass(frozen=True, slots=True)
class Model:
    """One model of an engine."""

    name: str
    """As clients ask for it; empty where the engine does not say."""
    state: str | None
    """One of MODEL_STATES; None: not known."""
    values: Mapping[str, float] = field(default_factory=dict)
    """By the name of the metric without ``infertune_model_``; what is not known is not there."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How an engine is, and its models."""

    state: str
    """As of an Answer; ``up`` where it serves."""
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a server beside what it answers."""

    never_sleeps: bool = False
    """It was started without a setting that unloads its model; False: not known."""


Talk = Generator[str, Answer, Reading]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One inference engine: how it is called, recognised and read."""

    id: str
    """As ``engine =`` of a declaration says it."""
    title: str
    """As server_files/command_line.py recognises it: by the program that a unit starts."""
    talk: Callable[[Known], Talk]
    ready: str = "/health"
    """Path that answers 200 once it serves: asked while it starts, and never by a scrape."""
    source: str
    """Documents, or files of its source, and the version that was read."""


def name_of(found: object) -> str:
    """A model's name as a label: bounded, and nothing in it that breaks a line or an encoding."""
    return printable_line(found, _NAME_LENGTH) if isinstance(found, str) else ""


def objects(found: object) -> list[dict[str, Any]]:
    """The objects of a list.  Raises ValueError where it is none."""
    if not isinstance(found, list):
        raise ValueError("no list")
    return [each for each in found if isinstance(each, dict)]
