"""Episodes before and after, as GIFs: of the client that does worst in the end, and of the one that does best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grpo_fed.reports.film import WHOLE, FilmStyle, film
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.rng import client_seed
from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.policies import LoadedPolicy, load_policy

EPISODES = "episodes"


@dataclass(frozen=True)
class Filmed:
    """What there is to see."""

    paths: tuple[Path, ...]
    """`episodes/<client>-before.gif` and `-after.gif`, in this order."""
    notes: tuple[str, ...]
    """Which clients could not be drawn, and why."""


def film_episodes(folder: str | Path, clients: Sequence[str] = (), look: FilmStyle = WHOLE) -> Filmed:
    """Play one episode of the first and of the last policy, by default of the worst and of the best client.

    The same episode both times, and the first of those that the run evaluates with; those filmed earlier go.
    """
    folder = Path(folder)
    history = read_history(folder)
    home = folder / EPISODES
    home.mkdir(exist_ok=True)
    for old in home.glob("*.gif"):
        old.unlink()
    paths, notes = [], []
    for name in clients or worst_and_best(history):
        try:
            after = load_policy(folder, name)
            for when, policy in (("before", first_policy(after)), ("after", after)):
                path = home / f"{name}-{when}.gif"
                film(policy, path, look=look)
                paths.append(path)
        except ValueError as error:
            notes.append(str(error))
    return Filmed(tuple(paths), tuple(notes))


def worst_and_best(history: History) -> tuple[str, ...]:
    """By their last returns; one client where there is only one, or where all are level."""
    known = history.after if np.isfinite(history.after).any() else np.full(len(history.clients), np.nan)
    if not np.isfinite(known).any() and history.lines:
        known = history.returns[-1]
    if not np.isfinite(known).any():
        return history.clients[:1]
    chosen = int(np.nanargmin(known)), int(np.nanargmax(known))
    return tuple(dict.fromkeys(history.clients[k] for k in chosen))


def first_policy(last: LoadedPolicy) -> LoadedPolicy:
    """The same client's policy as it was before the first round."""
    scenario = last.scenario
    seed = scenario.seed if scenario.policy.same_start else client_seed(scenario.seed, last.task.client)
    size, clip = last.policy.observation_size, scenario.normalise.clip
    fresh = ObservationNormaliser(1, size, clip) if scenario.normalise.observations else None
    return replace(last, parameters=last.policy.initial(seed)[None], normaliser=fresh)
