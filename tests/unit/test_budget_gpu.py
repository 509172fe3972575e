# SPDX-License-Identifier: Apache-2.0
"""Buffers of a GPU's graph: what build 11669 allocated with the Vulkan backend.

The device was a software one (llvmpipe, Mesa 26.2.6), the models heads of published ones, with
few layers and experts so that no tensor is longer than its maxStorageBufferRange, 128 MiB.
tests/real starts such a server again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import gguf_files
from infertune.base.records import replace
from infertune.base.units import MIB
from infertune.budget.compute import compute
from infertune.budget.gguf_file import read_model
from infertune.budget.settings import server_memory
from infertune.budget.shape import Shape, read_shape
from known_models import KNOWN, Known, thin

CASES: Mapping[str, Mapping[str, str]] = {
    "fa": {"ctx_size": "8192", "parallel": "1", "ubatch_size": "64"},
    "fa4": {"ctx_size": "16384", "parallel": "4", "ubatch_size": "128", "kv_unified": "0"},
    "fakvu": {
        "ctx_size": "16384",
        "parallel": "3",
        "ubatch_size": "64",
        "kv_unified": "1",
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
    },
    "nofa": {"ctx_size": "4096", "parallel": "1", "ubatch_size": "32", "flash_attn": "off"},
    "nofa2": {
        "ctx_size": "8192",
        "parallel": "2",
        "ubatch_size": "64",
        "flash_attn": "off",
        "kv_unified": "0",
    },
}

LARGE: Mapping[str, Mapping[str, str]] = {
    "one": {"ctx_size": "8192", "parallel": "1"},
    "four": {"ctx_size": "32768", "parallel": "4", "kv_unified": "0", "ubatch_size": "2048"},
    "no fa, two": {
        "ctx_size": "16384",
        "parallel": "2",
        "kv_unified": "0",
        "flash_attn": "off",
        "ubatch_size": "256",
    },
}
"""As in test_budget.py, with 16 experts; without the models whose tensors are too long then."""

# MiB as the server printed them: compute buffer of the GPU, inputs in host memory.  Without Mamba
# 2.8B, whose scan this backend leaves to the CPU, and two of DeepSeek V3 with a tensor too long.
ALLOCATED: tuple[tuple[str, str, float, float], ...] = (
    ("Llama 3.1 8B", "fa", 15.5, 5),
    ("Llama 3.1 8B", "fa4", 30, 9),
    ("Llama 3.1 8B", "fakvu", 17.1, 6.27),
    ("Llama 3.1 8B", "nofa", 18.75, 2.75),
    ("Llama 3.1 8B", "nofa2", 37.5, 5.5),
    ("Mixtral 8x7B", "fa", 26, 5),
    ("Mixtral 8x7B", "fa4", 51, 9),
    ("Mixtral 8x7B", "fakvu", 27.92, 6.27),
    ("Mixtral 8x7B", "nofa", 18.75, 2.75),
    ("Mixtral 8x7B", "nofa2", 37.5, 5.5),
    ("Qwen3 8B", "fa", 14, 5),
    ("Qwen3 8B", "fa4", 27, 9),
    ("Qwen3 8B", "fakvu", 15.55, 6.27),
    ("Qwen3 8B", "nofa", 18.75, 2.75),
    ("Qwen3 8B", "nofa2", 37.5, 5.5),
    ("Qwen3 30B-A3B", "fa", 11.5, 3),
    ("Qwen3 30B-A3B", "fa4", 22, 5),
    ("Qwen3 30B-A3B", "fakvu", 12.97, 4.21),
    ("Qwen3 30B-A3B", "nofa", 18.63, 1.63),
    ("Qwen3 30B-A3B", "nofa2", 37.25, 3.25),
    ("Gemma 3 27B", "fa", 23.47, 6.41),
    ("Gemma 3 27B", "fa4", 45.94, 11.82),
    ("Gemma 3 27B", "fakvu", 25.65, 8.06),
    ("Gemma 3 27B", "nofa", 20.28, 4.28),
    ("Gemma 3 27B", "nofa2", 40.56, 8.57),
    ("gpt-oss 120B", "fa", 12.28, 3.85),
    ("gpt-oss 120B", "fa4", 23.57, 6.69),
    ("gpt-oss 120B", "fakvu", 13.79, 5.09),
    ("gpt-oss 120B", "nofa", 35.19, 2.19),
    ("gpt-oss 120B", "nofa2", 70.38, 4.38),
    ("DeepSeek V3", "fa", 50, 8),
    ("DeepSeek V3", "fakvu", 52.6, 9.28),
    ("DeepSeek V3", "nofa", 89, 4),
    ("GLM 4.5 Air", "fa", 21.25, 5),
    ("GLM 4.5 Air", "fa4", 41.5, 9),
    ("GLM 4.5 Air", "fakvu", 23.03, 6.27),
    ("GLM 4.5 Air", "nofa", 53.75, 2.75),
    ("GLM 4.5 Air", "nofa2", 107.5, 5.5),
    ("Phi 3 mini", "fa", 10, 4),
    ("Phi 3 mini", "fa4", 19, 7),
    ("Phi 3 mini", "fakvu", 11.35, 5.16),
    ("Phi 3 mini", "nofa", 18.75, 2.75),
    ("Phi 3 mini", "nofa2", 37.5, 5.5),
    ("Qwen3 Next 80B-A3B", "fa", 14.1, 3),
    ("Qwen3 Next 80B-A3B", "fa4", 35.38, 5),
    ("Qwen3 Next 80B-A3B", "fakvu", 23.89, 4.39),
    ("Qwen3 Next 80B-A3B", "nofa", 11.13, 1.63),
    ("Qwen3 Next 80B-A3B", "nofa2", 22.25, 3.25),
    ("Nemotron 3 Nano 30B-A3B", "fa", 12.87, 3.63),
    ("Nemotron 3 Nano 30B-A3B", "fa4", 33.57, 6.25),
    ("Nemotron 3 Nano 30B-A3B", "fakvu", 21.78, 4.85),
    ("Nemotron 3 Nano 30B-A3B", "nofa", 18.38, 1.88),
    ("Nemotron 3 Nano 30B-A3B", "nofa2", 36.75, 3.75),
    ("like Falcon H1", "fa", 10.93, 3),
    ("like Falcon H1", "fa4", 35.94, 5),
    ("like Falcon H1", "fakvu", 23.59, 4.21),
    ("like Falcon H1", "nofa", 9.76, 1.56),
    ("like Falcon H1", "nofa2", 19.51, 3.13),
    ("Granite 4.0 H Tiny", "fa", 8.74, 2.5),
    ("Granite 4.0 H Tiny", "fa4", 24.05, 4),
    ("Granite 4.0 H Tiny", "fakvu", 16.15, 3.69),
    ("Granite 4.0 H Tiny", "nofa", 7.38, 1.38),
    ("Granite 4.0 H Tiny", "nofa2", 15.13, 2.75),
)


ALLOCATED_LARGE: tuple[tuple[str, str, float, float], ...] = (
    ("Llama 3.1 8B", "one", 124.01, 40.02),
    ("Llama 3.1 8B", "four", 496.05, 160.07),
    ("Qwen3 8B", "one", 112.01, 40.02),
    ("Qwen3 8B", "four", 448.05, 160.07),
    ("Qwen3 30B-A3B", "one", 92.01, 24.02),
    ("Qwen3 30B-A3B", "four", 368.05, 96.07),
    ("Gemma 3 27B", "one", 188.02, 51.53),
    ("gpt-oss 120B", "one", 98.77, 31.28),
    ("gpt-oss 120B", "four", 401.09, 131.1),
    ("GLM 4.5 Air", "one", 170.01, 40.02),
    ("Qwen3 Next 80B-A3B", "one", 94.01, 24.02),
    ("Qwen3 Next 80B-A3B", "no fa, two", 157, 17.01),
    ("Nemotron 3 Nano 30B-A3B", "one", 82.26, 29.02),
    ("Nemotron 3 Nano 30B-A3B", "four", 329.05, 116.06),
    ("like Falcon H1", "one", 57.15, 24.02),
    ("like Falcon H1", "four", 252.59, 96.07),
    ("like Falcon H1", "no fa, two", 87.05, 16.51),
    ("Granite 4.0 H Tiny", "one", 58.01, 20.02),
    ("Granite 4.0 H Tiny", "four", 232.05, 80.07),
    ("Granite 4.0 H Tiny", "no fa, two", 112.5, 15.01),
)


def read(directory: Path, known: Known) -> Shape:
    path = gguf_files.write(directory / "model.gguf", known.metadata(), known.tensors())
    return read_shape(read_model(str(path)))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Shape]:
    directory = tmp_path_factory.mktemp("models")
    small = [thin(known, experts=1, vocab=2048) for known in KNOWN]
    return {
        # Rows of its widest matrix are too long in q8_0.
        known.name: read(
            directory, replace(known, type="q4_0" if "DeepSeek" in known.name else known.type)
        )
        for known in small
    }


@pytest.mark.parametrize(
    ("name", "case", "buffer", "inputs"),
    ALLOCATED,
    ids=[f"{name}, {case}" for name, case, *_ in ALLOCATED],
)
def test_as_llama_cpp_allocates_for_a_gpu(
    name: str, case: str, buffer: float, inputs: float, shapes: Mapping[str, Shape]
) -> None:
    shape, memory = shapes[name], server_memory(CASES[case])
    found = compute(shape, memory, gpu=True)
    # A quantised cache is rotated: two square matrices of a head's length, and what they are for.
    rotation = 0.4 if memory.cache_type_k == "q8_0" else 0.0
    assert found.inputs / MIB == pytest.approx(inputs, abs=0.02 + rotation)
    if any(layer.state_values for layer in shape.layers):
        low, high = 0.98, 1.26
    elif name == "Gemma 3 27B" and memory.flash_attn:
        low, high = 0.94, 1.0  # Q is narrower than the model: holes that nothing fits
    else:
        low, high = 0.999, 1.001
    assert low * buffer - 4.2 * rotation < found.buffer / MIB < high * buffer + 0.01


@pytest.mark.parametrize(
    ("name", "case", "buffer", "inputs"),
    ALLOCATED_LARGE,
    ids=[f"{name}, {case}" for name, case, *_ in ALLOCATED_LARGE],
)
def test_as_llama_cpp_allocates_for_larger_batches(
    name: str, case: str, buffer: float, inputs: float, tmp_path: Path
) -> None:
    shape = read(tmp_path, thin(next(known for known in KNOWN if known.name == name)))
    found = compute(shape, server_memory(LARGE[case]), gpu=True)
    assert found.inputs / MIB == pytest.approx(inputs, abs=0.12)
    if any(layer.state_values for layer in shape.layers):
        low, high = 0.98, 1.18
    else:
        low, high = (0.94, 1.0) if name == "Gemma 3 27B" else (0.999, 1.001)
    assert low * buffer < found.buffer / MIB < high * buffer


def test_a_graph_on_the_host_has_no_inputs_beside_it(shapes: Mapping[str, Shape]) -> None:
    assert compute(shapes["Llama 3.1 8B"], server_memory(CASES["fa"])).inputs == 0
