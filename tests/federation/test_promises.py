"""What the server promises, held against real clients that learn: through the whole loop, and by other arithmetic.

Clients answer one by one, as they would from machines of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Answer, Instruction, Measure, Train, Trained
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

CARTS = """
name = "carts"
rounds = 3
steps = 128
evaluate.episodes = 1
policy = { hidden = [8], shared = ["torso.*", "actor"] }
rollout = { num_envs = 4, horizon = 32 }
objective = { epochs = 4, minibatches = 2, learning_rate = 0.01 }
[[clients]]
name = "long"
count = 2
env = "grpo_fed/CartPole-v1"
spread = { length = [0.3, 0.9] }
[[clients]]
name = "backwards"
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""


@dataclass
class Village:
    """Real clients, each of them alone at home."""

    scenario: Scenario
    folder: Path
    bytes_up: int = 0
    bytes_down: int = 0
    sent: list[tuple[str, Instruction]] = field(default_factory=list)
    trained: list[tuple[str, int, Trained]] = field(default_factory=list)
    submitted: dict[str, Instruction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commons: SharedBlocks = resolve_shared_blocks(self.scenario)
        self.home = StateStore(self.folder, durable=False)
        self.members = {
            task.client: Clients(self.scenario, self.commons, [task], self.home)
            for task in resolve_tasks(self.scenario)
        }

    def reachable(self) -> tuple[str, ...]:
        return self.commons.clients

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name in sorted(instructions):
            told = instructions[name]
            answer = self.members[name].answer({name: told})[name]
            self.sent.append((name, told))
            if isinstance(answer, Trained):
                self.trained.append((name, told.start.round, answer))
            yield name, answer

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        self.submitted |= instructions

    def collect(self, timeout: float) -> list[tuple[str, Answer | Failure]]:
        submitted, self.submitted = self.submitted, {}
        return list(self.send(submitted, timeout))

    def shared(self, number: int) -> np.ndarray:
        """[S]: what a round began with."""
        return next(
            told.start.shared for _, told in self.sent if isinstance(told, Train) and told.start.round == number
        )

    def parameters(self, run: str) -> dict[str, np.ndarray]:
        """Of every client, as it left its last round."""
        states = {name: self.home.read(run, name, self.scenario.rounds) for name in self.members}
        return {name: state.arrays["parameters"] for name, state in states.items() if state is not None}


def carts(*overrides: str, text: str = CARTS) -> Scenario:
    return Scenario.loads(text, overrides=overrides)


def run(scenario: Scenario, folder: Path) -> tuple[Federation, Village, list[RoundRecord]]:
    village = Village(scenario, folder)
    federation, notes = Federation(scenario, village.commons, village), []
    federation.run(notes.append)
    for members in village.members.values():
        members.close()
    return federation, village, notes


FEDAVG = ('merge.rule="mean"', 'proximity.mode="off"')


# FedAvg and local learning, at the ends -------------------------------------------------------------------------------


def test_averaging_is_the_weighted_mean_bit_for_bit(tmp_path: Path):
    """Sums in float64 in the order of the clients' names, one division, and then float32."""
    federation, village, _ = run(carts(*FEDAVG, 'merge.weights="episodes"'), tmp_path)
    for number in (1, 2, 3):
        replies = sorted((name, reply) for name, trained, reply in village.trained if trained == number)
        total, weight = np.zeros(village.commons.size), 0.0
        for _, reply in replies:
            total += float(reply.episodes) * reply.point.astype(np.float64)
            weight += float(reply.episodes)
        after = federation.state.shared if number == 3 else village.shared(number + 1)
        assert len(replies) == 3
        assert (after == (total / weight).astype(np.float32)).all()


@pytest.mark.parametrize(
    "limitless",
    [
        ('merge.rule="huber"', "merge.threshold=inf", 'proximity.mode="off"'),
        ('merge.rule="mean"', 'proximity.mode="measured"', "proximity.kl_block=inf", "proximity.kl_joint=inf"),
        ('merge.rule="mean"', 'proximity.mode="quadratic"', "proximity.kl_block=inf", "proximity.kl_joint=inf"),
    ],
    ids=["huber", "measured", "quadratic"],
)
def test_without_limits_everything_is_averaging_bit_for_bit(tmp_path: Path, limitless: tuple[str, ...]):
    average, _, _ = run(carts(*FEDAVG), tmp_path / "average")
    federation, _, notes = run(carts(*limitless), tmp_path / "limitless")
    assert (federation.state.shared == average.state.shared).all()
    assert all(not one.departed for note in notes for one in note.clients)


def test_with_a_threshold_of_0_everybody_learns_alone(tmp_path: Path):
    """To the same parameters, bit for bit, as where nothing is shared at all."""
    left, departed, notes = run(carts('merge.rule="huber"', "merge.threshold=0.0"), tmp_path / "left")
    alone, local, _ = run(carts("method=local"), tmp_path / "alone")
    theirs = local.parameters(alone.state.name)
    for name, parameters in departed.parameters(left.state.name).items():
        assert (parameters == theirs[name]).all()
    assert len(theirs) == 3
    everything = tuple(departed.commons.groups.names)
    assert all(one.departed == everything for note in notes[1:] for one in note.clients)
    assert (left.state.shared == left.shared_blocks.initial.numpy()).all()


@pytest.mark.parametrize("mode", ["measured", "quadratic"])
@pytest.mark.parametrize("budget", ["kl_block", "kl_joint"])
def test_a_budget_of_0_leaves_the_shared_blocks_as_they_were(tmp_path: Path, mode: str, budget: str):
    federation, _, _ = run(carts('merge.rule="mean"', f'proximity.mode="{mode}"', f"proximity.{budget}=0"), tmp_path)
    assert (federation.state.shared == federation.shared_blocks.initial.numpy()).all()


def test_a_block_with_a_budget_of_0_rests_and_the_others_move(tmp_path: Path):
    given = carts('merge.rule="mean"', 'proximity.mode="measured"', 'proximity.blocks={ "actor" = 0.0 }')
    federation, _, _ = run(given, tmp_path)
    first, shared = federation.shared_blocks.initial.numpy(), federation.state.shared
    actor, torso = federation.shared_blocks.slices["actor"], federation.shared_blocks.slices["torso.0"]
    assert (shared[actor] == first[actor]).all()
    assert (shared[torso] != first[torso]).any()


# The order of clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        ('merge.rule="huber"', 'proximity.mode="measured"'),
        ('merge.rule="fisher"', 'proximity.mode="quadratic"'),
        ('merge.rule="clusters"', 'proximity.mode="measured"'),
        ('merge.rule="krum"', 'proximity.mode="off"', "round.fraction=0.7"),
    ],
    ids=["huber", "fisher", "clusters", "krum"],
)
def test_permuting_clients_changes_nothing(tmp_path: Path, rule: tuple[str, ...]):
    head, *entries = CARTS.split("[[clients]]")
    found = []
    for number, order in enumerate(itertools.islice(itertools.permutations(entries), 2)):
        text = "[[clients]]".join([head, *order])
        federation, village, notes = run(carts(*rule, "evaluate.every=1", text=text), tmp_path / str(number))
        own = {name: array.tobytes() for name, array in sorted(village.parameters(federation.state.name).items())}
        kept = [None if note.server is None else note.server.step for note in notes]
        assert federation.result is not None
        scores = [sorted(note.scores.items()) for note in notes]
        result = sorted(federation.result.clients.items())
        found.append((federation.state.shared.tobytes(), own, kept, scores, result))
    assert village.commons.clients[0] == "backwards"
    assert found[0] == found[1]


# Budgets --------------------------------------------------------------------------------------------------------------


def measured_kl(village: Village, run: str, name: str, number: int, old: np.ndarray, new: np.ndarray) -> float:
    """KL(old, new) of one client's policy, with its own private blocks and groups, on the states that it kept.

    The network is written down here once more, and the KL is torch's.
    """
    stored = village.home.read(run, name, number)
    assert stored is not None
    state, layout = stored.arrays, village.members[name].policies.policy.layout
    columns = village.commons.columns_in(layout).numpy()
    asked = [told for client, told in village.sent if client == name and isinstance(told, Measure)]
    personal = [told.start.departed for told in asked if told.start.round == number][-1]
    keeps = village.commons.columns_of_groups(personal).numpy()

    def says(shared: np.ndarray) -> Categorical:
        flat = state["parameters"].copy()
        flat[columns] = np.where(keeps, flat[columns], shared)
        named = {slot.name: torch.tensor(flat[slot.start : slot.stop]).reshape(slot.shape) for slot in layout.slots}
        seen = torch.tensor(state["measurement_states"])
        hidden = torch.tanh(seen @ named["torso.0.weight"].T + named["torso.0.bias"])
        return Categorical(logits=(hidden @ named["actor.weight"].T + named["actor.bias"]).double())

    return float(kl_divergence(says(old), says(new)).mean())


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_no_accepted_step_exceeds_its_budgets_on_the_states_that_clients_kept(tmp_path: Path, over: str):
    budgets = (
        "proximity.kl_block=0.0005",
        "proximity.kl_joint=0.0008",
        f'proximity.over="{over}"',
        "objective.learning_rate=0.03",
    )
    given = carts('merge.rule="huber"', "merge.threshold=0.06", 'proximity.mode="measured"', *budgets)
    federation, village, notes = run(given, tmp_path)
    moves = 0
    for number in (1, 2, 3):
        server = notes[number].server
        assert server is not None
        kept = server.step
        assert kept is not None
        old, new = village.shared(number), federation.state.shared if number == 3 else village.shared(number + 1)

        def over_clients(step: np.ndarray, old: np.ndarray = old, number: int = number) -> float:
            found = [measured_kl(village, federation.state.name, name, number, old, step) for name in village.members]
            return float(np.mean(found) if over == "mean" else np.max(found))

        joint = over_clients(new)
        assert joint <= 0.0008 * (1 + 1e-4)
        assert joint == pytest.approx(kept.joint, rel=2e-3, abs=1e-7)
        for block in kept.blocks:
            alone = old.copy()
            columns = village.commons.slices[block.block]
            alone[columns] = new[columns]
            found = over_clients(alone)
            assert found <= 0.0005 * (1 + 1e-4)
            assert found == pytest.approx(block.kl, rel=2e-3, abs=1e-7)
            moves += 0 < block.alpha < 1
    assert moves >= 3  # or the budgets were no limits at all
    assert any(one.departed for note in notes for one in note.clients)  # or nothing was measured of who has left


def test_a_predicted_step_is_about_what_the_clients_find_it_to_be(tmp_path: Path):
    """By a diagonal Fisher matrix, and a policy that has moved on by then: right in its size and no more."""
    budgets = ("proximity.kl_block=0.002", "proximity.kl_joint=0.003")
    _, _, notes = run(carts('merge.rule="mean"', 'proximity.mode="quadratic"', *budgets, "rounds=4"), tmp_path)
    for before, after in itertools.pairwise(notes[1:]):
        assert before.server is not None
        assert before.server.step is not None
        assert after.server is not None
        assert before.server.step.joint is not None
        assert before.server.step.joint <= 0.003
        assert set(after.server.last_kl) == {"joint", "torso.0", "actor"}
        assert 0.1 < after.server.last_kl["joint"] / before.server.step.joint < 10


# Leaving --------------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_a_group_keeps_all_of_its_deviation(tmp_path: Path):
    """The next round begins with its own parameters there, and with the shared ones elsewhere."""
    given = carts('merge.rule="huber"', "merge.threshold=0.04", 'proximity.mode="off"', "rounds=2")
    federation, village, _ = run(given, tmp_path)
    told = {name: one.start for name, one in village.sent if isinstance(one, Train) and one.start.round == 2}
    assert {start.departed for start in told.values()} != {()}
    for name, start in told.items():
        state = village.home.read(federation.state.name, name, 1)
        assert state is not None
        members = village.members[name]
        layout = members.policies.policy.layout
        columns = village.commons.columns_in(layout).numpy()
        sent = next(reply.point for client, number, reply in village.trained if (client, number) == (name, 1))
        assert (state.arrays["parameters"][columns] == sent).all()
        keeps = village.commons.columns_of_groups(start.departed).numpy()
        members.save_policies(tmp_path, {name: replace(start, round=1)})  # as it was, with this start put in place
        arrays = load_file(tmp_path / "policies" / f"{name}.safetensors")
        begins = layout.stack([arrays])[0, columns].numpy()
        assert (begins[keeps] == sent[keeps]).all()
        assert (begins[~keeps] == start.shared[~keeps]).all()
