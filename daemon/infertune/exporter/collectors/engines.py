# SPDX-License-Identifier: Apache-2.0
"""What inference engines say of themselves, under the name of their declaration and of the model.

An engine's own names are its own (``llamacpp:prompt_tokens_total``, ``vllm:prompt_tokens_total``);
here one thing has one name.  Only what is listed here passes, so that a server cannot add series.
A reading never loads, wakes or keeps a model (servers/engines).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from infertune.base.root import Root
from infertune.exporter.asking import STATES, ask
from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, one_of
from infertune.exporter.servers import asked
from infertune.servers.engines import ENGINES
from infertune.servers.engines.base import MODEL_STATES, Model, Reading

MAX_MODELS = 64
"""Bound of the label ``model`` for one server; those that are loaded come first."""
_SOURCE = "; ".join(engine.source for engine in ENGINES.values())
_OF_LLAMA = ENGINES["llama-server"].source
_OF_LABELLED = "; ".join(ENGINES[each].source for each in ("vllm", "sglang"))
_SERIES = f"one per model (at most {MAX_MODELS} of each declared server)"

# Name, type, unit and meaning; whose documents.
_VALUES: tuple[tuple[str, Literal["gauge", "counter"], str, str, str], ...] = (
    (
        "prompt_tokens_total",
        "counter",
        "items",
        "Prompt tokens processed; llama-server leaves out cached ones.",
        _SOURCE,
    ),
    (
        *("prompt_tokens_cached_total", "counter", "items"),
        *("Prompt tokens taken from the cache.", _SOURCE),
    ),
    ("prompt_seconds_total", "counter", "seconds", "Time spent on prompts.", _OF_LLAMA),
    ("tokens_predicted_total", "counter", "items", "Tokens generated.", _SOURCE),
    ("tokens_predicted_seconds_total", "counter", "seconds", "Time spent generating.", _OF_LLAMA),
    (
        *("first_token_seconds_total", "counter", "seconds"),
        *("Time from request to first token, of all requests.", _OF_LABELLED),
    ),
    ("first_tokens_total", "counter", "items", "Requests that have a first token.", _OF_LABELLED),
    ("decodes_total", "counter", "items", "Calls of llama_decode().", _OF_LLAMA),
    ("busy_slots_per_decode", "gauge", "items", "Slots busy per call, on average.", _OF_LLAMA),
    ("requests_processing", "gauge", "items", "Requests in work.", _SOURCE),
    ("requests_deferred", "gauge", "items", "Requests that wait for their turn.", _SOURCE),
    ("tokens_max", "gauge", "items", "Largest context seen.", _OF_LLAMA),
    ("kv_cache_usage_ratio", "gauge", "ratio", "Share of the KV cache that is in use.", _SOURCE),
    ("drafts_total", "counter", "items", "Drafts made.", _SOURCE),
    ("draft_tokens_total", "counter", "items", "Tokens drafted.", _SOURCE),
    ("draft_tokens_accepted_total", "counter", "items", "Drafted tokens accepted.", _SOURCE),
)

METRICS = (
    Metric(
        name="infertune_server_state",
        unit="1",
        help=f"1 for how a declared server answers now: {', '.join(STATES)}.",
        labels=("server", "state"),
        source=_SOURCE,
        series=f"{len(STATES)} per declared server (at most 64)",
    ),
    Metric(
        name="infertune_model_state",
        unit="1",
        help=f"1 for what a model of a server is now: {', '.join(MODEL_STATES)}. A server that "
        "lists loaded ones only (Ollama, Lemonade, llama-swap) has no series of the others.",
        labels=("server", "model", "state"),
        source=_SOURCE,
        series=f"{len(MODEL_STATES)} per model (at most {MAX_MODELS} of each declared server)",
    ),
    *(
        Metric(
            name=f"infertune_model_{name}",
            kind=kind,
            unit=unit,
            help=text,
            labels=("server", "model"),
            source=source,
            series=_SERIES,
        )
        for name, kind, unit, text, source in _VALUES
    ),
)
_NAMES = frozenset(name for name, *_ in _VALUES)


def read(root: Root) -> Iterable[Sample]:
    """Every declared server.  Raises Absent where none is declared, or on a recorded machine."""
    declared = asked(root)
    if not declared:
        raise Absent("no server is declared")
    if not root.live:
        raise Absent("a recorded machine does not answer")
    talks = {
        name: (each.port, each.engine.talk(each.known))
        for name, each in declared.items()
        if each.engine
    }
    readings = ask(talks)
    for server in declared:
        yield from of_one(server, readings.get(server, Reading("unknown-engine")))


def of_one(server: str, reading: Reading) -> Iterable[Sample]:
    """One server's samples."""
    yield from one_of("infertune_server_state", (server,), STATES, reading.state)
    models = {each.name: each for each in reading.models}  # one that is told twice counts once
    for model in bounded(sorted(models.values(), key=_loaded_first), MAX_MODELS):
        labels = (server, model.name)
        if model.state is not None:
            yield from one_of("infertune_model_state", labels, MODEL_STATES, model.state)
        for name, value in model.values.items():
            if name in _NAMES and math.isfinite(value) and value >= 0:  # all else is not known
                yield Sample(f"infertune_model_{name}", labels, value)


def _loaded_first(model: Model) -> tuple[bool, str]:
    return model.state != "loaded", model.name


ENGINES_COLLECTOR = Collector(
    id="engines",
    summary="What inference engines say of themselves, by declared server and model. They tell "
    "sums, of which an average can be made; that says nothing of the slowest request. No model is "
    "loaded, woken or kept for it: a model that sleeps or is not loaded has a state and nothing "
    "else.",
    metrics=METRICS,
    read=read,
    timeout_s=4.0,
)
