"""Attacks that a scenario names: what the server is sent, on which engines, and that a robust rule tolerates them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

import grpo_fed
from grpo_fed.aggregation.attacks import COLLUDING
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.wire import Codec
from grpo_fed.federation.hostile import ClientAttack, ColludingTransport, attacks_of, lie
from grpo_fed.federation.messages import Answer, Evaluated, EvaluationSummary, Measure, Measured, Start, Train, Trained
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ATTACKS_WITH_STRENGTH, COLLUDING_ATTACKS, ClientSettings
from grpo_fed.scenario.toml.source import ScenarioError
from tests.support.numeric_clients import BASE, NumericTransport, numeric_scenario

ATTACKS = [name for name in get_args(ClientSettings.model_fields["attack"].annotation) if name != "none"]
OF_TASKS = ("negated-reward", "random-action")
ALONE = [name for name in ATTACKS if name not in (*COLLUDING, *OF_TASKS)]


def hostile_scenario(attack: str, *overrides: str, hostile: int = 2, honest: int = 5) -> Scenario:
    text = f'{BASE}[[clients]]\nname = "c"\ncount = {honest}\nenv = "grpo_fed/CartPole-v1"\n'
    text += f'[[clients]]\nname = "x"\ncount = {hostile}\nenv = "grpo_fed/CartPole-v1"\nattack = "{attack}"\n'
    return Scenario.loads(text, overrides=overrides)


def answer_of(attack: str, round: int = 3, **settings: float) -> tuple[SharedBlocks, Trained, Trained, Train]:
    """Return a client's honest answer to `Train`, and the hostile one, with its instruction."""
    scenario = numeric_scenario('proximity.mode="quadratic"')
    shared_blocks = resolve_shared_blocks(scenario)
    train = Train(Start("run", round, np.full(shared_blocks.size, 0.5, np.float32)), 0.0, 0.5)
    honest = NumericTransport(shared_blocks)._answer("c-0", train)
    forged = lie("c-0", train, honest, ClientAttack(attack, settings.get("strength")), scenario)
    assert isinstance(honest, Trained)
    assert isinstance(forged, Trained)
    return shared_blocks, honest, forged, train


def test_every_attack_is_either_alone_together_or_of_a_task() -> None:
    assert {*COLLUDING} <= {*ATTACKS}
    assert {*ATTACKS_WITH_STRENGTH} <= {*ATTACKS}
    assert {name for name, attack in attacks_of(hostile_scenario("kl")).items() if attack.kind == "kl"} == {
        "x-0",
        "x-1",
    }


@pytest.mark.parametrize("attack", ALONE)
def test_lies_pass_the_checks_of_the_wire(attack: str) -> None:
    """An attack that is refused would be no attack."""
    shared_blocks, honest, forged, train = answer_of(attack)
    codec = Codec(shared_blocks, numeric_scenario('proximity.mode="quadratic"'))
    read = codec.read_answer(train, codec.write_answer(train, forged))
    assert isinstance(read, Trained)
    assert np.array_equal(read.point, forged.point)
    assert (read.steps, read.episodes, read.gain) == (forged.steps, forged.episodes, forged.gain)
    assert attack == "kl" or not np.array_equal(forged.point, honest.point)


def test_a_sign_flip_by_hand() -> None:
    _, honest, forged, _ = answer_of("sign-flip", strength=2.0)
    np.testing.assert_allclose(forged.point, 0.5 - 2 * (honest.point - 0.5), rtol=1e-6)


def test_a_weight_is_claimed_as_far_as_the_server_believes_it() -> None:
    """The steps of a batch are known, and an episode has one or more of them."""
    _, honest, forged, _ = answer_of("weight")
    assert (honest.steps, honest.episodes) == (128, 5)
    assert (forged.steps, forged.episodes) == (128, 128)
    assert forged.gain > 100 * forged.spread


def test_a_fisher_diagonal_is_claimed_a_thousand_times() -> None:
    _, honest, forged, _ = answer_of("fisher")
    assert honest.fisher is not None
    assert forged.fisher is not None
    np.testing.assert_allclose(forged.fisher, 1000 * honest.fisher)


def test_returns_are_claimed_better_also_where_they_are_negative() -> None:
    _, honest, forged, _ = answer_of("returns", strength=3.0)
    key = "charts/episodic_return"
    assert honest.metrics[key] < 0
    assert forged.metrics[key] == pytest.approx(honest.metrics[key] + 2 * abs(honest.metrics[key]))
    scenario, summary = numeric_scenario(), EvaluationSummary(10.0, 1.0, 8.0, 12.0, 2, 5.0)
    evaluated = lie("c-0", Measure(_start(), np.zeros(0), ()), Evaluated(summary), ClientAttack("returns"), scenario)
    assert isinstance(evaluated, Evaluated)
    assert (evaluated.summary.mean, evaluated.summary.most) == (10_000, 10_000)


def test_a_kl_is_claimed_for_every_step() -> None:
    measured: Answer = Measured((0.1, 0.2))
    forged = lie("c-0", Measure(_start(), np.zeros(0), ()), measured, ClientAttack("kl", 7.0), numeric_scenario())
    assert isinstance(forged, Measured)
    assert forged.kl == (7.0, 7.0)


def _start() -> Start:
    return Start("run", 1, np.zeros(0, np.float32))


# Together -------------------------------------------------------------------------------------------------------------


def colluding_round(scenario: Scenario) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Train a round with numeric clients; return the shared blocks, what all sent, and what arrived at the server."""
    shared_blocks = resolve_shared_blocks(scenario)
    start = Start("run", 1, shared_blocks.initial.numpy())
    instructions = dict.fromkeys(shared_blocks.clients, Train(start, 0.0, 1.0))

    def points(transport: NumericTransport | ColludingTransport) -> dict[str, np.ndarray]:
        answers = dict(transport.send(instructions, None))
        return {name: answer.point for name, answer in answers.items() if isinstance(answer, Trained)}

    sent = points(NumericTransport(shared_blocks))
    return (
        start.shared,
        sent,
        points(ColludingTransport(NumericTransport(shared_blocks), scenario, shared_blocks)),
    )


@pytest.mark.parametrize("attack", COLLUDING)
def test_colluding_clients_send_the_same_and_honest_ones_what_they_learned(attack: str) -> None:
    _, sent, arrived = colluding_round(hostile_scenario(attack))
    assert list(arrived) == sorted(sent)
    assert all(np.array_equal(arrived[name], sent[name]) for name in sent if name.startswith("c"))
    assert np.array_equal(arrived["x-0"], arrived["x-1"])
    assert not np.array_equal(arrived["x-0"], sent["x-0"])


def test_a_forged_point_is_made_of_honest_ones_alone() -> None:
    shared, sent, arrived = colluding_round(hostile_scenario("ipm", "clients.x.strength=2.0"))
    honest = np.stack([sent[f"c-{number}"].astype(np.float64) for number in range(5)])
    np.testing.assert_allclose(arrived["x-0"], shared - 2 * (honest.mean(0) - shared), atol=1e-6)


def test_clients_that_collude_are_refused_where_nobody_knows_the_others() -> None:
    scenario = hostile_scenario("alie")
    shared_blocks = resolve_shared_blocks(scenario)
    with pytest.raises(ValueError, match=r'client x-0: attack = "alie": clients that collude .* use --engine local'):
        Federation(scenario, shared_blocks, NumericTransport(shared_blocks))
    with pytest.raises(ValueError, match="nobody knows with the engine flower"):
        FlowerEngine(scenario)
    with pytest.raises(ValueError, match="rounds that wait"):
        ColludingTransport(NumericTransport(shared_blocks), scenario, shared_blocks).submit({})


def test_clients_that_collude_are_refused_in_rounds_that_do_not_wait() -> None:
    with pytest.raises(ScenarioError, match=r'does not wait for them; use round.mode = "sync", or an attack such'):
        hostile_scenario("mimic", "round.mode=buffered")
    assert set(COLLUDING_ATTACKS) == set(COLLUDING)
    assert hostile_scenario("sign-flip", "round.mode=buffered").round.mode == "buffered"


def test_mixing_needs_twice_as_many_clients_in_a_round() -> None:
    """Of seven clients three may be hostile, of the four of a merge one, of the two of a sample none."""
    rule = "merge.rule=median"
    assert hostile_scenario("alie", rule, "merge.mix=3").merge.mix == 3
    with pytest.raises(ScenarioError, match="less than half of the clients of a round: at most 3 of 7"):
        hostile_scenario("alie", rule, "merge.mix=4")
    with pytest.raises(ScenarioError, match=r"at most 1 of 4 with round\.buffer = 0\.5"):
        hostile_scenario("scaled", rule, "merge.mix=2", "round.mode=buffered")
    with pytest.raises(ScenarioError, match=r"at most 0 of 2 with round\.fraction = 0\.25"):
        hostile_scenario("scaled", rule, "merge.mix=1", "round.fraction=0.25")
    with pytest.raises(ScenarioError, match=r'"persistence" needs; use "mean" or a robust rule'):
        hostile_scenario("scaled", "merge.rule=persistence", "merge.mix=1")


def test_attacks_by_a_task_are_refused_for_language_models() -> None:
    text = 'name = "w"\n[[clients]]\nname = "x"\nprompts = "a:b"\nattack = "negated-reward"\n'
    with pytest.raises(ScenarioError, match='"negated-reward" is for a client with env'):
        Scenario.loads(text, overrides=['objective.preset="grpo"'])


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_all_attacks_at_once_run_on_the_local_engine() -> None:
    """Five honest carts and a client of every attack: all answers pass, and the lie about the KL stops nobody."""
    entries = "".join(
        f'[[clients]]\nname = "{attack}"\nenv = "grpo_fed/CartPole-v1"\nattack = "{attack}"\n' for attack in ATTACKS
    )
    text = f'{BASE}[[clients]]\nname = "c"\ncount = 5\nenv = "grpo_fed/CartPole-v1"\n{entries}'
    overrides = ["rounds=2", 'merge.rule="median"', 'proximity.mode="measured"', "evaluate.episodes=1"]
    records: list[RoundRecord] = []
    result = grpo_fed.run(Scenario.loads(text, overrides=overrides), watch=records.append, workers=0)
    assert not [(client.client, client.failure) for record in records for client in record.clients if client.failure]
    assert result.clients["returns"].after == pytest.approx(1000 * 9, rel=1)  # a thousand times a beginner's
    assert result.clients["negated-reward"].after < 0
    states = [np.array(record.server.step.alphas) for record in records if record.server and record.server.step]
    assert len(states) == 2
    assert all((alphas > 0).all() for alphas in states)
