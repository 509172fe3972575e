# SPDX-License-Identifier: Apache-2.0
"""Readings of a machine that serves, made up: what ``top`` is shown in tests."""

from __future__ import annotations

from typing import Any

from infertune.views.load import Labels, Reading

BUCKETS = ("1e-06", "0.0001", "0.01", "+Inf")
STATUS: dict[str, Any] = {
    "state": "applied",
    "applied": {
        "profile": "long-context", "backend": "vulkan", "owner": "infertuned (pid 7)",
        "since": "2026-11-24T08:00:00+00:00", "held": False, "confirm_by_s": 1300.0,
    },
    "notes": [], "damaged_journals": [], "items": [], "demand": None,
    "drift": [
        {"knob": "vm.swappiness", "path": "/proc/sys/vm/swappiness", "state": "external",
         "value": "100", "by": "tuned"},
    ],
}  # fmt: skip
SERVERS = [
    {"name": "gpt", "state": "active", "profile": "big-moe", "port": 8080, "host": None,
     "model": "/models/gpt-oss-120b-MXFP4-00001-of-00003.gguf", "engine": "llama-server",
     "unit": None, "user": None, "error": None},
    {"name": "vllm", "state": "active", "profile": "serve-many", "port": 8000, "host": None,
     "model": None, "engine": "vllm", "unit": None, "user": None, "error": None},
    {"name": "old", "state": "failed", "profile": "quiet", "port": 8082, "host": None,
     "model": "/models/x.gguf", "engine": "llama-server", "unit": None, "user": None,
     "error": "exit code 1"},
]  # fmt: skip
DOCTOR = {
    "findings": [
        {"severity": "error", "text": "the GPU was reset"},
        {"severity": "info", "text": "GPU memory is the kernel's default, half of RAM"},
    ]
}


def reading(tick: int, **more: Any) -> Reading:
    """The machine ``tick`` times two seconds after its start: each tick a request ends."""
    samples: dict[str, list[tuple[Labels, float]]] = {}

    def add(metric: str, value: float, **labels: str) -> None:
        samples.setdefault(f"infertune_{metric}", []).append((labels, float(value)))

    add("gpu_info", 1, gpu="card1", pci_address="0000:c2:00.0", pci_id="1002:1586")
    add("gpu_busy_ratio", 0.87, gpu="card1")
    add("gpu_power_watts", 78.042, gpu="card1", reading="average")
    add("gpu_temperature_celsius", 64, gpu="card1", sensor="edge")
    add("gpu_clock_hertz", 2.85e9, gpu="card1", clock="sclk")
    for direction, value in (("read", 51.2e9), ("write", 1e9)):
        add("gpu_metrics_traffic_bytes_per_second", value,
            gpu="card1", client="dram", direction=direction)  # fmt: skip
    for limiter, cycles in (("spl", 1000 * tick), ("thm_gfx", 7)):
        add("gpu_metrics_throttle_cycles_total", cycles, gpu="card1", limiter=limiter)
    add("gpu_pool_bytes", 96 << 30, gpu="card1", pool="GTT")
    add("gpu_pool_held_bytes", 72 << 30, gpu="card1", pool="GTT")
    add("gpu_pool_promised_bytes", 4 << 30, gpu="card1", pool="GTT")
    add("gpu_pool_limit_bytes", 120 << 30, gpu="card1", setting="RAM")
    add("gpu_pool_limit_bytes", 96 << 30, gpu="card1", setting="ttm.pages_limit")
    add("gpu_pool_next_boot_bytes", 104 << 30, gpu="card1", pool="GTT")
    for resource, share in (("cpu", 0.1), ("io", 0.0), ("memory", 0.02)):
        for unit in ("system", "infertune.slice"):
            add("pressure_stalled_seconds_total", 2 * share * tick,
                unit=unit, server="", resource=resource, share="some")  # fmt: skip
    for server, model in (("gpt", "gpt-oss"), ("vllm", "qwen")):
        for state in ("up", "loading"):
            add("server_state", state == "up", server=server, state=state)
        add("model_state", 1, server=server, model=model, state="loaded")
        add("model_requests_processing", 2, server=server, model=model)
        add("model_requests_deferred", 1, server=server, model=model)
        add("model_prompt_tokens_total", 1000 * tick, server=server, model=model)
        add("model_tokens_predicted_total", 60 * tick, server=server, model=model)
        for server_kind, faults in (("major", 4 * tick), ("minor", 900 * tick)):
            add("page_faults_total", faults, server=server, kind=server_kind)
        for bound, share in zip(BUCKETS, (0.6, 0.98, 1.0, 1.0), strict=True):
            add("run_queue_latency_seconds_bucket", 1000 * share * tick, server=server, le=bound)
    add("model_prompt_seconds_total", 1.6 * tick, server="gpt", model="gpt-oss")
    add("model_tokens_predicted_seconds_total", 1.2 * tick, server="gpt", model="gpt-oss")
    add("model_first_token_seconds_total", 0.5 * tick, server="vllm", model="qwen")
    add("model_first_tokens_total", 2 * tick, server="vllm", model="qwen")
    told: dict[str, Any] = {
        "status": STATUS, "servers": SERVERS, "doctor": DOCTOR, "boottime": 1000.0 + 2 * tick,
    }  # fmt: skip
    return Reading(at=2.0 * tick, samples=samples, **{**told, **more})
