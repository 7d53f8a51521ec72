"""The shared policy of a run for a client that was never in it: what the server shares, acting in an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_fed.policy.make import make_policy
from grpo_fed.policy.start_values import read_server_start
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.runs.folder import read_scenario, refuse_all_links
from grpo_fed.runs.policies import LoadedPolicy, load_network
from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_tasks

NEWCOMER = "newcomer"
"""The name of the client that was never there."""
CRITIC = "critic"
"""What the names of blocks begin with that no action depends on."""


def load_shared_policy(
    folder: str | Path,
    env: str,
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] = (),
    moments_of: str | None = None,
) -> LoadedPolicy:
    """Load what a run's latest checkpoint shares as the policy of a new client with an environment.

    env, kwargs, wrappers: as in `[[clients]]`. moments_of: the client whose moments normalise observations, for a run
    with `normalise.observations`; they are not shared. ValueError if the run does not share all that actions depend on,
    or if it does not fit the environment.
    """
    folder = Path(folder)
    scenario = read_scenario(folder)
    refuse_all_links(folder)
    policy_settings = scenario.policy.model_copy(update={"start": str(folder)})
    start = read_server_start(scenario.model_copy(update={"policy": policy_settings}))
    assert start is not None, "the scenario names one"
    start = replace(start, source=str(folder))
    if any(settings.prompts is not None for settings in scenario.clients):
        raise ValueError(f"{folder}: shares adapters of a language model; merge them with grpo-fed export instead")
    entry = ClientSettings(name=NEWCOMER, env=env, kwargs=dict(kwargs or {}), wrappers=list(wrappers))
    (task,) = resolve_tasks(scenario.model_copy(update={"clients": [entry]}))
    assert isinstance(task, GymTask), "an entry with env is one of a gymnasium environment"
    policy = make_policy(task, scenario.policy)
    missing = dict.fromkeys(slot.block for slot in policy.layout.slots if slot.name not in start.arrays)
    if own := [block for block in missing if not block.startswith(CRITIC)]:
        raise ValueError(
            f"{folder}: a client that was never there has no {', '.join(own)}, which this run does not share; name a"
            " client of the run with --client, or let the newcomer join it with grpo-fed join"
        )
    parameters = start.place(policy.layout, policy.initial(scenario.seed))
    normaliser: ObservationNormaliser | None = None
    if scenario.normalise.observations:
        if moments_of is None:
            names = ", ".join(name for settings in scenario.clients for name in settings.names)
            raise ValueError(
                f"{folder}: observations are normalised by each client's own moments; name whose to take with"
                f" --moments-of, one of {names}"
            )
        veteran = load_network(folder, moments_of)
        normaliser = veteran.normaliser
        if veteran.task.observation_size != task.observation_size:
            raise ValueError(f"--moments-of {moments_of}: its observations have another size than those of {env}")
    elif moments_of is not None:
        raise ValueError(f"--moments-of {moments_of}: {folder} does not normalise observations; leave it out")
    return LoadedPolicy(scenario, task, task, policy, parameters[None], normaliser)
