"""Writes a client's policy from a run's folder in a form that other programs open."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.cnn import CnnPolicy
from grpo_fed.policy.language.merged_folder import write_merged_folder
from grpo_fed.policy.shared_names import NORMALISER, POLICIES
from grpo_fed.rl.normalise import EPSILON
from grpo_fed.runs.adapters import LoadedAdapters
from grpo_fed.runs.policies import LoadedPolicy, load_policy, write_policy
from grpo_fed.runs.shared_policy import load_shared_policy
from grpo_fed.tasks.action_spaces import action_parts, is_nested

Form: TypeAlias = Literal["safetensors", "onnx", "torchscript", "torch-export", "sb3"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Forms in which a network can be written."""
SUFFIXES: dict[str, str] = {"onnx": "onnx", "torchscript": "pt", "torch-export": "pt2"}
"""Suffixes of graphs, by their form."""
DESCRIPTION = "policy.json"
"""The file that says what a network's file takes and returns."""


def export_policy(
    folder: str | Path,
    out: str | Path,
    client: str | None = None,
    merge: bool = False,
    form: Form | None = None,
    shared: str | None = None,
    moments_of: str | None = None,
) -> list[Path]:
    """Write a client's policy to the folder `out`, and return its files.

    Adapters of a language model become a folder for `PeftModel.from_pretrained`, or, with `merge`, a whole model for
    `AutoModelForCausalLM.from_pretrained`: the base with the adapters added, in the type `language.dtype`. A network
    is written in a form of `FORMS`, by default as a safetensors file with its parameters by name, beside `policy.json`,
    which says what it takes and returns.

    client: may be left out if the run has only one. shared: an environment, for what the run shares, as the policy of a
    client that was never there; moments_of: whose moments normalise it then, as for `load_shared_policy`. ValueError if
    the run has no such policy, `out` is not empty, or the policy cannot be written like this.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; name a folder that does not exist yet")
    if form is not None and form not in FORMS:
        raise ValueError(f"--to {form}: is no form of a policy; there are {', '.join(FORMS)}")
    if shared is not None and client is not None:
        raise ValueError(
            f"--shared {shared}: is the policy of a client that was never there; leave out --client {client}"
        )
    if shared is None and moments_of is not None:
        raise ValueError(f"--moments-of {moments_of}: is for --shared ENV")
    policy: LoadedPolicy | LoadedAdapters
    policy = (
        load_policy(folder, client) if shared is None else load_shared_policy(folder, shared, moments_of=moments_of)
    )
    name = policy.task.client
    if merge and not isinstance(policy, LoadedAdapters):
        raise ValueError(f"client {name}: has a network and no adapters that could be merged; leave out --merge")
    if form is not None and isinstance(policy, LoadedAdapters):
        raise ValueError(
            f"client {name}: has adapters of a language model, and --to {form} is for networks; leave out --to for"
            " adapters that peft opens, or use --merge for a whole model"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        target = Path(temporary) / "policy"
        target.mkdir()
        if not isinstance(policy, LoadedAdapters):
            _write_network(policy, target, form or "safetensors")
        elif merge:
            language, seed = policy.scenario.language, policy.scenario.seed
            factors = policy.policy.frozen_factors(seed)
            write_merged_folder(target, policy.policy, policy.parameters[0], factors, language.model, language.dtype)
        else:
            for path in (folder / POLICIES / name).iterdir():
                shutil.copyfile(path, target / path.name)
        target.replace(out)
    return sorted(out.iterdir())


def _write_network(policy: LoadedPolicy, target: Path, form: Form) -> None:
    """Write a network and its description to a folder."""
    if form == "sb3":
        from grpo_fed.runs.sb3_export import export_to_sb3

        export_to_sb3(policy, target)
    elif form == "safetensors":
        write_policy(target, policy)
    else:
        from grpo_fed.runs.graph_export import export_graph

        export_graph(policy, target / f"{policy.task.client}.{SUFFIXES[form]}", form)
    (target / DESCRIPTION).write_text(json.dumps(_describe(policy, form), indent=1) + "\n", encoding="utf-8")


def _describe(policy: LoadedPolicy, form: Form) -> dict[str, Any]:
    """Describe what a network takes and returns, so that it can be used without grpo_fed."""
    task, settings = policy.task, policy.scenario
    action: dict[str, Any] = {"space": str(task.action_space), "kind": task.action.kind, "sizes": task.action.sizes}
    if is_nested(task.action_space):
        parts = action_parts(task.action_space)
        places = [[*range(part.columns.start, part.columns.stop)] for part in parts]
        action["parts"] = [{"space": str(part.space), "entries": at} for part, at in zip(parts, places, strict=True)]
    if task.action.choices:
        action["start"] = task.action.start
    if task.action.reals:
        action |= {"low": _finite(task.action.low), "high": _finite(task.action.high), "squash": settings.policy.squash}
    normaliser = None
    if policy.normaliser is not None:
        normaliser = {"prefix": NORMALISER, "clip": policy.normaliser.clip, "epsilon": EPSILON}
    network: dict[str, Any] = {"module": settings.policy.module}
    if isinstance(policy.policy, ActorCritic):
        network = {"layers": [*policy.policy.torso, "actor"], "activation": settings.policy.activation}
    elif isinstance(policy.policy, CnnPolicy):
        network = {"encoder": settings.policy.encoder, "hidden": settings.policy.hidden, "scale": 1 / 255}
        network["activation"] = settings.policy.activation
    return {
        "client": task.client,
        "env": task.env,
        "scenario": settings.name,
        "form": form,
        "observation": {
            "space": str(task.observation_space),
            "size": task.observation_size,
            "type": str(task.observation_dtype),
        },
        "outputs": [
            "action",
            *(["logits"] if task.action.choices else []),
            *(["mean", "log_std"] if task.action.reals else []),
        ],
        "action": action,
        "normaliser": normaliser,
        "network": network,
    }


def _finite(bounds: Sequence[float]) -> list[float | None]:
    """Replace infinite bounds by None, since JSON has no infinity."""
    return [bound if math.isfinite(bound) else None for bound in bounds]
