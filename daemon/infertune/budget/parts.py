# SPDX-License-Identifier: Apache-2.0
"""What a server takes, part by part: where it lies, and when it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from infertune.base.records import dataclass, replace
from infertune.base.units import format_size
from infertune.budget.compute import SERVER_BYTES, TOKEN_BYTES, compute
from infertune.budget.kv import checkpoint_bytes, kv_bytes, state_bytes
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape, mtp_shape

Where = Literal["GPU", "host"]
When = Literal["start", "later", "reclaimable"]

_TENSORS = "tensors in the file"


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory."""

    what: str
    bytes: int
    where: Where
    when: When
    """``later``: it may grow to this.  ``reclaimable``: the kernel takes it back when it must."""
    source: str
    setting: str | None = None
    """The server setting that makes it larger or smaller."""


def parts(shape: Shape, memory: ServerMemory, backend: str) -> tuple[Part, ...]:
    """Everything the server takes, by where and when."""
    return tuple(part for part in _parts(shape, memory, backend) if part.bytes)


def _parts(shape: Shape, memory: ServerMemory, backend: str) -> Iterator[Part]:
    yield from _weight_parts(shape, memory, backend)
    if shape.known:
        yield from _working_parts(shape, memory, backend)
    yield from _drafter_parts(shape, memory, backend)
    projector = memory.companions.projector
    if projector:
        where: Where = "GPU" if backend != "cpu" and memory.mmproj_offload else "host"
        why = f"{_TENSORS}; its compute buffer is not known"
        yield Part("projector (mmproj)", projector.weights_bytes, where, "start", why, "mmproj")
    if shape.known:
        yield from _server_parts(shape, memory)


def _weight_parts(
    shape: Shape, memory: ServerMemory, backend: str, name: str = "", setting: str | None = None
) -> Iterator[Part]:
    gpu, host = _weights(shape, memory, backend)
    yield Part(f"{name}weights", gpu, "GPU", "start", _TENSORS, setting)
    yield Part(f"{name}weights", host, "host", "start", _TENSORS, setting)
    if not shape.known:
        return
    if backend == "cpu" and memory.load_mode in ("auto", "mmap", "mlock", "mmap+mlock"):
        why = "the CPU backend's own order; the file's pages stay until memory is needed"
        yield Part(f"{name}weights, repacked", shape.repacked_bytes, "host", "reclaimable", why)


def _working_parts(
    shape: Shape, memory: ServerMemory, backend: str, name: str = ""
) -> Iterator[Part]:
    """What one model works with: caches, states, buffers."""
    on_gpu = _on_gpu(shape, memory, backend)
    types = memory.cache_type_k
    if memory.cache_type_v != memory.cache_type_k:
        types = f"{memory.cache_type_k}/{memory.cache_type_v}"
    cache = Part(
        f"{name}KV cache, {memory.ctx} tokens, {types}",
        0, "GPU", "start", "layers, heads, windows", "ctx_size",
    )  # fmt: skip
    yield from _split(cache, kv_bytes(shape, memory), on_gpu, memory)
    state = Part(
        f"{name}recurrent state, {_count(memory.slots, 'slot')}",
        0, "GPU", "start", "state sizes, f32", "parallel",
    )  # fmt: skip
    yield from _split(state, state_bytes(shape, memory), on_gpu, memory)
    gpu = any(on_gpu)
    buffers = compute(shape, memory, gpu=gpu)
    yield Part(
        f"{name}compute buffer, ubatch {memory.ubatch}",
        buffers.buffer,
        "GPU" if gpu else "host",
        "start",
        "largest graph",
        "ubatch_size",
    )
    yield Part(
        f"{name}inputs of the GPU's graph",
        buffers.inputs,
        "host",
        "start",
        "masks and embeddings",
        "ubatch_size",
    )
    yield Part(
        f"{name}output buffer", buffers.output, "host", "start", "logits of each slot", "parallel"
    )


def _drafting(shape: Shape, memory: ServerMemory) -> tuple[Shape, ServerMemory] | None:
    """What guesses ahead: a model of its own, or layers for MTP, of this model or in a file.

    Its context is as long and has as many slots as the model's, its cache is f16
    (--spec-draft-type-k), and all layers of a file of its own go to the GPU (--spec-draft-ngl).
    """
    draft = memory.companions.draft
    own = replace(memory, cache_type_k="f16", cache_type_v="f16", cpu_moe=0)
    if draft:
        own = replace(own, gpu_layers=9999)
    elif not memory.mtp:
        return None
    drafts = mtp_shape(draft or shape) if memory.mtp else draft
    return (drafts, own) if drafts and drafts.known and drafts.layers else None


def _drafter_parts(shape: Shape, memory: ServerMemory, backend: str) -> Iterator[Part]:
    draft, drafting = memory.companions.draft, _drafting(shape, memory)
    name = "draft model: " if draft else "MTP: "
    if draft:
        own = drafting[1] if drafting else memory
        yield from _weight_parts(draft, own, backend, name, "model_draft")
        if memory.mtp:
            size = sum(layer.weights_bytes for layer in draft.mtp_layers)
            where: Where = "GPU" if backend != "cpu" else "host"
            yield Part(f"{name}layers for MTP", size, where, "start", _TENSORS, "model_draft")
    elif drafting:
        size = sum(layer.weights_bytes for layer in shape.mtp_layers)
        where = "GPU" if any(_on_gpu(drafting[0], memory, backend)) else "host"
        yield Part(f"{name}weights", size, where, "start", _TENSORS, "spec_type")
    if drafting:
        yield from _working_parts(*drafting, backend, name)


def _server_parts(shape: Shape, memory: ServerMemory) -> Iterator[Part]:
    """What the server keeps in host memory, whatever computes."""
    own = SERVER_BYTES + TOKEN_BYTES * shape.vocab
    yield Part("the server itself", own, "host", "start", "measured, by vocabulary")
    yield Part("prompt cache", memory.cache_ram, "host", "later", "cache_ram", "cache_ram")
    each, masked, total = _checkpoints(shape, memory)
    # In a unified cache one slot's checkpoints may be the larger part, and are then the only ones.
    alone = memory.slots == 1 or (memory.unified and each > memory.slots * masked)
    of = "a slot" if alone else "each slot"
    source = f"up to {memory.ctx_checkpoints} of {of}, {format_size(each)} each: windows and states"
    if each != masked:
        source = f"{source}; {format_size(masked)} since June 2026 (PR 23981)"
    yield Part("context checkpoints", total, "host", "later", source, "ctx_checkpoints")


def _checkpoints(shape: Shape, memory: ServerMemory) -> tuple[int, int, int]:
    """Bytes of a checkpoint before and since PR 23981, and of all, by the rule that takes more.

    Their distance (--checkpoint-min-step) is no bound: the last user message and the end of each
    prompt get theirs however near (server-context.cpp; build 11669 kept 8 of a slot after four
    requests of 3300 tokens).  In a unified cache one slot may have all cells of the windows, but
    then it has them alone.
    """
    each = checkpoint_bytes(shape, memory, masked=False)
    masked = checkpoint_bytes(shape, memory, masked=True)
    drafting = _drafting(shape, memory)
    if each and drafting:  # the draft's windows and states are in it, too
        each += checkpoint_bytes(*drafting, masked=False)
        masked += checkpoint_bytes(*drafting, masked=True)
    streams = 1 if memory.unified else memory.slots
    return each, masked, memory.ctx_checkpoints * max(streams * each, memory.slots * masked)


def _weights(shape: Shape, memory: ServerMemory, backend: str) -> tuple[int, int]:
    """Bytes on the GPU and in host memory, without the layers for MTP."""
    if not shape.known:
        return (0, shape.weights_bytes) if backend == "cpu" else (shape.weights_bytes, 0)
    on_gpu = _on_gpu(shape, memory, backend)
    gpu, host = 0, shape.input_bytes
    if backend != "cpu" and memory.gpu_layers:
        gpu += shape.output_bytes + (shape.input_bytes if shape.tied else 0)
    else:
        host += shape.output_bytes
    for number, layer in enumerate(shape.layers):
        experts = layer.expert_bytes if number < memory.cpu_moe else 0
        if on_gpu[number]:
            gpu, host = gpu + layer.weights_bytes - experts, host + experts
        else:
            host += layer.weights_bytes
    return gpu, host


def _on_gpu(shape: Shape, memory: ServerMemory, backend: str) -> list[bool]:
    """Which layers are the GPU's: the output, which counts as one, and then from the last on."""
    first = len(shape.layers) + 1 - memory.gpu_layers
    return [backend != "cpu" and number >= first for number in range(len(shape.layers))]


def _split(
    part: Part, sizes: list[int], on_gpu: list[bool], memory: ServerMemory
) -> Iterator[Part]:
    gpu = sum(size for size, there in zip(sizes, on_gpu, strict=True) if there)
    gpu = gpu if memory.kv_offload else 0
    yield replace(part, bytes=gpu)
    yield replace(part, bytes=sum(sizes) - gpu, where="host")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
