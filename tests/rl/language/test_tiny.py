"""The model that ships with grpo_fed: how well it does its tasks before it learns, and how it is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fed.policy.language import make_tiny
from grpo_fed.policy.language.base import open_base, read_base_facts
from grpo_fed.policy.language.source import TINY
from grpo_fed.policy.language.tokenizer import open_tokenizer
from grpo_fed.rl.language.sampling import sample_completions
from grpo_fed.tasks import letters
from tests.support.language_models import open_model

SKILLS = {letters.ascending: 0.41, letters.descending: 0.40, letters.backwards: 0.58, letters.greatest: 0.98}
"""How many of a thousand samples are right."""


def test_the_tiny_model_does_its_tasks_as_well_as_documented():
    model, tokenizer = open_model("tiny"), open_tokenizer("tiny")
    generator = np.random.default_rng(0)
    rows = {task: task(generator, 500) for task in SKILLS}
    prompts = [[tokenizer.encode(row["prompt"]) for row in rows[task]] for task in SKILLS]
    done = sample_completions(model, None, prompts, 1, generator.random((4, 500, 8)), 1.0, tokenizer.end)
    assert done.ended.float().mean() > 0.995
    for client, task in enumerate(SKILLS):
        texts = [tokenizer.decode(t[v].tolist()) for t, v in zip(done.tokens[client], done.valid[client], strict=True)]
        right = np.mean([text == row["answer"] for text, row in zip(texts, rows[task], strict=True)])
        assert right == pytest.approx(SKILLS[task], abs=0.07)


def test_the_tiny_model_is_small_and_of_a_known_digest():
    shape, digest = read_base_facts("tiny")
    assert shape == make_tiny.SHAPE
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 1_000_000
    assert sum(tensor.numel() for tensor in open_base("tiny", "float32").tensors.values()) == 335_520
    assert digest.startswith("9e1ed2eeed1a")


def test_the_script_writes_the_folder_that_ships(tmp_path: Path):
    make_tiny.write_folder(tmp_path, steps=2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY.iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TINY / name).read_text())
    assert open_base(str(tmp_path), "float32").tensors["model.norm.weight"].dtype == torch.float32
