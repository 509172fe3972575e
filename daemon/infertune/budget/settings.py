# SPDX-License-Identifier: Apache-2.0
"""The server's settings as far as they take memory, with llama-server's own defaults."""

from __future__ import annotations

from collections.abc import Mapping

from infertune.base.records import dataclass, replace
from infertune.base.units import MIB
from infertune.budget.companions import ALONE, Companions, read_companions

CACHE_RAM = 8192 * MIB
"""Default of --cache-ram."""
CTX_CHECKPOINTS = 32
"""Default of --ctx-checkpoints, builds 11549 and 11669.  It was 3 (pull request 15293, August 2025)
and 8 (as in pull request 19408, February 2026)."""
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
    swa_full: bool = False
    """Layers with a window keep everything."""
    cache_ram: int = CACHE_RAM
    ctx_checkpoints: int = CTX_CHECKPOINTS
    """Most of them that are kept of one slot."""
    mmproj_offload: bool = True
    mtp: bool = False
    """Layers for MTP draft (``spec_type`` has draft-mtp)."""
    load_mode: str = "auto"
    fit: bool = True
    """Whether the server may shrink what is not set."""
    companions: Companions = ALONE


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
        swa_full=settings.get("swa_full") == "1",
        cache_ram=number("cache_ram", CACHE_RAM // MIB) * MIB,
        ctx_checkpoints=number("ctx_checkpoints", CTX_CHECKPOINTS),
        mmproj_offload=settings.get("mmproj_offload", "1") == "1",
        mtp="draft-mtp" in settings.get("spec_type", "").split(","),
        load_mode=settings.get("load_mode", "auto"),
        fit=settings.get("fit", "on") == "on",
    )


def read_memory(settings: Mapping[str, str]) -> ServerMemory:
    """The same with the other files that the settings name, read.  Raises ModelError."""
    return replace(server_memory(settings), companions=read_companions(settings))
