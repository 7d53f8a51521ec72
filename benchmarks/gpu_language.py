"""The language part of benchmarks/gpu.py: adapters on a frozen model, on the device and on the CPU.

Of the tiny model that ships: how far float32 on the device is from the CPU, and what a bfloat16 base changes. Of a
random model with the same letters, 8 layers of width 512 where the size is full: tokens a second written by K clients
as one computation and one after another, and completions a second learned from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.gpu_report import Extent, Report, free_memory, synchronize, time_call
from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import open_base
from grpo_fed.policy.language.shape import shape_from_config
from grpo_fed.policy.language.source import TINY
from grpo_fed.policy.language.transformer import Transformer
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.language.sampling import Completions, sample_completions
from grpo_fed.rl.make import make_learners
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import LanguageSettings, PolicySettings

COMPLETIONS = 32
"""Completions of each client in a batch: 4 prompts of 8."""
LONG = 120
"""Seconds that the measurements of one number of clients may take at most."""


def measure_language(report: Report, extent: Extent, device: torch.device) -> None:
    """Compare the tiny model's numbers with the CPU's, then measure the speed of a larger one."""
    compare_numbers(report, device)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), extent.width, extent.layers)
        for clients in extent.writing:
            if report.has_time(LONG):
                measure_clients(report, folder, clients, device)


def compare_numbers(report: Report, device: torch.device) -> None:
    """Compare logits and greedy completions of the same adapters: CPU, device, and a bfloat16 base."""
    prompts = np.random.default_rng(0).integers(2, 20, (2, 16, 6)).tolist()
    completions = {}
    logits = {}
    for name, place, dtype in (
        ("cpu", torch.device("cpu"), "float32"),
        ("device", device, "float32"),
        ("bfloat16", device, "bfloat16"),
    ):
        settings = LanguageSettings.model_validate({"rank": 4, "dtype": dtype})
        base = open_base("tiny", settings.dtype)
        policy = AdapterPolicy(base.shape, settings, PolicySettings())
        transformer = Transformer(base, policy, policy.frozen_factors(0), place)
        generator = torch.Generator().manual_seed(1)
        adapters = policy.layout.views((0.1 * torch.randn(2, policy.layout.size, generator=generator)).to(place))
        with torch.no_grad():
            logits[name] = transformer.logits(transformer.hidden(adapters, torch.tensor(prompts).to(place))).cpu()
        written = sample_completions(transformer, adapters, prompts, 1, np.zeros((2, 16, 8)), 1.0, {1}, greedy=True)
        completions[name] = written
    scale = float(logits["cpu"].abs().max())
    for name in ("device", "bfloat16"):
        difference = float((logits[name] - logits["cpu"]).abs().max())
        differing = _share_of_differing_tokens(completions[name], completions["cpu"])
        report.add(
            "language",
            f"{name}: logits differ from the CPU's float32 by {difference:.1e} of {scale:.1f}, and {differing:.1%} of"
            " greedy tokens",
            name=name,
            logits=difference,
            of=scale,
            differing_tokens=differing,
        )


def _share_of_differing_tokens(first: Completions, second: Completions) -> float:
    counted = second.valid.cpu()
    return float((first.tokens.cpu() != second.tokens.cpu())[counted].float().mean())


def write_random_model(folder: Path, width: int, layers: int) -> None:
    """Write a random model with the tiny model's letters, in Hugging Face's layout."""
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": width, "num_hidden_layers": layers, "head_dim": 32, "intermediate_size": 3 * width}
    config |= {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator) * 0.02 + (1.0 if "norm" in name else 0.0)
        for name, size in shape_from_config(config, "config.json").tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_learner(model: str, clients: int, device: torch.device) -> LanguageLearner:
    """Make a learner of clients with the adapters of this model."""
    scenario = Scenario.model_validate(
        {
            "name": "gpu",
            "method": "local",
            "steps": COMPLETIONS,
            "device": str(device),
            "language": {"model": model, "rank": 8, "length": 16, "tokens": 1_000_000},
            "rollout": {"num_envs": COMPLETIONS},
            "objective": {"preset": "dr-grpo", "epochs": 1, "learning_rate": 1e-4},
            "clients": [
                {
                    "name": "up",
                    "count": clients,
                    "prompts": "grpo_fed.tasks.letters:ascending",
                    "rewards": [{"function": "exact"}],
                }
            ],
        }
    )
    (learner,) = make_learners(scenario)
    assert isinstance(learner, LanguageLearner)
    return learner


def measure_clients(report: Report, model: str, clients: int, device: torch.device) -> None:
    """Measure writing and learning of K clients as one computation, beside one client alone."""
    free_memory(device)
    together, alone = make_learner(model, clients, device), make_learner(model, 1, device)
    for learner in (together, alone):
        learner.train(COMPLETIONS)
    synchronize(device)
    written, _ = together.collect()
    tokens = int(written.rows.valid.sum())
    write, learn = (time_call(call, device) for call in (together.collect, lambda: together.train(COMPLETIONS)))
    write_one, learn_one = (time_call(call, device) for call in (alone.collect, lambda: alone.train(COMPLETIONS)))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    report.add(
        "language",
        f"{clients} clients: {tokens / write:,.0f} tokens/s written, {clients * write_one / write:.1f} times as fast as"
        f" one after another; {clients * COMPLETIONS / learn:,.0f} completions/s written and learned,"
        f" {clients * learn_one / learn:.1f} times as fast; {peak:.1f} GB",
        clients=clients,
        tokens_per_second=tokens / write,
        write_ratio=clients * write_one / write,
        completions_per_second=clients * COMPLETIONS / learn,
        learn_ratio=clients * learn_one / learn,
        peak_gb=peak,
    )
