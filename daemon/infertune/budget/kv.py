# SPDX-License-Identifier: Apache-2.0
"""What a server keeps of the tokens it has seen: KV cache and recurrent state.

llama.cpp: src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp.  All of it
is allocated, and written once, at the start.
"""

from __future__ import annotations

from infertune.base.records import dataclass
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Layer, Shape

BLOCK = 32
TYPE_BYTES = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
"""Bytes of 32 values (ggml-common.h); the types llama-server offers for its cache."""

_PAD = 256
"""Cells of a cache come in this number (since llama.cpp issue 17037 for windows too)."""


@dataclass(frozen=True, slots=True)
class Cells:
    """How many tokens the caches have room for."""

    streams: int
    """Caches beside each other: one, or one for each slot."""
    full: int
    """Tokens in each."""
    window: int
    """Tokens in each, of layers that see a window; 0 where there are none."""


def pad(count: int, to: int = _PAD) -> int:
    return -(-count // to) * to


def cells(shape: Shape, memory: ServerMemory) -> Cells:
    """Room of the caches: a window needs room for one more batch."""
    context = memory.ctx or shape.context
    streams = 1 if memory.unified else memory.slots
    full = pad(pad(context) // streams)
    window = max((layer.window or 0 for layer in shape.layers), default=0)
    if window and memory.swa_full:
        window = full
    elif window:
        together = window * (memory.slots if memory.unified else 1)
        window = pad(min(full, together + min(memory.ubatch, full)))
    return Cells(streams, full, window)


def kv_bytes(shape: Shape, memory: ServerMemory) -> list[int]:
    """Bytes of the KV cache of each layer."""
    room = cells(shape, memory)
    widest = max((layer.v_values for layer in shape.layers), default=0)
    sizes = []
    for layer in shape.layers:
        tokens = room.streams * (room.window if layer.window else room.full)
        # Without flash attention V lies the other way round, and is as wide everywhere.
        v_values = layer.v_values if memory.flash_attn or not layer.v_values else widest
        sizes.append(
            tokens
            * (
                row_bytes(memory.cache_type_k, layer.k_values)
                + row_bytes(memory.cache_type_v, v_values)
            )
        )
    return sizes


def token_bytes(shape: Shape, memory: ServerMemory) -> int:
    """Bytes that one more token takes, in the layers that see everything."""
    return sum(_token(layer, memory) for layer in shape.layers if not layer.window)


def state_bytes(shape: Shape, memory: ServerMemory) -> list[int]:
    """Bytes of the recurrent state of each layer: f32, for each slot."""
    return [4 * layer.state_values * memory.slots for layer in shape.layers]


def checkpoint_bytes(shape: Shape, memory: ServerMemory, *, masked: bool) -> int:
    """Bytes of one context checkpoint: what cannot be taken back, of one slot.

    Its states, and of windows all cells that it has, up to all there are.  ``masked``: without the
    cells behind the window (since llama.cpp pull request 23981, June 2026; build 11669 has it).
    """
    room = cells(shape, memory)
    state = 4 * sum(layer.state_values for layer in shape.layers)
    windows = [layer for layer in shape.layers if layer.window and not memory.swa_full]
    if not windows:
        return state
    kept = room.window
    if masked:
        kept = min(kept, max(layer.window or 0 for layer in windows))
    return state + kept * sum(_token(layer, memory) for layer in windows)


def _token(layer: Layer, memory: ServerMemory) -> int:
    return row_bytes(memory.cache_type_k, layer.k_values) + row_bytes(
        memory.cache_type_v, layer.v_values
    )


def row_bytes(cache_type: str, values: int) -> int:
    """Bytes of so many values in whole blocks."""
    if cache_type in ("f32", "f16", "bf16"):
        return values * TYPE_BYTES[cache_type] // BLOCK
    return -(-values // BLOCK) * TYPE_BYTES[cache_type]
