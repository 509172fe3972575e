# SPDX-License-Identifier: Apache-2.0
"""llama-swap: a proxy that starts a server for each model.

Only /running is asked: /upstream/MODEL starts the model's server, and whatever goes through it
counts as use (the model's ``ttl``).  Its /metrics is of the machine, which is known from elsewhere.
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

_STATES = {
    "ready": "loaded",
    "starting": "loading",
    "stopping": "unloaded",
    "stopped": "unloaded",
    "shutdown": "unloaded",
}


def _talk(known: Known) -> Talk:
    del known
    running = yield "/running"
    if not running.is_there:
        return Reading(running.state)
    found = objects(running.document().get("running"))
    models = (
        Model(name_of(each.get("model")), _STATES.get(str(each.get("state")))) for each in found
    )
    return Reading("up", tuple(models))


LLAMA_SWAP = Engine(
    id="llama-swap",
    title="llama-swap",
    talk=_talk,
    source="llama-swap, README.md, GET /running (read in November 2026)",
)
