"""The server steers the levels of its clients: it pools what their returns say, and knows nothing else of them.

With `curriculum.by = "server"` the clients of an entry have one curriculum. Its state travels with the instruction to
train, and a client answers with its evidence (tasks/curriculum.py): counts of episodes, and sums of their returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from grpo_fed.federation.messages import Trained
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.curriculum import Curriculum, advance, first_state

CurriculumStates: TypeAlias = Mapping[str, tuple[float, ...]]
"""What the server knows of each curriculum that it steers, by the name of the entry."""


def steered_curricula(scenario: Scenario) -> dict[str, Curriculum]:
    """List the curricula that the server steers, by the name of their entry."""
    if scenario.curriculum.by != "server":
        return {}
    curricula = {
        entry.name: Curriculum(entry.curriculum)
        for entry in scenario.clients
        if entry.trains and entry.curriculum is not None
    }
    return {name: curriculum for name, curriculum in curricula.items() if curriculum.slots}


def first_states(scenario: Scenario) -> dict[str, tuple[float, ...]]:
    """Make the states of the steered curricula before the first round."""
    return {name: tuple(first_state(each).tolist()) for name, each in steered_curricula(scenario).items()}


def states_of_clients(scenario: Scenario, states: CurriculumStates) -> dict[str, tuple[float, ...]]:
    """Find the state that each steered client is sent."""
    return {name: states[entry.name] for entry in scenario.clients if entry.name in states for name in entry.names}


def steer(scenario: Scenario, states: CurriculumStates, replies: Mapping[str, Trained]) -> dict[str, tuple[float, ...]]:
    """Move the steered curricula by the evidence of a round's answers, added up in the order of the clients."""
    moved = dict(states)
    for name, curriculum in steered_curricula(scenario).items():
        (entry,) = (entry for entry in scenario.clients if entry.name == name)
        evidence = np.zeros((2, curriculum.slots))
        for client in entry.names:
            if client in replies:
                evidence += np.array(replies[client].evidence).reshape(2, -1)
        moved[name] = tuple(advance(curriculum, np.array(states[name]), evidence).tolist())
    return moved
