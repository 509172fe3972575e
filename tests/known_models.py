# SPDX-License-Identifier: Apache-2.0
"""Published models as GGUF heads, with what is published of their sizes.

``layers`` may be cut (the tests that start a server do), all else is the model's config.json.
Tensor names and shapes: llama.cpp's model files (src/models/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gguf_files import Spec, Value
from infertune.base.records import replace

Tensors = Iterator[Spec]


@dataclass(frozen=True)
class Known:
    """One published model."""

    name: str
    architecture: str
    keys: Mapping[str, Value]
    """Without the prefix of the architecture; a list has one value for each layer."""
    vocab: int
    layer: Callable[[Known, int], Tensors]
    type: str = "q8_0"
    expert_type: str | None = None
    tied: bool = False
    """No tensor output.weight: the embedding is used."""
    output_norm: str = "output_norm.weight"
    parameters: int = 0
    """Published number of parameters."""
    active: int = 0
    """Published number of active parameters; 0 where all are."""
    kv_bytes_per_token: int = 0
    """Published or computed by hand from config.json, at f16; of full-attention layers."""
    source: str = ""

    def get(self, key: str, layer: int | None = None) -> int:
        value = self.keys[key]
        if not isinstance(value, int):
            assert isinstance(value, Sequence)
            assert layer is not None
            value = value[layer]
        assert isinstance(value, int)
        return value

    @property
    def layers(self) -> int:
        return self.get("block_count")

    def metadata(self, layers: int | None = None) -> dict[str, Value]:
        """Keys of the file, cut to so many layers."""
        count = layers or self.layers
        keys: dict[str, Value] = {
            "general.architecture": self.architecture,
            "tokenizer.ggml.model": "no_vocab",
            f"{self.architecture}.vocab_size": self.vocab,
        }
        for key, value in self.keys.items():
            whole = isinstance(value, Sequence) and not isinstance(value, str)
            if whole and len(value) == self.layers:  # type: ignore[arg-type]
                value = list(value)[:count]  # type: ignore[arg-type]
            keys[f"{self.architecture}.{key}"] = count if key == "block_count" else value
        return keys

    def tensors(self, layers: int | None = None) -> list[Spec]:
        width = self.get("embedding_length")
        found = [Spec("token_embd.weight", (width, self.vocab), self.type)]
        found.append(Spec(self.output_norm, (width,), "f32"))
        if not self.tied:
            found.append(Spec("output.weight", (width, self.vocab), self.type))
        for number in range(layers or self.layers):
            for spec in self.layer(self, number):
                found.append(Spec(f"blk.{number}.{spec.name}", spec.dims, spec.type))
        return found


def _w(model: Known, name: str, *dims: int) -> Spec:
    """A weight; the model's type where rows are whole blocks of it."""
    kind = (model.expert_type or model.type) if "_exps" in name else model.type
    return Spec(f"{name}.weight", dims, kind if len(dims) > 1 and dims[0] % 32 == 0 else "f32")


def _f(name: str, *dims: int) -> Spec:
    return Spec(name, dims, "f32")


def _heads(model: Known, layer: int) -> tuple[int, int, int, int]:
    """Width of Q, K and V, and of one head."""
    heads = model.get("attention.head_count", layer)
    head = (
        model.get("attention.key_length")
        if "attention.key_length" in model.keys
        else model.get("embedding_length") // heads
    )
    kv = model.get("attention.head_count_kv", layer)
    return heads * head, kv * head, kv * head, head


def _attention(
    model: Known, layer: int, *, norm: bool = False, bias: bool = False, gated: bool = False
) -> Tensors:
    width = model.get("embedding_length")
    q, k, v, head = _heads(model, layer)
    yield _w(model, "attn_q", width, q * (2 if gated else 1))
    yield _w(model, "attn_k", width, k)
    yield _w(model, "attn_v", width, v)
    yield _w(model, "attn_output", q, width)
    if bias:
        yield from (_f("attn_q.bias", q), _f("attn_k.bias", k), _f("attn_v.bias", v))
    if norm:
        yield from (_f("attn_q_norm.weight", head), _f("attn_k_norm.weight", head))


def _ffn(model: Known, layer: int = 0, *, gate: bool = True) -> Tensors:
    width, inner = model.get("embedding_length"), model.get("feed_forward_length", layer)
    if gate:
        yield _w(model, "ffn_gate", width, inner)
    yield _w(model, "ffn_up", width, inner)
    yield _w(model, "ffn_down", inner, width)


def _experts(model: Known, *, shared: int = 0, biased: bool = False, gate: bool = True) -> Tensors:
    width, experts = model.get("embedding_length"), model.get("expert_count")
    key = "expert_feed_forward_length"
    inner = model.get(key if key in model.keys else "feed_forward_length", 0)
    yield _f("ffn_gate_inp.weight", width, experts)
    if gate:
        yield _w(model, "ffn_gate_exps", width, inner, experts)
    yield _w(model, "ffn_up_exps", width, inner, experts)
    yield _w(model, "ffn_down_exps", inner, width, experts)
    if biased:
        yield _f("exp_probs_b.bias", experts)
    if shared:
        if gate:
            yield _w(model, "ffn_gate_shexp", width, shared)
        yield _w(model, "ffn_up_shexp", width, shared)
        yield _w(model, "ffn_down_shexp", shared, width)


def _norms(model: Known, *names: str) -> Tensors:
    yield from (_f(f"{name}.weight", model.get("embedding_length")) for name in names)


def _llama(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm", "ffn_norm")
    yield from _attention(model, layer)
    yield from _experts(model) if "expert_count" in model.keys else _ffn(model)


def _qwen3(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm", "ffn_norm")
    yield from _attention(model, layer, norm=True)
    yield from _experts(model) if "expert_count" in model.keys else _ffn(model)


def _gemma3(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    yield from _attention(model, layer, norm=True)
    yield from _ffn(model)


def _gpt_oss(model: Known, layer: int) -> Tensors:
    width, experts = model.get("embedding_length"), model.get("expert_count")
    inner = model.get("expert_feed_forward_length")
    yield from _norms(model, "attn_norm", "post_attention_norm")
    yield from _attention(model, layer, bias=True)
    yield _f("attn_output.bias", width)
    yield _f("attn_sinks.weight", model.get("attention.head_count"))
    yield from _experts(model)
    yield _f("ffn_gate_inp.bias", experts)
    yield _f("ffn_gate_exps.bias", inner, experts)
    yield _f("ffn_up_exps.bias", inner, experts)
    yield _f("ffn_down_exps.bias", width, experts)


def _deepseek2(model: Known, layer: int) -> Tensors:
    width, heads = model.get("embedding_length"), model.get("attention.head_count")
    rank, rope = model.get("attention.kv_lora_rank"), model.get("rope.dimension_count")
    q_rank = model.get("attention.q_lora_rank")
    head, value = model.get("attention.key_length_mla"), model.get("attention.value_length_mla")
    yield from _norms(model, "attn_norm", "ffn_norm")
    yield _w(model, "attn_q_a", width, q_rank)
    yield _f("attn_q_a_norm.weight", q_rank)
    yield _w(model, "attn_q_b", q_rank, heads * head)
    yield _w(model, "attn_kv_a_mqa", width, rank + rope)
    yield _f("attn_kv_a_norm.weight", rank)
    yield _w(model, "attn_k_b", head - rope, rank, heads)
    yield _w(model, "attn_v_b", rank, value, heads)
    yield _w(model, "attn_output", heads * value, width)
    if layer < model.get("leading_dense_block_count"):
        yield from _ffn(model)
    else:
        yield from _experts(model, shared=model.get("expert_feed_forward_length"), biased=True)


def _glm4moe(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm", "post_attention_norm")
    yield from _attention(model, layer, bias=True)
    if layer < model.get("leading_dense_block_count"):
        yield from _ffn(model)
    else:
        yield from _experts(model, shared=model.get("expert_feed_forward_length"), biased=True)
    if layer >= model.layers - model.get("nextn_predict_layers"):
        width = model.get("embedding_length")
        yield _w(model, "nextn.eh_proj", 2 * width, width)
        yield from _norms(model, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")
        yield _w(model, "nextn.embed_tokens", width, model.vocab)
        yield _w(model, "nextn.shared_head_head", width, model.vocab)


def _phi3(model: Known, layer: int) -> Tensors:
    width = model.get("embedding_length")
    q, k, v, _ = _heads(model, layer)
    yield from _norms(model, "attn_norm", "ffn_norm")
    yield _w(model, "attn_qkv", width, q + k + v)
    yield _w(model, "attn_output", q, width)
    yield _w(model, "ffn_up", width, 2 * model.get("feed_forward_length"))
    yield _w(model, "ffn_down", model.get("feed_forward_length"), width)


def _qwen3next(model: Known, layer: int) -> Tensors:
    width = model.get("embedding_length")
    yield from _norms(model, "attn_norm", "post_attention_norm")
    if (layer + 1) % 4:
        state, inner = model.get("ssm.state_size"), model.get("ssm.inner_size")
        heads = model.get("ssm.time_step_rank")
        channels = inner + 2 * state * model.get("ssm.group_count")
        yield _w(model, "attn_qkv", width, channels)
        yield _w(model, "attn_gate", width, inner)
        yield _f("ssm_conv1d.weight", model.get("ssm.conv_kernel"), channels)
        yield _f("ssm_dt.bias", heads)
        yield _f("ssm_a", heads)
        yield _w(model, "ssm_ba", width, 2 * heads)
        yield _f("ssm_norm.weight", state)
        yield _w(model, "ssm_out", inner, width)
    else:
        yield from _attention(model, layer, norm=True, gated=True)
    yield from _experts(model, shared=model.get("expert_shared_feed_forward_length"))
    yield _f("ffn_gate_inp_shexp.weight", width)


def _mamba(model: Known, layer: int) -> Tensors:
    del layer
    width, inner = model.get("embedding_length"), model.get("ssm.inner_size")
    state, rank = model.get("ssm.state_size"), model.get("ssm.time_step_rank")
    yield from _norms(model, "attn_norm")
    yield _w(model, "ssm_in", width, 2 * inner)
    yield _f("ssm_conv1d.weight", model.get("ssm.conv_kernel"), inner)
    yield _f("ssm_conv1d.bias", inner)
    yield _w(model, "ssm_x", inner, rank + 2 * state)
    yield _w(model, "ssm_dt", rank, inner)
    yield from (_f("ssm_dt.bias", inner), _f("ssm_a", state, inner), _f("ssm_d", inner))
    yield _w(model, "ssm_out", inner, width)


def _mamba2(model: Known) -> Tensors:
    width, inner = model.get("embedding_length"), model.get("ssm.inner_size")
    heads, groups = model.get("ssm.time_step_rank"), model.get("ssm.group_count")
    channels = inner + 2 * groups * model.get("ssm.state_size")
    yield _w(model, "ssm_in", width, inner + channels + heads)
    yield _f("ssm_conv1d.weight", model.get("ssm.conv_kernel"), channels)
    yield _f("ssm_conv1d.bias", channels)
    yield from (_f("ssm_dt.bias", heads), _f("ssm_a", 1, heads), _f("ssm_d", 1, heads))
    yield _f("ssm_norm.weight", inner // groups, groups)
    yield _w(model, "ssm_out", inner, width)


def _nemotron_h(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm")
    if model.get("attention.head_count_kv", layer):
        yield from _attention(model, layer)
    elif model.get("feed_forward_length", layer):
        if "expert_count" in model.keys:
            shared = model.get("expert_shared_feed_forward_length")
            yield from _experts(model, shared=shared, biased=True, gate=False)
        else:
            yield from _ffn(model, layer, gate=False)
    else:
        yield from _mamba2(model)


def _falcon_h1(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm")
    yield _f("ffn_norm", model.get("embedding_length"))  # without ".weight", in llama.cpp too
    yield from _attention(model, layer)
    yield from (spec for spec in _mamba2(model) if spec.name != "ssm_norm.weight")
    yield from _ffn(model)


def _granite_hybrid(model: Known, layer: int) -> Tensors:
    yield from _norms(model, "attn_norm", "ffn_norm")
    if model.get("attention.head_count_kv", layer):
        yield from _attention(model, layer)
    else:
        yield from _mamba2(model)
    yield from _experts(model, shared=model.get("expert_shared_feed_forward_length"))


_COMMON: dict[str, Value] = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}

_NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""hybrid_override_pattern of its config.json: M mamba, E experts, * attention."""

KNOWN: tuple[Known, ...] = (
    Known(
        name="Llama 3.1 8B",
        architecture="llama",
        keys={
            **_COMMON,
            "block_count": 32,
            "context_length": 131072,
            "embedding_length": 4096,
            "feed_forward_length": 14336,
            "attention.head_count": 32,
            "attention.head_count_kv": 8,
            "rope.dimension_count": 128,
        },
        vocab=128256,
        layer=_llama,
        parameters=8_030_000_000,
        kv_bytes_per_token=131_072,
        source="llama-bench prints 8.03 B, 7.95 GiB at Q8_0; 128 KiB a token: 1 GiB at 8192",
    ),
    Known(
        name="Mixtral 8x7B",
        architecture="llama",
        keys={
            **_COMMON,
            "block_count": 32,
            "context_length": 32768,
            "embedding_length": 4096,
            "feed_forward_length": 14336,
            "attention.head_count": 32,
            "attention.head_count_kv": 8,
            "rope.dimension_count": 128,
            "expert_count": 8,
            "expert_used_count": 2,
        },
        vocab=32000,
        layer=_llama,
        parameters=46_700_000_000,
        active=12_900_000_000,
        kv_bytes_per_token=131_072,
        source="arXiv:2401.04088: 46.7 B, 12.9 B active; config.json",
    ),
    Known(
        name="Qwen3 8B",
        architecture="qwen3",
        keys={
            **_COMMON,
            "block_count": 36,
            "context_length": 40960,
            "embedding_length": 4096,
            "feed_forward_length": 12288,
            "attention.head_count": 32,
            "attention.head_count_kv": 8,
            "attention.key_length": 128,
            "attention.value_length": 128,
        },
        vocab=151936,
        layer=_qwen3,
        parameters=8_190_000_000,
        kv_bytes_per_token=147_456,
        source="llama-bench prints 8.19 B; config.json",
    ),
    Known(
        name="Qwen3 30B-A3B",
        architecture="qwen3moe",
        keys={
            **_COMMON,
            "block_count": 48,
            "context_length": 40960,
            "embedding_length": 2048,
            "feed_forward_length": 6144,
            "expert_feed_forward_length": 768,
            "attention.head_count": 32,
            "attention.head_count_kv": 4,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "expert_count": 128,
            "expert_used_count": 8,
        },
        vocab=151936,
        layer=_qwen3,
        parameters=30_530_000_000,
        active=3_300_000_000,
        kv_bytes_per_token=98_304,
        source="model card: 30.5 B, 3.3 B active; llama-bench prints 30.53 B, 30.25 GiB at Q8_0",
    ),
    Known(
        name="Gemma 3 27B",
        architecture="gemma3",
        keys={
            **_COMMON,
            "block_count": 62,
            "context_length": 131072,
            "embedding_length": 5376,
            "feed_forward_length": 21504,
            "attention.head_count": 32,
            "attention.head_count_kv": 16,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.sliding_window": 1024,
        },
        vocab=262144,
        layer=_gemma3,
        tied=True,
        parameters=27_010_000_000,
        kv_bytes_per_token=10 * 8192,
        source="llama-bench prints 27.01 B; 10 of 62 layers see everything (arXiv:2503.19786, 5:1)",
    ),
    Known(
        name="gpt-oss 120B",
        architecture="gpt-oss",
        keys={
            **_COMMON,
            "block_count": 36,
            "context_length": 131072,
            "embedding_length": 2880,
            "feed_forward_length": 2880,
            "expert_feed_forward_length": 2880,
            "attention.head_count": 64,
            "attention.head_count_kv": 8,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.sliding_window": 128,
            "expert_count": 128,
            "expert_used_count": 4,
        },
        vocab=201088,
        layer=_gpt_oss,
        expert_type="mxfp4",
        parameters=116_830_000_000,
        active=5_130_000_000,
        kv_bytes_per_token=18 * 2048,
        source="model card: 116.83 B, 5.13 B active; llama-bench prints 59.02 GiB; config.json",
    ),
    Known(
        name="DeepSeek V3",
        architecture="deepseek2",
        keys={
            **_COMMON,
            "block_count": 61,
            "context_length": 163840,
            "embedding_length": 7168,
            "feed_forward_length": 18432,
            "expert_feed_forward_length": 2048,
            "attention.head_count": 128,
            "attention.head_count_kv": 1,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "attention.q_lora_rank": 1536,
            "attention.kv_lora_rank": 512,
            "rope.dimension_count": 64,
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_shared_count": 1,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "leading_dense_block_count": 3,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        vocab=129280,
        layer=_deepseek2,
        parameters=671_000_000_000,
        active=37_000_000_000,
        kv_bytes_per_token=70_272,
        source="arXiv:2412.19437: 671 B, 37 B active; arXiv:2505.09343 table 1: 70.272 KB a token",
    ),
    Known(
        name="GLM 4.5 Air",
        architecture="glm4moe",
        keys={
            **_COMMON,
            "block_count": 47,
            "context_length": 131072,
            "embedding_length": 4096,
            "feed_forward_length": 10944,
            "expert_feed_forward_length": 1408,
            "attention.head_count": 96,
            "attention.head_count_kv": 8,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "rope.dimension_count": 64,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "nextn_predict_layers": 1,
        },
        vocab=151552,
        layer=_glm4moe,
        parameters=110_470_000_000,
        active=12_000_000_000,
        kv_bytes_per_token=46 * 4096,
        source="llama-bench prints 110.47 B; model card: 12 B active; config.json",
    ),
    Known(
        name="Phi 3 mini",
        architecture="phi3",
        keys={
            **_COMMON,
            "block_count": 32,
            "context_length": 4096,
            "embedding_length": 3072,
            "feed_forward_length": 8192,
            "attention.head_count": 32,
            "attention.head_count_kv": 32,
            "rope.dimension_count": 96,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 2047,
        },
        vocab=32064,
        layer=_phi3,
        parameters=3_820_000_000,
        kv_bytes_per_token=393_216,
        source="llama-bench prints 3.82 B; config.json; llama.cpp does not use its window",
    ),
    Known(
        name="Qwen3 Next 80B-A3B",
        architecture="qwen3next",
        keys={
            **_COMMON,
            "block_count": 48,
            "context_length": 262144,
            "embedding_length": 2048,
            "feed_forward_length": 5120,
            "expert_feed_forward_length": 512,
            "expert_shared_feed_forward_length": 512,
            "attention.head_count": 16,
            "attention.head_count_kv": 2,
            "attention.key_length": 256,
            "attention.value_length": 256,
            "rope.dimension_count": 64,
            "expert_count": 512,
            "expert_used_count": 10,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 128,
            "ssm.group_count": 16,
            "ssm.time_step_rank": 32,
            "ssm.inner_size": 4096,
        },
        vocab=151936,
        layer=_qwen3next,
        parameters=79_670_000_000,
        active=3_000_000_000,
        kv_bytes_per_token=12 * 2048,
        source="model card: 80 B, 3 B active; llama-bench prints 79.67 B; config.json",
    ),
    Known(
        name="Mamba 2.8B",
        architecture="mamba",
        keys={
            **_COMMON,
            "block_count": 64,
            "context_length": 2048,
            "embedding_length": 2560,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 5120,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 160,
        },
        vocab=50280,
        layer=_mamba,
        tied=True,
        parameters=2_768_000_000,
        source="model card: 2.8 B; 2,768,345,600 parameters in the published weights",
    ),
    Known(
        name="Nemotron 3 Nano 30B-A3B",
        architecture="nemotron_h_moe",
        keys={
            **_COMMON,
            "block_count": 52,
            "context_length": 1048576,
            "embedding_length": 2688,
            "feed_forward_length": [1856 if kind == "E" else 0 for kind in _NEMOTRON],
            "expert_feed_forward_length": 1856,
            "expert_shared_feed_forward_length": 3712,
            "attention.head_count": 32,
            "attention.head_count_kv": [2 if kind == "*" else 0 for kind in _NEMOTRON],
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.layer_norm_epsilon": 1e-5,
            "rope.dimension_count": 84,
            "expert_count": 128,
            "expert_used_count": 6,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 4096,
            "ssm.state_size": 128,
            "ssm.time_step_rank": 64,
            "ssm.group_count": 8,
        },
        vocab=131072,
        layer=_nemotron_h,
        parameters=31_580_000_000,
        active=3_500_000_000,
        kv_bytes_per_token=6 * 1024,
        source="model card: 31.6 B, 3.5 B active (3.2 B without embedding); config.json",
    ),
    Known(
        name="like Falcon H1",
        architecture="falcon-h1",
        keys={
            **_COMMON,
            "block_count": 24,
            "context_length": 131072,
            "embedding_length": 2048,
            "feed_forward_length": 4096,
            "attention.head_count": 8,
            "attention.head_count_kv": 2,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 3072,
            "ssm.state_size": 256,
            "ssm.time_step_rank": 48,
            "ssm.group_count": 1,
        },
        vocab=65537,
        layer=_falcon_h1,
        type="f16",
        kv_bytes_per_token=24 * 1024,
        source="made up after Falcon H1 1.5B: attention and state beside each other in a layer",
    ),
    Known(
        name="Granite 4.0 H Tiny",
        architecture="granitehybrid",
        keys={
            **_COMMON,
            "block_count": 40,
            "context_length": 131072,
            "embedding_length": 1536,
            "feed_forward_length": 512,
            "expert_feed_forward_length": 512,
            "expert_shared_feed_forward_length": 1024,
            "attention.head_count": 12,
            "attention.head_count_kv": [4 if n in (5, 15, 25, 35) else 0 for n in range(40)],
            "rope.dimension_count": 128,
            "expert_count": 64,
            "expert_used_count": 6,
            "expert_shared_count": 1,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 3072,
            "ssm.state_size": 128,
            "ssm.time_step_rank": 48,
            "ssm.group_count": 1,
        },
        vocab=100352,
        layer=_granite_hybrid,
        tied=True,
        parameters=6_940_000_000,
        active=1_000_000_000,
        kv_bytes_per_token=4 * 2048,
        source="model card: 7 B, 1 B active, 4 of 40 layers attention; llama-bench prints 6.94 B",
    ),
)


LAYERS = {
    "DeepSeek V3": 3,
    "GLM 4.5 Air": 4,
    "Qwen3 Next 80B-A3B": 4,
    "Gemma 3 27B": 6,
    "Granite 4.0 H Tiny": 6,
    "Nemotron 3 Nano 30B-A3B": 6,
}
"""So many layers of each model were loaded by a server, else 2."""


def thin(model: Known, *, experts: int = 16, vocab: int = 32000) -> Known:
    """A model of few layers, small enough to be loaded: what tests hold a server against."""
    layers = LAYERS.get(model.name, 2)
    keys = dict(model.keys)
    for key, value in model.keys.items():
        if isinstance(value, list):
            keys[key] = value[:layers]
    keys["block_count"] = layers
    if "expert_count" in keys:
        keys["expert_count"] = min(
            model.get("expert_count"), max(experts, model.get("expert_used_count"))
        )
    if model.name == "DeepSeek V3":
        keys["leading_dense_block_count"] = 1
    return replace(model, keys=keys, vocab=vocab)
