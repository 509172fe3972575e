# SPDX-License-Identifier: Apache-2.0
"""Settings of declared servers that fit neither each other nor this machine.

A threshold is one that a source names, or it is computed from the machine.
"""

from __future__ import annotations

from collections.abc import Callable

from infertune.base.units import MIB, format_size
from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    Unknown,
    github,
    llama,
    need,
    rocm,
)
from infertune.doctor.builds import runs_on
from infertune.doctor.conditions import AMDGPU, DECLARED, INTEGRATED
from infertune.doctor.facts import Facts
from infertune.doctor.rules.llama_cpp import and_others, may_refuse
from infertune.doctor.surroundings import LlamaServer
from infertune.host.servers import Declared
from infertune.host.text import integer
from infertune.server_files.command_line import LLAMA

_BATCH = 2048
_UBATCH = 512
_CACHE_RAM_MIB = 8192
"""llama-server's own defaults (common/common.h)."""

_LONG_UBATCH = 2048
"""Size with which Vulkan lost the device at 256k tokens of context; with 8192 it was 128k."""

_FIRST_LOAD_MODE = 10114
"""About the build of pull request 20834; before it a model is mapped unless --no-mmap is given."""

_OFF = ("off", "0", "false", "disabled")
_FULL_CACHES = ("f16", "f32", "bf16")
_NO_CHAT = ("--embedding", "--embeddings", "--rerank", "--reranking")

_SERVER_README = Source(
    "llama.cpp: llama-server",
    "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
)
_CONTEXT = Source(
    "llama.cpp: llama-context.cpp",
    "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp",
)


def _each(check: Callable[[Declared, Facts], str | None]) -> Callable[[Facts], Answer]:
    """A check of every declared llama-server; the finding names the first, and counts the rest."""

    def answer(facts: Facts) -> Answer:
        servers = [each for each in need(facts.declared) if each.engine == LLAMA and _serves(each)]
        said = [(server.where, text) for server in servers if (text := check(server, facts))]
        if not said:
            return None
        return Finding(said[0][1] + and_others([where for where, _ in said]))

    return answer


def _serves(server: Declared) -> bool:
    """Not a router: what serves is in its preset, and stands there for itself."""
    return server.preset is None and server.kind != "infertune"


def _number(server: Declared, option: str, default: int) -> int:
    value = integer(server.option(option))
    return default if value is None else value


def _ubatch_capped(server: Declared, facts: Facts) -> str | None:
    batch, ubatch = _number(server, "batch_size", _BATCH), _number(server, "ubatch_size", _UBATCH)
    if ubatch <= batch or batch == 0:
        return None
    own = "" if server.option("batch_size") else ", llama-server's default"
    return (
        f"{server.where} sets a micro-batch of {ubatch} tokens, and the batch is {batch}{own}: "
        f"llama-server silently uses {batch}"
    )


def _ubatch_vulkan(server: Declared, facts: Facts) -> str | None:
    batch, ubatch = _number(server, "batch_size", _BATCH), _number(server, "ubatch_size", _UBATCH)
    if min(batch, ubatch) < _LONG_UBATCH or runs_on(server, facts) != "vulkan":
        return None
    if server.has(*_NO_CHAT):
        return None  # short texts: what takes long is a micro-batch at the end of a long context
    return (
        f"{server.where} computes {min(batch, ubatch)} tokens in one go with Vulkan: at a long "
        "context that takes longer than the kernel waits, and the device is lost"
    )


def _quantised_v(server: Declared, facts: Facts) -> str | None:
    kind = server.option("cache_type_v")
    if not kind or kind in _FULL_CACHES:
        return None
    if (server.option("flash_attn") or "auto").lower() not in _OFF:
        return None
    return (
        f"{server.where} sets a V cache of {kind} and turns off flash attention, which it needs: "
        "the server does not start"
    )


def _slot_context(server: Declared, facts: Facts) -> str | None:
    slots, context = _number(server, "parallel", 1), _number(server, "ctx_size", 0)
    batch = _number(server, "batch_size", _BATCH)
    shared = server.has("--kv-unified", "-kvu") or server.option("kv_unified") not in (None, *_OFF)
    if slots < 2 or context == 0 or shared or server.has(*_NO_CHAT):
        return None
    slot = context // slots
    if slot >= batch:
        return None
    return (
        f"{server.where} divides {context} tokens of context among {slots} slots: {slot} for each, "
        f"less than one batch ({batch})"
    )


def _is_on_gpu(server: Declared) -> bool:
    return server.option("gpu_layers") != "0" and server.option("device") != "none"


def _locked_copy(server: Declared, facts: Facts) -> str | None:
    mode = server.option("load_mode") or ""
    maps = (server.has("--mlock") and not server.has("--no-mmap")) or mode == "mmap+mlock"
    if not maps or not _is_on_gpu(server) or may_refuse(server, facts, "--mlock"):
        return None
    return (
        f"{server.where} maps the model and locks it in memory: on an integrated GPU that is a "
        "second copy of what the GPU holds, and the kernel cannot reclaim it"
    )


def _mapped(server: Declared, facts: Facts) -> str | None:
    if runs_on(server, facts) != "rocm" and not _may_be_rocm(server, facts):
        return None
    mode = server.option("load_mode") or ""
    if not _is_on_gpu(server) or server.has("--no-mmap"):
        return None
    if server.has("--mmap") or mode in ("mmap", "mmap+mlock"):
        return _mapping_text(server, "asks for a mapped model")
    known = facts.server
    build = known.build if isinstance(known, LlamaServer) and server.image is None else None
    if build is not None and build < _FIRST_LOAD_MODE and not mode:
        return _mapping_text(server, f"does not give --no-mmap, and b{build} maps models")
    return None


def _may_be_rocm(server: Declared, facts: Facts) -> bool:
    known = facts.server
    named = server.image is not None or server.option("device")
    return not named and isinstance(known, LlamaServer) and "rocm" in known.backends


def _mapping_text(server: Declared, what: str) -> str:
    return (
        f"{server.where} {what}: with ROCm on an integrated GPU loading a large one takes very "
        "long, or never ends"
    )


def _no_offload(server: Declared, facts: Facts) -> str | None:
    if _is_on_gpu(server) or server.has(*_NO_CHAT):
        return None
    return f"{server.where} keeps every layer on the CPU, and there is a GPU to run it on"


def _prompt_cache(server: Declared, facts: Facts) -> str | None:
    asked = server.option("cache_ram")
    unlimited = asked == "-1"
    size = _number(server, "cache_ram", _CACHE_RAM_MIB) * MIB
    ram = need(facts.machine.memory.total_bytes or Unknown("the size of RAM is not known"))
    gtt = need(facts.gpu.gtt_bytes or Unknown("the GTT limit cannot be read"))
    left = ram - gtt
    if server.has(*_NO_CHAT) or (size <= left and not unlimited):
        return None
    own = "" if asked else ", llama-server's default"
    wanted = "all memory" if unlimited else f"{format_size(size)}{own}"
    return (
        f"{server.where} may cache prompts in {wanted}, and the GPU's limit of {format_size(gtt)} "
        f"leaves {format_size(max(left, 0))} of RAM"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        id="server-ubatch-capped",
        title="a micro-batch larger than the batch",
        when=DECLARED,
        check=_each(_ubatch_capped),
        severity="info",
        confidence="sure",
        fix="give --batch-size as well, or leave --ubatch-size out",
        sources=(_CONTEXT,),
    ),
    Rule(
        id="server-ubatch-vulkan",
        title="a large micro-batch with Vulkan",
        when=INTEGRATED & DECLARED,
        check=_each(_ubatch_vulkan),
        fix="--ubatch-size 512, or less for contexts of 100,000 tokens and more",
        sources=(
            github("Nathanw1014/strix-halo-llamacpp", 16),
            llama(21724),
            github("ollama/ollama", 17870),
        ),
    ),
    Rule(
        id="server-quantised-v",
        title="a quantised V cache without flash attention",
        when=DECLARED,
        check=_each(_quantised_v),
        severity="error",
        confidence="sure",
        fix="--flash-attn on, or --cache-type-v f16",
        sources=(llama(28524), llama(10378)),
    ),
    Rule(
        id="server-slot-context",
        title="a context split into slots smaller than one batch",
        when=DECLARED,
        check=_each(_slot_context),
        fix="--kv-unified, fewer slots (--parallel), or a larger --ctx-size",
        sources=(llama(11681), llama(16736)),
    ),
    Rule(
        id="server-locked-copy",
        title="a mapped model that is locked in memory beside the GPU's copy",
        when=INTEGRATED & DECLARED,
        check=_each(_locked_copy),
        fix="leave the load mode at auto; on an integrated GPU the weights need no locking",
        sources=(llama(7399), llama(26110)),
    ),
    Rule(
        id="server-mapped-model",
        title="a mapped model with ROCm on an integrated GPU",
        when=INTEGRATED & DECLARED,
        check=_each(_mapped),
        fix="--load-mode none (--no-mmap before b10114)",
        sources=(llama(15018), rocm(6182)),
    ),
    Rule(
        id="server-no-offload",
        title="a server that does not use the GPU",
        when=AMDGPU & DECLARED,
        check=_each(_no_offload),
        severity="info",
        fix="leave out --n-gpu-layers and --device: all layers that fit go to the GPU",
        sources=(_SERVER_README,),
    ),
    Rule(
        id="server-prompt-cache",
        title="a prompt cache larger than the RAM that the GPU's limit leaves",
        when=INTEGRATED & DECLARED,
        check=_each(_prompt_cache),
        fix="set --cache-ram to a number of MiB that fits (0 for no cache), or lower the GTT limit",
        sources=(llama(16391), github("ollama/ollama", 18265)),
    ),
)
