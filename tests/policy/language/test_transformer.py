"""The stacked transformer against transformers and peft, one client after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_fed.policy.language.transformer import Transformer
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn", ["B", "AB"])
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
        gradient = {s.name: parameters[peft_name(s.name)].grad for s in ours.policy.layout.slots}
        torch.testing.assert_close(flat.grad[client], ours.policy.layout.flatten(gradient), rtol=1e-4, atol=1e-4)
