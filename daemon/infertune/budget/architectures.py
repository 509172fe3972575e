# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp keeps in memory for each architecture it knows: one entry each.

From its model files (src/models/*.cpp, ``load_arch_hparams``).  Those in CHECKED were held against
what a server allocates; a budget of another says that it was not.  An architecture that is not here
is unknown, not plain: a guess would be off by a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from infertune.base.records import dataclass

Recurrent = Literal["none", "all", "beside", "no_kv_heads", "no_kv_heads_no_ffn", "interval"]
State = Literal["ssm", "wkv", "shortconv", "kda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How the layers of one architecture remember what came before."""

    window_period: int = 0
    """Of so many layers, all but one see a window only; 0: all see everything, whatever
    ``attention.sliding_window`` says.  ``attention.sliding_window_pattern`` counts first."""
    window_default: int = 0
    """Tokens of the window where the file does not say."""
    full_first: bool = False
    """The layer that sees everything is the first of its period, not the last."""
    own_kv_layers: int = 0
    """So many layers from the start keep a KV cache, the rest use theirs; 0: all."""
    recurrent: Recurrent = "none"
    """Which layers keep a state of fixed size: all, all beside attention, those without KV heads
    (and without feed-forward), all but one of ``full_attention_interval``."""
    state: State = "ssm"
    token_shifts: int = 2


_PLAIN = (
    "llama", "mistral3", "llama-embed", "deci", "grok", "falcon", "gpt2", "gptj", "gptneox", "mpt",
    "baichuan", "starcoder", "starcoder2", "refact", "bloom", "stablelm", "qwen", "qwen2",
    "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "phi2", "phi3", "phimoe",
    "plamo", "codeshell", "orion", "internlm2", "minicpm", "minicpm3", "gemma", "command-r",
    "dbrx", "olmo", "olmoe", "openelm", "arctic", "deepseek", "deepseek2", "chatglm", "glm4",
    "glm4moe", "bitnet", "jais", "jais2", "nemotron", "exaone", "granite", "granitemoe",
    "chameleon", "plm", "bailingmoe", "bailingmoe2", "dots1", "arcee", "ernie4_5", "ernie4_5-moe",
    "hunyuan-moe", "hunyuan-dense", "smollm3", "seed_oss", "grovemoe", "apertus", "minimax-m2",
    "pangu-embedded", "maincoder", "xverse", "mistral4",
)  # fmt: skip
"""Every layer keeps K and V of every token (deepseek2 and mistral4: the latent of MLA)."""

ARCHITECTURES: Mapping[str, Architecture] = {
    **dict.fromkeys(_PLAIN, Architecture()),
    "gemma2": Architecture(window_period=2, window_default=4096),
    "gemma3": Architecture(window_period=6),
    "gemma3n": Architecture(window_period=5, own_kv_layers=20),
    "gemma4": Architecture(window_period=6),
    "cohere2": Architecture(window_period=4),
    "gpt-oss": Architecture(window_period=2),
    "llama4": Architecture(window_period=4, window_default=8192),
    "exaone4": Architecture(window_period=4),
    "exaone-moe": Architecture(window_period=4),
    "olmo2": Architecture(window_period=4),
    "smallthinker": Architecture(window_period=4, full_first=True),
    "afmoe": Architecture(window_period=4),
    "mimo2": Architecture(window_period=1),
    "step35": Architecture(window_period=1),
    "mamba": Architecture(recurrent="all"),
    "mamba2": Architecture(recurrent="all"),
    "jamba": Architecture(recurrent="no_kv_heads"),
    "falcon-h1": Architecture(recurrent="beside"),
    "plamo2": Architecture(recurrent="no_kv_heads"),
    "granitehybrid": Architecture(recurrent="no_kv_heads"),
    "nemotron_h": Architecture(recurrent="no_kv_heads_no_ffn"),
    "nemotron_h_moe": Architecture(recurrent="no_kv_heads_no_ffn"),
    "lfm2": Architecture(recurrent="no_kv_heads", state="shortconv"),
    "lfm2moe": Architecture(recurrent="no_kv_heads", state="shortconv"),
    "qwen3next": Architecture(recurrent="interval"),
    "qwen35": Architecture(recurrent="interval"),
    "qwen35moe": Architecture(recurrent="interval"),
    "kimi-linear": Architecture(recurrent="no_kv_heads", state="kda"),
    "rwkv6": Architecture(recurrent="all", state="wkv"),
    "rwkv7": Architecture(recurrent="all", state="wkv"),
    "rwkv6qwen2": Architecture(recurrent="all", state="wkv", token_shifts=1),
    "arwkv7": Architecture(recurrent="all", state="wkv", token_shifts=1),
}

CHECKED = frozenset(
    {
        "llama", "qwen3", "qwen3moe", "gemma3", "gpt-oss", "deepseek2", "glm4moe", "phi3",
        "qwen3next", "mamba", "nemotron_h_moe", "falcon-h1", "granitehybrid",
    }
)  # fmt: skip
"""Build 11549 loaded a model of each, and tests/unit/test_budget.py has what it allocated."""
