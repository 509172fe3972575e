# SPDX-License-Identifier: Apache-2.0
"""Canonical server settings become the flags of the binary that printed the help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infertune.catalogue.server_settings import (
    SERVER_SETTINGS,
    check_together,
    own_flags,
    parse_help,
    parse_server_setting,
    server_arguments,
    unknown_flag,
)
from infertune.cli.fit import parse_setting
from infertune.launch.embedded import help_text

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
    always = given(help_text)
    assert arguments[: len(always)] == always
    return arguments[len(always) :]


def given(help_text: str) -> list[str]:
    """What every server is given; a name for clients only where it takes one."""
    alias = ["--alias", "m"] if "--alias" in help_text else []
    return ["--model", "/m.gguf", "--host", "127.0.0.1", "--port", "8080", *alias]


def reason(settings: dict[str, str], help_text: str) -> str:
    """Why the one setting is refused; nothing but host, port, model and alias may be passed."""
    arguments, refused = server_arguments(settings, help_text, model="/m.gguf", port=8080)
    assert arguments == given(help_text)
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
    said_by_silence = {"load_mode", "spec_type", "prewarm"}
    assert len(arguments) == 6
    assert {one.setting for one in refused} == set(SERVER_SETTINGS) - said_by_silence


def setting_value(name: str) -> str:
    words = {
        "flash_attn": "on",
        "prewarm": "on",
        "load_mode": "auto",
        "spec_type": "none",
        "fit": "on",
    }
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


# -- drafting, projectors, files ---------------------------------------------------

NEWEST = """\
-mm, --mmproj FILE                      path to a projector
--mmproj-offload, --no-mmproj-offload   projector on the GPU (default: enabled)
-ctxcp, --ctx-checkpoints, --swa-checkpoints N
                                        max number of checkpoints (default: 32)
-cms, --checkpoint-min-step N           least distance (default: 8192)
--swa-full                              whole cache (default: false)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model (default: unused)
--spec-draft-n-max N                    tokens to draft (default: 3)
--spec-type none,draft-simple,draft-eagle3,draft-mtp,draft-dflash,draft-dspark,ngram-mod
                                        comma-separated list of kinds (default: none)
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
"""
"""In the form of build 11669."""
BEFORE = """\
-md,   --model-draft FNAME              draft model (default: unused)
--draft, --draft-n, --draft-max N       number of tokens to draft (default: 16)
--swa-checkpoints N                     max number of checkpoints (default: 3)
--spec-type [none|ngram-cache|ngram-simple]
                                        type of speculative decoding to use (default: none)
"""


def test_newest_flags_of_drafting() -> None:
    settings = {
        "spec_type": "draft-dflash,ngram-mod",
        "model_draft": "/m/d 1.gguf",
        "spec_draft_n_max": "5",
        "mmproj": "/m/mmproj.gguf",
        "mmproj_offload": "0",
        "ctx_checkpoints": "4",
        "checkpoint_min_step": "1024",
        "swa_full": "1",
    }
    assert flags(settings, NEWEST) == [
        *("--spec-type", "draft-dflash,ngram-mod", "--spec-draft-model", "/m/d 1.gguf"),
        *("--spec-draft-n-max", "5", "--mmproj", "/m/mmproj.gguf", "--no-mmproj-offload"),
        *("--ctx-checkpoints", "4", "--checkpoint-min-step", "1024", "--swa-full"),
    ]


def test_older_flags_of_drafting() -> None:
    settings = {"model_draft": "/d.gguf", "spec_draft_n_max": "5", "ctx_checkpoints": "4"}
    assert flags(settings, BEFORE) == [
        *("--model-draft", "/d.gguf", "--draft-max", "5", "--swa-checkpoints", "4"),
    ]
    assert "offers none, ngram-cache" in reason({"spec_type": "draft-mtp"}, BEFORE)
    assert "takes one word" in reason({"spec_type": "ngram-cache,ngram-simple"}, BEFORE)


def test_a_flag_that_is_listed_only_as_removed_is_not_there() -> None:
    without = NEWEST.replace("--spec-draft-n-max N ", "--other N ")
    assert "--draft-max" not in parse_help(without)
    assert "this build has no --draft-max" in reason({"spec_draft_n_max": "5"}, without)


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ("none", "none"),
        ("draft-mtp", "draft-mtp"),
        ("draft-mtp, ngram-mod", "draft-mtp,ngram-mod"),
        ("ngram-simple,ngram-cache", "ngram-simple,ngram-cache"),
    ],
)
def test_kinds_of_speculation(value: str, canonical: str) -> None:
    assert SERVER_SETTINGS["spec_type"].value.parse(value) == canonical


@pytest.mark.parametrize("value", ["mtp", "draft-mtp,", "", "ngram-mod,ngram-mod", 3, True])
def test_kinds_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match=r"not one of none, draft-simple|has a word twice"):
        SERVER_SETTINGS["spec_type"].value.parse(value)


def test_a_path_is_absolute_plain_and_bounded() -> None:
    parse = SERVER_SETTINGS["mmproj"].value.parse
    assert parse("/srv/my models/a:b%.gguf") == "/srv/my models/a:b%.gguf"
    assert parse("/" + "m" * 4094) == "/" + "m" * 4094
    wrong = ("m.gguf", "./m", "", "/m\n", "/m\0", "/a/../b", "/a//b", "//a", "/a/", 1, None)
    for path in (*wrong, "/" + "m" * 4095, "/\udcff"):
        with pytest.raises(ValueError, match="is not an absolute path of a file") as error:
            parse(path)
        assert len(str(error.value)) < 250
        assert str(error.value).isprintable()


def test_an_unknown_setting_and_what_may_be_meant() -> None:
    with pytest.raises(ValueError, match="no server setting 'ctxsize'; did you mean 'ctx_size'"):
        parse_server_setting("ctxsize", 1)
    with pytest.raises(ValueError, match=r"^ctx_size: 'x' is not a whole number"):
        parse_server_setting("ctx_size", "x")


@pytest.mark.parametrize("kind", ["draft-simple", "draft-eagle3", "ngram-mod,draft-dspark"])
def test_a_kind_that_needs_a_model_of_its_own(kind: str) -> None:
    with pytest.raises(ValueError, match="needs model_draft, the file of the model that drafts"):
        check_together({"spec_type": kind})
    check_together({"spec_type": kind, "model_draft": "/d.gguf"})


def test_kinds_that_need_none() -> None:
    for kind in ("draft-mtp", "none", "ngram-mod", "draft-mtp,ngram-mod"):
        check_together({"spec_type": kind})
    check_together({})


def test_the_embedded_server_offers_what_needs_no_second_file() -> None:
    text = help_text()
    assert flags({"spec_type": "ngram-mod,ngram-cache"}, text) == [
        *("--spec-type", "ngram-mod,ngram-cache"),
    ]
    assert "offers none, ngram-simple" in reason({"spec_type": "draft-mtp"}, text)
    assert "this build has no --mmproj" in reason({"mmproj": "/m"}, text)


def test_a_name_for_clients_instead_of_the_file_s(new: str) -> None:
    arguments, refused = server_arguments(
        {"alias": "qwen3.6:35b/chat"}, new, model="/m.gguf", port=8080
    )
    assert arguments[-2:] == ["--alias", "qwen3.6:35b/chat"]
    assert arguments.count("--alias") == 1
    assert not refused
    for wrong in ("a,b", "--x", "", "a\nb", "x" * 129, 7):
        with pytest.raises(ValueError, match="is not a name of letters"):
            parse_server_setting("alias", wrong)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--chat-template-kwargs", '{"enable_thinking": false}', "--no-webui"], None),
        (["--seed", "-1"], None),
        ([], None),
        (["x", "--y"], "'x' is not a flag"),
        (["--ctx-size", "1"], "--ctx-size is 'ctx_size' under [settings]"),
        (["--no-mmap"], "--no-mmap is 'load_mode' under [settings]"),
        (["--host=0.0.0.0"], "infertune gives --host itself"),
        (["-m", "/etc/passwd"], "write -m in its long form"),
        (["--tools", "all"], "--tools is not for a server's unit"),
        (["--ui-mcp-proxy"], "--ui-mcp-proxy is not for a server's unit"),
        (["--models-preset", "/x"], "--models-preset is 'models_preset' under [settings]"),
        (["--log-file", "/x"], "--log-file is not for a server's unit"),
    ],
)
def test_flags_of_an_administrator(words: list[str], problem: str | None) -> None:
    assert own_flags(words) == problem


def test_a_flag_that_the_build_lacks_is_named(new: str) -> None:
    assert unknown_flag(["--kv-unified", "--threads", "3"], new) is None
    assert unknown_flag(["--threads", "3", "--nonsense=1"], new) == "--nonsense"


def test_a_factor_is_a_text_with_decimals_between_its_bounds() -> None:
    assert parse_server_setting("rope_freq_scale", "0.90") == "0.9"
    assert parse_setting("rope_freq_scale=0.9") == ("rope_freq_scale", "0.9")
    for wrong in ("0", "9", "nan", "0.9x", "-1", True, None):
        with pytest.raises(ValueError, match=r"rope_freq_scale: .*0\.01 to 4"):
            parse_server_setting("rope_freq_scale", wrong)


def test_what_has_decimals_is_given_to_a_flag_that_lists_no_values() -> None:
    text = "--rope-freq-scale N    factor\n--repack, -nr, --no-repack    weights\n--port N  p\n"
    settings = {"rope_freq_scale": "0.9", "repack": "0"}
    words, refused = server_arguments(settings, text, model="/m", port=1)
    assert not refused
    assert words[-3:] == ["--rope-freq-scale", "0.9", "--no-repack"]
