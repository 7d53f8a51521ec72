"""Transformer: one frozen base with the adapters of K clients stacked, as one computation.

The shape is Llama's: RMSNorm, rotary positions, attention with grouped keys and values, SwiGLU. The base's products are
one matrix product over the rows of all clients; the adapters' are one batched product with the client as the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention in a layer, from its number, queries [K, R, heads * head_width], and keys and values [K, R, kv_heads *
head_width], to [K, R, heads * head_width]; R are the tokens of all of a client's sequences."""


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
        attend = partial(self._attend, places, cache)
        states = self._apply_layers(adapters, tokens.reshape(clients, rows * length), attend, recompute)
        if cache is not None:
            cache.advance(length)
        return states.view(clients, rows, length, -1)

    def hidden_after_prompts(
        self,
        adapters: Adapters | None,
        prompts: Tensor,
        prompt_valid: Tensor,
        prompt_of: Tensor,
        tokens: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        """Compute the hidden states that predict the tokens of completions, [K, N, C, width].

        Each prompt is computed once, however many completions follow it: its keys and values are those of all of them,
        and their gradients add up.

        prompts: [K, Q, T] int64, padded on the left where prompt_valid, [K, Q, T] bool, is False. prompt_of: [K, N]
        int64, the prompt of each completion. tokens: [K, N, C] int64, padded on the right.
        """
        (clients, count, longest), (_, rows, length) = prompts.shape, tokens.shape
        flat = prompt_of + count * torch.arange(clients, device=self.device)[:, None]
        span = count * longest
        valid = None if bool(prompt_valid.all()) else prompt_valid.flatten(0, 1)
        of_prompts = self._places(clients * count, longest, valid, None)
        of_completions = self._places_after(longest, length - 1, None if valid is None else valid[flat.flatten()])

        def attend(number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            first = self._split([each[:, :span] for each in (queries, keys, values)], of_prompts)
            attended = self._mix(*first, of_prompts.mask).reshape(clients, span, -1)
            if length == 1:
                return attended
            q, k, v = self._split([each[:, span:] for each in (queries, keys, values)], of_completions)
            before = [each.index_select(0, flat.flatten()) for each in first[1:]]
            k, v = (torch.cat(each, 2) for each in zip(before, (k, v), strict=True))
            rest = self._mix(q, k, v, of_completions.mask)
            return torch.cat([attended, rest.reshape(clients, rows * (length - 1), -1)], 1)

        every = torch.cat([prompts.flatten(1), tokens[..., :-1].flatten(1)], 1)
        states = self._apply_layers(adapters, every, attend, recompute)
        last = states[:, longest - 1 : span : longest].flatten(0, 1)[flat]
        return torch.cat([last[:, :, None], states[:, span:].unflatten(1, (rows, length - 1))], 2)

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

    def _apply_layers(self, adapters: Adapters | None, tokens: Tensor, attend: Attention, recompute: bool) -> Tensor:
        """Compute the last layer's normalised outputs, [K, R, width], from tokens [K, R]."""
        states = F.embedding(tokens, self._embedding)
        for number, layer in enumerate(self._layers):
            compute = partial(self._apply_layer, number, layer, adapters, attend)
            states = checkpoint(compute, states, use_reentrant=False) if recompute else compute(states)
        return _normalise(states, self._norm, self.shape.norm_epsilon)

    def _places(self, rows: int, length: int, valid: Tensor | None, cache: Cache | None) -> _Places:
        """Work out rotations and masks of tokens. valid: [K * B, T], None for all."""
        before = 0 if cache is None else cache.filled
        seen = valid if cache is None else cache.see(rows, length, valid)
        self._extend_rotations(before + length)
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

    def _places_after(self, before: int, length: int, valid: Tensor | None) -> _Places:
        """Work out rotations and masks of tokens that follow a prompt. valid: [K * B, before], None for all."""
        self._extend_rotations(before + length)
        steps = torch.arange(length, device=self.device)
        mask = torch.ones(length, before + length, dtype=torch.bool, device=self.device).tril(before)[None, None]
        if valid is None:
            positions = (steps + before)[None]
        else:
            positions = valid.sum(1, keepdim=True) + steps
            of_prompt = valid[:, None, None].expand(-1, -1, length, -1)
            mask = torch.cat([of_prompt, mask[..., before:].expand(len(valid), -1, -1, -1)], -1)
        return _Places(self._cosines[positions][:, None], self._sines[positions][:, None], mask)

    def _extend_rotations(self, length: int) -> None:
        """Prepare the rotations of at least so many positions."""
        if length > len(self._cosines):
            self._cosines, self._sines = self._rotations(2 * length)

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
        self, number: int, layer: _Layer, adapters: Adapters | None, attend: Attention, states: Tensor
    ) -> Tensor:
        """Compute a layer, [K, R, width] -> [K, R, width]."""

        def linear(name: str, inputs: Tensor) -> Tensor:
            outputs = F.linear(inputs, layer.weights[name], layer.biases.get(name))
            if adapters is None or name not in self.policy.maps:
                return outputs
            return self._add_adapter(outputs, inputs, layer.factors.get(name), adapters, f"layers.{number}.{name}")

        inputs = _normalise(states, layer.attention_norm, self.shape.norm_epsilon)
        queries, keys, values = (linear(name, inputs) for name in ("q_proj", "k_proj", "v_proj"))
        states = states + linear("o_proj", attend(number, queries, keys, values))
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
        self, places: _Places, cache: Cache | None, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Compute the attention of sequences of equal length, after the keys and values of a cache."""
        q, k, v = self._split([queries, keys, values], places)
        if cache is not None:
            k, v = cache.append(number, k, v)
        return self._mix(q, k, v, places.mask).reshape(queries.shape)

    def _split(self, projections: Sequence[Tensor], places: _Places) -> tuple[Tensor, Tensor, Tensor]:
        """Split queries, keys and values [K, B * T, heads * head_width] into rotated heads, [K * B, heads, T, ...]."""
        length, width = places.cosines.shape[2], self.shape.head_width
        queries, keys, values = (
            each.reshape(-1, length, each.shape[-1] // width, width).transpose(1, 2) for each in projections
        )
        return _rotate(queries, places), _rotate(keys, places), values

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention, [N, heads, T, w] with [N, kv_heads, S, w] -> [N, T, heads * w]; causal without a mask.

        With a mask, or for a single token, heads that share keys are computed as further tokens that attend to the same
        ones, so that keys need not be repeated.
        """
        count, heads, length, width = queries.shape
        shared = heads // keys.shape[1]
        if length == 1 or (mask is not None and shared > 1):
            queries = queries.reshape(count, -1, shared * length, width)
            if mask is not None and length > 1:
                mask = mask.repeat(1, 1, shared, 1)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        else:
            if shared > 1:
                keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        return attended.reshape(count, heads, length, width).transpose(1, 2).flatten(2)


def _normalise(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root of the mean square, computed in float32 (RMSNorm, 1910.07467)."""
    if states.dtype == torch.float32:
        return F.rms_norm(states, weight.shape, weight, epsilon)
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(states.dtype)


def _rotate(states: Tensor, places: _Places) -> Tensor:
    """Rotate [N, heads, T, head_width] by their positions (RoPE, 2104.09864), in pairs of the first and second half."""
    return torch.addcmul(states * places.cosines, states.roll(states.shape[-1] // 2, -1), places.sines)
