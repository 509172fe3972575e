# SPDX-License-Identifier: Apache-2.0
"""Two readings of a machine as one document (infertune.top/1): what is, and what happened between.

Rates are of the time between the two.  An engine that counts a request when it ends has a speed
only where one has ended: then the speed of before stays, and is told as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infertune.base.records import dataclass, field

Document = Mapping[str, Any]
Labels = Mapping[str, str]
Samples = Mapping[str, Sequence[tuple[Labels, float]]]
"""By the name of the metric (docs/metrics.md)."""

MAX_SERVERS = 64
_SPEEDS = ("prompt_per_s", "tokens_per_s", "ttft_s", "ttft_at_most")


@dataclass(frozen=True, slots=True)
class Reading:
    """A machine at one moment."""

    at: float
    """CLOCK_MONOTONIC in seconds."""
    samples: Samples
    status: Document | None = None
    """infertune.status/1"""
    servers: Sequence[Document] | None = None
    """Of infertune.servers/1"""
    doctor: Document | None = None
    """infertune.doctor/1, of some minutes ago"""
    boottime: float = 0.0
    """CLOCK_BOOTTIME in seconds: what a deadline of status is in."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Why something is not there."""


class _Between:
    """What counters did between two readings; None where that is not known."""

    def __init__(self, before: Reading | None, now: Reading) -> None:
        self._now = now.samples
        self._before = before.samples if before else {}
        self.seconds = now.at - before.at if before else 0.0

    def values(self, metric: str, **labels: str) -> list[tuple[Labels, float]]:
        found = self._now.get(metric, ())
        return [each for each in found if labels.items() <= each[0].items()]

    def value(self, metric: str, **labels: str) -> float | None:
        """The sum over what has these labels."""
        found = self.values(metric, **labels)
        return sum(value for _, value in found) if found else None

    def growths(self, metric: str, **labels: str) -> list[tuple[Labels, float]]:
        """How much counters grew; one that was not there before, or began anew, tells nothing."""
        before = {_key(each): value for each, value in self._before.get(metric, ())}
        found = [(each, before.get(_key(each)), now) for each, now in self.values(metric, **labels)]
        return [(each, now - was) for each, was, now in found if was is not None and was <= now]

    def grown(self, metric: str, **labels: str) -> float | None:
        """How much they grew together."""
        found = self.growths(metric, **labels)
        return sum(value for _, value in found) if found else None

    def rate(self, metric: str, **labels: str) -> float | None:
        grown = self.grown(metric, **labels)
        return None if grown is None or self.seconds <= 0 else grown / self.seconds


def _key(labels: Labels) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def load(before: Reading | None, now: Reading, last: Document | None = None) -> Document:
    """The document; ``last`` is the one of before, for speeds that nothing new is known of."""
    between = _Between(before, now)
    known = {each["name"]: each for each in last["servers"]} if last else {}
    return {
        "interval_s": round(between.seconds, 3) if before else None,
        "profile": _profile(now),
        "drift": list(now.status["drift"]) if now.status else [],
        "doctor": _doctor(now.doctor),
        "gpus": [
            _gpu(between, labels["gpu"]) for labels, _ in between.values("infertune_gpu_info")
        ],
        "memory": _memory(between),
        "pressure": {resource: _stalled(between, resource) for resource in ("cpu", "io", "memory")},
        "run_queue": _latency(between),
        "major_faults_per_s": between.rate("infertune_page_faults_total", kind="major"),
        "servers": [
            _server(between, name, told, known.get(name))
            for name, told in _servers(between, now.servers or ())
        ],
        "unknown": dict(now.unknown),
    }


def _profile(now: Reading) -> Document | None:
    if now.status is None:
        return None
    about, demand = now.status["applied"], now.status["demand"]
    by = about["confirm_by_s"] if about else None
    return {
        "state": now.status["state"],
        "name": about["profile"] if about else None,
        "backend": about["backend"] if about else None,
        "since": about["since"] if about else None,
        "confirm_in_s": None if by is None else max(0.0, round(by - now.boottime, 1)),
        "while_serving": demand["profile"] if demand else None,
    }


def _doctor(doctor: Document | None) -> Document | None:
    if doctor is None:
        return None
    number = Counter(each["severity"] for each in doctor["findings"])
    worst = [each["text"] for each in doctor["findings"]]
    names = {"error": "errors", "warning": "warnings", "info": "notes"}
    return {name: number[each] for each, name in names.items()} | {
        "worst": worst[0] if worst else None
    }


def _stalled(between: _Between, resource: str) -> float | None:
    """Share of the time; on a busy machine the two moments are not those that are noted."""
    metric = "infertune_pressure_stalled_seconds_total"
    found = between.rate(metric, unit="system", resource=resource, share="some")
    return None if found is None else min(found, 1.0)


# -- the machine -----------------------------------------------------------------------


def _gpu(between: _Between, gpu: str) -> Document:
    cycles = between.growths("infertune_gpu_metrics_throttle_cycles_total", gpu=gpu)
    throttled = [labels["limiter"] for labels, grown in cycles if grown]
    temperatures = between.values("infertune_gpu_temperature_celsius", gpu=gpu)
    power = [
        between.value("infertune_gpu_power_watts", gpu=gpu, reading=reading)
        for reading in ("average", "instant")
    ]
    traffic = "infertune_gpu_metrics_traffic_bytes_per_second"
    return {
        "gpu": gpu,
        "busy": between.value("infertune_gpu_busy_ratio", gpu=gpu),
        "watts": next((each for each in power if each is not None), None),
        "celsius": max((value for _, value in temperatures), default=None),
        "hertz": between.value("infertune_gpu_clock_hertz", gpu=gpu, clock="sclk"),
        "dram_bytes_per_s": between.value(traffic, gpu=gpu, client="dram"),
        "throttled_by": sorted(throttled),
    }


def _memory(between: _Between) -> Document | None:
    """The judge's answer, as the collector of pools has it."""
    found = between.values("infertune_gpu_pool_bytes")
    if not found:
        return None
    [(labels, size), *_] = found
    gpu, pool = labels["gpu"], labels["pool"]
    limits = between.values("infertune_gpu_pool_limit_bytes", gpu=gpu)
    then = between.values("infertune_gpu_pool_next_boot_bytes", gpu=gpu)
    return {
        "pool": pool,
        "bytes": int(size),
        "held_bytes": _whole(between.value("infertune_gpu_pool_held_bytes", gpu=gpu, pool=pool)),
        "promised_bytes": _whole(between.value("infertune_gpu_pool_promised_bytes", gpu=gpu)),
        "limited_by": min(limits, key=lambda each: each[1])[0]["setting"] if limits else None,
        "next_boot_bytes": int(then[0][1]) if then else None,
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _latency(between: _Between, **labels: str) -> Document | None:
    """Upper bounds of how long half, and 99 of 100, waited for a processor; None where nobody is
    known to have."""
    counts: dict[float, float] = {}
    for each, grown in between.growths("infertune_run_queue_latency_seconds_bucket", **labels):
        bound = float(each.get("le", "inf"))
        counts[bound] = counts.get(bound, 0.0) + grown
    return _quantiles(sorted(counts.items()))


def _quantiles(counts: Sequence[tuple[float, float]]) -> Document | None:
    total = counts[-1][1] if counts else 0
    if not total:
        return None

    def at(share: float) -> float | None:
        bound = next(bound for bound, count in counts if count >= share * total)
        return None if bound == float("inf") else bound

    return {"p50_s": at(0.5), "p99_s": at(0.99)}


# -- servers ---------------------------------------------------------------------------


def _servers(between: _Between, told: Iterable[Document]) -> list[tuple[str, Document | None]]:
    """By name: those that infertuned tells of, and those that answer."""
    known: dict[str, Document | None] = {each["name"]: each for each in told}
    for labels, _ in between.values("infertune_server_state"):
        known.setdefault(labels["server"], None)
    return sorted(known.items())[:MAX_SERVERS]


def _server(
    between: _Between, name: str, told: Document | None, before: Document | None
) -> Document:
    about = told or {}
    answers = between.values("infertune_server_state", server=name)
    models = [
        labels["model"]
        for labels, value in between.values("infertune_model_state", server=name, state="loaded")
        if value == 1 and labels["model"]
    ]
    found = {
        "name": name,
        "state": about.get("state"),
        "answers": next((labels["state"] for labels, value in answers if value == 1), None),
        "engine": about.get("engine"),
        "model": ", ".join(models) or about.get("model"),
        "requests": between.value("infertune_model_requests_processing", server=name),
        "waiting": between.value("infertune_model_requests_deferred", server=name),
        "run_queue": _latency(between, server=name),
        "major_faults_per_s": between.rate(
            "infertune_page_faults_total", server=name, kind="major"
        ),
    }
    speeds = _speeds(between, name)
    is_new = any(each is not None for each in speeds.values())
    if not is_new and before and found["answers"] == "up":
        speeds = {each: before[each] for each in _SPEEDS}
    return {**found, **speeds, "speeds_are_new": is_new}


def _speeds(between: _Between, server: str) -> dict[str, Any]:
    """Tokens a second and time to the first token; None where nothing new is known.

    llama-server adds a request up when its prompt, and when all of it, is done: the tokens of the
    interval by the seconds spent on them are the speed, and the seconds of all prompts together are
    the most that one of them took.  Engines that tell no seconds count as they go.
    """

    def speed(tokens: str, seconds: str) -> float | None:
        made = between.grown(f"infertune_model_{tokens}", server=server)
        spent = between.grown(f"infertune_model_{seconds}", server=server)
        if spent is not None:
            return made / spent if made and spent > 0 else None
        return between.rate(f"infertune_model_{tokens}", server=server)

    first = between.grown("infertune_model_first_token_seconds_total", server=server)
    firsts = between.grown("infertune_model_first_tokens_total", server=server)
    prompts = between.grown("infertune_model_prompt_seconds_total", server=server)
    ttft = first / firsts if first is not None and firsts else prompts or None
    return {
        "prompt_per_s": speed("prompt_tokens_total", "prompt_seconds_total"),
        "tokens_per_s": speed("tokens_predicted_total", "tokens_predicted_seconds_total"),
        "ttft_s": ttft,
        "ttft_at_most": None if ttft is None else not firsts,
    }
