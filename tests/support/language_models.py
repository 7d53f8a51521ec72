"""Small random language models in Hugging Face's layout, and the same adapters for us and for peft."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import open_base
from grpo_fed.policy.language.shape import ModelShape, shape_from_config
from grpo_fed.policy.language.transformer import Transformer
from grpo_fed.scenario.settings import LanguageSettings, PolicySettings

LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
"""The config.json of a small model, whose heads share keys in twos."""


def random_tensors(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights that give logits of about 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.4 * torch.randn(size, generator=generator) + (1.0 if "norm" in name else 0.0)
        for name, size in shape.tensor_shapes().items()
    }


def write_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a random model. changes: to `LLAMA`."""
    config = {**LLAMA, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(shape_from_config(config, "config.json"), seed)
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def open_model(model: str | Path, **language: object) -> Transformer:
    """Open a model with adapters of rank 3. language: settings of `[language]`."""
    settings = LanguageSettings.model_validate({"rank": 3, "alpha": 6.0, **language})
    base = open_base(str(model), settings.dtype)
    policy = AdapterPolicy(base.shape, settings, PolicySettings())
    return Transformer(base, policy, policy.frozen_factors(0))


def random_adapters(policy: AdapterPolicy, clients: int, seed: int = 1) -> Tensor:
    """Draw the adapters of K clients, [K, P]."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(clients, policy.layout.size, generator=generator)
