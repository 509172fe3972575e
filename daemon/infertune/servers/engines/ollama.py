# SPDX-License-Identifier: Apache-2.0
"""Ollama: lists the models that are in memory; it has no counters.

/api/ps reads the scheduler's list and leaves ``expires_at`` as it is.
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


def _talk(known: Known) -> Talk:
    del known
    loaded = yield "/api/ps"
    if not loaded.is_there:
        return Reading(loaded.state)
    # null where nothing is loaded: a list of Go's that was never made.
    models = loaded.document()["models"]
    found = objects([] if models is None else models)
    return Reading("up", tuple(Model(name_of(each.get("name")), "loaded") for each in found))


OLLAMA = Engine(
    id="ollama",
    title="Ollama",
    talk=_talk,
    ready="/api/version",
    source="Ollama 0.40, docs.ollama.com/api/ps, GET /api/ps",
)
