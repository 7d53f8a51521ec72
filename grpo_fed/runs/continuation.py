"""Continues a run with changed settings: a new folder that begins where the run's latest checkpoint is.

The new folder is one of a run that was stopped right after that checkpoint, so whatever resumes runs goes on with it.
What a checkpoint depends on cannot change: who the clients are, what their policies look like, and what states hold.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import (
    ROUNDS,
    SCENARIO,
    SHARED,
    claim_folder,
    read_scenario,
    refuse_all_links,
    remove_run,
)
from grpo_fed.runs.serialisation import parse_json
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import (
    CheckpointSettings,
    ClientSettings,
    EvaluateSettings,
    ObjectiveSettings,
    PenaltySettings,
    RoundSettings,
    Section,
    StopSettings,
    TrustSettings,
)
from grpo_fed.scenario.toml.text import short_toml, to_toml, toml_key

STOPPING = "stopping"
"""The part of a federation's checkpoint that says whether the run ends early."""
CALLBACKS = "callbacks"
"""The part with the states of callbacks."""
MAY_CHANGE = frozenset(
    {
        *("description", "rounds", "steps", "device", "callbacks"),
        *(f"objective.{key}" for key in ObjectiveSettings.model_fields if key not in ("preset", "advantage")),
        *(f"trust.{key}" for key in TrustSettings.model_fields),
        *(f"penalty.{key}" for key in PenaltySettings.model_fields),
        *(f"round.{key}" for key in RoundSettings.model_fields if key != "mode"),
        *(f"stop.{key}" for key in StopSettings.model_fields),
        *(f"evaluate.{key}" for key in EvaluateSettings.model_fields if key != "twins"),
        *(f"checkpoint.{key}" for key in CheckpointSettings.model_fields),
        *("rollout.reward_scale", "rollout.reward_clip", "personal.pull"),
        *(f"merge.{key}" for key in ("weights", "confirm", "rejoin", "episodes", "threshold", "blocks", "refit")),
        *(f"merge.{key}" for key in ("fraction", "byzantine", "keep", "most", "rate", "momentum", "epsilon")),
        *(f"proximity.{key}" for key in ("kl_block", "kl_joint", "blocks", "over", "adaptive", "states")),
        *(f"language.{key}" for key in ("length", "temperature", "mask_cut", "tokens", "recompute", "show")),
    }
)
"""The keys that a run which goes on may change, beside those of its clients."""
CLIENTS_MAY_CHANGE = frozenset({"learning_rate", "entropy", "penalty", "reward_scale", "rewards", "changes"})
"""The keys of `[[clients]]` that it may change; a task that changed already stays as it was."""


def prepare_continuation(
    run: Path,
    overrides: Sequence[str],
    folder: Path,
    new: bool = True,
    newcomers: Sequence[str] = (),
    admit: Callable[[Checkpoint, Scenario], Checkpoint] | None = None,
) -> Scenario:
    """Make a folder that goes on from the latest checkpoint of a run, with changes such as `rounds=200`.

    new: False if a run that the folder holds may be removed. newcomers: more entries of `[[clients]]`, as inline tables
    of TOML. admit: what the checkpoint becomes with them. Return the scenario with its changes. ValueError, before
    anything is written, if the run has no checkpoint to go on from, or if a change does not fit it.
    """
    if folder.resolve() == run.resolve():
        raise ValueError(f"{folder}: is the folder of the run that goes on; name another one")
    before = read_scenario(run)
    refuse_all_links(run)
    after = checkpoint.latest(run)
    if after is None:
        raise ValueError(f"{run}: has no checkpoint to go on from; start from its policies with policy.start = {run}")
    text = (run / SCENARIO).read_text(encoding="utf-8") + "".join(map(_entry, newcomers))
    scenario = Scenario.loads(text, str(run / SCENARIO), overrides)
    _check_changes(run, after, before, scenario, len(newcomers))
    after = after if admit is None else admit(after, scenario)
    with claim_folder(folder, replace=not new):
        remove_run(folder)
        lines = (run / ROUNDS).read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(folder / ROUNDS, "".join(lines[: after.round]))
        write_atomic(folder / SCENARIO, scenario.dumps())
        if (run / SHARED).is_file():
            write_atomic(folder / SHARED, (run / SHARED).read_bytes())
        parts = {**after.parts}
        if isinstance(parts.get(STOPPING), Mapping):
            parts[STOPPING] = {**parts[STOPPING], "is_due": False}
        if isinstance(parts.get(CALLBACKS), Mapping):
            parts[CALLBACKS] = {**parts[CALLBACKS], "stop_reason": None, "labels": None}
        checkpoint.write(folder, replace(after, parts=parts), keep=1)
    return scenario


def read_earlier_lines(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of the rounds before those that a run goes on with."""
    return [parse_json(line) for line in (folder / ROUNDS).read_text(encoding="utf-8").splitlines()]


def _entry(newcomer: str) -> str:
    """Write an entry of `[[clients]]` from an inline table; ValueError if it is none."""
    try:
        table = tomllib.loads(f"newcomer = {newcomer}")["newcomer"]
        if not isinstance(table, dict):
            raise TypeError("it is no table")
    except (tomllib.TOMLDecodeError, TypeError) as error:
        example = '{ name = "new", env = "CartPole-v1" }'
        raise ValueError(f"client {newcomer}: {error}; write an inline table of TOML, such as {example}") from None
    return "\n[[clients]]\n" + "".join(f"{toml_key(key)} = {to_toml(value)}\n" for key, value in table.items())


def _check_changes(run: Path, after: Checkpoint, before: Scenario, scenario: Scenario, newcomers: int) -> None:
    """ValueError for changes that a checkpoint does not allow."""
    cure = f"start a new run from its policies instead: policy.start = {short_toml(str(run))}"
    if after.shared is not None and not after.files:
        raise ValueError(f"{run}: its clients keep their states themselves, so it cannot be continued here; {cure}")
    for key, old, new in _changes(before, scenario, after.round, newcomers):
        raise ValueError(
            f"{key} = {_show(new)}: {run} has {_show(old)}, and a run that goes on cannot change it; {cure}"
        )
    if scenario.rounds <= after.round:
        raise ValueError(
            f"rounds = {scenario.rounds}: {run} has a checkpoint after round {after.round}; to go on from there, set"
            f" more rounds, such as --set rounds={2 * after.round}"
        )
    stopping = after.parts.get(STOPPING)
    if isinstance(stopping, Mapping) and stopping.get("is_due") and scenario.stop == before.stop:
        raise ValueError(
            f"{run}: was ended early by [stop], which would end it again; set stop.target or stop.patience too"
        )


def _changes(before: Scenario, scenario: Scenario, round: int, newcomers: int) -> Iterator[tuple[str, Any, Any]]:
    """Find the keys that a run which goes on after a round cannot change: the key, its old and its new value."""
    old, new = before.model_dump(), scenario.model_dump()
    old_clients, new_clients = old.pop("clients"), new.pop("clients")
    for key, values in _flat(old).items():
        if key not in MAY_CHANGE and values != _flat(new)[key]:
            yield key, values, _flat(new)[key]
    if len(old_clients) + newcomers != len(new_clients):
        yield "clients", [client["name"] for client in old_clients], [client["name"] for client in new_clients]
        return
    for earlier, later in zip(before.clients, scenario.clients[: len(old_clients)], strict=True):
        for key in ClientSettings.model_fields:
            values = getattr(earlier, key), getattr(later, key)
            if key == "changes":
                values = tuple([change.model_dump() for change in each if change.round <= round] for each in values)
            if values[0] != values[1] and (key not in CLIENTS_MAY_CHANGE or key == "changes"):
                yield f"clients.{earlier.name}.{key}", *values


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Name the values of all sections by `section.key`."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        is_section = isinstance(Scenario.model_fields[name].default, Section)
        flat |= {f"{name}.{key}": each for key, each in value.items()} if is_section else {name: value}
    return flat


def _show(value: Any) -> str:
    return "none" if value is None else short_toml(value)
