"""Episodes of a run before and after training, as GIFs: of the clients with the lowest and the highest return."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grpo_fed.reports.film import LONG, FilmStyle, film
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.start import client_starts, first_parameters, load_first_moments, place_starts
from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.played_levels import PlayedLevels, reached_levels
from grpo_fed.runs.policies import LoadedPolicy, load_network

EPISODES = "episodes"
"""The folder of films in a run's folder."""


@dataclass(frozen=True)
class FilmedEpisodes:
    """The films of a run."""

    paths: tuple[Path, ...]
    """`episodes/<client>-before.gif` and `-after.gif` of each client, in this order."""
    problems: tuple[str, ...]
    """Clients that could not be filmed, and why."""


def film_episodes(folder: str | Path, clients: Sequence[str] = (), style: FilmStyle = LONG) -> FilmedEpisodes:
    """Film one episode of each client with its first policy, and the same episode with its last policy.

    It is the first episode of the run's own evaluations, in the first and in the last task of a client whose task
    changed, and at the middle of the levels that it has reached, if its task has levels. Films of an earlier call are
    removed. Clients with prompts are left out.

    clients: by default those with the lowest and the highest return.
    """
    folder = Path(folder)
    history = read_history(folder)
    target = folder / EPISODES
    chosen = filmed_clients(history, clients)
    if chosen:
        target.mkdir(exist_ok=True)
    for old in target.glob("*.gif"):
        old.unlink()
    paths, problems = [], []
    for name in chosen:
        try:
            last = load_network(folder, name)
            levels = client_levels(history, name)
            level = None if levels is None else levels.middle
            for when, policy in (("before", first_policy(last)), ("after", last)):
                path = target / f"{name}-{when}.gif"
                film(policy, path, style=style, level=level)
                paths.append(path)
        except ValueError as error:
            problems.append(str(error))
    return FilmedEpisodes(tuple(paths), tuple(problems))


def client_levels(history: History, client: str) -> PlayedLevels | None:
    """Return the levels that a client has reached; None for a task without levels."""
    return reached_levels(history.scenario, client, history.lines[-1] if history.lines else None)


def filmed_clients(history: History, clients: Sequence[str] = ()) -> tuple[str, ...]:
    """Choose the clients that are filmed: of these, or the worst and the best, those that have an environment."""
    answering = {name for entry in history.scenario.clients if entry.prompts is not None for name in entry.names}
    if not clients:
        return worst_and_best(history, answering)
    return tuple(name for name in clients if name not in answering)


def worst_and_best(history: History, without: Collection[str] = ()) -> tuple[str, ...]:
    """Choose the clients with the lowest and the highest return; one client if there is only one or all are equal.

    without: clients that are not chosen.
    """
    known = [name not in without for name in history.clients]
    if not any(known):
        return ()
    returns = np.where(known, history.after, np.nan)
    if not np.isfinite(returns).any() and history.lines:
        returns = np.where(known, history.returns[-1], np.nan)
    if not np.isfinite(returns).any():
        return (history.clients[known.index(True)],)
    chosen = int(np.nanargmin(returns)), int(np.nanargmax(returns))
    return tuple(dict.fromkeys(history.clients[k] for k in chosen))


def first_policy(last: LoadedPolicy) -> LoadedPolicy:
    """Rebuild the policy that a client had before the first round, with the task that it had then."""
    scenario = last.scenario
    client, policy = last.task.client, last.policy
    starts = client_starts(scenario, [client], policy)
    first = first_parameters(policy, scenario, [client_seed(scenario.seed, client)])
    normaliser = None
    if scenario.normalise.observations:
        normaliser = ObservationNormaliser(1, policy.observation_size, scenario.normalise.clip)
        load_first_moments(normaliser, {0: starts[0]})
    parameters = place_starts(policy, first, starts)
    return replace(last, task=last.first_task, parameters=parameters, normaliser=normaliser)
