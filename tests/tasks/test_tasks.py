"""From the clients of a scenario to tasks: their spaces and settings, and the errors where one cannot be made."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from grpo_fed.tasks.gym import find_env_spec, make_env
from grpo_fed.tasks.task import ActionSpec, Task, TaskError
from tests.support.toy_envs import make_task, make_tasks


class SpacesEnv(gymnasium.Env[Any, Any]):
    """Has the given spaces, and nothing else."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space


BOX = spaces.Box(-1, 1, (2,))
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "start": (BOX, spaces.Discrete(3, start=5)),
    "multi": (BOX, spaces.MultiDiscrete([2, 4], start=[0, 7])),
    "grid": (BOX, spaces.MultiDiscrete([[2, 3], [4, 5]])),
    "binary": (BOX, spaces.MultiBinary(3)),
    "open": (BOX, spaces.Box(np.array([-np.inf, 0]), np.array([np.inf, 4]), dtype=np.float64)),
    "whole": (BOX, spaces.Box(0, 255, (2, 2), np.uint8)),
    "image": (spaces.Box(0, 255, (4, 5, 3), np.uint8), spaces.Discrete(2)),
    "mixed": (spaces.Dict({"a": BOX, "b": spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(4)))}), BOX),
    "text": (spaces.Text(5), BOX),
    "hidden-text": (spaces.Dict({"a": spaces.Tuple((BOX, spaces.Text(5)))}), BOX),
    "graph": (spaces.Graph(BOX, None), BOX),
    "sequence": (spaces.Sequence(BOX), BOX),
    "empty": (spaces.Box(-1, 1, (0,)), BOX),
    "text-action": (BOX, spaces.Tuple((spaces.Discrete(2), spaces.Text(3)))),
}


@pytest.fixture(autouse=True)
def spaces_envs(toy_envs: None) -> None:
    """Register an environment for each pair of spaces."""
    for name, pair in SPACES.items():
        gymnasium.register(f"toys/{name}-v0", lambda pair=pair: SpacesEnv(*pair))


# Tasks and their settings --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTask(Task):
    """A task without an environment."""

    prompts: tuple[str, ...]

    @property
    def signature(self) -> Hashable:
        return "tokens", 32000

    @property
    def description(self) -> str:
        return f"{len(self.prompts)} prompts"


def test_a_task_needs_no_environment():
    task = PromptTask(
        "writer", learning_rate=0.5, entropy=0.0, penalty=0.25, reward_scale=2.0, prompts=("2 + 2 =", "3 + 5 =")
    )
    assert (task.client, task.learning_rate, task.entropy, task.penalty) == ("writer", 0.5, 0.0, 0.25)
    assert task.reward_scale == 2.0
    assert (task.signature, task.description) == (("tokens", 32000), "2 prompts")


def test_the_record_of_a_task_does_not_import_gymnasium():
    code = "import sys, grpo_fed.tasks.task; sys.exit('gymnasium' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gym_task_is_described_by_its_environment():
    assert make_task("CartPole-v1").description == "CartPole-v1"


def test_tasks_with_equal_sizes_have_equal_signatures():
    cart, long_cart, acrobot = (
        make_task("CartPole-v1"),
        make_task("grpo_fed/CartPole-v1", kwargs={"length": 2.0}),
        make_task("Acrobot-v1"),
    )
    assert cart.signature == long_cart.signature == cart.shape.signature
    assert cart.signature != acrobot.signature


def test_spread_places_values_evenly_between_two():
    tasks = make_tasks(
        {"name": "pole", "env": "grpo_fed/CartPole-v1", "count": 5, "spread": {"length": [0.1, 0.5]}},
        {"name": "other", "env": "CartPole-v1", "kwargs": {"sutton_barto_reward": True}},
    )
    assert [task.client for task in tasks] == ["pole-0", "pole-1", "pole-2", "pole-3", "pole-4", "other"]
    assert [task.kwargs for task in tasks[:5]] == [{"length": length} for length in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert tasks[5].kwargs == {"sutton_barto_reward": True}


def test_a_clients_settings_replace_those_of_the_scenario():
    client_settings = {"learning_rate": 0.5, "entropy": -0.25, "penalty": 0.0}
    special, ordinary = make_tasks(
        {"name": "special", "env": "CartPole-v1", **client_settings},
        {"name": "ordinary", "env": "CartPole-v1"},
        objective={"learning_rate": 0.125, "entropy": 0.01},
        penalty={"weight": 0.75},
    )
    assert (special.learning_rate, special.entropy, special.penalty) == (0.5, -0.25, 0.0)
    assert (ordinary.learning_rate, ordinary.entropy, ordinary.penalty) == (0.125, 0.01, 0.75)


@pytest.mark.parametrize(
    ("env", "size", "action"),
    [
        ("CartPole-v1", 4, ActionSpec("categorical", (2,), (0,))),
        ("Pendulum-v1", 3, ActionSpec("gaussian", (1,), (), (-2.0,), (2.0,))),
        ("FrozenLake-v1", 16, ActionSpec("categorical", (4,), (0,))),
        ("Blackjack-v1", 32 + 11 + 2, ActionSpec("categorical", (2,), (0,))),
        ("grpo_fed/RandomMDP-v0", 6, ActionSpec("categorical", (3,), (0,))),
        ("toys/start-v0", 2, ActionSpec("categorical", (3,), (5,))),
        ("toys/multi-v0", 2, ActionSpec("multi-categorical", (2, 4), (0, 7))),
        ("toys/grid-v0", 2, ActionSpec("multi-categorical", (2, 3, 4, 5), (0, 0, 0, 0))),
        ("toys/binary-v0", 2, ActionSpec("multi-categorical", (2, 2, 2), (0, 0, 0))),
        ("toys/open-v0", 2, ActionSpec("gaussian", (2,), (), (-np.inf, 0.0), (np.inf, 4.0))),
        ("toys/whole-v0", 2, ActionSpec("gaussian", (4,), (), (0.0,) * 4, (255.0,) * 4)),
        ("toys/image-v0", 60, ActionSpec("categorical", (2,), (0,))),
        ("toys/mixed-v0", 2 + 3 + 4, ActionSpec("gaussian", (2,), (), (-1.0, -1.0), (1.0, 1.0))),
    ],
)
def test_a_task_has_the_sizes_of_its_spaces(env: str, size: int, action: ActionSpec):
    task = make_task(env)
    assert (task.observation_size, task.action) == (size, action)
    assert task.signature == (size, action.kind, action.sizes, *task.picture)


def test_an_action_has_an_entry_for_each_choice_or_number():
    assert [make_task(f"toys/{name}-v0").action.size for name in ("start", "grid", "whole")] == [1, 4, 4]


def test_kwargs_may_replace_the_registered_step_limit():
    limits = [{}, {"max_episode_steps": 7}, {"max_episode_steps": -1}]
    tasks = make_tasks(*({"name": f"c{n}", "env": "CartPole-v1", "kwargs": kwargs} for n, kwargs in enumerate(limits)))
    assert [(task.episode_limit, dict(task.kwargs)) for task in tasks] == [(500, {}), (7, {}), (0, {})]
    assert "TimeLimit" in str(make_env(tasks[1]))
    assert str(make_env(tasks[0], lean=True)) == "<CartPoleEnv<CartPole-v1>>"


def make_pendulum(limit: int = 0, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Make an environment as a function of a user does, without registering it."""
    made: gymnasium.Env[Any, Any] = gymnasium.make("Pendulum-v1", max_episode_steps=limit or None)
    return made


def test_a_function_that_makes_an_environment_needs_no_registration():
    task = make_task(f"{__name__}:make_pendulum", kwargs={"limit": 7, "max_episode_steps": 3})
    assert (task.observation_size, task.episode_limit) == (3, 3)
    env = make_env(task)
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match=r"make_pendulum: cannot be made with kwargs = .*limt: did you mean limit"):
        make_task(f"{__name__}:make_pendulum", kwargs={"limt": 7})
    with pytest.raises(ValueError, match="no such task is registered"):
        make_task(f"{__name__}:make_nothing")


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
def test_a_wrapper_takes_arguments():
    """Actions from -1 to 1 are stretched to -2 to 2, and observations of two steps are shown at once."""
    rescale = {"path": "gymnasium.wrappers:RescaleAction", "kwargs": {"min_action": -1.0, "max_action": 1.0}}
    stack = {"path": "gymnasium.wrappers:FrameStackObservation", "kwargs": {"stack_size": 2}}
    task = make_task("Pendulum-v1", wrappers=[rescale, stack, "gymnasium.wrappers:FlattenObservation"])
    assert (task.action.low, task.action.high, task.observation_size) == ((-1.0,), (1.0,), 6)
    assert list(map(str, task.wrappers)) == [
        "gymnasium.wrappers:RescaleAction(min_action=-1.0, max_action=1.0)",
        "gymnasium.wrappers:FrameStackObservation(stack_size=2)",
        "gymnasium.wrappers:FlattenObservation",
    ]
    wrong = {"path": "gymnasium.wrappers:FrameStackObservation", "kwargs": {"size": 2}}
    with pytest.raises(ValueError, match=r"FrameStackObservation with kwargs = {'size': 2}: TypeError: .*'size'"):
        make_task("Pendulum-v1", wrappers=[wrong])


# Finding and wrapping environments -----------------------------------------------------------------------------------


def test_a_module_before_the_id_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "import gymnasium\ngymnasium.register('mine/Cart-v3', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    (tmp_path / "my_envs.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    assert make_task("my_envs:mine/Cart-v3").observation_size == 4
    assert make_task("mine/Cart-v3").episode_limit == 0


def test_an_id_without_a_version_means_the_latest():
    assert find_env_spec(make_task("CartPole")).id == "CartPole-v1"


def test_wrappers_are_applied_innermost_first():
    wrappers = ["gymnasium.wrappers:TimeAwareObservation", f"{__name__}:DoubledObservation"]
    task = make_task("CartPole-v1", wrappers=wrappers)
    assert task.observation_size == 10
    env = make_env(task, lean=True)
    assert str(env).startswith("<DoubledObservation<TimeAwareObservation<TimeLimit<")
    seen, _ = env.reset(seed=0)
    np.testing.assert_array_equal(seen[:5], seen[5:])


class DoubledObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Repeats every observation within itself."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        inner = env.observation_space
        assert isinstance(inner, spaces.Box)
        self.observation_space = spaces.Box(np.tile(inner.low, 2), np.tile(inner.high, 2), dtype=np.float64)

    def observation(self, observation: Any) -> Any:
        return np.tile(observation, 2)


def no_wrapper(env: Any) -> int:
    return 1


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (
            {"env": "CartPoel-v1"},
            "client toy: env = 'CartPoel-v1': no such task is registered; did you mean CartPole-v1",
        ),
        ({"env": "cartpole-v1"}, "did you mean CartPole-v1"),
        ({"env": "CartPole-v7"}, "no such task is registered; did you mean CartPole-v1"),
        ({"env": "ALE/Breakout-v5"}, "put the package before it: my_package:ALE/Breakout-v5"),
        ({"env": "no_such_module:Maze-v0"}, "no_such_module cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        (
            {"env": "Pendulum-v1", "kwargs": {"gg": 9.0}},
            r"cannot be made with kwargs = {'gg': 9.0}.*gg: did you mean g\?",
        ),
        ({"env": "CartPole-v1", "kwargs": {"wind": 9.0}}, "it takes sutton_barto_reward"),
        ({"env": "grpo_fed/CartPole-v1", "kwargs": {"lenght": 1.0}}, 'client toy: .*lenght.*did you mean "length"'),
        ({"env": "CartPole-v1", "kwargs": {"max_episode_steps": 0}}, "kwargs.max_episode_steps = 0: must be 1 or more"),
        (
            {"env": "CartPole-v1", "wrappers": ["gymnasium.wrappers:NoSuch"]},
            "wrappers: gymnasium.wrappers:NoSuch: cannot be imported: Attri",
        ),
        ({"env": "CartPole-v1", "wrappers": [f"{__name__}:no_wrapper"]}, "makes int, which is no gymnasium.Env"),
        (
            {"env": "toys/text-v0"},
            r"client toy: toys/text-v0: observations from Text\(.*are no fixed number of numbers",
        ),
        ({"env": "toys/hidden-text-v0"}, r"observations from Text\("),
        ({"env": "toys/graph-v0"}, r"observations from Graph\("),
        ({"env": "toys/sequence-v0"}, r"observations from Sequence\("),
        ({"env": "toys/empty-v0"}, r"observations from Box\("),
        ({"env": "toys/text-action-v0"}, r"no policy has actions for Text\(.*wrapper"),
    ],
)
def test_an_impossible_task_is_refused_with_a_cure(client: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_task(**client)


def test_every_mistake_is_listed_once():
    with pytest.raises(ValueError, match=r"client a-0: .*\nclient c: ") as raised:
        make_tasks(
            {"name": "a", "env": "CartPole-v1", "count": 3, "kwargs": {"wind": 1}},
            {"name": "b", "env": "CartPole-v1"},
            {"name": "c", "env": "Nothing-v1"},
        )
    assert len(str(raised.value).splitlines()) == 2


def test_a_missing_package_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    with pytest.raises(ValueError, match=r"LunarLander-v3: needs a package .*pip install 'gymnasium\[box2d\]"):
        make_task("LunarLander-v3")


def test_an_environment_that_exists_only_vectorised_cannot_be_wrapped():
    gymnasium.register("toys/vector-v0", vector_entry_point="gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv")
    assert make_task("toys/vector-v0").signature == (4, "categorical", (2,))
    with pytest.raises(ValueError, match="a vector environment only, and wrappers need a single environment"):
        make_task("toys/vector-v0", wrappers=["gymnasium.wrappers:TimeAwareObservation"])


def test_a_task_error_can_be_sent_between_processes():
    error = copy.copy(TaskError("cart", "CartPole-v1", "step failed"))
    assert (error.client, error.env) == ("cart", "CartPole-v1")
    assert str(error) == "client cart: CartPole-v1: step failed"
