# SPDX-License-Identifier: Apache-2.0
"""A model of random weights that llama.cpp loads and answers with: what depends on size alone."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from gguf_files import ALIGNMENT, Signed, Spec, Value, head

WIDTH, HIDDEN, HEADS = 2048, 6144, 16
_SCALE = 0x0CEA
"""About 0.0003 as a half: weights within 0.04, as trained ones are."""


def write(path: Path, layers: int, kind: str = "q8_0") -> Path:
    """A llama of ``layers`` layers, 58 MB each; its vocabulary is the bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{each:02X}>" for each in range(256)), "▁", "a"]
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 4096,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [Signed(each) for each in (2, 3, 3, *[6] * 256, 1, 1)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tensors = [
        Spec("token_embd.weight", (WIDTH, len(tokens)), kind),
        Spec("output_norm.weight", (WIDTH,), "f32"),
        Spec("output.weight", (WIDTH, len(tokens)), kind),
    ]
    for layer in range(layers):
        tensors += [
            Spec(f"blk.{layer}.{name}.weight", dims, "f32" if len(dims) == 1 else kind)
            for name, dims in (
                ("attn_norm", (WIDTH,)),
                *((f"attn_{each}", (WIDTH, WIDTH)) for each in ("q", "k", "v", "output")),
                ("ffn_norm", (WIDTH,)),
                ("ffn_gate", (WIDTH, HIDDEN)),
                ("ffn_up", (WIDTH, HIDDEN)),
                ("ffn_down", (HIDDEN, WIDTH)),
            )
        ]
    # Blocks of q8_0: a scale, and 32 bytes.
    noise = b"".join(struct.pack("<H", _SCALE) + os.urandom(32) for _ in range(32768))
    with path.open("wb") as file:
        file.write(head(metadata, tensors))
        for spec in tensors:
            left = spec.bytes
            while left:
                ones = struct.pack("<f", 1.0) * (left // 4) if spec.type == "f32" else noise
                left -= file.write(ones[:left])
            file.write(bytes(-spec.bytes % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
    return path
