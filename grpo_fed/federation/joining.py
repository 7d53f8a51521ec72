"""Newcomers in a run that goes on: what a checkpoint must know of clients that were not there before.

A newcomer begins with the shared blocks as they are. With the merge rule `persistence` it is asked after some rounds
what fits it: it plays with what it has learned itself and with all that is shared. If its own is better, it leaves
everything, as a client does whose task has changed, and comes back block by block where sharing is no worse. From then
on the rule treats it as all others. What is known of veterans, and what they have left, is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo_fed.aggregation.merge.evidence import Evidence, with_clients
from grpo_fed.federation.server_state import EVIDENCE, evidence_arrays, first_evidence, read_evidence
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.steering import steered_curricula
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.policy.shared_names import SharedNames
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.folder import read_scenario, read_shared_names
from grpo_fed.scenario.scenario import Scenario


def prepare_joining(
    run: Path, newcomers: Sequence[str], overrides: Sequence[str], folder: Path, new: bool = True
) -> Scenario:
    """Make a folder that goes on from the latest checkpoint of a run with more clients.

    newcomers: their entries of `[[clients]]` as inline tables of TOML. overrides: changes such as `rounds=60`. new:
    False if a run that the folder holds may be removed. Return the scenario. ValueError, before anything is written, if
    the run has no checkpoint to go on from, or if something does not fit it.
    """
    read_scenario(run)  # a folder without a run is said to be one
    names = read_shared_names(run)
    if names is None or not names.blocks:
        raise ValueError(f"{run}: its clients share nothing that a newcomer could begin with")

    def admit(checkpoint: Checkpoint, scenario: Scenario) -> Checkpoint:
        return admit_newcomers(checkpoint, scenario, names)

    return prepare_continuation(run, overrides, folder, new, newcomers, admit)


def admit_newcomers(
    checkpoint: Checkpoint, scenario: Scenario, names: SharedNames, shared_blocks: SharedBlocks | None = None
) -> Checkpoint:
    """Return a checkpoint of a federation with some clients more.

    names: the shared blocks and groups that the run has. shared_blocks: those with the newcomers, where it is known
    what they would be; None to make all tasks and find out. ValueError if a newcomer's policy has not these, or if the
    federation cannot take newcomers.
    """
    _refuse(scenario, list_newcomers(checkpoint, scenario))
    if shared_blocks is None:
        shared_blocks = FederationSetup.of(scenario).shared_blocks
    if tuple(shared_blocks.groups.names) != names.groups:
        missing = [name for name in names.blocks if name not in shared_blocks.blocks] or list(names.blocks)
        raise ValueError(
            f"{checkpoint.folder}: its clients share {', '.join(names.blocks)}; with the newcomers' policies"
            f" {', '.join(missing)} would not be the same for all: choose a task with such observations and actions"
        )
    evidence = _evidence(checkpoint, scenario, shared_blocks)
    known = {name: array for name, array in (checkpoint.shared or {}).items() if not name.startswith(EVIDENCE)}
    arrays = {**known, **({} if evidence is None else evidence_arrays(evidence))}
    return replace(checkpoint, shared=arrays, parts={**checkpoint.parts, "recorder": _note(checkpoint, scenario)})


def _refuse(scenario: Scenario, newcomers: Collection[str]) -> None:
    """ValueError for federations whose state says more of each client than a newcomer could have."""
    steered = steered_curricula(scenario)
    if new := [entry.name for entry in scenario.clients if entry.name in steered and {*entry.names} & {*newcomers}]:
        text = 'curriculum.by = "server", and the server of the run steers no levels of it'
        raise ValueError(f"client {new[0]}: {text}; leave its curriculum out, or start a new run with all clients")
    cure = "start a new run from its policies instead, with all clients and policy.start"
    if scenario.merge.rule == "clusters":
        raise ValueError(f'merge.rule = "clusters": newcomers would have no cluster; {cure}')
    if scenario.sites:
        raise ValueError(f"sites: the state of each is of the clients that it began with; {cure}")
    if scenario.round.mode == "buffered":
        raise ValueError(f'round.mode = "buffered": its order of events is of the clients that it began with; {cure}')


def list_newcomers(checkpoint: Checkpoint, scenario: Scenario) -> list[str]:
    """List the clients that the run did not have."""
    known = checkpoint.parts["recorder"]["totals"]["steps"]
    return [name for entry in scenario.clients for name in entry.names if name not in known]


def _evidence(checkpoint: Checkpoint, scenario: Scenario, shared_blocks: SharedBlocks) -> Evidence | None:
    """Make the evidence about all clients; None with merge rules that have none.

    What is known of veterans is kept where all clients are compared with each other, in one panel. With several it
    begins anew, since a run that goes on divides its clients into panels as if it began with all of them.
    """
    evidence = first_evidence(scenario.merge.rule, shared_blocks)
    if not isinstance(evidence, Evidence):
        return None
    newcomers = list_newcomers(checkpoint, scenario)
    veterans = replace(
        shared_blocks,
        clients=tuple(name for name in shared_blocks.clients if name not in newcomers),
        held_out=tuple(name for name in shared_blocks.held_out if name not in newcomers),
    )
    before = read_evidence(checkpoint, checkpoint.shared or {}, veterans)
    if isinstance(before, Evidence) and len(evidence.panels) == 1:
        evidence = with_clients(before, shared_blocks.training_clients, shared_blocks.groups)
    asked = () if scenario.merge.confirm == "evidence" else newcomers
    return _for_newcomers(evidence, checkpoint.parts["server"]["departed"], asked)


def _for_newcomers(evidence: Evidence, departed: Mapping[str, Sequence[int]], newcomers: Collection[str]) -> Evidence:
    """Let evidence know which groups clients have left, and who is to be asked what fits it."""
    panels = []
    for panel in evidence.panels:
        left = panel.departed.clone()
        for row, client in enumerate(panel.clients):
            left[row, torch.tensor(list(departed.get(client, ())), dtype=torch.int64)] = True
        is_new = torch.tensor([client in newcomers for client in panel.clients])
        panels.append(replace(panel, departed=left, newcomers=panel.newcomers | is_new))
    return Evidence(tuple(panels))


def _note(checkpoint: Checkpoint, scenario: Scenario) -> dict[str, Any]:
    """Note in the recorder's state in which round newcomers join."""
    recorder: dict[str, Any] = checkpoint.parts["recorder"]
    totals = recorder["totals"]
    joined = {**totals.get("joined", {}), **dict.fromkeys(list_newcomers(checkpoint, scenario), checkpoint.round + 1)}
    return {**recorder, "totals": {**totals, "joined": joined}}
