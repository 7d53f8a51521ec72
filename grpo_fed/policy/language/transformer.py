"""Transformer: one frozen base with the adapters of K clients stacked, as one computation.

The shape is Llama's: RMSNorm, rotary positions, attention with grouped keys and values, SwiGLU. The base's products are
one matrix product over the rows of all clients; the adapters' are one batched product with the client as the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import FrozenBase
from grpo_fed.policy.language.cache import Cache
from grpo_fed.policy.language.shape import MAPS, module_of

Adapters = Mapping[str, Tensor]
"""The learned factors of K clients by name, [K, out, rank] and [K, rank, in]: `policy.layout.views(flat)`."""


@dataclass(frozen=True)
class _Layer:
    """The frozen weights of a layer."""

    attention_norm: Tensor
    inner_norm: Tensor
    weights: Mapping[str, Tensor]
    """[out, in] of each linear map."""
    biases: Mapping[str, Tensor]
    """[out] of the maps that have one."""
    factors: Mapping[str, Tensor]
    """[in, rank], the transposed frozen factor A of each adapted map; none where A is learned."""


@dataclass(frozen=True)
class _Places:
    """Where tokens are: their rotations, and what each of them attends to."""

    cosines: Tensor
    """[K * B, 1, T, head_width], or [1, 1, T, head_width] where all rows have the same positions."""
    sines: Tensor
    """The same; the first half with the sign that a rotation has there."""
    mask: Tensor | None
    """[K * B, 1, T, S] bool; None where each token attends to all before it and itself."""


class Transformer:
    """Computes the hidden states and logits of K clients that share a frozen base.

    With float32 adapters on a bfloat16 base, adapters are computed in float32 and added in the base's type.
    """

    def __init__(
        self, base: FrozenBase, policy: AdapterPolicy, factors: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        """Prepare the weights.

        factors: the frozen factors A, `policy.frozen_factors(seed)`.
        """
        self.base = base
        self.policy = policy
        self.shape = base.shape
        self.device = torch.device(device)
        self._dtype = base.dtype
        tensors = {name: tensor.to(self.device) for name, tensor in base.tensors.items()}
        self._embedding = tensors["model.embed_tokens.weight"]
        self._head = self._embedding if self.shape.tied else tensors["lm_head.weight"]
        self._norm = tensors["model.norm.weight"]
        self._layers = [self._layer(layer, tensors, factors) for layer in range(self.shape.layers)]
        self._cosines, self._sines = self._rotations(64)

    def hidden(
        self,
        adapters: Adapters | None,
        tokens: Tensor,
        valid: Tensor | None = None,
        cache: Cache | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Compute hidden states, [K, B, T, width], from tokens [K, B, T] int64.

        adapters: None for the base alone. valid: [K, B, T] bool, False for padding, on either side; positions are
        counted from the first valid token; None where all are valid. cache: keys and values of the tokens before these
        ones, to which those of these tokens are added. recompute: compute the activations of a layer again in the
        backward pass instead of keeping them.
        """
        clients, rows, length = tokens.shape
        places = self._places(clients * rows, length, None if valid is None else valid.flatten(0, 1), cache)
        states = F.embedding(tokens.reshape(clients, rows * length), self._embedding)
        for number, layer in enumerate(self._layers):
            compute = partial(self._apply_layer, number, layer, adapters, places, cache, length)
            states = checkpoint(compute, states, use_reentrant=False) if recompute else compute(states)
        if cache is not None:
            cache.advance(length)
        return _normalise(states, self._norm, self.shape.norm_epsilon).view(clients, rows, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, [..., V] float32, from hidden states [..., width]."""
        return F.linear(hidden, self._head).float()

    def _layer(self, layer: int, tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> _Layer:
        prefix = f"model.layers.{layer}."
        paths = {name: f"{prefix}{module_of(name)}.{name}" for name in MAPS}
        frozen = {name: factors.get(f"layers.{layer}.{name}.A") for name in self.policy.maps}
        return _Layer(
            tensors[f"{prefix}input_layernorm.weight"],
            tensors[f"{prefix}post_attention_layernorm.weight"],
            {name: tensors[f"{path}.weight"] for name, path in paths.items()},
            {name: tensors[f"{path}.bias"] for name, path in paths.items() if f"{path}.bias" in tensors},
            {name: factor.to(self.device).T.contiguous() for name, factor in frozen.items() if factor is not None},
        )

    def _places(self, rows: int, length: int, valid: Tensor | None, cache: Cache | None) -> _Places:
        """Work out rotations and masks of tokens. valid: [K * B, T], None for all."""
        before = 0 if cache is None else cache.filled
        seen = valid if cache is None else cache.see(rows, length, valid)
        if before + length > len(self._cosines):
            self._cosines, self._sines = self._rotations(2 * (before + length))
        if seen is None:
            cosines, sines = (table[None, before : before + length] for table in (self._cosines, self._sines))
        else:
            positions = (seen.cumsum(1)[:, before:] - 1).clamp_min(0)
            cosines, sines = self._cosines[positions], self._sines[positions]
        return _Places(
            cosines[:, None],
            sines[:, None],
            None if seen is None and (before == 0 or length == 1) else self._mask(before, length, seen),
        )

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Compute the cosines and signed sines of the first positions, [length, head_width]."""
        half = torch.arange(0, self.shape.head_width, 2, dtype=torch.float32, device=self.device)
        frequencies = 1.0 / self.shape.rope_theta ** (half / self.shape.head_width)
        if self.shape.rope_factors:
            frequencies /= torch.tensor(self.shape.rope_factors, device=self.device)
        angles = torch.arange(length, device=self.device)[:, None] * frequencies
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat([cosines, cosines], -1).to(self._dtype), torch.cat([-sines, sines], -1).to(self._dtype)

    def _mask(self, before: int, length: int, seen: Tensor | None) -> Tensor:
        """Return what T tokens attend to, [K * B, 1, T, S] bool: valid tokens up to themselves, and always themselves.

        seen: [K * B, S], which tokens are valid. A token of padding has itself to attend to, as the mean of nothing is
        not a number.
        """
        of_query = torch.arange(before, before + length, device=self.device)[:, None]
        of_key = torch.arange(before + length, device=self.device)
        earlier = of_key <= of_query
        if seen is None:
            return earlier[None, None]
        return ((earlier & seen[:, None, :]) | (of_key == of_query))[:, None]

    def _apply_layer(
        self,
        number: int,
        layer: _Layer,
        adapters: Adapters | None,
        places: _Places,
        cache: Cache | None,
        length: int,
        states: Tensor,
    ) -> Tensor:
        """Compute a layer, [K, B * T, width] -> [K, B * T, width]."""

        def linear(name: str, inputs: Tensor) -> Tensor:
            outputs = F.linear(inputs, layer.weights[name], layer.biases.get(name))
            if adapters is None or name not in self.policy.maps:
                return outputs
            return self._add_adapter(outputs, inputs, layer.factors.get(name), adapters, f"layers.{number}.{name}")

        inputs = _normalise(states, layer.attention_norm, self.shape.norm_epsilon)
        queries, keys, values = (linear(name, inputs) for name in ("q_proj", "k_proj", "v_proj"))
        attended = self._attend(queries, keys, values, number, places, cache, length)
        states = states + linear("o_proj", attended)
        inputs = _normalise(states, layer.inner_norm, self.shape.norm_epsilon)
        return states + linear("down_proj", F.silu(linear("gate_proj", inputs)) * linear("up_proj", inputs))

    def _add_adapter(
        self, outputs: Tensor, inputs: Tensor, factor: Tensor | None, adapters: Adapters, name: str
    ) -> Tensor:
        """Add the adapters' part to a map's outputs, [K, B * T, out]. factor: [in, rank], None where A is learned."""
        wide = inputs.float()
        features = wide @ factor if factor is not None else torch.bmm(wide, adapters[f"{name}.A"].transpose(1, 2))
        output_factor = adapters[f"{name}.B"].transpose(1, 2)
        if outputs.dtype == torch.float32:
            return outputs.baddbmm_(features, output_factor, alpha=self.policy.scale)
        return outputs + (torch.bmm(features, output_factor) * self.policy.scale).to(outputs.dtype)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        number: int,
        places: _Places,
        cache: Cache | None,
        length: int,
    ) -> Tensor:
        """Compute attention from queries [K, B * T, heads * head_width], keys and values [K, B * T, kv_heads * ...]."""
        clients, rows, _ = queries.shape
        split = (clients * rows // length, length, -1, self.shape.head_width)
        q = _rotate(queries.view(split).transpose(1, 2), places)
        k = _rotate(keys.view(split).transpose(1, 2), places)
        v = values.view(split).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(number, k, v)
        shared = self.shape.heads // self.shape.kv_heads
        if length == 1:  # the heads that share keys are then like further tokens that attend to the same ones
            q = q.reshape(len(q), self.shape.kv_heads, shared, -1)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=places.mask)
            return attended.reshape(queries.shape)
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=places.mask, is_causal=places.mask is None)
        return attended.transpose(1, 2).reshape(queries.shape)


def _normalise(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root of the mean square, computed in float32 (RMSNorm, 1910.07467)."""
    if states.dtype == torch.float32:
        return F.rms_norm(states, weight.shape, weight, epsilon)
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(states.dtype)


def _rotate(states: Tensor, places: _Places) -> Tensor:
    """Rotate [N, heads, T, head_width] by their positions (RoPE, 2104.09864), in pairs of the first and second half."""
    return torch.addcmul(states * places.cosines, states.roll(states.shape[-1] // 2, -1), places.sines)
