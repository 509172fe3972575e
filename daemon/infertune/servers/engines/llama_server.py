# SPDX-License-Identifier: Apache-2.0
"""llama-server of llama.cpp: with one model, or as a router over several.

What keeps a model (tools/server/README.md, "Sleeping on Idle"): /props, /health and a router's
/models never count as use.  /metrics wakes a model that sleeps and keeps one from falling asleep
before build 10519 (PR 27376, issues 20227 and 23096); since then it does neither.  A router's
/metrics?model= loads the model unless autoload=false says not to.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from infertune.servers.engines.base import (
    MAX_ASKED,
    MODEL_STATES,
    Answer,
    Engine,
    Known,
    Model,
    Reading,
    Talk,
    name_of,
    objects,
)
from infertune.servers.engines.exposition import samples

METRICS_LET_SLEEP = 10519
"""The first build whose /metrics neither wakes a model nor keeps it awake."""

VALUES = {
    "prompt_tokens_total": "prompt_tokens_total",
    "prompt_tokens_cached_total": "prompt_tokens_cached_total",
    "prompt_seconds_total": "prompt_seconds_total",
    "tokens_predicted_total": "tokens_predicted_total",
    "tokens_predicted_seconds_total": "tokens_predicted_seconds_total",
    "n_decode_total": "decodes_total",
    "n_busy_slots_per_decode": "busy_slots_per_decode",
    "requests_processing": "requests_processing",
    "requests_deferred": "requests_deferred",
    "n_tokens_max": "tokens_max",
    "spec_decode_num_drafts_total": "drafts_total",
    "spec_decode_num_draft_tokens_total": "draft_tokens_total",
    "spec_decode_num_accepted_tokens_total": "draft_tokens_accepted_total",
}
"""Name of its metric, and ours."""
_PREFIX = "llamacpp:"


def _talk(known: Known) -> Talk:
    props = yield "/props"
    if not props.is_there:
        return Reading(props.state)
    about = props.document()
    lets_sleep = build(about) >= METRICS_LET_SLEEP
    if about.get("role") == "router":
        return (yield from _router(known, lets_sleep=lets_sleep))
    name = name_of(about.get("model_alias"))
    if about.get("is_sleeping") is True:
        return Reading("up", (Model(name, "sleeping"),))
    if not (lets_sleep or known.never_sleeps or "is_sleeping" not in about):
        # It may have been told to sleep, and would not, for being asked.
        return Reading("no-metrics", (Model(name, "loaded"),))
    metrics = yield "/metrics"
    if not metrics.is_there:
        return Reading(metrics.state, (Model(name, "loaded"),))
    return Reading("up", (Model(name, "loaded", values(metrics.text)),))


def _router(known: Known, *, lets_sleep: bool) -> Talk:
    listed = yield "/models"
    if not listed.is_there:
        return Reading(listed.state)
    found = {name_of(each.get("id")): _state(each) for each in _known(listed)}
    # A preset may have a model sleep: each one's arguments are in the list.  A variable of somebody
    # else's unit may too, and is not seen.
    asked = lets_sleep or (known.never_sleeps and "sleep-idle-seconds" not in listed.text)
    loaded = [name_of(each.get("id")) for each in _known(listed) if _state(each) == "loaded"]
    models, state = {name: Model(name, was) for name, was in found.items()}, "up"
    if loaded and not asked:
        state = "no-metrics"
    for name in loaded[:MAX_ASKED] if asked else ():
        metrics = yield f"/metrics?model={quote(name, safe='')}&autoload=false"
        if metrics.is_there:
            models[name] = Model(name, "loaded", values(metrics.text))
        elif metrics.state == "no-metrics":
            state = metrics.state
    return Reading(state, tuple(models.values()))


def _known(listed: Answer) -> list[dict[str, object]]:
    """The models that can be asked for by the name they are shown with."""
    return [
        each
        for each in objects(listed.document().get("data"))
        if each.get("id") and name_of(each["id"]) == each["id"]
    ]


def _state(model: dict[str, object]) -> str | None:
    status = model.get("status")
    if not isinstance(status, dict):
        return None
    if status.get("failed") is True:
        return "failed"
    state = {"downloading": "loading", "downloaded": "unloaded"}.get(
        str(status.get("value")), status.get("value")
    )
    return str(state) if state in MODEL_STATES else None


def build(props: dict[str, object]) -> int:
    """Number of the build in /props (``b11669-Debian``); 0 where it does not say."""
    match = re.match(r"b([0-9]{1,9})\b", str(props.get("build_info")))
    return int(match[1]) if match else 0


def values(text: str) -> dict[str, float]:
    """What a page of llama-server's says, by our names.  Raises ValueError for another page."""
    found: dict[str, float] = {}
    is_its_page = False
    for line in samples(text, _PREFIX):
        is_its_page = True
        name = VALUES.get(line.name.removeprefix(_PREFIX))
        if name and not line.labels:
            found.setdefault(name, line.value)
    if not is_its_page:
        raise ValueError("no page of llama-server's")
    return found


LLAMA_SERVER = Engine(
    id="llama-server",
    title="llama.cpp",
    talk=_talk,
    source="llama.cpp, tools/server/README.md, GET /props, /models, /metrics (build 11669)",
)
