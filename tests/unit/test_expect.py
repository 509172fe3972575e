# SPDX-License-Identifier: Apache-2.0
"""The roofline: bytes for a token, bandwidth, and what others measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import gguf_files
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.budget.expect import chip_of, expect
from infertune.budget.gguf_file import read_model
from infertune.budget.measured import CHIPS, SPEEDS, speeds_of
from infertune.budget.shape import Shape, read_shape
from infertune.cli.main import main
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_root
from infertune.measure.client import Timed
from infertune.measure.conditions import Between
from infertune.measure.store import Store, machine_key, model_key
from infertune.measure.trial import Load, Sample
from known_models import KNOWN

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
STRIX_HALO = str(FIXTURES / "strix-halo-128.snapshot")
BY_NAME = {model.name: model for model in KNOWN}


def machine(name: str = "strix-halo-128") -> Machine:
    with open_root(str(FIXTURES / f"{name}.snapshot")) as root:
        return read_machine(root)


def shape_of(name: str, directory: Path) -> Shape:
    model = BY_NAME[name]
    path = gguf_files.write(directory / "model.gguf", model.metadata(), model.tensors())
    return read_shape(read_model(str(path)))


def test_dense_reads_all_but_the_embedding(tmp_path: Path) -> None:
    shape = shape_of("Llama 3.1 8B", tmp_path)
    assert shape.active_bytes == shape.weights_bytes - shape.input_bytes
    found = expect(shape, machine(), 50e9, 8192)
    gpu, cpu = found.rooflines
    assert (gpu.reader, cpu.reader) == ("GPU", "CPU")
    assert gpu.tokens_per_second == (212e9 / shape.active_bytes, 221e9 / shape.active_bytes)
    assert cpu.tokens_per_second[0] == 50e9 / shape.active_bytes
    assert found.depth_bytes == 2**30  # 128 KiB a token
    assert cpu.tokens_per_second_deep == (50e9 / (shape.active_bytes + 2**30),) * 2


def test_a_tied_embedding_is_read_as_output(tmp_path: Path) -> None:
    shape = shape_of("Gemma 3 27B", tmp_path)
    assert shape.active_bytes == shape.weights_bytes


def test_experts_count_as_far_as_they_are_used(tmp_path: Path) -> None:
    shape = shape_of("gpt-oss 120B", tmp_path)
    experts = sum(layer.expert_bytes for layer in shape.layers)
    rest = shape.weights_bytes - shape.input_bytes - experts
    assert shape.active_bytes == round(rest + experts * 4 / 128)


def test_layers_for_mtp_are_not_read(tmp_path: Path) -> None:
    shape = shape_of("GLM 4.5 Air", tmp_path)
    assert len(shape.layers) == 46
    assert shape.active_parameters < 13e9  # with that layer 14.8e9


def test_what_others_measured_stays_below_the_roofline(tmp_path: Path) -> None:
    """Else one of the two is wrong."""
    for name in ("gpt-oss 120B",):
        shape = shape_of(name, tmp_path)
        [speed] = speeds_of(shape, "gfx1151")
        [gpu, _] = expect(shape, machine(), 50e9, 0).rooflines
        assert speed.tokens_per_second[1] < gpu.tokens_per_second[1]
        assert speed.tokens_per_second[0] > gpu.tokens_per_second[0] / 4


def test_only_the_same_model_at_the_same_bits_is_compared(tmp_path: Path) -> None:
    shape = shape_of("Qwen3 30B-A3B", tmp_path)  # 8.5 bits
    assert speeds_of(shape, "gfx1151") == ()
    four = replace(shape, weights_bytes=round(shape.parameters * 4.6 / 8))
    assert [speed.model for speed in speeds_of(four, "gfx1151")] == ["Qwen3 (Coder) 30B-A3B, Q4"]
    assert speeds_of(four, "gfx1100") == ()
    assert speeds_of(replace(four, parameters=four.parameters * 2), "gfx1151") == ()


def test_table_of_others() -> None:
    for speed in SPEEDS:
        assert speed.source
        assert speed.how
        low, high = speed.tokens_per_second
        assert 0 < low <= high
        assert speed.gfx_target in {chip.gfx_target for chip in CHIPS}
    for chip in CHIPS:
        assert chip.cpu_read[1] < chip.gpu_read[0] < chip.gpu_read[1] < chip.peak


GORGON = "AMD RYZEN AI MAX+ PRO 495 w/ Radeon 8065S"


def named(model: str | None, name: str = "strix-halo-128") -> Machine:
    """A recorded machine with another processor."""
    found = machine(name)
    return replace(found, cpu=replace(found.cpu, model=model))


@pytest.mark.parametrize(
    ("model", "chip"),
    [
        (GORGON, "Gorgon Halo"),
        ("AMD RYZEN AI MAX PRO 490 w/ Radeon 8050S", "Gorgon Halo"),
        ("AMD RYZEN AI MAX PRO 390 w/ Radeon 8050S", "Strix Halo"),
        ("AMD Ryzen AI Max+ 395 w/ Radeon 8060S", "Strix Halo"),
        ("AMD Eng Sample", "Strix Halo"),
        (None, "Strix Halo"),
    ],
)
def test_the_processor_tells_the_chip(model: str | None, chip: str) -> None:
    found = chip_of(named(model))
    assert found is not None
    assert found.name == chip


def test_a_card_beside_the_processor_is_not_its_chip() -> None:
    assert chip_of(named(GORGON, "radeon-desktop")) is None


def test_faster_memory_and_what_is_only_scaled(tmp_path: Path) -> None:
    shape = shape_of("gpt-oss 120B", tmp_path)
    gpu, cpu = expect(shape, named(GORGON), None, 0).rooflines
    assert gpu.bandwidth == pytest.approx((226.1e9, 235.7e9), rel=1e-3)
    assert gpu.source.startswith("scaled from Strix Halo")
    assert "on Strix Halo" in cpu.source
    assert cpu.bandwidth == (100e9, 118e9)
    [note] = [each for each in expect(shape, named(GORGON), 1e9, 0).notes if "Gorgon" in each]
    assert "no measurement of Gorgon Halo is known here" in note
    assert not [each for each in expect(shape, machine(), 1e9, 0).notes if "Gorgon" in each]


def test_unknown_is_not_zero(tmp_path: Path) -> None:
    shape = shape_of("Llama 3.1 8B", tmp_path)
    on = machine("recorded-vm")
    assert chip_of(on) is None
    found = expect(shape, on, None, 8192)
    assert found.rooflines == ()
    assert "memory bandwidth was not measured on this machine" in found.notes
    strange = replace(shape, known=False, layers=())
    found = expect(strange, machine(), None, 8192)
    assert found.depth_bytes is None
    assert found.rooflines[0].tokens_per_second_deep is None
    assert found.rooflines[0].tokens_per_second[0] > 0


def test_verb_on_a_recorded_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = BY_NAME["gpt-oss 120B"]
    path = gguf_files.write(tmp_path / "m.gguf", model.metadata(), model.tensors())
    assert main(["--root", STRIX_HALO, "expect", str(path), "--ctx", "8192"]) == 0
    out = capsys.readouterr().out
    assert "measured by others: gpt-oss 120B MXFP4: 51 to 56 tokens/s" in out
    assert "measured here: not yet ('infertune bench')" in out
    assert "not measured on this machine" in out


# -- what was measured here --------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Store]:
    """A model of this machine, and a run to put samples into."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("infertune.budget.bandwidth.read_bandwidth", lambda _: 50e9)
    model = BY_NAME["Llama 3.1 8B"]
    path = str(gguf_files.write(tmp_path / "m.gguf", model.metadata(), model.tensors()))
    root = Root("/")
    places = (machine_key(read_machine(root)), model_key(root, [path]))
    here = f"{tmp_path}/infertune/measurements/{'/'.join(places)}"
    return path, Store(root, f"{here}/20261129T090000Z-bench")


def sample(depth: int, tpot_s: float, *reasons: str) -> dict[str, Any]:
    times = tuple(1 + number * tpot_s for number in range(3))
    calm = Between(0.0, 0.0, {}, 0, None, None, None, 0, None, ())
    answer = Timed(times, 3, depth + 512, 0)
    return Sample(Load(depth, 1, 3), (0,), (answer,), times[-1], calm, reasons).document()


def test_measured_stands_beside_the_roofline(
    measured: tuple[str, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    path, store = measured
    assert main(["expect", path]) == 0
    assert "measured here: not yet" in capsys.readouterr().out
    about = {"verb": "bench", "began": "2026-11-29T09:00:00Z", "backend": "cpu", "busy": False}
    store.begin({**about, "profile": "quiet", "build": "11669", "kernel": "1.2.3"})
    for each in (sample(0, 0.2), sample(0, 0.4, "cc"), sample(4096, 0.5)):
        store.add(each)
    later = Store(Root("/"), store.path.replace("T09", "T10"))
    later.begin({**about, "verb": "prove"})
    later.add(sample(0, 0.1))
    assert main(["expect", path]) == 0
    out = capsys.readouterr().out
    assert "measured here: 2026-11-29: profile quiet, cpu, 11669\n" in out
    shape, here = read_shape(read_model(path)), read_machine(Root("/"))
    [line] = [e for e in expect(shape, here, 50e9, 512).rooflines if e.reader == "CPU"]
    assert line.tokens_per_second_deep is not None
    share = 5 / line.tokens_per_second_deep[1]
    assert re.search(rf"^0 +1 +5\.0 +{share:.0%} of ", out, re.MULTILINE)
    assert re.search(r"^4096 +1 +2\.0 +", out, re.MULTILINE)
    assert "measured under kernel 1.2.3" in out
    table = out[out.index("DEPTH") :].partition("note:")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_what_is_no_measurement_is_passed_over(
    measured: tuple[str, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    path, store = measured
    store.begin({"verb": "bench", "profile": None, "build": None, "backend": None, "busy": True})
    good = sample(0, 0.2)
    answer = good["answers"][0]
    for bad in (
        {}, {**good, "load": {}}, {**good, "load": 5},
        {**good, "load": {**good["load"], "depth": "x"}},
        {**good, "answers": 5}, {**good, "answers": [{**answer, "times_s": []}]},
        {**good, "answers": [{**answer, "times_s": ["x"]}]}, {**good, "conditions": None},
        {**good, "load": {**good["load"], "depth": 7}, "answers": [{**answer, "tokens": "x"}]},
    ):  # fmt: skip
        store.add(bad)
    main(["expect", path])
    assert "measured here: not yet" in capsys.readouterr().out
    store.add(good)
    main(["expect", path])
    assert re.search(r"^0 +1 +5\.0 ", capsys.readouterr().out, re.MULTILINE)
