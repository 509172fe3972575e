# SPDX-License-Identifier: Apache-2.0
"""A llama-server that others start, as the settings that say how much memory it takes.

Its flags and variables are what its unit has; nobody asks the program.  What is not understood is
an answer of its own: a start that cannot be judged is never refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from infertune.base.records import dataclass, field
from infertune.base.units import printable_line
from infertune.catalogue.server_settings import parse_server_setting
from infertune.host.servers import OPTIONS, Declared
from infertune.server_files.command_line import LLAMA

_BLIND = (
    *("--override-tensor", "-ot", "--rpc", "--tensor-split", "-ts", "--model-url", "-mu"),
    *("--hf-repo", "-hf", "-hfr", "--hf-file", "-hff", "--docker-repo", "-dr", "--models-dir"),
    *("--spec-draft-hf", "-hfd", "--hf-repo-draft", "--mmproj-url", "-mmu"),
)
"""Flags after which it is not known where what lies."""
_BLIND_VARIABLES = ("LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODELS_DIR", "LLAMA_ARG_RPC")

_SWITCHES: dict[str, tuple[str, str]] = {
    "--kv-unified": ("kv_unified", "1"),
    "-kvu": ("kv_unified", "1"),
    "--no-kv-unified": ("kv_unified", "0"),
    "-no-kvu": ("kv_unified", "0"),
    "--no-kv-offload": ("kv_offload", "0"),
    "-nkvo": ("kv_offload", "0"),
    "--no-mmproj-offload": ("mmproj_offload", "0"),
    "--swa-full": ("swa_full", "1"),
    "--cpu-moe": ("n_cpu_moe", "9999"),
    "-cmoe": ("n_cpu_moe", "9999"),
    "--no-mmap": ("load_mode", "none"),
    "--mlock": ("load_mode", "mlock"),
    "--direct-io": ("load_mode", "dio"),
}
"""Flags without a value, and the setting they stand for."""
_AUTO = {"parallel": "-1", "gpu_layers": "-1"}
"""Values that mean: as without it."""
_WORDS = ("flash_attn", "cache_type_k", "cache_type_v", "load_mode", "fit", "spec_type")
_FILES = ("mmproj", "model_draft")


@dataclass(frozen=True, slots=True)
class Started:
    """What is known of a server before it starts."""

    model: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    """Canonical, by the names of server_settings.py."""
    on_cpu: bool = False
    """Whether it was told to use no device."""
    unknown: str | None = None
    """Why it is not known how much it takes; None where it is."""


def started(server: Declared | None, unit: str) -> Started:
    """What a unit will start, or why that is not known."""
    if why := _unknown(server, unit):
        return Started(unknown=why)
    assert server is not None
    try:
        settings = dict(_settings(server))
    except ValueError as error:
        return Started(unknown=f"{server.path}: {error}")
    return Started(server.model, settings, server.option("device") == "none")


def _unknown(server: Declared | None, unit: str) -> str | None:
    if server is None:
        return f"{unit} starts no server that infertune knows"
    if server.engine != LLAMA:
        return f"what {server.engine} loads is not known before it does"
    if server.unread:
        return server.unread
    given = [each for each in _BLIND if each in server.flags]
    given += [each for each in _BLIND_VARIABLES if each in server.environment]
    if server.preset is not None or given:
        what = given[0] if given else "a preset"
        return f"{server.path}: with {what} it is not known how much it takes"
    if server.model is None:
        return f"{server.path} names no model"
    if server.image is not None:
        return f"{server.path}: a container has files of its own"
    if not server.model.startswith("/") or set("%$") & set(server.model):
        return f"{server.path}: {printable_line(server.model, 80)} is not the whole path of a file"
    return None


def _settings(server: Declared) -> Iterator[tuple[str, str]]:
    """Raises ValueError for a value that is none of the setting's."""
    for flag in server.flags:
        if flag in _SWITCHES:
            yield _SWITCHES[flag]
    if server.flags.keys() & {"-fa", "--flash-attn"} and server.option("flash_attn") == "":
        yield "flash_attn", "on"  # builds of before August 2025 take no value
    for name in OPTIONS:
        value = server.option(name)
        if not value or name == "device" or value == _AUTO.get(name):
            continue
        if name == "kv_unified":
            yield name, "1" if value in ("1", "true", "on") else "0"
        elif name in _FILES or name in _WORDS:
            yield name, parse_server_setting(name, value)
        elif name == "cache_ram":
            yield name, parse_server_setting(name, f"{value}MiB")
        else:
            yield name, parse_server_setting(name, int(value) if value.isdecimal() else value)
