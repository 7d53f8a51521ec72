"""Writes a client's policy from a run's folder in a form that other programs open."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from grpo_fed.policy.language.merged_folder import write_merged_folder
from grpo_fed.policy.shared_names import POLICIES
from grpo_fed.runs.adapters import LoadedAdapters
from grpo_fed.runs.policies import load_policy


def export_policy(folder: str | Path, out: str | Path, client: str | None = None, merge: bool = False) -> list[Path]:
    """Write a client's policy to the folder `out`, and return its files.

    Adapters of a language model become a folder for `PeftModel.from_pretrained`, or, with `merge`, a whole model for
    `AutoModelForCausalLM.from_pretrained`: the base with the adapters added, in the type `language.dtype`. A network
    becomes a safetensors file with its parameters by name.

    client: may be left out if the run has only one. ValueError if the run has no such policy, `out` is not empty, or
    there is nothing to merge.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; name a folder that does not exist yet")
    policy = load_policy(folder, client)
    name = policy.task.client
    if merge and not isinstance(policy, LoadedAdapters):
        raise ValueError(f"client {name}: has a network and no adapters that could be merged; leave out --merge")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        target = Path(temporary) / "policy"
        target.mkdir()
        if not isinstance(policy, LoadedAdapters):
            shutil.copyfile(folder / POLICIES / f"{name}.safetensors", target / f"{name}.safetensors")
        elif merge:
            language, seed = policy.scenario.language, policy.scenario.seed
            factors = policy.policy.frozen_factors(seed)
            write_merged_folder(target, policy.policy, policy.parameters[0], factors, language.model, language.dtype)
        else:
            for path in (folder / POLICIES / name).iterdir():
                shutil.copyfile(path, target / path.name)
        target.replace(out)
    return sorted(out.iterdir())
