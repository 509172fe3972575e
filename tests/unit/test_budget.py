# SPDX-License-Identifier: Apache-2.0
"""Budgets: known models against published sizes, and against what llama.cpp allocates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import gguf_files
from infertune.base.records import replace
from infertune.base.units import GIB, MIB
from infertune.boot.sizes import outlooks
from infertune.budget.architectures import ARCHITECTURES, CHECKED
from infertune.budget.budget import budget, largest, largest_context
from infertune.budget.compute import compute
from infertune.budget.gguf_file import read_model
from infertune.budget.kv import TYPE_BYTES, cells, kv_bytes, state_bytes, token_bytes
from infertune.budget.parts import parts
from infertune.budget.settings import ServerMemory, server_memory
from infertune.budget.shape import Shape, read_shape
from infertune.cli import serve
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_root
from infertune.pools.facts import PoolFacts, read_facts
from infertune.pools.judge import system_reserve
from known_models import KNOWN, Known, thin

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
STRIX_HALO = str(FIXTURES / "strix-halo-128.snapshot")
BY_NAME = {model.name: model for model in KNOWN}
PUBLISHED = [model for model in KNOWN if model.parameters]


def machine(name: str = "strix-halo-128") -> PoolFacts:
    with open_root(str(FIXTURES / f"{name}.snapshot")) as root:
        return read_facts(root, read_machine(root))


def shape_of(model: Known, directory: Path) -> Shape:
    path = gguf_files.write(directory / "model.gguf", model.metadata(), model.tensors())
    return read_shape(read_model(str(path)))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Shape]:
    directory = tmp_path_factory.mktemp("models")
    return {model.name: shape_of(model, directory) for model in KNOWN}


# -- what is published ------------------------------------------------------------


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.name)
def test_published_parameters(model: Known, shapes: Mapping[str, Shape]) -> None:
    assert shapes[model.name].parameters == pytest.approx(model.parameters, rel=0.001)


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.name)
def test_published_active_parameters(model: Known, shapes: Mapping[str, Shape]) -> None:
    """Model cards cut off digits, and count both, one or none of embedding and output."""
    shape = shapes[model.name]
    matrix = model.vocab * shape.embedding
    low = shape.active_parameters - matrix
    high = shape.active_parameters + (0 if model.tied else matrix)
    published = model.active or model.parameters
    digit = 10**9 if published % 10**9 == 0 else 10**8
    assert low < published + digit
    assert high > published * 0.98
    if not model.active:
        assert high == pytest.approx(published, rel=0.001)


@pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.name)
def test_published_kv_cache(model: Known, shapes: Mapping[str, Shape]) -> None:
    assert token_bytes(shapes[model.name], ServerMemory()) == model.kv_bytes_per_token


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("Llama 3.1 8B", 7.95),
        ("Qwen3 8B", 8.11),
        ("Qwen3 30B-A3B", 30.25),
        ("gpt-oss 120B", 59.02),
    ],
)
def test_published_file_sizes(name: str, gib: float, shapes: Mapping[str, Shape]) -> None:
    """As llama-bench prints them."""
    assert shapes[name].weights_bytes / GIB == pytest.approx(gib, abs=0.005)


# -- what llama.cpp allocates -------------------------------------------------------

CASES: Mapping[str, Mapping[str, str]] = {
    "one": {"ctx_size": "8192", "parallel": "1"},
    "four": {"ctx_size": "32768", "parallel": "4", "kv_unified": "0", "ubatch_size": "2048"},
    "types": {
        "ctx_size": "16384",
        "parallel": "3",
        "kv_unified": "1",
        "cache_type_k": "q8_0",
        "cache_type_v": "q4_0",
    },
    "no fa": {"ctx_size": "4096", "parallel": "1", "flash_attn": "off"},
    "no fa, two": {
        "ctx_size": "16384",
        "parallel": "2",
        "kv_unified": "0",
        "flash_attn": "off",
        "ubatch_size": "256",
    },
}

# MiB as build 11549 printed them when it loaded these heads on the CPU: KV cache, recurrent
# state, compute buffer.  Without the quantised cache of DeepSeek: K and V must be alike there.
ALLOCATED: tuple[tuple[str, str, float, float, float], ...] = (
    ("Llama 3.1 8B", "one", 64.0, 0, 132.02),
    ("Llama 3.1 8B", "four", 256.0, 0, 528.07),
    ("Llama 3.1 8B", "types", 52.0, 0, 140.37),
    ("Llama 3.1 8B", "no fa", 32.0, 0, 316.01),
    ("Llama 3.1 8B", "no fa, two", 128.0, 0, 290.01),
    ("Mixtral 8x7B", "one", 64.0, 0, 216.02),
    ("Mixtral 8x7B", "four", 256.0, 0, 864.07),
    ("Mixtral 8x7B", "types", 52.0, 0, 224.53),
    ("Mixtral 8x7B", "no fa", 32.0, 0, 316.01),
    ("Mixtral 8x7B", "no fa, two", 128.0, 0, 290.01),
    ("Qwen3 8B", "one", 64.0, 0, 120.02),
    ("Qwen3 8B", "four", 256.0, 0, 480.07),
    ("Qwen3 8B", "types", 52.0, 0, 128.35),
    ("Qwen3 8B", "no fa", 32.0, 0, 316.01),
    ("Qwen3 8B", "no fa, two", 128.0, 0, 290.01),
    ("Qwen3 30B-A3B", "one", 32.0, 0, 96.02),
    ("Qwen3 30B-A3B", "four", 128.0, 0, 384.07),
    ("Qwen3 30B-A3B", "types", 26.0, 0, 104.3),
    ("Qwen3 30B-A3B", "no fa", 16.0, 0, 302.01),
    ("Qwen3 30B-A3B", "no fa, two", 64.0, 0, 283.01),
    ("Gemma 3 27B", "one", 124.0, 0, 188.03),
    ("Gemma 3 27B", "four", 736.0, 0, 758.11),
    ("Gemma 3 27B", "types", 108.88, 0, 198.57),
    ("Gemma 3 27B", "no fa", 92.0, 0, 335.52),
    ("Gemma 3 27B", "no fa, two", 228.0, 0, 299.51),
    ("gpt-oss 120B", "one", 17.5, 0, 104.4),
    ("gpt-oss 120B", "four", 82.0, 0, 423.6),
    ("gpt-oss 120B", "types", 13.81, 0, 112.93),
    ("gpt-oss 120B", "no fa", 9.5, 0, 569.64),
    ("gpt-oss 120B", "no fa, two", 34.0, 0, 544.57),
    ("DeepSeek V3", "one", 27.0, 0, 414.01),
    ("DeepSeek V3", "four", 108.0, 0, 1656.05),
    ("DeepSeek V3", "no fa", 13.5, 0, 1438.01),
    ("DeepSeek V3", "no fa, two", 54.0, 0, 1235.01),
    ("GLM 4.5 Air", "one", 96.0, 0, 178.02),
    ("GLM 4.5 Air", "four", 384.0, 0, 712.07),
    ("GLM 4.5 Air", "types", 78.0, 0, 186.46),
    ("GLM 4.5 Air", "no fa", 48.0, 0, 868.01),
    ("GLM 4.5 Air", "no fa, two", 192.0, 0, 822.01),
    ("Phi 3 mini", "one", 192.0, 0, 86.02),
    ("Phi 3 mini", "four", 768.0, 0, 344.07),
    ("Phi 3 mini", "types", 156.0, 0, 94.2),
    ("Phi 3 mini", "no fa", 96.0, 0, 306.01),
    ("Phi 3 mini", "no fa, two", 384.0, 0, 285.01),
    ("Qwen3 Next 80B-A3B", "one", 16.0, 6.28, 98.02),
    ("Qwen3 Next 80B-A3B", "four", 64.0, 25.12, 392.07),
    ("Qwen3 Next 80B-A3B", "types", 13.0, 18.84, 106.49),
    ("Qwen3 Next 80B-A3B", "no fa", 8.0, 6.28, 182.01),
    ("Qwen3 Next 80B-A3B", "no fa, two", 32.0, 12.56, 159.01),
    ("Mamba 2.8B", "one", 0, 0.74, 75.38),
    ("Mamba 2.8B", "four", 0, 2.97, 301.52),
    ("Mamba 2.8B", "types", 0, 2.23, 76.27),
    ("Mamba 2.8B", "no fa", 0, 0.74, 75.38),
    ("Mamba 2.8B", "no fa, two", 0, 1.48, 38.25),
    ("Nemotron 3 Nano 30B-A3B", "one", 8.0, 6.21, 87.52),
    ("Nemotron 3 Nano 30B-A3B", "four", 32.0, 24.84, 350.06),
    ("Nemotron 3 Nano 30B-A3B", "types", 6.5, 18.63, 101.08),
    ("Nemotron 3 Nano 30B-A3B", "no fa", 4.0, 6.21, 299.26),
    ("Nemotron 3 Nano 30B-A3B", "no fa, two", 16.0, 12.42, 281.63),
    ("like Falcon H1", "one", 16.0, 6.08, 64.15),
    ("like Falcon H1", "four", 64.0, 24.33, 256.61),
    ("like Falcon H1", "types", 13.0, 18.25, 78.45),
    ("like Falcon H1", "no fa", 8.0, 6.08, 97.01),
    ("like Falcon H1", "no fa, two", 32.0, 12.16, 84.51),
    ("Granite 4.0 H Tiny", "one", 16.0, 7.69, 59.02),
    ("Granite 4.0 H Tiny", "four", 64.0, 30.76, 236.07),
    ("Granite 4.0 H Tiny", "types", 13.0, 23.07, 67.54),
    ("Granite 4.0 H Tiny", "no fa", 8.0, 7.69, 124.01),
    ("Granite 4.0 H Tiny", "no fa, two", 32.0, 15.38, 114.01),
)


@pytest.mark.parametrize(
    ("name", "case", "kv", "state", "buffer"),
    ALLOCATED,
    ids=[f"{name}, {case}" for name, case, *_ in ALLOCATED],
)
def test_as_llama_cpp_allocates(
    name: str, case: str, kv: float, state: float, buffer: float, tmp_path: Path
) -> None:
    shape = shape_of(thin(BY_NAME[name]), tmp_path)
    memory = server_memory(CASES[case])
    assert sum(kv_bytes(shape, memory)) / MIB == pytest.approx(kv, abs=0.01)
    assert sum(state_bytes(shape, memory)) / MIB == pytest.approx(state, abs=0.01)
    found = compute(shape, memory).buffer / MIB
    # Without flash attention the sum is an upper bound.
    low, high = (0.99, 1.02) if memory.flash_attn else (0.985, 1.06)
    assert low * buffer - 0.6 < found < high * buffer


def test_checked_is_what_was_held_against_llama_cpp() -> None:
    assert {BY_NAME[name].architecture for name, *_ in ALLOCATED} == CHECKED
    assert ARCHITECTURES.keys() > CHECKED
    told = (REPOSITORY / "docs" / "memory.md").read_text().partition("architectures: ")[2]
    assert set(re.split(r",\s+", told.partition(". ")[0])) == CHECKED


def test_windows_need_room_for_a_batch(shapes: Mapping[str, Shape]) -> None:
    gemma = shapes["Gemma 3 27B"]  # a window of 1024
    memory = server_memory({"ctx_size": "32768", "parallel": "4", "kv_unified": "1"})
    assert cells(gemma, memory).window == 4 * 1024 + 512
    one = replace(memory, unified=False)
    assert (cells(gemma, one).streams, cells(gemma, one).window) == (4, 1536)
    assert cells(gemma, replace(memory, ctx=512)).window == 512


# -- verdicts ----------------------------------------------------------------------


def judge(shape: Shape, on: PoolFacts, backend: str = "vulkan", **settings: str) -> str:
    given = {"gpu_layers": "999", "parallel": "1", **settings}
    return budget(shape, server_memory(given), on, backend).verdict


def with_gtt(on: PoolFacts, gib: int, *, carveout: int | None = None) -> PoolFacts:
    """A limit of so many GiB that the driver has taken over."""
    assert on.ttm
    vram = carveout * GIB if carveout else on.memory.vram_bytes
    return replace(
        on,
        memory=replace(on.memory, gtt_bytes=gib * GIB, vram_bytes=vram),
        ttm=replace(on.ttm, pages_limit=gib * 262144),
    )


def test_gtt_is_the_limit_and_a_profile_the_remedy(shapes: Mapping[str, Shape]) -> None:
    shape = shapes["gpt-oss 120B"]
    memory = server_memory({"gpu_layers": "999", "parallel": "1", "ctx_size": "131072"})
    with open_root(STRIX_HALO) as root:
        on = read_machine(root)
        facts = read_facts(root, on)
        found = budget(shape, memory, facts, "vulkan", outlooks(root, on, facts))
    assert found.verdict == "does not fit"
    assert found.reasons[0].startswith("GTT: ")
    assert "half of RAM (ttm.pages_limit 16376221)" in found.reasons[0]
    first = found.remedies[0]
    assert first.text == "'infertune boot stage long-context' and a reboot"
    assert budget(shape, memory, with_gtt(facts, 96), "vulkan").verdict == first.verdict
    assert judge(shape, with_gtt(facts, 96), ctx_size="131072") in ("fits", "tight")


def test_pools_are_never_added(shapes: Mapping[str, Shape]) -> None:
    """64 GiB of carve-out and a limit of 46 GiB are 64, not 110; and GTT is RAM."""
    shape = shapes["GLM 4.5 Air"]  # 107 GiB without its layer for MTP
    assert judge(shape, with_gtt(machine(), 62, carveout=64)) == "does not fit"
    small = machine("strix-halo-64-laptop")
    assert judge(shape, with_gtt(small, 120)) == "does not fit"
    found = budget(shape, server_memory({"gpu_layers": "999"}), with_gtt(small, 120), "vulkan")
    assert any(reason.startswith("RAM") for reason in found.reasons)


def test_a_larger_carve_out_is_outside_of_ram(shapes: Mapping[str, Shape]) -> None:
    memory = server_memory({"gpu_layers": "999", "ctx_size": "8192"})
    on = with_gtt(machine(), 16, carveout=64)
    found = budget(shapes["Qwen3 30B-A3B"], memory, on, "vulkan")
    pools = {pool.name: pool for pool in found.pools}
    assert set(pools) == {"carve-out", "RAM"}
    assert pools["RAM"].need < 2 * GIB


def test_the_prompt_cache_makes_it_tight(shapes: Mapping[str, Shape]) -> None:
    on = machine()
    on = replace(on, ram=40 * GIB, available=40 * GIB)
    shape = shapes["Qwen3 30B-A3B"]
    assert judge(shape, on, "cpu", ctx_size="8192") == "tight"
    assert judge(shape, on, "cpu", ctx_size="8192", cache_ram="0") == "fits"
    memory = server_memory({"ctx_size": "8192", "parallel": "1"})
    found = budget(shape, memory, on, "cpu")
    assert "cache_ram=0MiB (no prompt cache)" in [each.text for each in found.remedies]


def test_what_others_hold_now_counts(shapes: Mapping[str, Shape]) -> None:
    on = with_gtt(machine(), 96)
    shape, settings = shapes["Llama 3.1 8B"], {"ctx_size": "8192", "cache_ram": "0"}
    assert judge(shape, on, "cpu", **settings) == "fits"
    assert judge(shape, replace(on, available=4 * GIB), "cpu", **settings) == "does not fit now"
    # The CMA area is in MemAvailable, and not for the GPU.
    cma = replace(on, available=16 * GIB, cma_free=8 * GIB)
    assert judge(shape, cma, "cpu", **settings) == "fits"
    assert judge(shape, cma, "vulkan", **settings) == "does not fit now"
    # Between the floor and the reserve it is tight.
    assert judge(shape, replace(on, available=13 * GIB), "cpu", **settings) == "tight"


def test_the_largest_context_fits_and_the_next_does_not(shapes: Mapping[str, Shape]) -> None:
    on, shape = machine("recorded-vm"), shapes["Llama 3.1 8B"]
    memory = server_memory({"parallel": "1", "ctx_size": "131072"})
    assert budget(shape, memory, on, "cpu").verdict == "does not fit"
    ctx = largest_context(shape, memory, on, "cpu")
    assert ctx
    assert budget(shape, replace(memory, ctx=ctx), on, "cpu").verdict != "does not fit"
    assert budget(shape, replace(memory, ctx=ctx + 1024), on, "cpu").verdict == "does not fit"


def test_where_nothing_fits_nothing_is_the_largest() -> None:
    assert [largest(lambda number, most=most: number <= most, 100) for most in (-1, 0, 1, 100)] == [
        0, 0, 1, 100,
    ]  # fmt: skip


def test_bytes_of_a_block_of_the_cache() -> None:
    """ggml-common.h: a scale of two bytes for each block, and in q*_1 a minimum of two more."""
    scaled = {"q8_0": 2 + 32, "q5_1": 4 + 4 + 16, "q5_0": 2 + 4 + 16, "q4_1": 4 + 16}
    scaled |= {"q4_0": 2 + 16, "iq4_nl": 2 + 16}
    assert {"f32": 4 * 32, "f16": 2 * 32, "bf16": 2 * 32, **scaled} == TYPE_BYTES


def test_unknown_is_not_zero(shapes: Mapping[str, Shape], tmp_path: Path) -> None:
    llama = BY_NAME["Llama 3.1 8B"]
    shape = shape_of(replace(llama, architecture="tomorrow"), tmp_path)
    memory = server_memory({"parallel": "1"})
    found = budget(shape, memory, machine(), "cpu")
    assert found.verdict == "unknown"
    assert [part.what for part in found.parts] == ["weights"]
    assert "tomorrow" in found.reasons[0]
    blind = replace(machine(), ram=None, available=None)
    assert budget(shapes["Llama 3.1 8B"], memory, blind, "cpu").verdict == "unknown"
    blind = replace(machine(), memory=replace(machine().memory, vram_bytes=None))
    assert budget(shapes["Llama 3.1 8B"], memory, blind, "vulkan").verdict == "unknown"
    # Weights alone may be too much.
    small = replace(machine(), ram=4 * GIB)
    assert budget(shape, memory, small, "cpu").verdict == "does not fit"


def test_no_room_for_a_slot_is_no_fit(shapes: Mapping[str, Shape]) -> None:
    """llama_context: n_ctx_seq == 0 is an error, and a part of 256 tokens becomes 256."""
    shape = shapes["Llama 3.1 8B"]
    assert judge(shape, machine(), ctx_size="100", parallel="256") == "fits"
    memory = server_memory({"ctx_size": "100", "parallel": "1024", "gpu_layers": "999"})
    found = budget(shape, memory, machine(), "vulkan")
    assert found.verdict == "does not fit"
    assert "1024 slots share 256 tokens" in found.reasons[0]
    assert "parallel=1" in [each.text for each in found.remedies]
    assert budget(shape, replace(memory, unified=True), machine(), "vulkan").verdict == "fits"


def test_a_context_that_nobody_tells_is_unknown(shapes: Mapping[str, Shape]) -> None:
    silent = replace(shapes["Llama 3.1 8B"], context=0)
    found = budget(silent, server_memory({"parallel": "1"}), machine(), "vulkan")
    assert (found.verdict, found.reasons[-1]) == (
        "unknown", "the file does not say its context, and ctx_size is not set"
    )  # fmt: skip
    assert judge(silent, machine(), ctx_size="4096") == "fits"


def test_layers_and_experts_stay_where_they_are_told(shapes: Mapping[str, Shape]) -> None:
    shape = shapes["Qwen3 30B-A3B"]

    def on_gpu(**settings: str) -> int:
        memory = server_memory({"parallel": "1", "ctx_size": "8192", **settings})
        found = parts(shape, memory, "vulkan")
        return sum(part.bytes for part in found if part.what == "weights" and part.where == "GPU")

    layer = shape.layers[0]
    whole = shape.weights_bytes - shape.input_bytes
    assert on_gpu(gpu_layers="999") == on_gpu(gpu_layers="49") == whole
    assert on_gpu(gpu_layers="48") == whole - layer.weights_bytes
    assert on_gpu(gpu_layers="1") == shape.output_bytes
    assert on_gpu(gpu_layers="0") == 0
    assert on_gpu(gpu_layers="999", n_cpu_moe="10") == whole - 10 * layer.expert_bytes
    memory = server_memory({"kv_offload": "0"})
    found = parts(shape, memory, "vulkan")
    assert {part.where for part in found if part.what.startswith("KV")} == {"host"}


def test_a_context_that_is_not_set_is_shortened_by_the_server(
    shapes: Mapping[str, Shape],
) -> None:
    on, shape = with_gtt(machine("strix-halo-64-laptop"), 33), shapes["Qwen3 30B-A3B"]
    assert judge(shape, on, ctx_size="40960") == "does not fit"
    assert judge(shape, on) == "tight"
    assert judge(shape, on, fit="off") == "does not fit"


@pytest.mark.parametrize(
    ("gib", "reserve"), [(1, 0.5), (8, 0.5), (24, 1.5), (64, 4), (128, 4), (512, 4)]
)
def test_reserve(gib: int, reserve: float) -> None:
    assert system_reserve(gib * GIB) == reserve * GIB


# -- the verbs ----------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> str:
    model = BY_NAME["Llama 3.1 8B"]
    return str(gguf_files.write(tmp_path / "m.gguf", model.metadata(), model.tensors()))


def fit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object]]:
    cut = words.index("--") if "--" in words else len(words)
    code = main(["--root", STRIX_HALO, "fit", *words[:cut], "--json", *words[cut:]])
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, document


def test_settings_of_profile_and_options(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*words: str) -> dict[str, object]:
        _, document = fit(capsys, llama, *words)
        found = document["settings"]
        assert isinstance(found, dict)
        return found

    assert settings()["ctx"] == 131072  # as the model says
    assert settings()["slots"] == 4
    long = settings("--profile", "long-context")
    assert (long["ctx"], long["slots"], long["unified"]) == (131072, 1, False)
    more = settings("--profile", "long-context", "--parallel", "2", "--", "cache_type_k=q8_0")
    assert (more["slots"], more["cache_type_k"]) == (2, "q8_0")
    assert settings("--ctx", "4096", "--", "ctx_size=9999")["ctx"] == 4096


def test_an_architecture_that_was_never_measured_says_so(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(path: str) -> tuple[object, bool]:
        _, document = fit(capsys, path, "--ctx", "4096")
        notes, model = document["notes"], document["model"]
        assert isinstance(notes, list)
        assert isinstance(model, dict)
        main(["--root", STRIX_HALO, "fit", path, "--ctx", "4096"])
        assert ("note: not checked: " in capsys.readouterr().out) is any(
            note.startswith("not checked: ") for note in notes
        )
        return model["checked"], any(note.startswith("not checked: ") for note in notes)

    assert told(llama) == (True, False)
    other = replace(BY_NAME["Llama 3.1 8B"], architecture="qwen2")
    path = gguf_files.write(tmp_path / "qwen2.gguf", other.metadata(), other.tensors())
    assert told(str(path)) == (False, True)
    # Of an architecture that is not known nothing was added up that could be checked.
    other = replace(other, architecture="tomorrow")
    gguf_files.write(path, other.metadata(), other.tensors())
    assert told(str(path)) == (False, False)


def test_exit_codes(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(capsys, llama, "--ctx", "8192")[0] == 0
    deepseek = BY_NAME["DeepSeek V3"]
    path = gguf_files.write(tmp_path / "big.gguf", deepseek.metadata(), deepseek.tensors())
    code, document = fit(capsys, str(path))
    assert (code, document["verdict"]) == (1, "does not fit")
    arabic = ["--ctx", "\u0664\u0660\u0669\u0666"]
    for wrong in (["--ctx", "0"], ["--ctx", "x"], arabic, ["--parallel", "0"]):
        assert main(["fit", llama, *wrong]) == 2
    assert main(["fit", llama, "--profile", "none-such"]) == 2
    assert main(["fit", llama, "--", "ctx=1"]) == 2
    assert main(["fit", llama, "--", "cache_ram=many"]) == 2
    capsys.readouterr()


def test_serve_refuses_before_it_asks_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The checks of a path (others may read it) are not what this is about.
    monkeypatch.setattr(serve, "_refuse_unreadable", lambda what, path, kind: None)
    deepseek, llama = BY_NAME["DeepSeek V3"], BY_NAME["Llama 3.1 8B"]
    big = gguf_files.write(tmp_path / "big.gguf", deepseek.metadata(), deepseek.tensors())
    words = ["--root", STRIX_HALO, "serve", "long-context", "--model", str(big)]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "does not fit: GTT: " in err
    assert "nothing was started" in err
    assert main([*words, "--force"]) == 5  # and then: no daemon on a recorded machine
    assert "does not fit: GTT: " in capsys.readouterr().err
    small = gguf_files.write(tmp_path / "small.gguf", llama.metadata(), llama.tensors())
    words[-1] = str(small)
    assert main(words) == 5
    assert "fit" not in capsys.readouterr().err
    strange = replace(llama, architecture="tomorrow")
    gguf_files.write(small, strange.metadata(), strange.tensors())
    assert main(words) == 5
    assert "whether the model fits is unknown" in capsys.readouterr().err


def test_run_refuses_before_anything_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deepseek = BY_NAME["DeepSeek V3"]
    path = gguf_files.write(tmp_path / "big.gguf", deepseek.metadata(), deepseek.tensors())
    server = tmp_path / "llama-server"
    started = tmp_path / "started"
    server.write_text(
        "#!/bin/sh\ncase $1 in --help) echo '--port N'; echo '--model F'; echo '--ctx-size N';;"
        " --version) echo 'version: 1';; "
        f" *) touch '{started}'; exit 1;; esac\n"
    )
    server.chmod(0o755)
    words = ["run", "base", "--launch-only", "--server", str(server), "--model", str(path)]
    assert main(words) == 2
    assert not started.exists()
    err = capsys.readouterr().err
    assert "does not fit: RAM: " in err
    assert "nothing was started" in err
    assert "--force" in err
    assert main([*words, "--force"]) == 3
    assert started.exists()
    assert "does not fit" in capsys.readouterr().out
