# SPDX-License-Identifier: Apache-2.0
"""Canonical server settings become the flags of the binary that printed the help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infertune.server_settings import SERVER_SETTINGS, parse_help, server_arguments

FAKE = Path(__file__).parents[1] / "fake_llama_server"


def help_of(build: str) -> str:
    command = [sys.executable, FAKE, "--build", build, "--", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def old() -> str:
    return help_of("old")


@pytest.fixture(scope="module")
def new() -> str:
    return help_of("new")


def flags(settings: dict[str, str], help_text: str) -> list[str]:
    """The arguments for ``settings``; nothing may be refused."""
    arguments, refused = server_arguments(settings, help_text, model="/m.gguf", port=8080)
    assert refused == []
    assert arguments[:6] == ["--model", "/m.gguf", "--host", "127.0.0.1", "--port", "8080"]
    return arguments[6:]


def reason(settings: dict[str, str], help_text: str) -> str:
    """Why the one setting is refused; nothing but host, port and model may be passed."""
    arguments, refused = server_arguments(settings, help_text, model="/m.gguf", port=8080)
    assert len(arguments) == 6
    [one] = refused
    assert {one.setting: one.value} == settings
    return one.reason


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", []),
        ("mmap", []),
        ("none", ["--no-mmap"]),
        ("mlock", ["--mlock"]),
        ("mmap+mlock", ["--mlock"]),
        ("dio", ["--direct-io"]),
    ],
)
def test_load_mode_on_an_old_build(mode: str, expected: list[str], old: str) -> None:
    assert flags({"load_mode": mode}, old) == expected


@pytest.mark.parametrize("mode", ["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"])
def test_load_mode_on_a_new_build(mode: str, new: str) -> None:
    assert flags({"load_mode": mode}, new) == ["--load-mode", mode]


def test_values_are_passed_in_the_order_of_the_profile(new: str) -> None:
    settings = {"ctx_size": "131072", "threads": "8", "gpu_layers": "all", "prio": "-1"}
    expected = ["--ctx-size", "131072", "--threads", "8", "--n-gpu-layers", "all", "--prio", "-1"]
    assert flags(settings, new) == expected


def test_switches(new: str) -> None:
    assert flags({"metrics": "1", "cont_batching": "0", "slots": "1"}, new) == [
        "--metrics",
        "--no-cont-batching",
        "--slots",
    ]
    assert flags({"metrics": "0"}, new) == []


def test_a_flag_that_this_build_does_not_have(old: str) -> None:
    assert reason({"kv_unified": "1"}, old) == "this build has no --kv-unified"
    assert reason({"spec_type": "ngram-mod"}, old).startswith("this build has no --spec-type")
    assert flags({"spec_type": "none"}, old) == []


def test_a_value_that_this_build_does_not_list(new: str) -> None:
    assert reason({"spec_type": "ngram-map-k4v"}, new).startswith(
        "--spec-type of this build offers none, draft-simple"
    )
    narrow = "-fa, --flash-attn [on|off]    attention\n-ctk, --cache-type-k {f32,f16}    K\n"
    assert "offers on, off" in reason({"flash_attn": "auto"}, narrow)
    assert "offers f32, f16" in reason({"cache_type_k": "q8_0"}, narrow)


def test_a_word_that_this_build_does_not_mention() -> None:
    text = "-ngl,  --n-gpu-layers N      layers to keep on the GPU\n"
    assert "does not say that it takes 'all'" in reason({"gpu_layers": "all"}, text)
    assert flags({"gpu_layers": "99"}, text) == ["--n-gpu-layers", "99"]


def test_a_flag_that_takes_no_value_here() -> None:
    bare = "-fa,   --flash-attn                     use flash attention\n"
    assert flags({"flash_attn": "on"}, bare) == ["--flash-attn"]
    assert flags({"flash_attn": "off"}, bare) == []
    assert "takes no value" in reason({"flash_attn": "auto"}, bare)


def test_a_switch_that_wants_a_value_here() -> None:
    assert "wants a value" in reason({"metrics": "1"}, "--metrics MODE        metrics\n")


def test_nothing_is_passed_to_a_program_that_says_nothing() -> None:
    settings = {name: setting_value(name) for name in SERVER_SETTINGS}
    arguments, refused = server_arguments(settings, "usage: true", model="/m", port=1)
    # What older builds do anyway needs no flag.
    said_by_silence = {"load_mode", "spec_type"}
    assert len(arguments) == 6
    assert {one.setting for one in refused} == set(SERVER_SETTINGS) - said_by_silence


def setting_value(name: str) -> str:
    words = {"flash_attn": "on", "load_mode": "auto", "spec_type": "none", "fit": "on"}
    return words.get(name) or ("f16" if name.startswith("cache_type") else "1")


def test_help_with_lists_over_several_lines(new: str) -> None:
    options = parse_help(new)
    assert options["-ctk"] == options["--cache-type-k"]
    assert options["--cache-type-k"].words == (
        "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
    )  # fmt: skip
    assert options["--load-mode"].words == ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
    assert options["--ctx-size"].argument == "N"
    assert options["--no-cont-batching"].argument is None
    assert options["--poll"].words is None


def test_the_defaults_of_every_setting_parse() -> None:
    for setting in SERVER_SETTINGS.values():
        assert setting.value.accepts()
    assert SERVER_SETTINGS["gpu_layers"].value.parse("auto") == "auto"
    assert SERVER_SETTINGS["gpu_layers"].value.parse(12) == "12"
    assert SERVER_SETTINGS["cache_ram"].value.parse("2GiB") == "2048"
    with pytest.raises(ValueError, match="or auto, all"):
        SERVER_SETTINGS["gpu_layers"].value.parse("most")
