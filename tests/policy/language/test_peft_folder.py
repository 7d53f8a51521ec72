"""Adapters as peft's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grpo_fed.policy.language.peft_folder import read_peft_folder, write_peft_folder
from tests.support.language_models import open_model, random_adapters, write_model


@pytest.mark.parametrize("learn", ["B", "AB"])
def test_a_folder_of_adapters_opens_in_peft_with_the_same_logits(tmp_path: Path, learn: str):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = write_model(tmp_path / "model")
    ours = open_model(model, learn=learn, maps=["*_proj"])
    flat = random_adapters(ours.policy, 2)
    folder = tmp_path / "adapters"
    write_peft_folder(folder, ours.policy, flat[1], ours.policy.frozen_factors(0), str(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    tokens = torch.arange(12).reshape(1, 2, 6)
    logits = ours.logits(ours.hidden(ours.policy.layout.views(flat[1:]), tokens))
    torch.testing.assert_close(logits[0], theirs(tokens[0]).logits.detach(), rtol=1e-5, atol=2e-5)
    assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(model)


@pytest.mark.parametrize("learn", ["B", "AB"])
def test_adapters_are_read_back_to_the_bit_and_written_the_same_each_time(tmp_path: Path, learn: str):
    policy = open_model(write_model(tmp_path / "model"), learn=learn).policy
    flat, factors = random_adapters(policy, 1)[0], policy.frozen_factors(0)
    for name in ("one", "two"):
        write_peft_folder(tmp_path / name, policy, flat, factors, "tiny")
    assert torch.equal(read_peft_folder(tmp_path / "one", policy, factors), flat)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_adapters_of_another_policy_are_refused(tmp_path: Path):
    model, folder = write_model(tmp_path / "model"), tmp_path / "adapters"
    policy = open_model(model).policy
    write_peft_folder(folder, policy, policy.initial(0), policy.frozen_factors(0), "tiny")
    with pytest.raises(ValueError, match=r"q_proj.A is not the frozen one of this seed"):
        read_peft_folder(folder, policy, policy.frozen_factors(1))
    other = open_model(model, rank=2).policy
    with pytest.raises(ValueError, match=r"adapter_config.json: r is 3 and the policy's is 2"):
        read_peft_folder(folder, other, other.frozen_factors(0))
    fewer = open_model(model, maps=["q_proj"]).policy
    with pytest.raises(ValueError, match=r"differ between the file and the policy; are language.maps"):
        read_peft_folder(folder, fewer, fewer.frozen_factors(0))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"it cannot be read as safetensors"):
        read_peft_folder(folder, policy, policy.frozen_factors(0))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter_model.safetensors"):
        read_peft_folder(folder, policy, policy.frozen_factors(0))
