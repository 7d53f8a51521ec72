"""The stacked transformer against transformers and peft, one client after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_fed.policy.language.cache import Cache
from grpo_fed.policy.language.transformer import Adapters, Transformer
from tests.support.language_models import open_model, random_adapters, write_model

KINDS = {
    "llama": {},
    "one key for each head": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def some_tokens(clients: int = 3, rows: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Return tokens [K, B, T], and which are valid: the second row begins with three of padding."""
    tokens = torch.randint(0, 31, (clients, rows, length), generator=torch.Generator().manual_seed(5))
    valid = torch.ones(tokens.shape, dtype=torch.bool)
    valid[:, 1, :3] = False
    return tokens, valid


def as_peft(ours: Transformer, folder: Path, flat: Tensor):
    """Return transformers' model with peft's adapters that have the values of one client's, [P]."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    policy = ours.policy
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=policy.rank, lora_alpha=policy.alpha, target_modules=list(policy.maps))
    model = peft.get_peft_model(model, config).eval()
    factors = {**policy.frozen_factors(0), **policy.layout.views(flat)}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in factors.items():
            parameters[peft_name(name)].copy_(value)
    return model, parameters


def peft_name(name: str) -> str:
    """Return peft's name of a factor."""
    _, layer, linear, factor = name.split(".")
    module = "self_attn" if linear[0] in "qkvo" and linear != "gate_proj" else "mlp"
    return f"base_model.model.model.layers.{layer}.{module}.{linear}.lora_{factor}.default.weight"


@pytest.mark.parametrize(("kind", "learn"), [*((kind, "B") for kind in KINDS), ("llama", "AB"), ("qwen2", "AB")])
def test_logits_and_gradients_of_stacked_clients_equal_those_of_peft_one_by_one(tmp_path: Path, kind: str, learn: str):
    folder = write_model(tmp_path, **KINDS[kind])
    ours = open_model(folder, learn=learn)
    flat = random_adapters(ours.policy, 3).requires_grad_()
    tokens, valid = some_tokens()
    logits = ours.logits(ours.hidden(ours.policy.layout.views(flat), tokens, valid))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) * valid[..., None]
    (logits * weights).sum().backward()
    for client in range(3):
        model, parameters = as_peft(ours, folder, flat[client].detach())
        positions = (valid[client].cumsum(-1) - 1).clamp_min(0)
        expected = model(tokens[client], attention_mask=valid[client].long(), position_ids=positions).logits
        torch.testing.assert_close(logits[client][valid[client]], expected[valid[client]], rtol=1e-5, atol=2e-5)
        (expected * weights[client]).sum().backward()
        gradient = ours.policy.layout.flatten(
            {slot.name: parameters[peft_name(slot.name)].grad for slot in ours.policy.layout.slots}
        )
        largest = float(gradient.abs().max())
        torch.testing.assert_close(flat.grad[client], gradient, rtol=0, atol=1e-5 * largest)


def test_adapters_of_zero_give_the_base_to_the_bit(tmp_path: Path):
    ours = open_model(write_model(tmp_path))
    tokens, valid = some_tokens()
    zero = ours.policy.layout.views(ours.policy.initial(0).expand(3, -1))
    assert torch.equal(ours.hidden(zero, tokens, valid), ours.hidden(None, tokens, valid))


def test_padding_on_either_side_changes_nothing(tmp_path: Path):
    ours = open_model(write_model(tmp_path))
    adapters = ours.policy.layout.views(random_adapters(ours.policy, 3))
    tokens, _ = some_tokens()
    expected = ours.hidden(adapters, tokens)
    padding = torch.full((3, 2, 4), 9)
    left, right = torch.cat([padding, tokens], -1), torch.cat([tokens, padding], -1)
    valid = torch.ones(left.shape, dtype=torch.bool)
    valid[..., :4] = False
    torch.testing.assert_close(ours.hidden(adapters, left, valid)[:, :, 4:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.hidden(adapters, right, valid.flip(-1))[:, :, :-4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_in_parts_with_a_cache_give_the_same_as_all_at_once(tmp_path: Path, padded: bool):
    ours = open_model(write_model(tmp_path))
    adapters = ours.policy.layout.views(random_adapters(ours.policy, 3))
    tokens, valid = some_tokens()
    expected = ours.hidden(adapters, tokens, valid if padded else None)
    cache = Cache(7)
    parts = [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)]
    with torch.no_grad():
        hidden = [ours.hidden(adapters, tokens[..., p], valid[..., p] if padded else None, cache) for p in parts]
    kept = valid if padded else torch.ones_like(valid)
    torch.testing.assert_close(torch.cat(hidden, 2)[kept], expected[kept], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"a cache for 7 tokens cannot hold 8"):
        ours.hidden(adapters, tokens[..., :1], None, cache)


def test_activations_that_are_computed_again_give_the_same_gradient(tmp_path: Path):
    ours = open_model(write_model(tmp_path))
    tokens, valid = some_tokens()
    gradients = []
    for recompute in (False, True):
        flat = random_adapters(ours.policy, 3).requires_grad_()
        ours.hidden(ours.policy.layout.views(flat), tokens, valid, recompute=recompute).square().sum().backward()
        gradients.append(flat.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["llama", "one key for each head"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_that_is_computed_once_for_its_completions_gives_the_same_as_whole_sequences(
    tmp_path: Path, kind: str, length: int, padded: bool
):
    ours = open_model(write_model(tmp_path, **KINDS[kind]))
    prompts, valid = some_tokens(rows=2, length=5)
    valid = valid if padded else torch.ones_like(valid)
    of = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 1, 1]])  # in any order, and one client uses one prompt alone
    tokens = torch.randint(0, 31, (3, 3, length), generator=torch.Generator().manual_seed(8))
    weights = torch.randn(3, 3, length, ours.shape.width, generator=torch.Generator().manual_seed(9))

    def whole(adapters: Adapters) -> Tensor:
        wide = of[..., None].expand(-1, -1, 5)
        every = torch.cat([prompts.gather(1, wide), tokens[..., :-1]], -1)
        is_valid = torch.cat([valid.gather(1, wide), torch.ones(3, 3, length - 1, dtype=torch.bool)], -1)
        return ours.hidden(adapters, every, is_valid)[:, :, 4:]

    computed, gradients = [], []
    for compute in (
        whole,
        lambda adapters: ours.hidden_after_prompts(adapters, prompts, valid, of, tokens),
        lambda adapters: ours.hidden_after_prompts(adapters, prompts, valid, of, tokens, recompute=True),
    ):
        flat = random_adapters(ours.policy, 3).requires_grad_()
        computed.append(compute(ours.policy.layout.views(flat)))
        (gradient,) = torch.autograd.grad((computed[-1] * weights).sum(), flat)
        gradients.append(gradient)
    torch.testing.assert_close(computed[1], computed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * float(gradients[0].abs().max()))
    assert torch.equal(gradients[2], gradients[1])


def test_adapters_of_a_part_of_the_maps_leave_the_others_alone(tmp_path: Path):
    ours = open_model(write_model(tmp_path), maps=["q_proj"])
    assert {slot.name for slot in ours.policy.layout.slots} == {"layers.0.q_proj.B", "layers.1.q_proj.B"}
    tokens, valid = some_tokens()
    flat = random_adapters(ours.policy, 3)
    changed = ours.hidden(ours.policy.layout.views(flat), tokens, valid)
    alone = ours.hidden(None, tokens, valid)
    # A single token attends to itself alone, whatever its query is.
    torch.testing.assert_close(changed[:, 0, 0], alone[:, 0, 0])
    assert not torch.allclose(changed[:, 0, 1], alone[:, 0, 1])


def test_a_base_of_bfloat16_is_close_to_one_of_float32(tmp_path: Path):
    folder = write_model(tmp_path)
    exact, rounded = open_model(folder), open_model(folder, dtype="bfloat16")
    tokens, valid = some_tokens()
    adapters = exact.policy.layout.views(random_adapters(exact.policy, 3))
    expected = exact.logits(exact.hidden(adapters, tokens, valid))[valid]
    logits = rounded.logits(rounded.hidden(adapters, tokens, valid))[valid]
    assert logits.dtype == torch.float32
    assert 1e-4 < float((logits - expected).norm() / expected.norm()) < 0.05
