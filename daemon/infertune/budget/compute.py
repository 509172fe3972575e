# SPDX-License-Identifier: Apache-2.0
"""Working memory of one batch: llama.cpp's compute and output buffers.

llama.cpp lays the tensors of its largest graph over each other (ggml-alloc.c) and keeps the
result.  Which tensors live at once decides; the sums below are those of the largest moment of
each kind of layer, as measured: on the CPU with build 11549, on a GPU with build 11669 and the
Vulkan backend (docs/memory.md, "How well").
"""

from __future__ import annotations

from infertune.base.records import dataclass
from infertune.base.units import MIB
from infertune.budget.kv import cells
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape

_F32 = 4
SERVER_BYTES = 30 * MIB
"""Code and tables of a llama-server without a model: 12 MiB anonymous, 18 MiB of its files."""
TOKEN_BYTES = 230
"""Host memory for each entry of the vocabulary: its text, its pieces, two maps.  Both measured
with build 11549."""


_INDEX = 8
"""Bytes of an index into a cache (i64)."""


@dataclass(frozen=True, slots=True)
class Compute:
    buffer: int
    """Where the layers are computed."""
    inputs: int
    """In host memory: what is prepared there for a GPU; 0 where the host computes."""
    output: int
    """Logits on their way to the sampler."""


def compute(shape: Shape, memory: ServerMemory, *, gpu: bool = False) -> Compute:
    """Bytes of the buffers, of a GPU's graph or the host's."""
    room = cells(shape, memory)
    tokens = min(memory.ubatch, room.full * room.streams)
    sees = [
        *([room.full] if any(each.k_values and not each.window for each in shape.layers) else []),
        *([room.window] if room.window else []),
    ]
    # The mask is f16 for flash attention (llama-graph.cpp, build_attn_inp_kq_mask), else f32.
    inputs = sum(sees) * tokens * (2 if memory.flash_attn else _F32)
    if gpu and not memory.flash_attn:
        # V lies the other way round: each number has an index of its own (set_input_v_idxs).
        widest = max((each.v_values for each in shape.layers), default=0)
        inputs += len(sees) * widest * tokens * _INDEX
    logits = memory.slots * shape.vocab * _F32
    peak = max(_widths(shape, memory, max(sees, default=0), gpu=gpu)) * tokens
    if shape.recurrent_width:
        # A layer's states are taken out of the cache, and put back; on a GPU both may live at once.
        states = max(each.state_values for each in shape.layers) * memory.slots * (2 if gpu else 1)
        peak = max(peak, (5 * shape.embedding + shape.recurrent_width) * tokens + states)
    peak *= _F32
    return Compute(
        buffer=max(peak, logits) + inputs,
        # Four rows as wide as the embedding, which itself stays with the host: measured.
        inputs=inputs + 4 * shape.embedding * tokens * _F32 if gpu else 0,
        output=logits,
    )


def _widths(shape: Shape, memory: ServerMemory, sees: int, *, gpu: bool) -> list[int]:
    """Numbers for one token that live at once, of each kind of layer this model has.

    Five rows as wide as the embedding are always there: what the layer got, and the sums and
    norms around it.  Where a GPU computes, one of them is the host's, unless layers have states.
    """
    in_place = gpu and not any(each.state_values for each in shape.layers)
    rows = (4 if in_place else 5) * shape.embedding
    found = [rows + 3 * shape.feed_forward]  # gate, up, and their product
    if shape.experts:
        inner = shape.experts_used * shape.expert_feed_forward
        out = shape.experts_used * shape.embedding
        if not shape.gated:
            found.append(rows + inner + out)
        else:
            # What experts give finds no room where gate and up were, if it is wider than both.
            wider = out if shape.embedding > 2 * shape.expert_feed_forward else 0
            found.append(rows + 3 * inner + wider)
    heads = max((each.heads for each in shape.layers if each.k_values), default=0)
    q_values = max((each.q_values for each in shape.layers if each.k_values), default=0)
    if shape.mla:
        head, rank, rope = shape.mla
        attention = heads * (head + rope + rank + rank + rope)
    elif memory.flash_attn:
        attention = 2 * q_values
    elif in_place:
        # Q finds room in the rows that are free by then, if it is no wider.
        attention = 2 * q_values if q_values > shape.embedding else 0
    else:
        attention = 3 * q_values
    found.append(rows + attention + (0 if memory.flash_attn else sees * heads))
    return found
