"""Members: whoever else is asked, whatever process answers and however often, a client becomes the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.metrics import REPORTED
from grpo_fed.runs.policies import load_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

SMALL = """
name = "small"
rounds = 4
steps = 200
[policy]
hidden = [8, 8]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 2
learning_rate = 1e-2
[proximity]
states = 48
[evaluate]
episodes = 4
"""
CARTS = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 3
spread = { length = [0.1, 0.9] }
"""
NAMES = ("cart-0", "cart-1", "cart-2")
Kind = TypeVar("Kind", bound=Answer)


def scenario(*overrides: str, clients: str = CARTS) -> Scenario:
    return Scenario.loads(SMALL + clients, overrides=overrides)


def members(given: Scenario, folder: Path, *names: str) -> Clients:
    """Of all clients, or of some."""
    tasks = [task for task in resolve_tasks(given) if not names or task.client in names]
    return Clients(given, resolve_shared_blocks(given), tasks, StateStore(folder, durable=False))


def answers(asked: Clients, told: Mapping[str, Any], kind: type[Kind]) -> dict[str, Kind]:
    found = {name: one for name, one in asked.answer(told).items() if isinstance(one, kind)}
    assert list(found) == [name for name in asked.names if name in told]
    return found


def trained(
    asked: Clients, round: int, shared: np.ndarray, names: Sequence[str] = NAMES, personal: tuple[int, ...] = ()
) -> dict[str, Trained]:
    """A round of four, with all that can be asked of it."""
    start = Start("run", round, shared, personal)
    order = Train(start, (round - 1) / 4, round / 4, measure_last_step=True, evaluate_first=EvaluationPlan(round - 1))
    return answers(asked, dict.fromkeys(names, order), Trained)


def shared_of(round: int, size: int) -> np.ndarray:
    """Whatever a server might say, the same for all who ask."""
    return 0.3 * np.random.default_rng(round).normal(size=size).astype(np.float32)


def said(played: EvaluationSummary | None) -> dict[str, float]:
    """All of it, by name."""
    return {} if played is None else vars(played)


def assert_alike(one: Trained, other: Trained) -> None:
    """To what the order of float32 sums leaves."""
    np.testing.assert_allclose(one.point, other.point, rtol=2e-3, atol=2e-4)
    assert (one.steps, one.episodes) == (other.steps, other.episodes)
    assert (one.gain, one.spread) == pytest.approx((other.gain, other.spread), rel=1e-5, abs=1e-6)
    assert one.metrics.keys() == other.metrics.keys()
    for name in one.metrics.keys() - {"charts/seconds"}:
        assert one.metrics[name] == pytest.approx(other.metrics[name], rel=2e-3, abs=1e-4), name
    assert (one.fisher is None) == (other.fisher is None)
    if one.fisher is not None and other.fisher is not None:
        np.testing.assert_allclose(one.fisher, other.fisher, rtol=0.02, atol=1e-4)
    assert (one.kl is None) == (other.kl is None)
    assert one.kl == (None if other.kl is None else pytest.approx(other.kl, rel=5e-3, abs=1e-6))
    assert said(one.played) == said(other.played)


def assert_the_same_bits(one: Mapping[str, Trained], other: Mapping[str, Trained]) -> None:
    """But for what the clock says."""
    assert one.keys() == other.keys()
    for name, mine in one.items():
        theirs = other[name]
        assert mine.point.tobytes() == theirs.point.tobytes()
        assert (mine.fisher is None) == (theirs.fisher is None)
        assert mine.fisher is None or theirs.fisher is None or mine.fisher.tobytes() == theirs.fisher.tobytes()
        quiet = [{k: v for k, v in each.metrics.items() if k != "charts/seconds"} for each in (mine, theirs)]
        assert quiet[0] == quiet[1]
        for field in ("steps", "episodes", "gain", "spread", "kl"):
            assert getattr(mine, field) == getattr(theirs, field), field
        assert said(mine.played) == said(theirs.played)


WAYS = {
    "measured": ("normalise.observations=true", "normalise.rewards=true"),
    "quadratic": ("proximity.mode=quadratic", "trust.reference=shared", "trust.region=adaptive"),
    "ditto": ("method=ditto", "normalise.observations=true", "steps=400"),
    "fedrep": ("method=fedrep",),
    "fedprox": ("method=fedprox", "penalty.squared=1.0"),
    "trpo": ("objective.preset=trpo", "penalty.squared=1.0"),
    "episodes": ("objective.preset=grpo", "group.size=2", "rollout.episode_limit=40", "normalise.observations=true"),
}


@pytest.mark.parametrize("overrides", WAYS.values(), ids=WAYS)
def test_a_client_becomes_the_same_alone_and_among_others_who_come_and_go(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """In round 2 the last client joins, and the first is away. 200 steps a round are not whole batches of 128: those
    who were there in two rounds would do two batches in the third, and one who was there in three a single one.
    """
    given = scenario(*overrides)
    together = members(given, tmp_path / "together")
    alone = {name: members(given, tmp_path / "alone", name) for name in NAMES}
    size = together.shared_blocks.size
    for round, names in ((1, NAMES[:2]), (2, NAMES[1:]), (3, NAMES), (4, NAMES)):
        all_of_them = trained(together, round, shared_of(round, size), names)
        for name in names:
            assert_alike(all_of_them[name], trained(alone[name], round, shared_of(round, size), [name])[name])
    for asked in (together, *alone.values()):
        asked.close()


@pytest.mark.parametrize("overrides", WAYS.values(), ids=WAYS)
def test_a_round_asked_again_gives_the_same_bits_whoever_answers(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The same process, another one, or one that has long been elsewhere; and so does what follows."""
    given = scenario(*overrides)
    first, other = members(given, tmp_path), members(given, tmp_path)
    size = first.shared_blocks.size
    told = {round: shared_of(round, size) for round in (1, 2, 3)}
    trained(first, 1, told[1])
    second, left = trained(first, 2, told[2]), states(tmp_path, 2)
    third = trained(first, 3, told[3])
    assert_the_same_bits(second, trained(first, 2, told[2]))
    assert_the_same_states(left, states(tmp_path, 2))
    assert_the_same_bits(third, trained(other, 3, told[3]))
    assert_the_same_bits(second, trained(other, 2, told[2]))
    assert_the_same_bits(third, trained(first, 3, told[3]))
    first.close()
    other.close()


@pytest.mark.parametrize("overrides", WAYS.values(), ids=WAYS)
def test_a_fleet_that_took_up_a_state_has_it_whole(overrides: tuple[str, ...]) -> None:
    """One of two has not stepped yet: what it stands at is where a fleet is that has only been made."""
    given = scenario(*overrides)
    tasks = resolve_tasks(given)[:2]
    one, both = StackedLearner(tasks[:1], given), StackedLearner(tasks, given)
    one.train(200)
    both.load([one.state(0), both.state(1)])
    for name, array in one.state(0).items():
        assert both.state(0)[name].tobytes() == array.tobytes(), name
    fresh = StackedLearner(tasks[1:], given)
    np.testing.assert_array_equal(both.state(1)["parameters"], fresh.state(0)["parameters"])
    assert both.state(1)["progress"].tolist() == [0, 0, 0]
    one.load([fresh.state(0)])
    for name, array in fresh.state(0).items():
        assert one.state(0)[name].tobytes() == array.tobytes(), name
    assert one.state(0).keys() == fresh.state(0).keys()
    for fleet in (one, both, fresh):
        fleet.close()


def test_states_are_kept_of_steps_that_were_lived_alone() -> None:
    """Episodes end at unlike times, and copies sleep until the longest is over; here all states that count are kept."""
    given = scenario(*WAYS["episodes"], "proximity.states=10000")
    fleet = StackedLearner(resolve_tasks(given), given)
    for report, kept in zip(fleet.train(1), fleet.measurement_states, strict=True):
        assert len(kept) == report.steps < 4 * max(episode.length for episode in report.episodes)
    fleet.close()


def states(folder: Path, round: int) -> dict[str, dict[str, np.ndarray]]:
    return {name: load_file(folder / "run" / name / f"round-{round:04d}.safetensors") for name in NAMES}


def assert_the_same_states(one: Mapping[str, Mapping[str, np.ndarray]], other: Mapping[str, Any]) -> None:
    for client, state in one.items():
        assert state.keys() == other[client].keys()
        for name, array in state.items():
            assert array.tobytes() == other[client][name].tobytes(), f"{client}: {name}"


def test_a_member_that_shares_nothing_is_a_client_that_learns_alone(tmp_path: Path) -> None:
    """Parameters bit for bit, and what the answer says is what the fleet's reports say."""
    given = scenario("method=local", "steps=256")
    asked, fleet = members(given, tmp_path), StackedLearner(resolve_tasks(given), given)
    means: list[float] = []
    for round in (1, 2, 3):
        found = trained(asked, round, np.zeros(0, np.float32))["cart-1"]
        report = fleet.train(256, (round - 1) / 3, round / 3)[1]
        scores = [episode.score for episode in report.episodes]
        means.append(float(np.mean(scores)))
        assert found.gain == pytest.approx(means[-1] - means[-2] if round > 1 else 0.0)
        assert found.spread == pytest.approx(np.std(scores))
        assert (found.steps, found.episodes) == (256, len(scores))
        assert found.metrics.keys() <= REPORTED
        assert found.metrics["charts/episodic_return"] == means[-1]
        assert found.metrics["losses/value_loss"] == report.losses["value_loss"]
        assert found.point.shape == (0,)
        state = load_file(tmp_path / "run" / "cart-1" / f"round-{round:04d}.safetensors")
        np.testing.assert_array_equal(state["parameters"], fleet.parameters[1].numpy())
        assert state["kept"].shape == (48, 4)
        lived = {tuple(row) for row in state["kept"].tolist()}
        assert len(lived) > 40, "states are drawn without replacement"
    asked.close()
    fleet.close()


def test_whoever_is_drawn_no_environment_is_made_twice_and_no_bit_changes(tmp_path: Path) -> None:
    """Four copies for each of three clients, to train on and to play on, whatever the fleets; against new ones."""
    book = tmp_path / "book"
    clients = CARTS.replace("grpo_fed/CartPole-v1", "tests.support.failing_envs:PidLogging-v0").split("spread")[0]
    given = scenario(clients=f"{clients}kwargs = {{ pid_file = {str(book)!r} }}\n")
    asked = members(given, tmp_path / "kept")
    book.unlink(missing_ok=True)
    drawn = (NAMES[:2], NAMES[1:], NAMES[::2], NAMES[:1])
    shared = [shared_of(round, asked.shared_blocks.size) for round in range(5)]
    found = [trained(asked, round, shared[round], names) for round, names in enumerate(drawn, 1)]
    assert len(book.read_text().split()) == 2 * 3 * 4
    for round, names in enumerate(drawn, 1):
        anew = members(given, tmp_path / "anew")
        assert_the_same_bits(trained(anew, round, shared[round], names), found[round - 1])
        anew.close()
    asked.close()


STILL = ("objective.learning_rate=1e-20",)


def test_the_shared_blocks_are_put_in_place_but_for_groups_that_a_client_has_left(tmp_path: Path) -> None:
    """Nobody learns here. Who remembers nothing has nothing to keep, and takes what it is given."""
    given = scenario(*STILL)
    asked = members(given, tmp_path)
    one, two, three = (shared_of(round, asked.shared_blocks.size) for round in (1, 2, 3))
    found = trained(asked, 1, one, NAMES[:2], personal=(1,))
    np.testing.assert_allclose(found["cart-0"].point, one, rtol=0, atol=1e-12)
    mine = trained(asked, 2, two, NAMES, personal=(1,))
    left = asked.shared_blocks.columns_of_groups((1,)).numpy()
    assert 0 < left.sum() < left.size
    np.testing.assert_allclose(mine["cart-0"].point, np.where(left, one, two), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mine["cart-2"].point, two, rtol=0, atol=1e-12)
    np.testing.assert_allclose(trained(asked, 3, three)["cart-0"].point, three, rtol=0, atol=1e-12)
    asked.close()


def test_private_blocks_are_nobodys_but_the_clients(tmp_path: Path) -> None:
    given = scenario(*STILL)
    asked = members(given, tmp_path)
    trained(asked, 1, shared_of(1, asked.shared_blocks.size))
    first = make_policy(asked.tasks["cart-0"], given.policy).initial(given.seed)
    private = torch.ones(len(first), dtype=torch.bool).index_fill_(0, asked.columns, False)
    assert private.sum() > 100
    state = states(tmp_path, 1)["cart-0"]["parameters"]
    np.testing.assert_allclose(state[private.numpy()], first[private].numpy(), rtol=0, atol=1e-12)
    asked.close()


def independent_kl(asked: Clients, client: str, folder: Path, round: int, old: np.ndarray, new: np.ndarray) -> float:
    """With torch.distributions, from the file alone."""
    state = load_file(folder / "run" / client / f"round-{round:04d}.safetensors")
    policy = make_policy(asked.tasks[client], asked.scenario.policy)
    views, columns = policy.layout.views, asked.columns

    def acts(shared: np.ndarray) -> torch.distributions.Categorical:
        parameters = torch.from_numpy(state["parameters"]).clone()
        parameters[columns] = torch.from_numpy(shared)
        logits = policy.act(views(parameters[None]), torch.from_numpy(state["kept"])[None])[0]
        return torch.distributions.Categorical(logits=logits.double())

    return float(torch.distributions.kl_divergence(acts(old), acts(new)).mean())


def test_the_kl_that_a_client_measures_is_that_of_the_policies_on_its_own_states(tmp_path: Path) -> None:
    given = scenario("normalise.observations=true")
    asked = members(given, tmp_path)
    commons, (begin, candidate) = asked.shared_blocks, (shared_of(round, asked.shared_blocks.size) for round in (1, 2))
    found = trained(asked, 1, begin)
    trials = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.5), (0.25, 0.0, 0.0), (0.0, 0.0, 0.0))
    told: dict[str, Measure] = {
        name: Measure(Start("run", 1, begin, (2,) if name == "cart-0" else ()), candidate, trials) for name in NAMES
    }
    kl = answers(asked, told, Measured)
    for name in NAMES:
        kept = commons.columns_of_groups(told[name].start.departed).numpy()
        own = np.where(kept, found[name].point, begin)
        for trial, measured in zip(trials, kl[name].kl, strict=True):
            step = np.zeros_like(begin)
            for alpha, columns in zip(trial, commons.slices.values(), strict=True):
                step[columns] = alpha * (candidate - begin)[columns]
            there = np.where(kept, own, begin + step)
            expected = independent_kl(asked, name, tmp_path, 1, own, there)
            assert measured == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert kl[name].kl[3] == 0.0
        assert kl[name].kl[0] > 1e-3
    assert kl["cart-0"].kl[1] == 0.0, "a group that it has left does not move"
    few = answers(members(given, tmp_path, "cart-1"), {"cart-1": told["cart-1"]}, Measured)
    assert few["cart-1"].kl == pytest.approx(kl["cart-1"].kl, rel=1e-3, abs=1e-7)
    asked.close()


def test_a_step_that_cannot_be_measured_is_longer_than_any_budget(tmp_path: Path) -> None:
    """Parameters whose logits overflow: what goes to the server is still a number."""
    asked = members(scenario(), tmp_path)
    begin = shared_of(1, asked.shared_blocks.size)
    trained(asked, 1, begin)
    candidate = np.full_like(begin, 1e38)
    told = dict.fromkeys(NAMES, Measure(Start("run", 1, begin), candidate, ((1.0, 1.0, 1.0),)))
    for found in answers(asked, told, Measured).values():
        assert found.kl[0] > 1e30
        assert np.isfinite(found.kl[0])
    asked.close()


def test_a_client_measures_only_on_states_of_the_very_round(tmp_path: Path) -> None:
    asked = members(scenario(), tmp_path)
    begin = shared_of(1, asked.shared_blocks.size)
    trained(asked, 1, begin)
    told = {"cart-1": Measure(Start("run", 2, begin), begin, ((1.0, 1.0, 1.0),))}
    with pytest.raises(ValueError, match=r"client cart-1: it has no states of round 2.*trained that round of run"):
        asked.answer(told)


def test_a_client_looks_back_at_the_step_since_its_last_round_and_at_no_other(tmp_path: Path) -> None:
    """What it says of the step is what it would have measured of it, jointly and for each block alone."""
    asked = members(scenario(), tmp_path)
    one, two, three = (shared_of(round, asked.shared_blocks.size) for round in (1, 2, 3))
    assert trained(asked, 1, one)["cart-0"].kl is None
    trials = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    told = dict.fromkeys(NAMES, Measure(Start("run", 1, one, (1,)), two, trials))
    expected = answers(asked, told, Measured)
    found = trained(asked, 2, two, NAMES[:2], personal=(1,))
    assert found["cart-0"].kl == pytest.approx(expected["cart-0"].kl, rel=1e-5)
    assert expected["cart-0"].kl[2] == 0.0
    last = trained(asked, 3, three)
    assert last["cart-1"].kl is not None
    assert last["cart-2"].kl is None, "it was not there in round 2"
    assert last["cart-2"].gain == 0.0
    asked.close()


def test_who_is_not_asked_to_look_back_or_to_play_does_not(tmp_path: Path) -> None:
    asked = members(scenario(), tmp_path)
    begin = shared_of(1, asked.shared_blocks.size)
    for round in (1, 2):
        told = dict.fromkeys(NAMES, Train(Start("run", round, begin), 0.0, 0.5))
        found = answers(asked, told, Trained)["cart-0"]
        assert (found.kl, found.played, found.fisher) == (None, None, None)
    asked.close()


@pytest.mark.parametrize("overrides", [("normalise.observations=true",), WAYS["ditto"]], ids=["grpo", "ditto"])
def test_what_plays_is_what_is_saved_and_to_play_changes_nothing(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    given = scenario(*overrides)
    watched, unseen = members(given, tmp_path / "a"), members(given, tmp_path / "b")
    one, two, three = (shared_of(round, watched.shared_blocks.size) for round in (1, 2, 3))
    told = dict.fromkeys(NAMES, Evaluate(Start("run", 0, one), EvaluationPlan(0)))
    before = answers(watched, told, Evaluated)
    assert said(before["cart-0"].played) == said(trained(watched, 1, one)["cart-0"].played)
    trained(unseen, 1, one)
    start = Start("run", 1, two, (1,))
    played = answers(watched, dict.fromkeys(NAMES, Evaluate(start, EvaluationPlan(0))), Evaluated)
    run = tmp_path / "saved"
    run.mkdir()
    (run / SCENARIO).write_text(given.dumps())
    watched.save_policies(run, dict.fromkeys(NAMES, start))
    for name in NAMES:
        scores = load_policy(run, name).play()
        every = scores.scores
        numbers = (every.mean(), every.std(), every.min(), every.max(), 4, scores.lengths.mean())
        assert tuple(said(played[name].played).values()) == numbers
    number = answers(watched, {"cart-1": Evaluate(start, EvaluationPlan(1))}, Evaluated)["cart-1"]
    drawn = answers(watched, {"cart-1": Evaluate(start, EvaluationPlan(1, deterministic=False))}, Evaluated)["cart-1"]
    again = trained(watched, 2, two, personal=(1,))
    assert said(number.played) == said(again["cart-1"].played)
    assert said(number.played) != said(drawn.played)
    assert_the_same_bits(again, trained(unseen, 2, two, personal=(1,)))
    assert_the_same_bits(trained(watched, 3, three), trained(unseen, 3, three))
    watched.close()
    unseen.close()


def test_a_client_that_missed_rounds_plays_with_what_it_has(tmp_path: Path) -> None:
    asked = members(scenario(), tmp_path)
    one, two = (shared_of(round, asked.shared_blocks.size) for round in (1, 2))
    trained(asked, 1, one)
    trained(asked, 2, two, NAMES[:1])
    late = answers(asked, {"cart-1": Evaluate(Start("run", 2, two), EvaluationPlan(2))}, Evaluated)["cart-1"]
    asked_then = answers(asked, {"cart-1": Evaluate(Start("run", 1, two), EvaluationPlan(2))}, Evaluated)["cart-1"]
    assert said(late.played) == said(asked_then.played)
    asked.close()


def test_a_client_whose_answers_came_to_nothing_for_long_still_plays_with_what_it_has_learned(tmp_path: Path) -> None:
    """The server knows of its first round only, which it no longer remembers; its actor is its own."""
    asked = members(scenario('policy.shared=["torso.*"]', "normalise.observations=true"), tmp_path)
    one = shared_of(1, asked.shared_blocks.size)
    for round in (1, 2, 3, 4):
        trained(asked, round, one)

    def play(round: int) -> dict[str, float]:
        told = {"cart-1": Evaluate(Start("run", round, one), EvaluationPlan(4))}
        return said(answers(asked, told, Evaluated)["cart-1"].played)

    assert asked.state_store.read("run", "cart-1", 1) is None
    assert play(1) == play(2) != play(0)
    asked.close()


class Breaks(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Fails at the 40th step after a file was there, which is in the middle of a round."""

    steps = 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps = self.steps + 1 if BROKEN.exists() else 0
        if self.steps == 40:
            raise RuntimeError("the cart is broken")
        return self.env.step(action)


BROKEN = Path("never-there")
BREAKABLE = """
[[clients]]
name = "cart"
env = "CartPole-v1"
count = 2
[[clients]]
name = "weak"
env = "CartPole-v1"
wrappers = ["test_members:Breaks"]
"""


def test_who_raises_takes_nobody_along_and_is_back_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have learned from a batch by then, and go on from where the round began: alone, or all once more."""
    monkeypatch.setattr("test_members.BROKEN", tmp_path / "broken")
    given, names = scenario(clients=BREAKABLE), ("cart-0", "cart-1", "weak")
    asked, well = members(given, tmp_path / "a"), members(given, tmp_path / "b")
    one, two, three = (shared_of(round, asked.shared_blocks.size) for round in (1, 2, 3))
    for each in (asked, well):
        trained(each, 1, one, names)
    (tmp_path / "broken").touch()
    with pytest.raises(Exception, match="the cart is broken"):
        asked.answer(dict.fromkeys(names, Train(Start("run", 2, two), 0.0, 0.5)))
    assert asked.state_store.latest("run", "cart-0") == 1
    for name in names[:2]:
        assert_the_same_bits(trained(asked, 2, two, [name]), trained(well, 2, two, [name]))
    (tmp_path / "broken").unlink()
    assert_the_same_bits(trained(asked, 3, three, names), trained(well, 3, three, names))
    (tmp_path / "broken").touch()
    with pytest.raises(Exception, match="the cart is broken"):
        asked.answer(dict.fromkeys(names, Train(Start("run", 4, three), 0.0, 0.5)))
    (tmp_path / "broken").unlink()
    assert_the_same_bits(trained(asked, 4, three, names), trained(well, 4, three, names))
    asked.close()
    well.close()


def test_a_client_whose_home_is_gone_begins_anew(tmp_path: Path) -> None:
    asked, other = members(scenario(), tmp_path / "a"), members(scenario(), tmp_path / "b")
    one = shared_of(1, asked.shared_blocks.size)
    trained(asked, 1, one)
    shutil.rmtree(tmp_path / "a" / "run" / "cart-1")
    assert_the_same_bits(trained(asked, 2, one, ["cart-1"]), trained(other, 2, one, ["cart-1"]))
    asked.close()
    other.close()


def test_another_run_knows_nothing_of_the_first(tmp_path: Path) -> None:
    asked = members(scenario(), tmp_path)
    begin = shared_of(1, asked.shared_blocks.size)
    found = []
    for run in ("first", "second"):
        told = dict.fromkeys(NAMES, Train(Start(run, 1, begin), 0.0, 0.5))
        found.append(answers(asked, told, Trained))
    assert_the_same_bits(*found)
    asked.close()
