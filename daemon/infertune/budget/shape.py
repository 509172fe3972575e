# SPDX-License-Identifier: Apache-2.0
"""A model as far as its memory goes: layers, widths, and the bytes that a token touches."""

from __future__ import annotations

import re
from collections.abc import Mapping

from infertune.base.records import dataclass, replace
from infertune.budget.architectures import ARCHITECTURES, CHECKED, Architecture
from infertune.budget.gguf_file import ModelError, ModelFile, Tensor, Value, tensors_of_layer

_LAYERS = 4096
_LARGEST = 2**31
"""No property of a model is larger: products of some of them still are sizes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer remembers."""

    k_values: int
    """Numbers kept for K of one token; 0: it has no KV cache of its own."""
    v_values: int
    window: int | None
    """Tokens it sees; None: all."""
    state_values: int
    """Numbers of its recurrent state, for one sequence, always f32."""
    heads: int
    q_values: int
    """Width of Q: of one token, in all heads."""
    weights_bytes: int
    expert_bytes: int
    """Of these, in experts."""


@dataclass(frozen=True, slots=True)
class Shape:
    name: str | None
    architecture: str
    known: bool
    """Whether it is known what this architecture keeps; else no layer is true."""
    checked: bool
    """Whether that was held against what a server allocates."""
    layers: tuple[Layer, ...]
    """Without those that only predict further tokens (MTP)."""
    mtp_layers: tuple[Layer, ...]
    """These: a server loads them where they draft (``spec_type`` draft-mtp), else not."""
    context: int
    """Tokens it was trained for."""
    embedding: int
    feed_forward: int
    """Widest feed-forward of a dense layer."""
    expert_feed_forward: int
    experts: int
    experts_used: int
    gated: bool
    """Whether the experts have a gate beside the way up."""
    recurrent_width: int
    """Numbers for one token that live at once in a recurrent layer; 0 where there is none."""
    mla: tuple[int, int, int] | None
    """Of MLA: head of K, rank of the latent, part that rotates."""
    vocab: int
    parameters: int
    weights_bytes: int
    input_bytes: int
    """The embedding: llama.cpp keeps it in host memory whatever the GPU holds."""
    output_bytes: int
    """Output and what else is in no layer, without the embedding."""
    tied: bool
    """Whether the embedding serves as output too: a GPU then has a copy of it."""
    repacked_bytes: int
    """Weights of which the CPU backend makes a copy in another order."""
    active_bytes: int
    """Read for one token: all but the embedding (one row) and the experts that are not used."""
    active_parameters: int


class _Keys:
    """The metadata of one architecture; every value is checked when it is asked for."""

    def __init__(self, path: str, metadata: Mapping[str, Value]) -> None:
        self._path = path
        self._metadata = metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not re.fullmatch(r"[\w.-]{1,64}", architecture):
            raise ModelError(f"{path}: does not say its architecture (general.architecture)")
        self.architecture = architecture

    def raw(self, key: str) -> Value:
        return self._metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        if isinstance(value, tuple) and value:
            value = max((each for each in value if isinstance(each, int)), default=None)
        if value is None and default is not None:
            return default
        return self._checked(key, value)

    def of_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A value for each layer, which the file may give once for all."""
        value = self.raw(key)
        if not isinstance(value, tuple):
            return [self.number(key, default)] * layers
        if len(value) < layers:
            raise ModelError(
                f"{self._path}: '{self.architecture}.{key}' has {len(value)} values for "
                f"{layers} layers"
            )
        return [self._checked(key, each) for each in value[:layers]]

    def bad(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self._path}: '{self.architecture}.{key}' {problem}")

    def _checked(self, key: str, value: object) -> int:
        if value is None:
            raise ModelError(f"{self._path}: has no '{self.architecture}.{key}'")
        if not isinstance(value, int) or not 0 <= value < _LARGEST:
            raise self.bad(key, f"is {value!r}")
        return int(value)


def _no_language_model(path: str, kind: str) -> ModelError:
    if kind in ("mmproj", "clip"):
        hint = "give it with --mmproj, beside its model"
        return ModelError(f"{path}: not a language model but a projector (mmproj)", hint=hint)
    return ModelError(f"{path}: not a language model but '{kind}'")


def read_shape(model: ModelFile) -> Shape:
    """The shape of a model.  Raises ModelError for keys that are missing or make no sense."""
    path = model.files[0]
    keys = _Keys(path, model.metadata)
    kind = model.metadata.get("general.type")
    if kind not in (None, "model") or keys.architecture == "clip":
        raise _no_language_model(path, str(kind or keys.architecture))
    embedding = keys.number("embedding_length")
    blocks = keys.number("block_count")
    if not 0 < blocks <= _LAYERS or embedding == 0:
        raise ModelError(f"{path}: says it has {blocks} layers of width {embedding}")
    count = blocks - min(keys.number("nextn_predict_layers", 0), blocks - 1)
    entry = ARCHITECTURES.get(keys.architecture)
    weights = _weights(model, blocks)
    layers = _layers(keys, entry, count, embedding, weights) if entry else ()
    embed = _named(model, "token_embd.weight")
    head = _named(model, "output.weight")
    vocab = keys.number("vocab_size", embed.dims[-1] if embed and len(embed.dims) > 1 else 0)
    experts, used = keys.number("expert_count", 0), keys.number("expert_used_count", 0)
    if used > experts:
        raise ModelError(f"{path}: uses {used} experts of {experts}")
    active = [
        (_share(tensor, layer, count, used, experts, tied=head is None), tensor)
        for layer, tensor in tensors_of_layer(model.tensors)
    ]
    rank = keys.number("attention.kv_lora_rank", 0)
    latent = rank and keys.number("attention.key_length_mla", 0)
    outside = sum(each.bytes for layer, each in tensors_of_layer(model.tensors) if layer is None)
    embed_bytes = embed.bytes if embed else 0
    name = model.metadata.get("general.name")
    return Shape(
        name=name if isinstance(name, str) else None,
        architecture=keys.architecture,
        known=entry is not None,
        checked=keys.architecture in CHECKED,
        layers=layers,
        mtp_layers=_mtp_layers(keys, count, blocks, embedding, weights) if entry else (),
        context=keys.number("context_length", 0),
        embedding=embedding,
        feed_forward=_inner(model, "ffn_down.weight"),
        expert_feed_forward=_inner(model, "ffn_down_exps.weight"),
        experts=experts,
        experts_used=used,
        gated=any(
            "_gate_exps." in each.name or "_gate_up_exps." in each.name for each in model.tensors
        ),
        recurrent_width=_recurrent_width(keys) if any(each.state_values for each in layers) else 0,
        mla=(latent, rank, keys.number("rope.dimension_count", 0)) if latent else None,
        vocab=vocab,
        parameters=sum(tensor.elements for tensor in model.tensors),
        weights_bytes=model.tensor_bytes,
        input_bytes=embed_bytes,
        output_bytes=outside - embed_bytes,
        tied=head is None,
        repacked_bytes=sum(
            tensor.bytes
            for tensor in model.tensors
            if tensor.type in _REPACKED and len(tensor.dims) > 1 and tensor is not embed
        ),
        active_bytes=round(sum(share * tensor.bytes for share, tensor in active)),
        active_parameters=round(sum(share * tensor.elements for share, tensor in active)),
    )


def mtp_shape(shape: Shape) -> Shape:
    """The layers for MTP alone, as the model that they are where they draft."""
    return replace(shape, layers=shape.mtp_layers, recurrent_width=0)


_REPACKED = {"q4_0", "q4_K", "iq4_nl", "mxfp4"}
"""ggml/src/ggml-cpu/repack.cpp on x86 with AVX2; build 11549 prints CPU_REPACK."""


def _inner(model: ModelFile, name: str) -> int:
    """Width inside of the widest feed-forward of this name; 0 where there is none."""
    return max(
        (each.dims[0] for each in model.tensors if each.name.endswith(f".{name}")), default=0
    )


def _named(model: ModelFile, name: str) -> Tensor | None:
    return next((tensor for tensor in model.tensors if tensor.name == name), None)


def _share(
    tensor: Tensor, layer: int | None, count: int, used: int, experts: int, *, tied: bool
) -> float:
    """How much of a tensor is read for one token."""
    if layer is not None and layer >= count:
        return 0.0  # MTP
    if tensor.name == "token_embd.weight":
        return 1.0 if tied else 0.0
    if tensor.name == "per_layer_token_embd.weight":
        return 0.0
    if _is_expert(tensor) and experts:
        return used / experts
    return 1.0


def _is_expert(tensor: Tensor) -> bool:
    return "_exps." in tensor.name


def _weights(model: ModelFile, blocks: int) -> list[tuple[int, int]]:
    """Bytes of each layer, and those in experts."""
    whole, experts = [0] * blocks, [0] * blocks
    for layer, tensor in tensors_of_layer(model.tensors):
        if layer is None:
            continue
        if layer >= blocks:
            raise ModelError(
                f"{model.files[0]}: has the tensor '{tensor.name}' and only {blocks} layers"
            )
        whole[layer] += tensor.bytes
        experts[layer] += tensor.bytes if _is_expert(tensor) else 0
    return list(zip(whole, experts, strict=True))


def _layers(
    keys: _Keys,
    entry: Architecture,
    count: int,
    embedding: int,
    weights: list[tuple[int, int]],
) -> tuple[Layer, ...]:
    heads = keys.of_layer("attention.head_count", count, 0)
    kv_heads = (
        keys.of_layer("attention.head_count_kv", count)
        if keys.raw("attention.head_count_kv") is not None
        else heads
    )
    ffn = keys.of_layer("feed_forward_length", count, 0)
    window = _windows(keys, entry, count)
    most = max(heads, default=0)
    if not most and entry.recurrent == "none":
        raise keys.bad("attention.head_count", "is 0 or missing, and every layer has attention")
    length = embedding // most if most else 0
    k_full = keys.number("attention.key_length", length)
    v_full = keys.number("attention.value_length", length)
    k_window = keys.number("attention.key_length_swa", k_full)
    v_window = keys.number("attention.value_length_swa", v_full)
    latent = bool(
        keys.number("attention.key_length_mla", 0) and keys.number("attention.value_length_mla", 0)
    )
    shared = keys.number("attention.shared_kv_layers", 0)
    own = count - shared if shared else entry.own_kv_layers or count
    if any(kv_heads) and not k_full:
        raise keys.bad("attention.key_length", "is 0 or missing, and there are KV heads")
    states = _states(keys, entry, count, embedding, kv_heads, ffn, most)
    found = []
    for number in range(count):
        k, v = (k_window, v_window) if window[number] else (k_full, v_full)
        # A recurrent layer has no attention, except where it stands beside it.
        keeps = number < own and (not states[number] or entry.recurrent == "beside")
        if entry.recurrent == "no_kv_heads_no_ffn" and ffn[number]:
            keeps = False
        found.append(
            Layer(
                k_values=kv_heads[number] * k if keeps else 0,
                # With MLA, V is a part of what K keeps.
                v_values=kv_heads[number] * v if keeps and not latent else 0,
                window=window[number] or None,
                state_values=states[number],
                heads=heads[number],
                q_values=heads[number] * k,
                weights_bytes=weights[number][0],
                expert_bytes=weights[number][1],
            )
        )
    return tuple(found)


def _mtp_layers(
    keys: _Keys, first: int, blocks: int, embedding: int, weights: list[tuple[int, int]]
) -> tuple[Layer, ...]:
    """Attention that sees everything, whatever the other layers are (src/models/, graph_mtp)."""
    heads = keys.number("attention.head_count", 0)
    kv_heads = keys.number("attention.head_count_kv", heads)
    length = embedding // heads if heads else 0
    k = keys.number("attention.key_length", length)
    v = keys.number("attention.value_length", length)
    latent = keys.number("attention.key_length_mla", 0)
    return tuple(
        Layer(
            k_values=kv_heads * k,
            v_values=0 if latent else kv_heads * v,
            window=None,
            state_values=0,
            heads=heads,
            q_values=heads * k,
            weights_bytes=weights[number][0],
            expert_bytes=weights[number][1],
        )
        for number in range(first, blocks)
    )


def _windows(keys: _Keys, entry: Architecture, count: int) -> list[int]:
    """Tokens that each layer sees; 0: all."""
    size = keys.number("attention.sliding_window", entry.window_default)
    if not entry.window_period or not size:
        return [0] * count
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        if not pattern:
            return [0] * count
        return [size if pattern[number % len(pattern)] else 0 for number in range(count)]
    period = keys.number("attention.sliding_window_pattern", entry.window_period)
    if period == 0:
        return [size] * count
    full = 0 if entry.full_first else period - 1
    return [0 if number % period == full else size for number in range(count)]


def _recurrent_width(keys: _Keys) -> int:
    """What goes in (gate, x, B, C, dt), the convolution's input and output, and what comes out."""
    inner = keys.number("ssm.inner_size", 0)
    groups = keys.number("ssm.group_count", 0) * keys.number("ssm.state_size", 0)
    return 5 * inner + 6 * groups + (keys.number("ssm.time_step_rank", 0) if groups else 0)


def _states(
    keys: _Keys,
    entry: Architecture,
    count: int,
    embedding: int,
    kv_heads: list[int],
    ffn: list[int],
    heads: int,
) -> list[int]:
    """Numbers of the recurrent state of each layer (llama_hparams::n_embd_r and n_embd_s)."""
    if entry.recurrent == "none":
        return [0] * count
    if entry.state == "wkv":
        shifts = keys.number("token_shift_count", entry.token_shifts)
        size = shifts * embedding + embedding * keys.number("wkv.head_size")
    elif entry.state == "shortconv":
        size = embedding * max(keys.number("shortconv.l_cache") - 1, 0)
    else:
        kernel = max(keys.number("ssm.conv_kernel") - 1, 0)
        if entry.state == "kda":
            head = keys.number("kda.head_dim")
            size = 3 * kernel * heads * head + head * head * heads
        else:
            state, inner = keys.number("ssm.state_size"), keys.number("ssm.inner_size")
            groups = keys.number("ssm.group_count", 0)
            size = kernel * (inner + 2 * groups * state) + state * inner
    if entry.recurrent == "interval":
        flags = keys.raw("attention.recurrent_layers")
        if isinstance(flags, tuple) and len(flags) >= count:
            return [size if flag else 0 for flag in flags[:count]]
        interval = keys.number("full_attention_interval", 4) or 1
        return [size if (number + 1) % interval else 0 for number in range(count)]
    if entry.recurrent in ("all", "beside"):
        return [size] * count
    return [
        0 if kv or (entry.recurrent == "no_kv_heads_no_ffn" and ff) else size
        for kv, ff in zip(kv_heads, ffn, strict=True)
    ]
