"""A client's adapters as a folder that the library peft opens: `PeftModel.from_pretrained(model, folder)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.shape import module_of, parse_config
from grpo_fed.scenario.toml.text import short_toml

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(
    folder: Path, policy: AdapterPolicy, parameters: Tensor, factors: Mapping[str, Tensor], model: str
) -> None:
    """Write both factors of all adapters; equal adapters give equal bytes.

    parameters: of one client, [P]. factors: the frozen factors A, `policy.frozen_factors(seed)`. model: the base, as
    `language.model` names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_config(policy, model), indent=2, sort_keys=True) + "\n")
    named = {**factors, **policy.layout.views(parameters.detach().cpu())}
    tensors = {_peft_name(name): named[name].cpu().contiguous() for name in sorted(named)}
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))


def read_peft_folder(folder: Path, policy: AdapterPolicy, factors: Mapping[str, Tensor]) -> Tensor:
    """Read adapters that `write_peft_folder` has written, [P].

    factors: the frozen factors A; the folder must have the same.

    Raises a ValueError where files are missing, or the adapters are not of this policy.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: there is no {name}; give a folder with the adapters of a client")
    _check_config(folder / CONFIG, policy)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: it cannot be read as safetensors ({error})") from None
    wanted = {name: _peft_name(name) for name in (*(slot.name for slot in policy.layout.slots), *factors)}
    missing, more = set(wanted.values()) - set(tensors), set(tensors) - set(wanted.values())
    if missing or more:
        raise ValueError(
            f"{folder / WEIGHTS}: {short_toml(sorted(missing | more)[:3])} differ between the file and the policy;"
            " are language.maps and the model the same?"
        )
    for name, factor in factors.items():
        other = tensors[wanted[name]]
        if other.shape != factor.shape or not torch.allclose(other, factor.cpu(), atol=1e-5):
            raise ValueError(f"{folder / WEIGHTS}: {name} is not the frozen one of this seed; give the run's own seed")
    return policy.layout.flatten({slot.name: tensors[wanted[slot.name]].float() for slot in policy.layout.slots})


def _config(policy: AdapterPolicy, model: str) -> dict[str, object]:
    return {
        "base_model_name_or_path": model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(policy.alpha) if policy.alpha.is_integer() else policy.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": policy.rank,
        "target_modules": list(policy.maps),
        "task_type": "CAUSAL_LM",
    }


def _check_config(file: Path, policy: AdapterPolicy) -> None:
    """Raise a ValueError where rank, scale or kind of the adapters are not the policy's."""
    config = parse_config(file.read_text(), str(file))
    for key, wanted in (("peft_type", "LORA"), ("r", policy.rank), ("lora_alpha", policy.alpha)):
        if config.get(key) != wanted:
            raise ValueError(f"{file}: {key} is {config.get(key)} and the policy's is {wanted}; use the run's scenario")


def _peft_name(name: str) -> str:
    """Return peft's name of a factor.

    `layers.0.q_proj.B` -> `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`
    """
    _, layer, linear, factor = name.split(".")
    return f"base_model.model.model.layers.{layer}.{module_of(linear)}.{linear}.lora_{factor}.weight"
