# SPDX-License-Identifier: Apache-2.0
"""Engines whose /metrics has the model as a label: vLLM and SGLang.

Their pages are made by a client library of Prometheus's from numbers that are there already.
SGLang's /health is not asked: it may generate a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from infertune.servers.engines.base import Engine, Known, Model, Reading, Talk, name_of
from infertune.servers.engines.exposition import Line, samples

_LARGEST = frozenset(("kv_cache_usage_ratio",))
"""Of several parts of an engine the largest counts; all else is added up."""

_VLLM = {
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:prefix_cache_hits_total": "prompt_tokens_cached_total",
    "vllm:generation_tokens_total": "tokens_predicted_total",
    "vllm:time_to_first_token_seconds_sum": "first_token_seconds_total",
    "vllm:time_to_first_token_seconds_count": "first_tokens_total",
    "vllm:num_requests_running": "requests_processing",
    "vllm:num_requests_waiting": "requests_deferred",
    "vllm:kv_cache_usage_perc": "kv_cache_usage_ratio",
    "vllm:gpu_cache_usage_perc": "kv_cache_usage_ratio",  # before 0.10
    "vllm:spec_decode_num_drafts_total": "drafts_total",
    "vllm:spec_decode_num_draft_tokens_total": "draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total": "draft_tokens_accepted_total",
}
_SGLANG = {
    "sglang:prompt_tokens_total": "prompt_tokens_total",
    "sglang:cached_tokens_total": "prompt_tokens_cached_total",
    "sglang:generation_tokens_total": "tokens_predicted_total",
    "sglang:time_to_first_token_seconds_sum": "first_token_seconds_total",
    "sglang:time_to_first_token_seconds_count": "first_tokens_total",
    "sglang:num_running_reqs": "requests_processing",
    "sglang:num_queue_reqs": "requests_deferred",
    "sglang:token_usage": "kv_cache_usage_ratio",
}


def _talk(prefix: str, names: Mapping[str, str], known: Known) -> Talk:
    del known
    metrics = yield "/metrics"
    if not metrics.is_there:
        return Reading(metrics.state)
    values: dict[str, dict[str, float]] = {}
    asleep, is_its_page = set(), False
    for line in samples(metrics.text, prefix):
        is_its_page = True
        model = name_of(line.labels.get("model_name"))
        if line.name == "vllm:engine_sleep_state":
            if line.labels.get("sleep_state") == "awake" and line.value == 0:
                asleep.add(model)
                values.setdefault(model, {})
        elif line.name in names and _is_whole(line):
            _add(values.setdefault(model, {}), names[line.name], line.value)
    if not is_its_page:
        return Reading("not-understood")
    models = (
        Model(model, "sleeping" if model in asleep else "loaded", found)
        for model, found in values.items()
    )
    return Reading("up", tuple(models))


def _is_whole(line: Line) -> bool:
    """Whether it is not a share of another line: SGLang tells queues by priority, too."""
    return not line.labels.get("priority")


def _add(values: dict[str, float], name: str, value: float) -> None:
    before = values.get(name, 0.0)
    together = max(before, value) if name in _LARGEST else before + value
    values[name] = math.nan if math.isnan(before + value) else together


VLLM = Engine(
    id="vllm",
    title="vLLM",
    talk=partial(_talk, "vllm:", _VLLM),
    source="vLLM 0.32, docs/usage/metrics.md, GET /metrics",
)
SGLANG = Engine(
    id="sglang",
    title="SGLang",
    talk=partial(_talk, "sglang:", _SGLANG),
    source="SGLang 0.5, docs/references/production_metrics.md, GET /metrics",
)
