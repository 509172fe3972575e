# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests: a head as told, and behind it nothing (a hole of the right length).

Written from ggml/docs/gguf.md, not with the reader under test; llama.cpp has loaded such files
(tests/unit/test_budget.py).  tests/host/test_budget.py compares the reader with llama.cpp's own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Scalar = int | float | bool | str
Value = Scalar | Sequence[Scalar]


class Signed(int):
    """A whole number of 32 bits with a sign, where llama.cpp takes no other."""


TYPES = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q8_0": (8, 32, 34),
    "q4_K": (12, 256, 144),
    "q6_K": (14, 256, 210),
    "bf16": (30, 1, 2),
    "mxfp4": (39, 32, 17),
}
"""Number, elements of a block, bytes of a block: ggml.h and ggml-common.h of llama.cpp."""

ALIGNMENT = 32


@dataclass(frozen=True)
class Spec:
    """A tensor that a test wants."""

    name: str
    dims: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        _, block, width = TYPES[self.type]
        count = 1
        for dim in self.dims:
            count *= dim
        assert self.dims[0] % block == 0, self
        return count // block * width


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _scalar(value: Scalar) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, Signed):
        return 5, struct.pack("<i", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, text(value)


def entry(key: str, value: Value) -> bytes:
    """One key with its value."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind, data = _scalar(value)
        return text(key) + struct.pack("<I", kind) + data
    items = [_scalar(each) for each in value]
    kind = items[0][0] if items else 4
    data = b"".join(data for _, data in items)
    return text(key) + struct.pack("<IIQ", 9, kind, len(items)) + data


def head(
    metadata: Mapping[str, Value],
    tensors: Sequence[Spec],
    *,
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """The head of a file, padded to where the data starts; counts may be made to lie."""
    out = [
        b"GGUF",
        struct.pack(
            "<IQQ",
            version,
            len(tensors) if tensor_count is None else tensor_count,
            len(metadata) if key_count is None else key_count,
        ),
        *(entry(key, value) for key, value in metadata.items()),
    ]
    offset = 0
    for spec in tensors:
        out += [
            text(spec.name),
            struct.pack("<I", len(spec.dims)),
            struct.pack(f"<{len(spec.dims)}Q", *spec.dims),
            struct.pack("<IQ", TYPES[spec.type][0], offset),
        ]
        offset += -(-spec.bytes // ALIGNMENT) * ALIGNMENT
    data = b"".join(out)
    return data + bytes(-len(data) % ALIGNMENT)


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Spec]) -> Path:
    """A whole file, whose tensors are a hole."""
    data = head(metadata, tensors)
    path.write_bytes(data)
    size = sum(-(-spec.bytes // ALIGNMENT) * ALIGNMENT for spec in tensors)
    os.truncate(path, len(data) + size)
    return path
