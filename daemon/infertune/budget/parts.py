# SPDX-License-Identifier: Apache-2.0
"""What a server takes, part by part: where it lies, and when it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from infertune.budget.compute import SERVER_BYTES, TOKEN_BYTES, compute
from infertune.budget.kv import checkpoint_bytes, kv_bytes, state_bytes
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape

Where = Literal["GPU", "host"]
When = Literal["start", "later", "reclaimable"]

_CHECKPOINTS = 32
_CHECKPOINT_STEP = 8192
"""llama-server's --ctx-checkpoints and --checkpoint-min-step, build 11549."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory."""

    what: str
    bytes: int
    where: Where
    when: When
    """``later``: it may grow to this.  ``reclaimable``: the kernel takes it back when it must."""
    source: str


def parts(shape: Shape, memory: ServerMemory, backend: str) -> tuple[Part, ...]:
    """Everything the server takes, by where and when."""
    return tuple(part for part in _parts(shape, memory, backend) if part.bytes)


def _parts(shape: Shape, memory: ServerMemory, backend: str) -> Iterator[Part]:
    on_gpu = [backend != "cpu" and each for each in _offloaded(shape, memory)]
    gpu, host = _weights(shape, memory, on_gpu, backend)
    tensors = "tensors in the file"
    yield Part("weights", gpu, "GPU", "start", tensors)
    yield Part("weights", host, "host", "start", tensors)
    if not shape.known:
        return
    if backend == "cpu" and memory.load_mode in ("auto", "mmap", "mlock", "mmap+mlock"):
        why = "the CPU backend's own order; the file's pages stay until somebody needs the room"
        yield Part("weights, repacked", shape.repacked_bytes, "host", "reclaimable", why)
    types = memory.cache_type_k
    if memory.cache_type_v != memory.cache_type_k:
        types = f"{memory.cache_type_k}/{memory.cache_type_v}"
    what = f"KV cache, {memory.ctx} tokens, {types}"
    yield from _split(what, kv_bytes(shape, memory), on_gpu, memory, "layers, KV heads, windows")
    what = f"recurrent state, {_count(memory.slots, 'slot')}"
    yield from _split(what, state_bytes(shape, memory), on_gpu, memory, "state sizes, f32")
    buffers = compute(shape, memory)
    where: Where = "GPU" if any(on_gpu) else "host"
    yield Part(
        f"compute buffer, ubatch {memory.ubatch}", buffers.buffer, where, "start", "largest graph"
    )
    if where == "GPU":
        inputs = buffers.masks + 4 * shape.embedding * memory.ubatch
        yield Part("inputs of the GPU's graph", inputs, "host", "start", "masks and embeddings")
    yield Part("output buffer", buffers.output, "host", "start", "logits of each slot")
    own = SERVER_BYTES + TOKEN_BYTES * shape.vocab
    yield Part("the server itself", own, "host", "start", "measured: program, vocabulary")
    yield Part("prompt cache", memory.cache_ram, "host", "later", "cache_ram")
    kept = min(_CHECKPOINTS, memory.ctx // _CHECKPOINT_STEP) * memory.slots
    if memory.unified:
        kept = min(kept, memory.ctx // _CHECKPOINT_STEP + memory.slots)
    yield Part(
        f"context checkpoints, up to {kept}",
        kept * checkpoint_bytes(shape, memory),
        "host",
        "later",
        "windows and states that cannot be taken back",
    )


def _weights(
    shape: Shape, memory: ServerMemory, on_gpu: list[bool], backend: str
) -> tuple[int, int]:
    """Bytes on the GPU and in host memory.  Layers for MTP are in the file, and not loaded."""
    if not shape.known:
        return (0, shape.weights_bytes) if backend == "cpu" else (shape.weights_bytes, 0)
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


def _offloaded(shape: Shape, memory: ServerMemory) -> list[bool]:
    """Which layers are the GPU's: the output, which counts as one, and then from the last on."""
    first = len(shape.layers) + 1 - memory.gpu_layers
    return [number >= first for number in range(len(shape.layers))]


def _split(
    what: str, sizes: list[int], on_gpu: list[bool], memory: ServerMemory, source: str
) -> Iterator[Part]:
    gpu = sum(size for size, there in zip(sizes, on_gpu, strict=True) if there)
    gpu = gpu if memory.kv_offload else 0
    yield Part(what, gpu, "GPU", "start", source)
    yield Part(what, sum(sizes) - gpu, "host", "start", source)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
