"""StackedLearner: what a client learns does not depend on the others, with every objective and every resumed state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.rl.update import reference_distributions
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

SMALL = """
steps = 512
rounds = 2
[policy]
hidden = [16, 16]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 4
"""
CLIENTS = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = {count}
spread = {{ length = [0.1, 0.9] }}
"""

ONE = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
"""


def scenario(text: str = SMALL, clients: str = CLIENTS.format(count=3), *overrides: str) -> Scenario:
    return Scenario.loads(f'name = "a"\n{text}\n{clients}', overrides=overrides)


def make_learner(given: Scenario) -> StackedLearner:
    (learner,) = make_learners(given)
    return learner


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_rewards_are_scaled_and_clipped_to_learn_from_and_reported_raw(advantage: str) -> None:
    """A cart gets 1 for each step: learned from are min(0.5 * 1, 0.4), min(0.25 * 1, 0.4) and 0.4."""
    overrides = ["rollout.reward_scale=0.5", "rollout.reward_clip=0.4", f"objective.advantage={advantage}"]
    given = scenario(SMALL, CLIENTS.format(count=3), *overrides, "group.size=2", "rollout.episode_limit=60")
    scales = {1: 0.25, 2: 7.0}
    tasks = [replace(task, reward_scale=scales.get(row, 0.5)) for row, task in enumerate(resolve_tasks(given))]
    learner = StackedLearner(tasks, given)
    trajectories, _ = learner.collect(np.ones(3, bool))
    learner.close()
    for row, expected in enumerate((0.4, 0.25, 0.4)):
        assert np.unique(trajectories.rewards[row][trajectories.valid[row]]) == np.float32(expected)
        assert all(episode.score == episode.length for episode in trajectories.episodes[row])


OBJECTIVES = {
    "ppo": (),
    "normalised": ("normalise.observations=true", "normalise.rewards=true"),
    "trpo": ("objective.preset=trpo",),
    "grpo": ("objective.preset=grpo", "group.size=2", "rollout.episode_limit=60", "objective.minibatches=2"),
    "normalised episodes": (
        "objective.preset=dr-grpo",
        "group.size=2",
        "rollout.episode_limit=60",
        "normalise.observations=true",
        "normalise.rewards=true",
    ),
    "similarity": ("objective.preset=rloo", "group.by=similarity", "group.clusters=2", "rollout.episode_limit=40"),
}


@pytest.mark.parametrize("overrides", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("count", [1, 64])
def test_a_client_learns_the_same_in_stacks_of_any_size(count: int, overrides: tuple[str, ...]) -> None:
    """The same task and name in a learner of 3 and of `count`: parameters, episodes and losses after a whole round."""
    given = scenario(SMALL, CLIENTS.format(count=64), *overrides)
    tasks = resolve_tasks(given)
    three, other = StackedLearner(tasks[:3], given), StackedLearner(tasks[:count] if count > 1 else tasks[1:2], given)
    first = {report.client: report for report in three.train(given.steps)}
    second = {report.client: report for report in other.train(given.steps)}
    for name in set(first) & set(second):
        a, b = three.parameters[three.names.index(name)], other.parameters[other.names.index(name)]
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
        assert first[name].steps == second[name].steps
        assert [e.score for e in first[name].episodes] == [e.score for e in second[name].episodes]
        assert first[name].losses["value_loss"] == pytest.approx(second[name].losses["value_loss"], rel=1e-3, abs=1e-6)


def test_only_the_same_seed_gives_the_same_bits() -> None:
    parameters = []
    for seed in (0, 0, 1):
        learner = make_learner(scenario(SMALL, CLIENTS.format(count=3), f"seed={seed}"))
        learner.train(512)
        parameters.append(learner.parameters)
    assert torch.equal(parameters[0], parameters[1])
    assert not torch.allclose(parameters[0], parameters[2])


def test_a_round_goes_on_where_the_last_one_stopped() -> None:
    """Two calls of 512 steps are one of 1,024: episodes, moments and streams go on."""
    given = scenario()
    twice, once = make_learner(given), make_learner(given)
    twice.train(512)
    twice.train(512)
    once.train(1024)
    torch.testing.assert_close(twice.parameters, once.parameters)


def test_steps_beyond_a_round_count_for_the_next_one() -> None:
    """128 steps a batch: 200 a round take two batches in the first round, one in the second, two in the third."""
    learner = make_learner(scenario())
    assert [learner.train(200)[0].steps for _ in range(3)] == [256, 256, 128]


def make_carts(num_envs: int, max_episode_steps: int = 30) -> gymnasium.vector.SyncVectorEnv:
    """Carts that reset themselves in the step after the last, as a vector environment only."""
    one = lambda: gymnasium.make("CartPole-v1", max_episode_steps=max_episode_steps)  # noqa: E731
    return gymnasium.vector.SyncVectorEnv([one] * num_envs)


gymnasium.register("Carts-v0", vector_entry_point=make_carts, max_episode_steps=30)


def test_reset_steps_of_one_client_do_not_affect_the_others() -> None:
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "{env}"\n' for name, env in (("v", "Carts-v0"), ("c", "CartPole-v1"))
    )
    given = scenario(SMALL, clients, "normalise.observations=true")
    tasks = resolve_tasks(given)
    together = StackedLearner(tasks, given)
    for _ in range(3):
        reports = together.train(512)
    assert reports[0].steps < reports[1].steps == 512
    for row, task in enumerate(tasks):
        alone = StackedLearner([task], given)
        for _ in range(3):
            alone.train(512)
        torch.testing.assert_close(together.parameters[row], alone.parameters[0], rtol=2e-4, atol=2e-5)


def test_clients_begin_with_equal_parameters_by_default() -> None:
    alike = make_learner(scenario())
    unlike = make_learner(scenario(SMALL, CLIENTS.format(count=3), "policy.same_start=false"))
    assert torch.equal(alike.parameters[0], alike.parameters[2])
    assert not torch.equal(unlike.parameters[0], unlike.parameters[2])


def test_clients_with_different_spaces_have_separate_learners() -> None:
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "{env}"\n'
        for name, env in (("a", "CartPole-v1"), ("b", "Pendulum-v1"), ("c", "CartPole-v1"), ("d", "Acrobot-v1"))
    )
    learners = make_learners(scenario(SMALL, clients))
    assert [learner.names for learner in learners] == [["a", "c"], ["b"], ["d"]]


def test_evaluation_is_repeatable_and_changes_nothing() -> None:
    given = scenario(SMALL, CLIENTS.format(count=2), "normalise.observations=true", "evaluate.episodes=6")
    watched, alone = make_learner(given), make_learner(given)
    first, again = watched.evaluate(), watched.evaluate()
    sampled = watched.evaluate(deterministic=False)
    watched.train(512)
    watched.evaluate()
    watched.train(512)
    alone.train(1024)
    assert torch.equal(watched.parameters, alone.parameters)
    for one, same, other in zip(first, again, sampled, strict=True):
        assert one.scores.shape == (6,)
        assert np.array_equal(one.scores, same.scores)
        assert not np.array_equal(one.scores, other.scores)


def test_an_endless_evaluation_stops_at_its_step_limit() -> None:
    clients = '[[clients]]\nname = "p"\nenv = "Pendulum-v1"\nkwargs = { max_episode_steps = -1 }\n'
    given = scenario(SMALL, clients, "evaluate.step_limit=17", "evaluate.episodes=3")
    assert make_learner(given).evaluate()[0].lengths.tolist() == [17, 17, 17]


def test_each_client_has_its_own_learning_rate_and_penalty() -> None:
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "CartPole-v1"\n{own}\n'
        for name, own in (("a", ""), ("b", "learning_rate = 1e-9"), ("c", "penalty = 1e6"))
    )
    learner = make_learner(scenario(SMALL, clients))
    start = learner.parameters.clone()
    learner.train(512)
    moved = (learner.parameters - start).abs().amax(1)
    assert moved[0] > 1e-4
    assert moved[1] < 1e-6
    assert moved[2] == 0.0


def test_a_penalty_toward_the_anchor_keeps_some_groups_exactly_there() -> None:
    given = scenario(SMALL, ONE, "penalty.weight=0.5", 'policy.groups={"torso.*"="row"}')
    learner = make_learner(given)
    start = learner.parameters.clone()
    learner.train(512)
    stack = learner.stacks[0]
    still = torch.tensor(
        [bool((learner.parameters == start)[0, stack.groups.ids == g].all()) for g in range(len(stack.groups.names))]
    )
    assert still.any()
    assert not still.all()


def test_a_missing_device_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"device = cuda:{count}: torch sees {count or 'no'} CUDA device"):
        resolve_device(f"cuda:{count}")
    assert resolve_device("cpu").type == "cpu"


def test_only_episodes_of_one_start_group_begin_alike() -> None:
    text = SMALL.replace("num_envs = 4", "num_envs = 6")
    given = scenario(text, ONE, "objective.preset=grpo", "group.size=3", "rollout.episode_limit=20")
    learner = make_learner(given)
    trajectories, groups = learner.collect(np.array([True]))
    assert groups is not None
    assert groups.tolist() == [[0, 0, 0, 1, 1, 1]]
    first = trajectories.observations[0, 0]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], first[2])
    assert not np.array_equal(first[0], first[3])
    longest = trajectories.valid[0].sum(0)
    assert (longest <= 20).all()
    assert len(trajectories.episodes[0]) == 6


def test_start_groups_are_refused_for_environments_that_reset_themselves() -> None:
    clients = ONE + '[[clients]]\nname = "v"\nenv = "Carts-v0"\n'
    grouped = ("objective.preset=grpo", "group.size=2")
    with pytest.raises(ValueError, match=r'client v: group.by = "start" needs.*Carts-v0 resets itself'):
        make_learners(scenario(SMALL, clients, *grouped))
    assert len(make_learner(scenario(SMALL, clients, *grouped, "group.by=task")).train(64)) == 2


class NanObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives NaN at the `at`-th step of an episode, and truncates the episode there if `cut`."""

    def __init__(self, env: gymnasium.Env[Any, Any], at: int, cut: bool) -> None:
        super().__init__(env)
        self.at, self.cut, self.steps = at, cut, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self.env.step(action)
        self.steps += 1
        now = self.steps == self.at
        return observation * (np.nan if now else 1), reward, False, now and self.cut, info


def nan_at_a_truncation(env: gymnasium.Env[Any, Any]) -> NanObservation:
    return NanObservation(env, 5, True)


def nan_after_a_batch(env: gymnasium.Env[Any, Any]) -> NanObservation:
    return NanObservation(env, 32, False)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (
            "nan_at_a_truncation",
            "at step 4 of this batch, entry 0 of the observation that the episode was truncated at is nan",
        ),
        ("nan_after_a_batch", "at step 32 of this batch, entry 0 of the observation is nan"),
    ],
)
def test_a_non_finite_observation_for_the_critic_alone_is_refused(wrapper: str, message: str) -> None:
    """Advantages begin with the value of this observation: if it were NaN, all of them would be."""
    clients = f'[[clients]]\nname = "c"\nenv = "Pendulum-v1"\nwrappers = ["tests.rl.test_stacked_learner:{wrapper}"]\n'
    with pytest.raises(ValueError, match=rf"client c: in env copy 0, {message}"):
        make_learner(scenario(SMALL, clients)).train(512)


def test_an_endless_task_is_refused_where_whole_episodes_are_needed() -> None:
    clients = '[[clients]]\nname = "p"\nenv = "Pendulum-v1"\nkwargs = { max_episode_steps = -1 }\n'
    with pytest.raises(ValueError, match=r"client p: Pendulum-v1 may never end.*rollout\.episode_limit"):
        make_learners(scenario(SMALL, clients, "objective.preset=grpo", "group.size=2"))


class NeverDone(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Hides every end of an episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation, _ = self.env.reset()
        return observation, reward, False, False, info


def test_rewards_of_whole_episodes_are_normalised() -> None:
    """Every step of cart-pole gives 1: unchanged in the first batch, and 1 / sqrt(variance) in the second."""
    learner = make_learner(scenario(SMALL, ONE, "objective.preset=grpo", "group.size=2", "normalise.rewards=true"))
    first, _ = learner.collect(np.array([True]))
    normaliser = learner.collector.reward_normaliser
    assert normaliser is not None
    scale = 1 / np.sqrt(normaliser.moments.variance.item())
    second, _ = learner.collect(np.array([True]))
    assert (first.rewards[first.valid] == 1).all()
    assert scale < 0.9
    np.testing.assert_allclose(second.rewards[second.valid], scale, rtol=1e-6)
    assert [episode.score for episode in first.episodes[0]] == [episode.length for episode in first.episodes[0]]


def test_an_episode_beyond_its_limit_names_the_client() -> None:
    clients = (
        ONE + '[[clients]]\nname = "b"\nenv = "CartPole-v1"\nwrappers = ["tests.rl.test_stacked_learner:NeverDone"]\n'
    )
    learner = make_learner(scenario(SMALL, clients, "objective.preset=grpo", "group.size=2"))
    with pytest.raises(ValueError, match=r"client b: an episode goes on after 500 steps.*rollout\.episode_limit"):
        learner.train(512)


def test_each_client_has_its_own_episode_limit() -> None:
    """Dr. GRPO divides by the limit: each client learns as if it were alone."""
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "CartPole-v1"\nkwargs = {{ max_episode_steps = {limit} }}\n'
        for name, limit in (("a", 60), ("b", 500), ("c", -1))
    )
    given = scenario(SMALL, clients, "objective.preset=dr-grpo", "group.size=2", "rollout.episode_limit=400")
    tasks = resolve_tasks(given)
    together = StackedLearner(tasks, given)
    together.train(512)
    assert together.max_episode_steps.tolist() == [60, 400, 400]
    for row, task in enumerate(tasks):
        alone = StackedLearner([task], given)
        alone.train(512)
        torch.testing.assert_close(together.parameters[row], alone.parameters[0], rtol=2e-4, atol=2e-5)


def test_an_average_over_total_steps_needs_an_episode_limit() -> None:
    clients = '[[clients]]\nname = "p"\nenv = "Pendulum-v1"\nkwargs = { max_episode_steps = -1 }\n'
    with pytest.raises(ValueError, match=r'client p: Pendulum-v1 may never end.*average = "total".*episode_limit'):
        make_learners(scenario(SMALL, clients, "objective.average=total"))


def test_an_entropy_group_beyond_the_action_names_the_client() -> None:
    with pytest.raises(ValueError, match=r"client cart-0: objective.entropy_groups.arm = \[3\]"):
        make_learners(scenario(SMALL, CLIENTS.format(count=2), "objective.entropy_groups={ arm = [3] }"))


def test_clients_with_unlike_spaces_share_a_torso_through_adapters() -> None:
    """Cart-pole has 4 numbers and 2 actions, Acrobot 6 and 3: the torso's blocks are alike, adapter and head not."""
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "{env}"\n' for name, env in (("a", "CartPole-v1"), ("b", "Acrobot-v1"))
    )
    given = scenario(SMALL, clients, "policy.adapter=12", 'policy.shared=["torso.*"]')
    one, two = make_learners(given)
    shared = [[(block.name, block.size) for block in learner.policy.layout.shared] for learner in (one, two)]
    assert shared[0] == shared[1] == [("torso.0", 12 * 16 + 16), ("torso.1", 16 * 16 + 16)]
    for name in ("torso.0.weight", "torso.1.weight"):
        assert torch.equal(one.client_parameters(0)[name], two.client_parameters(0)[name])
    for learner in (one, two):
        learner.train(512)
        assert torch.isfinite(learner.parameters).all()


class BoundedActor(nn.Module):
    """Actions as far as the action space goes."""

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Box) -> None:
        super().__init__()
        self.mean, self.value = nn.Linear(observation_space.shape[0], 1), nn.Linear(observation_space.shape[0], 1)
        self.reach = float(action_space.high[0])

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.reach * self.mean(observations)
        return torch.cat([mean, torch.zeros_like(mean)], -1), self.value(observations).squeeze(-1)


def doubled_actions(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.RescaleAction(env, np.array([-4.0], np.float32), np.array([4.0], np.float32))


def test_a_user_module_is_built_for_each_clients_spaces() -> None:
    """Pendulum's torque goes to 2, behind the wrapper to 4: the two clients must not use the same module."""
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "Pendulum-v1"\n{more}\n'
        for name, more in (("a", ""), ("b", 'wrappers = ["tests.rl.test_stacked_learner:doubled_actions"]'), ("c", ""))
    )
    learners = make_learners(scenario(SMALL, clients, "policy.module=tests.rl.test_stacked_learner:BoundedActor"))
    assert [learner.names for learner in learners] == [["a", "c"], ["b"]]
    assert [learner.policy.template.reach for learner in learners] == [2.0, 4.0]  # type: ignore[attr-defined]
    assert len(make_learners(scenario(SMALL, clients))) == 1


def test_a_user_module_learns_the_same_alone_and_in_a_stack() -> None:
    given = scenario(
        SMALL, CLIENTS.format(count=3), "policy.module=tests.policy.test_policy:UserNet", "policy.kwargs={ width = 9 }"
    )
    tasks = resolve_tasks(given)
    together, alone = StackedLearner(tasks, given), StackedLearner(tasks[1:2], given)
    start = together.parameters.clone()
    together.train(512)
    alone.train(512)
    torch.testing.assert_close(together.parameters[1:2], alone.parameters, rtol=2e-4, atol=2e-5)
    assert (together.parameters - start).abs().amax() > 1e-3


RESUMED = {
    "families": (CLIENTS.format(count=3), ()),
    "environments": ('[[clients]]\nname = "p"\nenv = "Pendulum-v1"\ncount = 2\n', ()),
    "unlike": (
        '[[clients]]\nname = "p"\nenv = "CartPole-v1"\n[[clients]]\nname = "f"\nenv = "grpo_fed/CartPole-v1"\n',
        ("normalise.observations=true", "normalise.rewards=true", "objective.preset=ppo-kl"),
    ),
    "noisy": (ONE + "kwargs = { sensor_noise = 0.1 }\n", ("objective.preset=trpo", "trust.adaptive_target=true")),
    "episodes": (ONE, ("objective.preset=grpo", "group.size=2", "rollout.episode_limit=60")),
}


@pytest.mark.parametrize(("clients", "overrides"), RESUMED.values(), ids=RESUMED)
def test_a_learner_goes_on_from_anothers_state_bit_for_bit(clients: str, overrides: tuple[str, ...]) -> None:
    """Three rounds in one learner, compared with one round, the state as arrays, and two more in a new learner."""
    given = scenario(SMALL, clients, *overrides)
    whole, first, second = make_learner(given), make_learner(given), make_learner(given)
    for _ in range(3):
        expected = whole.train(512)
    first.train(512)
    second.load([first.state(client) for client in range(len(first.names))])
    for _ in range(2):
        found = second.train(512)
    assert torch.equal(second.parameters, whole.parameters)
    assert [report.episodes for report in found] == [report.episodes for report in expected]
    assert str([report.losses for report in found]) == str([report.losses for report in expected])


START = ("objective.preset=grpo", "trust.reference=start", "group.size=2", "rollout.episode_limit=40")


@pytest.mark.parametrize("same_start", ["true", "false"])
def test_the_kl_is_measured_to_the_policy_that_the_run_began_with(same_start: str) -> None:
    """Also after a merge, from which `"shared"` measures."""
    given = scenario(SMALL, ONE, *START, f"policy.same_start={same_start}")
    learner = make_learner(given)
    began = learner.parameters.clone()
    learner.train(256)
    learner.parameters.add_(0.1)  # a merge
    moved = learner.parameters.clone()
    (stack,) = learner.stacks
    trajectories, _ = learner.collect(np.array([True]))
    batch = make_batch(learner.policy, stack.views, trajectories, stack.rows, critic=False)
    learner.anchor.copy_(moved)
    found = reference_distributions(stack, batch)
    observations = batch.observations.flatten(1, 2)
    expected, shared = (
        learner.policy.act(learner.policy.layout.views(parameters), observations) for parameters in (began, moved)
    )
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - shared).abs().max() > 1e-2
    to_shared = replace(stack, scenario=scenario(SMALL, ONE, *START, "trust.reference=shared"))
    found = reference_distributions(to_shared, batch)
    assert found is not None
    torch.testing.assert_close(found, shared, rtol=0, atol=1e-6)
    learner.close()


def test_a_run_with_a_server_begins_with_its_parameters_in_the_shared_columns() -> None:
    given = scenario(SMALL, ONE, *START, "policy.same_start=false")
    tasks, columns = resolve_tasks(given), torch.arange(50)
    for seeds in (None, [7]):  # those of a second, personal policy are others
        learner = StackedLearner(tasks, given, seeds, columns)
        first = learner.stacks[0].first
        assert first is not None
        assert torch.equal(first[0, :50], learner.policy.initial(given.seed)[:50])
        assert torch.equal(first[0, 50:], learner.policy.initial(client_seed(given.seed, "cart"))[50:])
        learner.close()
    without = StackedLearner(tasks, scenario(SMALL, ONE, *START, "trust.reference=shared"))
    assert without.stacks[0].first is None
    without.close()
