"""The dimensions of a language model, read from Hugging Face's config.json or from a GGUF file's metadata.

The models are of Llama's shape: RMSNorm, rotary positions, attention with grouped keys and values, SwiGLU. Qwen2 adds
biases to the maps of queries, keys and values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fed.scenario.toml.text import short_toml

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""The values of `model_type` in config.json that can be read."""
GGUF_TYPES = ("llama", "qwen2")
"""The values of `general.architecture` in GGUF that can be read."""
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer that adapters can be added to, in the order of their use."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a language model."""

    width: int
    """Features of a token between layers."""
    layers: int
    heads: int
    """Heads of the queries in each layer."""
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads heads of the queries."""
    head_width: int
    """Features of a head."""
    inner: int
    """Features between the two halves of a feed-forward network."""
    vocabulary: int = 0
    """Number of tokens; 0, as all that follows, where only the shapes of adapters are known."""
    context: int = 0
    """The most tokens that the model was made for."""
    norm_epsilon: float = 0.0
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 0.0
    """Base of the wavelengths of the rotary positions."""
    rope_factors: tuple[float, ...] = ()
    """What the head_width / 2 frequencies of the rotary positions are divided by; empty for 1."""
    tied: bool = False
    """Whether the head that gives logits has the weights of the embedding."""
    qkv_bias: bool = False
    """Whether the maps of queries, keys and values have a bias."""

    def map_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the linear maps of a layer with their features out and in."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        outputs = (queries, keys, keys, self.width, self.inner, self.inner, self.width)
        inputs = (self.width, self.width, self.width, queries, self.width, self.width, self.inner)
        return dict(zip(MAPS, zip(outputs, inputs, strict=True), strict=True))

    def to_sizes(self) -> tuple[int, ...]:
        """Return what the shapes of adapters depend on: width, layers, heads, kv_heads, head_width and inner."""
        return (self.width, self.layers, self.heads, self.kv_heads, self.head_width, self.inner)

    @staticmethod
    def from_sizes(sizes: tuple[int, ...]) -> ModelShape:
        """Return a shape that knows the shapes of adapters alone, from what `to_sizes` returns."""
        width, layers, heads, kv_heads, head_width, inner = sizes
        return ModelShape(width, layers, heads, kv_heads, head_width, inner)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the model's tensors, as Hugging Face's Llama names them."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes[f"{prefix}input_layernorm.weight"] = (self.width,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (self.width,)
            for name, shape in self.map_shapes().items():
                path = f"{prefix}{module_of(name)}.{name}"
                shapes[f"{path}.weight"] = shape
                if self.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                    shapes[f"{path}.bias"] = shape[:1]
        shapes["model.norm.weight"] = (self.width,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.width)
        return shapes


def module_of(name: str) -> str:
    """Return the module of a layer that a linear map lies in: `q_proj` -> `self_attn`."""
    return "self_attn" if name in MAPS[:4] else "mlp"


def shape_from_config(config: Mapping[str, Any], place: str) -> ModelShape:
    """Read a model's shape from the contents of config.json.

    place: the file, for errors.

    Raises a ValueError where the model is of another kind, or a key is missing.
    """
    kind = config.get("model_type")
    _check_kind(kind, MODEL_TYPES, f"{place}: model_type")
    _refuse_what_differs(config, place)
    try:
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or width // heads)
        theta, factors = _rope(config, head_width, place)
        return ModelShape(
            width=width,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=head_width,
            inner=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            context=int(config.get("max_position_embeddings") or 2048),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_factors=factors,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
        )
    except KeyError as error:
        raise ValueError(f"{place}: the key {error} is missing; it must be a complete config.json") from None


def shape_from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], place: str) -> ModelShape:
    """Read a model's shape from the metadata of a GGUF file, but for `rope_factors`, which are a tensor there.

    tensors: the shapes of the file's tensors by name. place: the file, for errors.

    Raises a ValueError where the model is of another kind, or a key is missing.
    """
    kind = fields.get("general.architecture")
    _check_kind(kind, GGUF_TYPES, f"{place}: general.architecture")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{place}: {kind}.rope.scaling.type = {short_toml(scaling)} is not supported; use another file"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{place}: the tensor token_embd.weight is missing; it must hold a whole language model")
    try:
        width, heads = int(fields[f"{kind}.embedding_length"]), int(fields[f"{kind}.attention.head_count"])
        return ModelShape(
            width=width,
            layers=int(fields[f"{kind}.block_count"]),
            heads=heads,
            kv_heads=int(fields.get(f"{kind}.attention.head_count_kv", heads)),
            head_width=int(fields.get(f"{kind}.attention.key_length", width // heads)),
            inner=int(fields[f"{kind}.feed_forward_length"]),
            vocabulary=embedding[0],
            context=int(fields[f"{kind}.context_length"]),
            norm_epsilon=_round(fields[f"{kind}.attention.layer_norm_rms_epsilon"]),
            rope_theta=_round(fields.get(f"{kind}.rope.freq_base", 10_000.0)),
            tied="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
        )
    except KeyError as error:
        raise ValueError(f"{place}: the key {error} is missing; it must be a complete GGUF file") from None


def parse_config(text: str, place: str) -> dict[str, Any]:
    """Parse config.json, or another file of a model's folder, and raise a ValueError where it is no JSON object."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{place}: it must hold a JSON object")
    return config


def _round(value: float) -> float:
    """Return the decimal number that was rounded to float32."""
    return float(f"{value:.6g}")


def _check_kind(kind: object, supported: tuple[str, ...], key: str) -> None:
    if kind not in supported:
        raise ValueError(f"{key} = {short_toml(str(kind))} is not supported; {', '.join(supported)} are")


def _refuse_what_differs(config: Mapping[str, Any], place: str) -> None:
    """Raise a ValueError for what changes the computation of a Llama."""
    window = config.get("sliding_window") if config.get("model_type") == "mistral" else config.get("use_sliding_window")
    if window:
        raise ValueError(f"{place}: attention with a sliding window is not supported; use a model without one")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{place}: {key} = true is not supported; use a model without such biases")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{place}: hidden_act = {short_toml(activation)} is not supported; use a model with silu")


def _rope(config: Mapping[str, Any], head_width: int, place: str) -> tuple[float, tuple[float, ...]]:
    """Return the base of the rotary positions and what their frequencies are divided by.

    The settings are `rope_theta` and `rope_scaling`, or, since transformers 5, both in `rope_parameters`.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{place}: partial_rotary_factor is not supported; use a model that rotates whole heads")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    match kind:
        case "default":
            return theta, ()
        case "linear":
            return theta, (float(settings["factor"]),) * (head_width // 2)
        case "llama3":
            return theta, _llama3_factors(settings, theta, head_width)
    raise ValueError(
        f"{place}: rope_type = {short_toml(str(kind))} is not supported; models with default, linear or llama3 are"
    )


def _llama3_factors(settings: Mapping[str, Any], theta: float, head_width: int) -> tuple[float, ...]:
    """Return what Llama 3 divides each frequency by: 1 for short waves, `factor` for long ones, between in between."""
    factor, context = float(settings["factor"]), float(settings["original_max_position_embeddings"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    factors = []
    for index in range(head_width // 2):
        waves = context / (2 * math.pi * theta ** (2 * index / head_width))
        kept = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return tuple(factors)
