# SPDX-License-Identifier: Apache-2.0
"""Lemonade: its own counters for each model, and those of the llama-server behind a model.

/api/v1/health lists what is loaded.  /metrics hands on the /metrics of each llama-server, which
may keep a model that is told to sleep (see llama_server.py) and whose build is not told; so where
a model's options speak of sleep it is not asked.  A variable of Lemonade's own unit that has
llama-server sleep is not seen.
"""

from __future__ import annotations

from infertune.servers.engines.base import (
    Engine,
    Known,
    Model,
    Reading,
    Talk,
    name_of,
    objects,
)
from infertune.servers.engines.exposition import samples
from infertune.servers.engines.llama_server import VALUES as LLAMA_VALUES

_BACKEND = "lemonade_llamacpp"
_OWN = {
    "lemonade_model_input_tokens_total": "prompt_tokens_total",
    "lemonade_model_output_tokens_total": "tokens_predicted_total",
}
"""Counted by Lemonade itself, for every kind of backend."""


def _talk(known: Known) -> Talk:
    del known
    health = yield "/api/v1/health"
    if not health.is_there:
        return Reading(health.state)
    loaded = objects(health.document().get("all_models_loaded") or [])
    states = {name_of(each.get("model_name")): "loaded" for each in loaded}
    if "sleep-idle" in health.text:
        return Reading("no-metrics", tuple(Model(*each) for each in states.items()))
    metrics = yield "/metrics"
    found = _values(metrics.text) if metrics.is_there else {}
    names = {**states, **dict.fromkeys(found, "unloaded"), **states}
    models = (Model(name, state, found.get(name, {})) for name, state in names.items())
    return Reading(metrics.state, tuple(models))


def _values(text: str) -> dict[str, dict[str, float]]:
    """Values by model.  A llama-server's own count goes before Lemonade's: it has the times too."""
    found: dict[str, dict[str, float]] = {}
    own: dict[str, dict[str, float]] = {}
    for line in samples(text, "lemonade_"):
        model = name_of(line.labels.get("model_name"))
        if line.name in _OWN:
            own.setdefault(model, {})[_OWN[line.name]] = line.value
        elif line.name.startswith(_BACKEND):
            name = LLAMA_VALUES.get(line.name[len(_BACKEND) + 1 :])
            if name:
                found.setdefault(model, {})[name] = line.value
    return {model: {**own.get(model, {}), **found.get(model, {})} for model in {**own, **found}}


LEMONADE = Engine(
    id="lemonade",
    title="Lemonade",
    talk=_talk,
    ready="/api/v1/health",
    source="Lemonade 10.9, docs/api/prometheus.md and src/cpp/server, GET /api/v1/health, /metrics",
)
