"""A client's adapters added to their base, as a whole model in Hugging Face's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import DTYPES, write_tensors
from grpo_fed.policy.language.shape import module_of, parse_config
from grpo_fed.policy.language.source import locate_model, open_source

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights that belong to a model: its tokenizer, its chat template, its settings of sampling."""
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def write_merged_folder(
    folder: Path,
    policy: AdapterPolicy,
    parameters: Tensor,
    factors: Mapping[str, Tensor],
    model: str,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files to a folder that exists.

    parameters: of one client, [P]. factors: the frozen factors A, `policy.frozen_factors(seed)`. model: the base, as
    `language.model` names it. dtype: the type of the numbers in the file; sums are rounded to it once.

    Raises a ValueError for a base that is no folder, since it has no config.json.
    """
    place = locate_model(model)
    if not place.is_dir():
        raise ValueError(
            f"language.model: {model} is no folder in Hugging Face's layout, and a whole model needs its config.json"
            " and its tokenizer; export the adapters alone, without --merge"
        )
    source = open_source(model)
    named = {name: each.float().cpu() for name, each in policy.layout.views(parameters.detach()).items()}
    named |= {name: factor.float().cpu() for name, factor in factors.items()}
    adapted = {
        f"model.layers.{layer}.{module_of(linear)}.{linear}.weight": f"layers.{layer}.{linear}"
        for layer in range(policy.shape.layers)
        for linear in policy.maps
    }

    def read(name: str) -> Tensor:
        weight = source.read(name).float()
        if name not in adapted:
            return weight
        return weight + policy.scale * named[f"{adapted[name]}.B"] @ named[f"{adapted[name]}.A"]

    for path in (path for pattern in COPIED for path in place.glob(pattern)):
        if path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, folder / path.name)
    config = parse_config((place / CONFIG).read_text(), str(place / CONFIG))
    config.pop("quantization_config", None)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    (folder / CONFIG).write_text(json.dumps({**config, **dict.fromkeys(keys, dtype)}, indent=2) + "\n")
    with (folder / WEIGHTS).open("wb") as file:
        write_tensors(file, policy.shape.tensor_shapes(), DTYPES[dtype], read)
