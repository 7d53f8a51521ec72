"""The strategy Grouped, over a grid in this process and clients that are Flower apps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx

from grpo_fed.aggregation.merge.persistence import rounds_of_evidence
from grpo_fed.flower import Grouped
from grpo_fed.flower.measurement import to_arrays, to_record
from grpo_fed.scenario.settings import MergeSettings
from tests.support.goal_app import ARRAYS, BLOCKS, GoalClient, run_rounds, train_messages
from tests.support.in_memory_grid import InMemoryGrid, enter_run

LEAVES = rounds_of_evidence(60)
"""The round in which a contrary client leaves the actor, which has 60 parameters."""


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(monkeypatch)


def make_grid(goals: list[dict[str, float]], weights: list[float] | None = None, kl: bool = True) -> InMemoryGrid:
    """Make a grid of one client for each goal, on nodes 11, 12, ..."""
    return InMemoryGrid(
        {
            11 + number: GoalClient(11 + number, goal, 1.0 if weights is None else weights[number], kl=kl)
            for number, goal in enumerate(goals)
        }
    )


ALIKE = {"torso.weight": 1.0, "torso.bias": 1.0, "actor.weight": 1.0, "critic.weight": 1.0}
CONTRARY = {**ALIKE, "actor.weight": -1.0}


def reply_with(message: Message, arrays: dict[str, np.ndarray], weight: float = 1.0) -> Message:
    metrics = MetricRecord({"num-examples": weight})
    return Message(RecordDict({"arrays": to_record(arrays), "metrics": metrics}), reply_to=message)


def test_the_mean_of_all_blocks_is_that_of_flowers_fedavg():
    grid = make_grid([ALIKE, CONTRARY, {"torso.weight": 3.0}], [1.0, 2.0, 5.0])
    strategy = Grouped(rule="mean")
    messages = list(strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), grid))
    replies = train_messages(grid, messages)
    arrays, metrics = strategy.aggregate_train(1, replies)
    expected, expected_metrics = FedAvg().aggregate_train(1, replies)
    for name in ("torso.weight", "torso.bias", "actor.weight", "critic.weight"):
        assert np.abs(arrays[name].numpy()).max() > 0.01
        np.testing.assert_allclose(arrays[name].numpy(), expected[name].numpy(), rtol=1e-6, atol=1e-7)
    assert dict(metrics) == dict(expected_metrics)


def test_a_contrary_client_leaves_the_actor_and_keeps_its_own():
    grid = make_grid([ALIKE, ALIKE, ALIKE, ALIKE, CONTRARY])
    strategy = Grouped(blocks=BLOCKS, chains=[["torso", "actor"]])
    run_rounds(strategy, grid, LEAVES + 12)
    assert strategy.departed == {"15": ("actor",)}
    assert [(record.round, record.left) for record in strategy.history if record.left] == [(LEAVES, {"15": ("actor",)})]
    assert strategy.history[LEAVES - 1].rho["15"]["actor"] > 0.9
    straight, contrary = (to_arrays(strategy.arrays_of(node)) for node in (11, 15))
    np.testing.assert_array_equal(straight["torso.weight"], contrary["torso.weight"])
    assert straight["actor.weight"].mean() > 0.9
    assert contrary["actor.weight"].mean() < -0.9


def test_a_client_that_has_left_a_block_gets_what_it_sent_last():
    grid = make_grid([ALIKE, ALIKE, ALIKE, ALIKE, CONTRARY])
    run_rounds(Grouped(blocks=BLOCKS), grid, LEAVES + 2)
    clients = grid.clients
    straight, contrary = clients[11].received[-1], clients[15].received[-1]
    np.testing.assert_array_equal(straight["torso.weight"], contrary["torso.weight"])
    assert not np.array_equal(straight["actor.weight"], contrary["actor.weight"])
    drift = contrary["actor.weight"] - clients[15].received[-2]["actor.weight"]
    pulled = 0.25 * (-1 - clients[15].received[-2]["actor.weight"])
    assert np.abs(drift - pulled).max() < 0.05 * 5  # its own step and noise, nothing of the others


def test_arrays_in_no_block_stay_with_their_client():
    grid = make_grid([{**ALIKE, "critic.weight": 1.0}, {**ALIKE, "critic.weight": -9.0}])
    result = run_rounds(Grouped(blocks=BLOCKS, rule="mean"), grid, 3)
    first, second = (grid.clients[node].received[-1] for node in (11, 12))
    assert first["critic.weight"].mean() > 0.2
    assert second["critic.weight"].mean() < -2
    assert (int(first["steps"]), int(second["steps"])) == (2, 2)
    assert not result.arrays["critic.weight"].numpy().any()


def test_evaluation_has_each_clients_own_model_and_averages_the_metrics():
    grid = make_grid([ALIKE, ALIKE, ALIKE, ALIKE, CONTRARY])
    strategy = Grouped(blocks=BLOCKS)
    result = run_rounds(strategy, grid, LEAVES + 12)
    last = strategy.history[-1].evaluate
    assert last["11"]["actor"] > 0.9
    assert last["15"]["actor"] < -0.9
    mean = sum(numbers["actor"] for numbers in last.values()) / 5
    assert result.evaluate_metrics_clientapp[LEAVES + 12]["actor"] == pytest.approx(mean)


def test_a_client_that_comes_late_is_compared_with_the_others():
    grid = make_grid([ALIKE, ALIKE, ALIKE, ALIKE])
    strategy = Grouped(blocks=BLOCKS)
    run_rounds(strategy, grid, 3)
    grid.clients[15] = GoalClient(15, CONTRARY)
    arrays = strategy.arrays_of(11)
    for number in range(4, 4 + LEAVES):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        arrays, _ = strategy.aggregate_train(number, train_messages(grid, messages))
    assert strategy.departed == {"15": ("actor",)}


# Budgets --------------------------------------------------------------------------------------------------------------


def one_step(strategy: Grouped, goal: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Send two clients' replies that agree on where to go, and return where the shared model went."""
    grid = InMemoryGrid({1: None, 2: None})
    messages = list(strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), grid))
    arrays, _ = strategy.aggregate_train(1, [reply_with(message, {**ARRAYS, **goal}) for message in messages])
    return to_arrays(arrays)


def test_a_budget_of_distance_shortens_the_step_of_its_block_alone():
    torso, actor = ARRAYS["torso.bias"].copy(), ARRAYS["actor.weight"].copy()
    torso[:2], actor[0, 0] = (3.0, 4.0), 1.0  # half squares of 12.5 and 0.5
    strategy = Grouped(blocks=BLOCKS, rule="mean", budget={"torso": 2.0}, measure="distance")
    moved = one_step(strategy, {"torso.bias": torso, "actor.weight": actor})
    np.testing.assert_allclose(moved["torso.bias"], [1.2, 1.6, 0], rtol=1e-6)  # sqrt(2 / 12.5) = 0.4 of the way
    assert moved["actor.weight"][0, 0] == 1
    step = strategy.history[-1].step
    assert [(block.block, block.wanted) for block in step.blocks] == [("torso", 12.5), ("actor", 0.5)]
    assert step.alphas == pytest.approx((0.4, 1.0))


def test_a_joint_budget_of_distance_shortens_all_blocks():
    torso, actor = ARRAYS["torso.bias"].copy(), ARRAYS["actor.weight"].copy()
    torso[0], actor[0, 0] = 3.0, 4.0  # half squares of 4.5 and 8, 12.5 together
    moved = one_step(
        Grouped(blocks=BLOCKS, rule="mean", joint_budget=0.5, measure="distance"),
        {"torso.bias": torso, "actor.weight": actor},
    )
    assert moved["torso.bias"][0] == pytest.approx(0.6)  # sqrt(0.5 / 12.5) = 0.2 of the way
    assert moved["actor.weight"][0, 0] == pytest.approx(0.8)


def test_clients_measure_the_kl_of_the_step_and_it_stays_within_the_budgets():
    grid = make_grid([ALIKE, ALIKE, ALIKE])
    strategy = Grouped(blocks=BLOCKS, rule="mean", budget=0.8, joint_budget=1.0)
    result = run_rounds(strategy, grid, 1)
    step = strategy.history[0].step
    moved = {name: result.arrays[name].numpy() for name in ("torso.weight", "torso.bias", "actor.weight")}
    torso = sum(float((moved[name] ** 2).sum()) / 2 for name in ("torso.weight", "torso.bias"))
    actor = float((moved["actor.weight"] ** 2).sum()) / 2
    assert [block.kl for block in step.blocks] == pytest.approx([torso, actor], rel=1e-4)
    assert step.joint == pytest.approx(torso + actor, rel=1e-4)
    assert 0.9 < step.joint <= 1.0
    assert max(block.kl for block in step.blocks) <= 0.8
    assert 0 < step.alphas[0] < 1
    assert set(strategy.history[0].kl) == {"11", "12", "13"}


def test_a_budget_of_0_moves_nothing_and_asks_nobody():
    grid = make_grid([ALIKE, ALIKE], kl=False)
    result = run_rounds(Grouped(blocks=BLOCKS, rule="mean", budget=0.0), grid, 2)
    assert not any(array.numpy().any() for name, array in result.arrays.items() if name != "steps")


def test_clients_that_measure_suffice_if_others_do_not():
    grid = make_grid([ALIKE, ALIKE])
    grid.clients[13] = answering_errors_to(GoalClient(13, ALIKE, kl=False))
    strategy = Grouped(blocks=BLOCKS, rule="mean", joint_budget=1.0)
    run_rounds(strategy, grid, 1)
    assert set(strategy.history[0].kl) == {"11", "12"}
    assert 0 < strategy.history[0].step.joint <= 1


def test_an_app_without_a_query_function_is_told_how_to_measure():
    grid = make_grid([])
    for node in (1, 2):
        grid.clients[node] = answering_errors_to(GoalClient(node, ALIKE, kl=False))
    with pytest.raises(ValueError, match=r"no client measures KL; register grpo_fed\.flower\.answer_query"):
        run_rounds(Grouped(blocks=BLOCKS, rule="mean", joint_budget=1.0), grid, 1)


def answering_errors_to(client: GoalClient):
    """Answer as a node does whose app raises."""

    def answer(message: Message) -> RecordDict | Error:
        try:
            return client(message)
        except ValueError as error:
            return Error(2, f"{type(error)}:<'{error}'>")

    return answer


# Replies and settings that do not fit ---------------------------------------------------------------------------------


def test_replies_that_do_not_fit_are_left_out_with_the_reason():
    strategy = Grouped(FedAvg(min_train_nodes=6, min_available_nodes=6), blocks=BLOCKS, rule="mean")
    grid = InMemoryGrid(dict.fromkeys(range(1, 7)))
    by_node = {
        message.metadata.dst_node_id: message
        for message in strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), grid)
    }
    moved = {**ARRAYS, "torso.bias": np.ones(3, np.float32)}
    nan = {**ARRAYS, "torso.bias": np.full(3, np.nan, np.float32)}
    replies = [
        reply_with(by_node[1], moved),
        reply_with(by_node[2], nan),
        reply_with(by_node[3], {"torso.bias": moved["torso.bias"]}),
        reply_with(by_node[4], moved, weight=-1.0),
        Message(RecordDict({"arrays": to_record(moved), "metrics": MetricRecord()}), reply_to=by_node[5]),
        Message(Error(2, "it raised"), reply_to=by_node[6]),
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays["torso.bias"].numpy().tolist() == [1, 1, 1]
    failures = strategy.history[0].failures
    assert failures["2"] == "an array is not finite"
    assert failures["3"].startswith('its model has other arrays than the server\'s: ["actor.weight"')
    assert failures["4"] == "its weight is -1; a weight is 0 or more"
    assert failures["5"] == 'its MetricRecord has no number "num-examples", which is its weight'
    assert failures["6"] == "it raised"
    assert strategy.history[0].weights == {"1": 1.0}


def test_a_node_that_does_not_answer_in_time_is_named():
    strategy = Grouped(blocks=BLOCKS, rule="mean")
    grid = InMemoryGrid({1: None, 2: None})
    first, _ = strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), grid)
    strategy.aggregate_train(1, [reply_with(first, ARRAYS)])
    answered = str(first.metadata.dst_node_id)
    assert strategy.history[0].failures == {
        node: "it did not answer in time" for node in ("1", "2") if node != answered
    }


def test_a_client_may_leave_by_the_group_lasso_as_far_as_its_row_is_away():
    rule = MergeSettings(rule="huber", threshold=0.5)
    strategy = Grouped(FedAvg(min_train_nodes=4, min_available_nodes=4), blocks=BLOCKS, groups="row", rule=rule)
    messages = list(
        strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), InMemoryGrid(dict.fromkeys(range(4))))
    )
    far = {**ARRAYS, "actor.weight": ARRAYS["actor.weight"].copy()}
    far["actor.weight"][1] = 9.0
    by_node = {message.metadata.dst_node_id: message for message in messages}
    strategy.aggregate_train(1, [reply_with(by_node[node], far if node == 3 else ARRAYS) for node in range(4)])
    assert strategy.departed == {"3": ("actor.weight:rows[1]",)}
    assert to_arrays(strategy.arrays_of(3))["actor.weight"][:, 0].tolist() == [0, 9, 0]
    assert not to_arrays(strategy.arrays_of(0))["actor.weight"].any()


def test_a_round_without_a_valid_reply_leaves_the_model():
    strategy = Grouped(blocks=BLOCKS)
    messages = list(strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), InMemoryGrid({1: None, 2: None})))
    assert strategy.aggregate_train(1, [Message(Error(2, "gone"), reply_to=messages[0])]) == (None, None)


def test_a_round_of_weights_of_0_moves_nothing():
    strategy = Grouped(blocks=BLOCKS)
    messages = list(strategy.configure_train(1, to_record(ARRAYS), ConfigRecord(), InMemoryGrid({1: None, 2: None})))
    moved = {**ARRAYS, "torso.bias": np.ones(3, np.float32)}
    arrays, metrics = strategy.aggregate_train(1, [reply_with(message, moved, 0.0) for message in messages])
    assert not arrays["torso.bias"].numpy().any()
    assert metrics is None


def test_clients_are_called_by_the_names_that_they_give_themselves():
    grid = InMemoryGrid({1: GoalClient(1, ALIKE, name="ant"), 2: GoalClient(2, ALIKE, name="bee")})
    strategy = Grouped(blocks=BLOCKS)
    run_rounds(strategy, grid, 1)
    assert strategy.history[0].weights == {"ant": 1.0, "bee": 1.0}
    assert to_arrays(strategy.arrays_of("bee")).keys() == ARRAYS.keys()


def test_a_name_belongs_to_the_first_node_that_has_it_and_a_number_to_its_node():
    names = {1: "ant", 2: "ant", 3: "4", 4: ""}
    grid = InMemoryGrid({node: GoalClient(node, {"critic.weight": node}, name=name) for node, name in names.items()})
    strategy = Grouped(blocks=BLOCKS)
    run_rounds(strategy, grid, 2)
    assert strategy.history[1].weights == {"4": 1.0, "4@3": 1.0, "ant": 1.0, "ant@2": 1.0}
    for node in names:  # each gets its own critic back
        assert grid.clients[node].received[1]["critic.weight"].mean() == pytest.approx(node / 4, abs=0.1)


def test_the_numbers_of_nodes_change_no_bit_of_clients_with_names():
    def final(nodes: tuple[int, int, int]) -> bytes:
        grid = InMemoryGrid({node: GoalClient(number, ALIKE, name=f"c{number}") for number, node in enumerate(nodes)})
        return run_rounds(Grouped(blocks=BLOCKS), grid, 3).arrays["torso.weight"].numpy().tobytes()

    assert final((5, 9, 7)) == final((1, 2, 3))


def test_the_strategy_inside_chooses_nodes_and_configures_them():
    grid = make_grid([ALIKE] * 4)
    run_rounds(Grouped(FedProx(fraction_train=0.5, proximal_mu=0.1), blocks=BLOCKS, rule="mean"), grid, 1)
    configs = [config for client in grid.clients.values() for config in client.configs]
    assert configs == [{"proximal-mu": 0.1, "server-round": 1}] * 2


def test_a_strategy_around_it_may_change_the_shared_model():
    grid = make_grid([ALIKE, ALIKE])
    strategy = Grouped(blocks=BLOCKS, rule="mean")
    run_rounds(strategy, grid, 1)
    changed = {**ARRAYS, "torso.bias": np.full(3, 5, np.float32)}
    for message in strategy.configure_train(2, to_record(changed), ConfigRecord(), grid):
        assert message.content["arrays"]["torso.bias"].numpy().tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Grouped(FedMedian()), "strategy: FedMedian merges arrays in its own way; give FedAvg, or FedProx"),
        (lambda: Grouped(FedAdam()), "strategy: FedAdam merges arrays in its own way"),
        (lambda: Grouped(rule="fisher"), 'rule = "fisher": the clients of an app send no Fisher information'),
        (lambda: Grouped(rule="clusters"), 'rule = "clusters": the model of an app is one'),
        (
            lambda: Grouped(rule=MergeSettings(rejoin=3)),
            r'rule = "persistence": \["rejoin"\] has no effect here; leave it',
        ),
        (
            lambda: Grouped(rule=MergeSettings(rule="mean", radius=3)),
            r'\["radius"\] has no effect .* it reads \["mix"\]',
        ),
        (
            lambda: Grouped(budget=1.0, measure="distance", over="worst"),
            "over: has no effect, where clients measure nothing",
        ),
        (lambda: Grouped(joint_budget=-1), "joint_budget = -1: a budget is 0, which moves nothing, or more"),
        (lambda: Grouped(budget={"a": float("nan")}), r'budget\["a"\] = nan: a budget is 0'),
        (lambda: Grouped(rule="huber"), 'rule = "huber" needs a threshold: MergeSettings'),
        (lambda: Grouped(over="worst"), "over: has no effect, where clients measure nothing; leave it out"),
        (
            lambda: Grouped(measure="distance"),
            "measure: has no effect, without a budget or a joint_budget; leave it out",
        ),
        (lambda: Grouped(rule="mean", chains=[["a"]]), "chains: has no effect, as only rule=.persistence. asks"),
        (lambda: Grouped(rule="median", groups="row"), "groups: has no effect, as with rule=.median. no client leaves"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_cure(make, text: str):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_budget_of_no_block_is_named_before_anything_is_sent():
    grid = make_grid([ALIKE, ALIKE])
    with pytest.raises(ValueError, match='budget: "actr" matches no block'):
        run_rounds(Grouped(blocks=BLOCKS, budget={"actr": 0.1}), grid, 1)
    assert not grid.clients[11].received


def test_a_robust_rule_takes_its_keys():
    rule = MergeSettings(rule="trimmed-mean", fraction=0.4)
    grid = make_grid([ALIKE, ALIKE, {**ALIKE, "torso.bias": 1e6}, ALIKE, ALIKE])
    result = run_rounds(Grouped(blocks=BLOCKS, rule=rule), grid, 1)
    assert np.abs(result.arrays["torso.bias"].numpy()).max() < 1
    assert math.isfinite(float(result.arrays["torso.bias"].numpy().sum()))
    assert isinstance(result.arrays, ArrayRecord)
