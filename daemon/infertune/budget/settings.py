# SPDX-License-Identifier: Apache-2.0
"""The server's settings as far as they take memory, with llama-server's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infertune.units import MIB

CACHE_RAM = 8192 * MIB
"""Default of --cache-ram."""
AUTO_SLOTS = 4
"""Without --parallel a server opens four slots in one cache (build 7500 and later, README)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    ctx: int = 0
    """Tokens of all slots together; 0: as the model says."""
    slots: int = AUTO_SLOTS
    unified: bool = True
    """One KV cache for all slots."""
    ubatch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: bool = True
    """``auto`` is on wherever the backend can, and all three can."""
    gpu_layers: int = 9999
    kv_offload: bool = True
    cpu_moe: int = 0
    """Layers whose experts stay in host memory."""
    cache_ram: int = CACHE_RAM
    load_mode: str = "auto"
    fit: bool = True
    """Whether the server may shrink what is not set."""


def server_memory(settings: Mapping[str, str]) -> ServerMemory:
    """From canonical values by id (server_settings.py); what is not set has the default."""

    def number(name: str, default: int) -> int:
        value = settings.get(name, "")
        return int(value) if value.lstrip("-").isdecimal() else default

    slots = number("parallel", 0)
    unified = settings.get("kv_unified")
    batch = number("batch_size", 2048)
    return ServerMemory(
        ctx=number("ctx_size", 0),
        slots=slots or AUTO_SLOTS,
        unified=unified == "1" if unified is not None else not slots,
        ubatch=min(number("ubatch_size", 512), batch),
        cache_type_k=settings.get("cache_type_k", "f16"),
        cache_type_v=settings.get("cache_type_v", "f16"),
        flash_attn=settings.get("flash_attn", "auto") != "off",
        gpu_layers=number("gpu_layers", 9999),
        kv_offload=settings.get("kv_offload", "1") == "1",
        cpu_moe=number("n_cpu_moe", 0),
        cache_ram=number("cache_ram", CACHE_RAM // MIB) * MIB,
        load_mode=settings.get("load_mode", "auto"),
        fit=settings.get("fit", "on") == "on",
    )
