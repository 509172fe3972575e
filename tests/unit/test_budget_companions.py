# SPDX-License-Identifier: Apache-2.0
"""What a server loads beside its model, and what it keeps to go back to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import gguf_files
from gguf_files import Spec
from infertune.base.records import replace
from infertune.base.units import GIB, MIB
from infertune.budget.companions import Companions, Projector, read_companions
from infertune.budget.gguf_file import ModelError, read_model
from infertune.budget.kv import checkpoint_bytes
from infertune.budget.parts import Part, parts
from infertune.budget.settings import ServerMemory, server_memory
from infertune.budget.shape import Shape, read_shape
from infertune.cli.main import main
from known_models import KNOWN, Known, thin

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
STRIX_HALO = str(FIXTURES / "strix-halo-128.snapshot")
BY_NAME = {model.name: model for model in KNOWN}
GEMMA4_WINDOWS = [(number + 1) % 6 != 0 for number in range(60)]
GEMMA4 = {
    "general.architecture": "gemma4",
    "gemma4.block_count": 60,
    "gemma4.context_length": 262144,
    "gemma4.embedding_length": 5376,
    "gemma4.attention.head_count": 32,
    "gemma4.attention.head_count_kv": [16 if window else 4 for window in GEMMA4_WINDOWS],
    "gemma4.attention.sliding_window": 1024,
    "gemma4.attention.sliding_window_pattern": GEMMA4_WINDOWS,
    "gemma4.attention.key_length": 512,
    "gemma4.attention.value_length": 512,
    "gemma4.attention.key_length_swa": 256,
    "gemma4.attention.value_length_swa": 256,
}
"""Gemma 4 31B, as far as its caches go."""


def write(path: Path, model: Known) -> str:
    return str(gguf_files.write(path, model.metadata(), model.tensors()))


def shape_of(path: Path, model: Known) -> Shape:
    return read_shape(read_model(write(path, model)))


def projector(path: Path) -> str:
    head = {"general.architecture": "clip", "general.type": "mmproj"}
    return str(gguf_files.write(path, head, [Spec("mm.weight", (1024, 1024), "f16")]))


@pytest.fixture
def llama(tmp_path: Path) -> Shape:
    return shape_of(tmp_path / "llama.gguf", thin(BY_NAME["Llama 3.1 8B"]))


@pytest.fixture
def gemma4(tmp_path: Path) -> Shape:
    tensors = [Spec("token_embd.weight", (5376, 32), "f16")]
    return read_shape(read_model(str(gguf_files.write(tmp_path / "g.gguf", GEMMA4, tensors))))


def named(found: tuple[Part, ...], what: str) -> list[tuple[str, int]]:
    return [(part.where, part.bytes) for part in found if part.what.startswith(what)]


# -- other files ----------------------------------------------------------------------


def test_files_are_read_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    seen, small = projector(tmp_path / "p.gguf"), write(tmp_path / "d.gguf", BY_NAME["Qwen3 8B"])
    assert read_companions({"ctx_size": "1"}) == Companions()
    found = read_companions({"mmproj": seen, "model_draft": small})
    assert found.projector == Projector(seen, 2 * MIB)
    assert found.draft
    assert found.draft.architecture == "qwen3"
    for name, path in (("mmproj", small), ("model_draft", seen), ("mmproj", f"{small}x")):
        with pytest.raises(ModelError, match=path):
            read_companions({name: path})


@pytest.mark.parametrize(
    ("backend", "offload", "where"),
    [("vulkan", True, "GPU"), ("vulkan", False, "host"), ("cpu", True, "host")],
)
def test_a_projector_is_a_part_of_its_own(
    backend: str, offload: bool, where: str, llama: Shape
) -> None:
    companions = Companions(projector=Projector("p", 7 * MIB))
    memory = ServerMemory(ctx=4096, mmproj_offload=offload, companions=companions)
    found = parts(llama, memory, backend)
    assert named(found, "projector (mmproj)") == [(where, 7 * MIB)]
    part = next(part for part in found if part.what == "projector (mmproj)")
    assert "not known" in part.source
    rest = [each for each in found if each is not part]
    assert rest == list(parts(llama, replace(memory, companions=Companions()), backend))


@pytest.mark.parametrize("backend", ["vulkan", "cpu"])
def test_a_draft_takes_what_it_takes_alone(backend: str, llama: Shape, tmp_path: Path) -> None:
    """With the same context, a cache of f16, and all its layers on the GPU (build 11669)."""
    draft = shape_of(tmp_path / "draft.gguf", thin(BY_NAME["Qwen3 8B"]))
    memory = server_memory(
        {"ctx_size": "8192", "parallel": "2", "cache_type_k": "q8_0", "gpu_layers": "1"}
    )
    alone = replace(memory, cache_type_k="f16", gpu_layers=999)
    found = parts(llama, replace(memory, companions=Companions(draft=draft)), backend)
    of_draft = [
        (part.what.removeprefix("draft model: "), part.where, part.bytes)
        for part in found
        if part.what.startswith("draft model: ")
    ]
    common = ("the server itself", "prompt cache", "context checkpoints")
    assert of_draft == [
        (part.what, part.where, part.bytes)
        for part in parts(draft, alone, backend)
        if not part.what.startswith(common)
    ]
    assert len(of_draft) >= 4


def test_layers_for_mtp_are_loaded_where_they_draft(tmp_path: Path) -> None:
    """GLM 4.5 Air with 4 layers and one for MTP, as build 11669 loaded it on a Vulkan device."""
    small = thin(BY_NAME["GLM 4.5 Air"], experts=8, vocab=2048)
    keys = {**small.keys, "block_count": 5, "nextn_predict_layers": 1}
    shape = shape_of(tmp_path / "m.gguf", replace(small, keys=keys))
    given = {"ctx_size": "8192", "parallel": "1", "ubatch_size": "64"}
    without = parts(shape, server_memory(given), "vulkan")
    assert named(without, "weights") == [
        ("GPU", pytest.approx(1060.84 * MIB, abs=0.01 * MIB)),
        ("host", pytest.approx(8.5 * MIB)),
    ]
    found = parts(shape, server_memory({**given, "spec_type": "ngram-mod,draft-mtp"}), "vulkan")
    assert [part for part in found if not part.what.startswith("MTP: ")] == list(without)
    measured = {
        "weights": (1380.38 - 1060.84, 0.01),
        "KV cache": (32, 0),
        "output": (0.0078, 0.001),
    }
    for what, (mib, off) in measured.items():
        [(_, size)] = named(found, f"MTP: {what}")
        assert size / MIB == pytest.approx(mib, abs=off), what
    # Its graph is that of one layer, without the rows around it: the sums are above it.
    for what, mib in {"compute buffer": 18.26, "inputs of": 2.0}.items():
        [(_, size)] = named(found, f"MTP: {what}")
        assert mib <= size / MIB <= mib + 3.01, what


# -- checkpoints --------------------------------------------------------------------


def checkpoints(shape: Shape, settings: Mapping[str, str]) -> Part | None:
    found = parts(shape, server_memory(settings), "vulkan")
    return next((part for part in found if part.what.startswith("context checkpoints")), None)


def test_a_checkpoint_is_what_a_slot_has_in_the_windows(gemma4: Shape) -> None:
    """3600 MiB printed for Gemma 4 31B with the server's defaults (amd-strix-halo-toolboxes 89)."""
    memory = server_memory({"ctx_size": "262144"})
    assert checkpoint_bytes(gemma4, memory, masked=False) == 3600 * MIB
    assert checkpoint_bytes(gemma4, memory, masked=True) == 800 * MIB
    part = checkpoints(gemma4, {"ctx_size": "262144"})
    assert part
    assert (part.when, part.where, part.setting) == ("later", "host", "ctx_checkpoints")
    assert part.bytes == 32 * 3600 * MIB
    assert "3.5 GiB each" in part.source
    assert "800 MiB since June 2026" in part.source


def test_checkpoints_of_all_slots(gemma4: Shape) -> None:
    def total(**settings: str) -> float:
        part = checkpoints(gemma4, {"ctx_size": "262144", **settings})
        return part.bytes / GIB if part else 0

    # 1536 cells of each slot, or 1024 since pull request 23981.
    assert total(parallel="1") == 32 * 1200 / 1024
    assert total(parallel="2") == 2 * 32 * 1200 / 1024
    # In one cache all slots at once have no more than all cells; eight windows are more than that.
    assert (
        total(parallel="8", kv_unified="1") == 32 * max(8 * 800, (8 * 1024 + 512) * 50 / 64) / 1024
    )
    assert total(ctx_checkpoints="4") == 4 * 3600 / 1024
    assert total(ctx_checkpoints="0") == 0
    assert total(swa_full="1") == 0
    # Not more than the context holds.
    assert total(ctx_size="512", parallel="1") == 32 * 400 / 1024


def test_a_checkpoint_of_states(tmp_path: Path) -> None:
    """75.376 MiB printed for Qwen3 Next 80B-A3B (llama.cpp pull request 19408)."""
    shape = shape_of(tmp_path / "m.gguf", BY_NAME["Qwen3 Next 80B-A3B"])
    memory = server_memory({"ctx_size": "262144", "parallel": "4"})
    for masked in (False, True):
        size = checkpoint_bytes(shape, memory, masked=masked)
        assert size / MIB == pytest.approx(75.376, abs=0.02)
    part = checkpoints(shape, {"ctx_size": "262144"})
    assert part
    assert part.bytes == 4 * 32 * size
    assert "23981" not in part.source


def test_a_model_without_windows_makes_none(llama: Shape) -> None:
    assert checkpoints(llama, {"ctx_size": "131072"}) is None


def test_a_draft_is_in_them_too(gemma4: Shape) -> None:
    """15.012 MiB instead of 7.506 for Gemma 3 270M that drafts for itself (build 11669)."""
    memory = server_memory({"ctx_size": "8192", "parallel": "1"})
    both = replace(memory, companions=Companions(draft=gemma4))
    one, two = (
        next(part.bytes for part in parts(gemma4, each, "cpu") if "checkpoints" in part.what)
        for each in (memory, both)
    )
    assert two == 2 * one


# -- the verb -----------------------------------------------------------------------


def test_fit_reads_the_files_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, seen = write(tmp_path / "m.gguf", BY_NAME["Qwen3 8B"]), projector(tmp_path / "p.gguf")
    words = ["--root", STRIX_HALO, "fit", model, "--ctx", "4096"]
    assert main([*words, "--mmproj", seen, "--draft", model, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["projector"] == {"file": seen, "weights_bytes": 2 * MIB}
    assert document["draft"]["architecture"] == "qwen3"
    assert "companions" not in document["settings"]
    what = [part["what"] for part in document["parts"]]
    assert "projector (mmproj)" in what
    assert "draft model: weights" in what
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["projector"], document["draft"]) == (None, None)
    assert main([*words, "--mmproj", model]) == 2
    assert f"{model}: not a projector" in capsys.readouterr().err
