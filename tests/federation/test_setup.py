"""A scenario's tasks are resolved once: an environment is made for each entry of `[[clients]]`, and none after that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.workers.handler import clients_factory
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks


class CountedCartPole(CartPoleEnv):
    """Counts how often it is made in this process."""

    made = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        CountedCartPole.made += 1


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Register the environment, and count from 0."""
    gymnasium.register("test/Counted-v0", f"{__name__}:CountedCartPole", max_episode_steps=20)
    CountedCartPole.made = 0
    yield
    del gymnasium.registry["test/Counted-v0"]


def scenario_of(**settings: Any) -> Scenario:
    entry = {"env": "test/Counted-v0"}
    plain: dict[str, Any] = {
        "name": "counted",
        "method": "grpo",
        "rounds": 2,
        "steps": 64,
        "policy": {"hidden": [4]},
        "rollout": {"num_envs": 2, "horizon": 32},
        "objective": {"epochs": 1, "minibatches": 1},
        "evaluate": {"episodes": 1},
        "clients": [{"name": "left", "count": 2, **entry}, {"name": "right", **entry}],
    }
    return Scenario.model_validate(plain | settings)


def test_a_setup_holds_the_tasks_their_groups_and_the_shared_blocks() -> None:
    pendulum = {"name": "pole", "env": "grpo_fed/Pendulum-v1"}
    clients = [{"name": "left", "env": "test/Counted-v0"}, pendulum, {"name": "right", "env": "test/Counted-v0"}]
    scenario = scenario_of(clients=clients, policy={"hidden": [4], "shared": ["*"]})
    setup = FederationSetup.of(scenario)
    assert CountedCartPole.made == 2
    assert setup.clients == tuple(setup.tasks) == ("left", "pole", "right")
    assert [[task.client for task in tasks] for tasks in setup.tasks_by_policy] == [["left", "right"], ["pole"]]
    assert setup.shared_blocks.digest == resolve_shared_blocks(scenario).digest
    assert list(setup.tasks.values()) == resolve_tasks(scenario)


def test_a_local_run_resolves_its_tasks_once(tmp_path: Path) -> None:
    with LocalEngine(scenario_of(), workers=0) as engine:
        assert CountedCartPole.made == 2  # one for each entry of [[clients]]
        engine.run()
    without_folder, CountedCartPole.made = CountedCartPole.made, 0
    with LocalEngine(scenario_of(), tmp_path / "run", workers=0) as engine:
        engine.run()
    assert CountedCartPole.made == without_folder  # saving policies needs no environment
    clients, num_envs = 3, 2
    assert CountedCartPole.made == 2 + 2 * clients * num_envs  # to resolve, and to train and to evaluate


def test_explaining_a_scenario_resolves_its_tasks_once() -> None:
    explain_scenario(scenario_of())
    assert CountedCartPole.made == 2


def test_a_worker_resolves_its_tasks_once_for_all_chunks(tmp_path: Path) -> None:
    factory = clients_factory(FederationSetup.of(scenario_of()), StateStore(tmp_path, durable=False))
    CountedCartPole.made = 0
    for names in (["left-0", "left-1"], ["right"]):
        clients = factory(names)
        clients.close()
    assert CountedCartPole.made == 2
