"""What policies begin with, from files of another run, and blocks that do not learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from grpo_fed.engines.alone import train
from grpo_fed.engines.start import run
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.policy.start_values import read_client_start, read_server_start
from grpo_fed.reports.episodes import first_policy
from grpo_fed.rl.make import make_client_policies, make_learners
from grpo_fed.runs.policies import load_network
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.tasks.resolve import resolve_gym_tasks
from tests.support.small_federation import TINY
from tests.support.small_language import WORDS

NORMALISED = "normalise.observations=true"


def tiny(*overrides: str) -> Scenario:
    return Scenario.loads(TINY, overrides=["rounds=1", "proximity.mode=off", "merge.rule=mean", *overrides])


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    run(tiny(NORMALISED, "seed=8"), folder, workers=0)
    return folder


def policy_file(folder: Path, client: str) -> dict[str, np.ndarray]:
    return load_file(folder / "policies" / f"{client}.safetensors")


def checkpoint(folder: Path, round: int = 1) -> dict[str, np.ndarray]:
    return load_file(folder / "checkpoints" / f"round-{round:04d}" / "shared.safetensors")


def test_a_run_that_starts_from_another_plays_first_what_the_other_played_last(first_run: Path, tmp_path: Path):
    """All blocks and the normalisers: with the episodes of the same round, the returns are the same to the digit."""
    given = tiny(NORMALISED, f"policy.start={first_run}", "seed=8", "policy.same_start=false")
    setup = FederationSetup.of(given)
    shared = checkpoint(first_run)
    for slot in setup.shared_blocks.layout.slots:
        values = setup.shared_blocks.initial[slot.start : slot.stop].numpy()
        np.testing.assert_array_equal(values, shared[slot.name].reshape(-1))
    policies = make_client_policies(resolve_gym_tasks(given), given, setup.shared_blocks)
    names = list(setup.clients)
    parameters = policies.parameters(names, [None] * 3)
    for name, row in zip(names, parameters, strict=True):
        file = policy_file(first_run, name)
        for slot_name, value in policies.policy.layout.views(row).items():
            np.testing.assert_array_equal(value.numpy(), file[slot_name])
    (played,) = policies.evaluate(["bee"], parameters[1:2], [None], 0, deterministic=True)
    assert played.score == load_network(first_run, "bee").play().score
    policies.close()


def test_a_client_may_start_from_a_file_of_its_own(first_run: Path, tmp_path: Path):
    save_file({"actor.bias": np.array([3.0, -3.0], np.float32)}, tmp_path / "own.safetensors")
    given = tiny("policy.shared=[]", f"clients.bee.start={tmp_path}/own.safetensors")
    (learner,) = make_learners(given)
    first = {name: learner.client_parameters(row) for row, name in enumerate(learner.names)}
    learner.close()
    assert first["bee"]["actor.bias"].tolist() == [3.0, -3.0]
    assert first["ant"]["actor.bias"].tolist() == [0.0, 0.0]
    assert torch.equal(first["ant"]["actor.weight"], first["bee"]["actor.weight"])


def test_shared_blocks_are_the_servers_whatever_a_client_starts_from(first_run: Path, tmp_path: Path):
    save_file({"actor.bias": np.array([3.0, -3.0], np.float32)}, tmp_path / "own.safetensors")
    given = tiny(f"clients.bee.start={tmp_path}/own.safetensors")
    assert not resolve_shared_blocks(given).initial[-2:].any()
    assert read_server_start(given) is None


def test_a_checkpoint_gives_the_shared_blocks_alone(first_run: Path):
    start = read_client_start(tiny(f"policy.start={first_run}/checkpoints/round-0001"), "ant")
    assert start is not None
    assert start.arrays.keys() == checkpoint(first_run).keys()
    assert not start.moments


def test_the_kl_to_the_start_is_measured_to_the_file(first_run: Path):
    """`trust.reference = "start"` refers to the policy of the file: its KL is 0 before the first update."""
    given = tiny(
        NORMALISED, f"policy.start={first_run}", "trust.region=penalty", "trust.reference=start", "policy.shared=[]"
    )
    (learner,) = make_learners(given)
    (stack,) = learner.stacks
    assert stack.first is not None
    assert torch.equal(stack.first, learner.parameters)
    file = policy_file(first_run, "ant")
    np.testing.assert_array_equal(learner.client_parameters(0)["actor.weight"].numpy(), file["actor.weight"])
    learner.close()


def test_the_film_before_training_shows_the_start(first_run: Path, tmp_path: Path):
    train(tiny(NORMALISED, f"policy.start={first_run}", "policy.shared=[]"), tmp_path / "second")
    first = first_policy(load_network(tmp_path / "second", "cat"))
    file = policy_file(first_run, "cat")
    np.testing.assert_array_equal(
        first.policy.layout.views(first.parameters[0])["actor.weight"].numpy(), file["actor.weight"]
    )
    assert first.normaliser is not None
    np.testing.assert_array_equal(first.normaliser.state(0)["mean"], file["normaliser:mean"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.start=nowhere"], 'policy.start = "nowhere": there is no such file or folder on this machine'),
        (["policy.start={run}", "policy.hidden=[9]"], r"torso\.0\.weight is float32 of shape \(8, 4\)"),
        (["policy.start={run}"], "set normalise.observations = true"),
        (["policy.start={run}/scenario.toml"], "cannot be read as .safetensors"),
        (["policy.start={other}"], "has no parameter of this policy, such as torso.0.weight"),
        (["policy.start={nan}"], "actor.bias is not finite"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_a_cure(
    first_run: Path, tmp_path: Path, overrides: list[str], message: str
):
    save_file({"other": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    save_file({"actor.bias": np.array([np.nan, 0], np.float32)}, tmp_path / "nan.safetensors")
    places = {"run": first_run, **{name: tmp_path / f"{name}.safetensors" for name in ("other", "nan")}}
    given = tiny(*(each.format(**places) for each in overrides))
    with pytest.raises(ValueError, match=message):
        first_parameters_of(given)


def first_parameters_of(given: Scenario) -> None:
    setup = FederationSetup.of(given)
    make_client_policies(resolve_gym_tasks(given), given, setup.shared_blocks).parameters(["ant"], [None])


def test_a_damaged_checkpoint_is_no_start(first_run: Path, tmp_path: Path):
    folder = tmp_path / "round-0001"
    folder.mkdir()
    save_file({"actor.bias": np.zeros(2, np.float32)}, folder / "shared.safetensors")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  shared.safetensors\n")
    with pytest.raises(ValueError, match="does not have the SHA-256 that is in SHA256SUMS"):
        resolve_shared_blocks(tiny(f"policy.start={folder}"))


def test_clients_with_prompts_start_from_their_model():
    with pytest.raises(ScenarioError, match=r"starts from language\.model.*export --merge"):
        Scenario.loads(WORDS, overrides=["policy.start=runs/words"])


# Frozen blocks -------------------------------------------------------------------------------------------------------


OBJECTIVES = {
    "adam": (),
    "penalised": ("penalty.weight=0.5", "penalty.toward=zero", "penalty.step=decoupled", "penalty.squared=0.1"),
    "natural": ("objective.preset=trpo",),
    "group": ("objective.preset=grpo", "group.size=2", "rollout.episode_limit=30"),
    "ditto": ("personal.model=true",),
}


def learned(folder: Path, *overrides: str) -> tuple[Result, dict[str, np.ndarray]]:
    result = run(tiny("steps=128", "policy.shared=['*']", *overrides), folder, workers=0)
    return result, policy_file(folder, "bee")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_frozen_blocks_stay_as_they_begin_and_are_not_sent(objective: str, tmp_path: Path):
    """No bit of the torso and of the critic changes; what is sent becomes smaller by these blocks."""
    frozen, free = ("torso.*", "critic"), OBJECTIVES[objective]
    result, after = learned(tmp_path / "frozen", "policy.freeze=['torso.*', 'critic']", *free)
    whole, moved = learned(tmp_path / "free", *free)
    given = tiny("policy.shared=['*']")
    policy = make_policy(resolve_gym_tasks(given)[0], given.policy)
    before = policy.layout.views(policy.initial(given.seed))
    for slot in policy.layout.slots:
        is_frozen = any(slot.block == name or slot.block.startswith("torso") for name in frozen)
        assert np.array_equal(after[slot.name], before[slot.name].numpy()) == is_frozen, slot.name
        if slot.name.endswith("weight") and objective != "group":
            assert not np.array_equal(moved[slot.name], before[slot.name].numpy())
    assert set(checkpoint(tmp_path / "frozen")) == {"actor.weight", "actor.bias"}
    if objective == "adam":
        torso, critic = 4 * 8 + 8, 4 * 8 + 8 + 8 + 1
        assert whole.bytes_up - result.bytes_up == 3 * 4 * (torso + critic)
    assert result.bytes_up < whole.bytes_up


def test_a_frozen_adapter_of_a_language_model_stays_as_it_begins():
    given = Scenario.loads(WORDS, overrides=["policy.freeze=['layers.0']", "language.show=0"])
    learner = make_learners(given)[0]
    learner.train(given.steps)
    for block in learner.policy.layout.blocks:
        assert bool(learner.parameters[:, block.start : block.stop].any()) == (block.name != "layers.0")
    learner.close()


def test_something_has_to_learn():
    with pytest.raises(ValueError, match=r"policy\.freeze: .* leaves no block that learns"):
        resolve_shared_blocks(tiny("policy.freeze=['*']"))
    given = tiny("policy.freeze=['torso.*', 'actor']", "objective.preset=trpo", "policy.shared=[]")
    with pytest.raises(ValueError, match=r"policy\.freeze leaves no parameter of the policy"):
        make_learners(given)
