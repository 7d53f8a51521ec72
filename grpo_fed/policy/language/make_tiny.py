"""Makes the model that ships with grpo_fed: `python -m grpo_fed.policy.language.make_tiny`, about 11 CPU seconds.

It knows characters, and the four tasks of `grpo_fed.tasks.letters` a little: half of what it has seen of "s3142=" was
sorted upwards and half downwards, so its answers to such prompts are of either kind. It is made once and shipped, as
another processor would round otherwise, and every figure would change with it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import FrozenBase
from grpo_fed.policy.language.shape import ModelShape
from grpo_fed.policy.language.source import TINY
from grpo_fed.policy.language.tokenizer import Tokenizer, open_tokenizer, write_character_tokenizer
from grpo_fed.policy.language.transformer import Transformer
from grpo_fed.scenario.settings import LanguageSettings, PolicySettings
from grpo_fed.tasks import letters

CHARACTERS = "0123456789=srm+-., ?"
SPECIAL = ("<pad>", "<end>")
SHAPE = ModelShape(
    width=96,
    layers=3,
    heads=4,
    kv_heads=4,
    head_width=24,
    inner=256,
    vocabulary=32,
    context=256,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    tied=True,
)
SORTED, BACKWARDS, GREATEST = 45, 26, 12
"""How many prompts of each kind a batch has; those that are sorted are there twice, sorted upwards and downwards."""
STEPS, LEARNING_RATE = 155, 3e-3


def main() -> None:
    """Train the model and write its folder."""
    write_folder(TINY)


def write_folder(folder: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the model on the tasks' answers, and write it as a folder in Hugging Face's layout."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(), indent=1) + "\n")
    write_character_tokenizer(folder, CHARACTERS, SPECIAL)
    tensors = _train(open_tokenizer(str(folder)), steps, seed)
    halves = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors").write_bytes(save(halves, {"format": "pt"}))


def _train(tokenizer: Tokenizer, steps: int, seed: int) -> dict[str, Tensor]:
    """Train all weights by AdamW on the cross-entropy of answers and their end."""
    generator = np.random.default_rng(seed)
    tensors = _initial(generator)
    base = FrozenBase(SHAPE, "", tensors, torch.float32)
    model = Transformer(base, AdapterPolicy(SHAPE, LanguageSettings(), PolicySettings()), {})
    optimiser = torch.optim.AdamW(tensors.values(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 20, (steps - step) / max(1, steps - 20))
        tokens, targets = _batch(generator, tokenizer)
        logits = model.logits(model.hidden(None, tokens[None]))[0]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimiser.step()
    return tensors


def _batch(generator: np.random.Generator, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Draw sequences of the tasks, [B, T], with the token to be predicted after each; -100 where none is."""
    (end,) = tokenizer.end
    upwards = letters.ascending(generator, SORTED)
    downwards = [{**row, "answer": row["answer"][::-1]} for row in upwards]
    rows = upwards + downwards + letters.backwards(generator, BACKWARDS) + letters.greatest(generator, GREATEST)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    answers = [[*tokenizer.encode(row["answer"]), end] for row in rows]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens = torch.full((len(rows), longest), tokenizer.pad)
    targets = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        tokens[row, :stop] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : stop - 1] = torch.tensor(answer)
    return tokens, targets


def _initial(generator: np.random.Generator) -> dict[str, Tensor]:
    """Draw the initial weights: norms are 1, all others normal with a deviation of width^-1/2."""
    tensors = {}
    for name, shape in SHAPE.tensor_shapes().items():
        deviation = 0.02 if "embed" in name else shape[-1] ** -0.5
        values = np.ones(shape) if len(shape) == 1 else generator.standard_normal(shape) * deviation
        tensors[name] = torch.from_numpy(values.astype(np.float32)).requires_grad_()
    return tensors


def _config() -> dict[str, object]:
    """Return the contents of config.json."""
    facts = dataclasses.asdict(SHAPE)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["width"],
        "num_hidden_layers": facts["layers"],
        "num_attention_heads": facts["heads"],
        "num_key_value_heads": facts["kv_heads"],
        "head_dim": facts["head_width"],
        "intermediate_size": facts["inner"],
        "vocab_size": facts["vocabulary"],
        "max_position_embeddings": facts["context"],
        "rms_norm_eps": facts["norm_epsilon"],
        "rope_theta": facts["rope_theta"],
        "tie_word_embeddings": facts["tied"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<end>"),
        "pad_token_id": SPECIAL.index("<pad>"),
        "dtype": "float16",
    }


if __name__ == "__main__":
    main()
