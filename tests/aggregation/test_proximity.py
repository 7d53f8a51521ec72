"""Budgets of the server's step: numbers by hand, and that nothing beyond a budget is ever accepted."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from grpo_fed.aggregation.proximity import (
    AcceptedBlock,
    AcceptedStep,
    Budgets,
    BudgetSearch,
    StepFractions,
    adapt_budgets,
    full_step,
    interpolate,
    predicted_step,
)
from grpo_fed.aggregation.proximity.measured import BACKTRACKING, BLOCK_FRACTIONS, JOINT_MULTIPLES, MAX_QUERIES
from grpo_fed.policy.distributions import Categorical

SEEDS = st.integers(0, 2**32 - 1)
LIMITS = st.sampled_from([0.0, 1e-9, 1e-3, 0.02, 0.5, math.inf])
BLOCKS = {"torso": slice(0, 3), "actor": slice(3, 5)}

Measure = Callable[[StepFractions], float]


def lead(
    budgets: Budgets, clients: Mapping[str, Measure], weights: Mapping[str, float] | None = None
) -> tuple[AcceptedStep, list[tuple[StepFractions, ...]]]:
    """The whole dialogue with clients that always answer: the decision, and what was asked."""
    search, asked = BudgetSearch(budgets, weights or dict.fromkeys(clients, 1.0)), []
    while trials := search.next_query():
        asked.append(trials)
        search = search.with_answers({name: [measure(trial) for trial in trials] for name, measure in clients.items()})
    return search.accepted(), asked


def bits(value: Tensor) -> list[int]:
    return value.view(torch.int32).tolist()


# Moving


def test_a_block_goes_its_part_of_the_way() -> None:
    old, new = torch.zeros(5), torch.tensor([1.0, 2.0, 4.0, 8.0, -8.0])
    found = interpolate(old, new, list(BLOCKS.values()), (0.25, 0.5))
    assert found.tolist() == [0.25, 0.5, 1.0, 4.0, -4.0]
    assert old.tolist() == [0.0] * 5


def test_all_and_nothing_of_a_step_are_exact() -> None:
    old = torch.tensor([0.1, -0.0, 1e-30, 3e38, -3e38])
    new = torch.tensor([-0.3, -0.0, 1e30, -3e38, 3e38])
    assert bits(interpolate(old, new, [slice(0, 5)], (1.0,))) == bits(new)
    assert bits(interpolate(old, new, [slice(0, 5)], (0.0,))) == bits(old)
    assert bits(interpolate(old, new, [slice(0, 2)], (1.0,))) == bits(torch.cat([new[:2], old[2:]]))


def test_off_makes_the_whole_step() -> None:
    kept = full_step(["torso", "actor"])
    assert kept.alphas == (1.0, 1.0)
    assert kept.joint is None


# Quadratic


def test_the_quadratic_step_by_hand() -> None:
    """1/2 d'Fd is 1/2 * 3 * 4 = 6 for the torso, 24 times its budget, and 1/2 * (0.04 + 0.04) for the actor's 0.05."""
    step, fisher = torch.tensor([2.0, 2.0, 2.0, 0.2, -0.1]), torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])
    kept = predicted_step(step, fisher, BLOCKS, Budgets({"torso": 0.25, "actor": 0.05}))
    assert kept.alphas == (pytest.approx(24**-0.5), 1.0)
    assert [block.wanted for block in kept.blocks] == pytest.approx([6.0, 0.04])
    assert [block.kl for block in kept.blocks] == pytest.approx([0.25, 0.04])
    assert (kept.joint_wanted, kept.joint) == (pytest.approx(6.04), pytest.approx(0.29))


def test_the_joint_budget_shrinks_all_blocks_alike() -> None:
    """0.25 + 0.04 is 4 times the joint budget: half of each step."""
    step, fisher = torch.tensor([2.0, 2.0, 2.0, 0.2, -0.1]), torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])
    kept = predicted_step(step, fisher, BLOCKS, Budgets({"torso": 0.25, "actor": 0.05}, joint=0.0725))
    assert kept.alphas == pytest.approx((0.5 * 24**-0.5, 0.5))
    assert kept.joint == pytest.approx(0.0725)


@given(SEEDS, LIMITS, LIMITS, LIMITS)
def test_a_quadratic_step_is_within_its_budgets(seed: int, torso: float, actor: float, joint: float) -> None:
    generator = np.random.default_rng(seed)
    step = torch.from_numpy(generator.normal(size=5) * np.exp(3 * generator.normal())).float()
    fisher = torch.from_numpy(generator.exponential(size=5) * generator.integers(0, 2, 5)).float()
    kept = predicted_step(step, fisher, BLOCKS, Budgets({"torso": torso, "actor": actor}, joint))
    for block in kept.blocks:
        assert block.kl is not None
        assert block.kl <= block.budget
        assert 0.0 <= block.alpha <= 1.0
        assert block.alpha == 0.0 or block.budget > 0
    assert kept.joint is not None
    assert kept.joint <= joint
    if torso == actor == joint == math.inf:
        assert kept.alphas == (1.0, 1.0)


@given(SEEDS)
def test_the_quadratic_step_is_the_merge_under_its_constraint(seed: int) -> None:
    """What lies nearest to the merged point, as the Fisher matrix measures, with 1/2 x'Fx within the budget."""
    generator = np.random.default_rng(seed)
    step, fisher = generator.normal(size=3), generator.exponential(size=3) + 0.1
    budget = float(0.5 * fisher @ step**2 * generator.uniform(0.1, 2.0))
    kept = predicted_step(torch.from_numpy(step), torch.from_numpy(fisher), {"b": slice(0, 3)}, Budgets({"b": budget}))
    found = minimize(
        lambda x: 0.5 * fisher @ (x - step) ** 2,
        np.zeros(3),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: budget - 0.5 * fisher @ x**2},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(kept.alphas[0] * step, found.x, atol=1e-4)


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_blocks_together_can_be_so_many_times_their_sum_and_no_more(seed: int, sizes: list[int]) -> None:
    """For any Fisher matrix F, d'Fd <= B sum_b d_b' F_bb d_b; equality where all B blocks pull at the same string."""
    generator = np.random.default_rng(seed)
    count, size = len(sizes), sum(sizes)
    cuts = np.split(np.arange(size), np.cumsum(sizes)[:-1])
    root = generator.normal(size=(generator.integers(1, size + 1), size))
    string = np.ones((1, size))
    for base, step in ((root, generator.normal(size=size)), (string, np.repeat(1.0 / np.array(sizes), sizes))):
        fisher = base.T @ base
        own = sum(step[cut] @ fisher[np.ix_(cut, cut)] @ step[cut] for cut in cuts)
        assert step @ fisher @ step <= count * own * (1 + 1e-9)
        assert base is not string or step @ fisher @ step == pytest.approx(count * own)


# Measured, by hand


def test_what_is_within_all_budgets_is_accepted_after_one_message() -> None:
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, joint=0.05)
    kept, asked = lead(budgets, {"a": lambda trial: 0.01 * sum(trial) ** 2})
    assert kept.alphas == (1.0, 1.0)
    assert [block.wanted for block in kept.blocks] == [block.kl for block in kept.blocks] == [0.01, 0.01]
    assert kept.joint_wanted == kept.joint == 0.04
    assert kept.clients == ("a",)
    assert len(asked) == 1
    assert len(asked[0]) == 1 + 2 * len(BLOCK_FRACTIONS)


def test_a_block_over_its_budget_is_brought_to_it_in_two_messages() -> None:
    """KL 0.5 alpha^2 is 0.02 at 0.2; the other block, uncoupled, goes all its way: a common shrink would not let it."""
    budgets = Budgets({"torso": 0.02, "actor": 0.02})
    kept, asked = lead(budgets, {"a": lambda trial: 0.5 * trial[0] ** 2 + 0.001 * trial[1] ** 2})
    assert len(asked) == 2
    assert 0.19 < kept.alphas[0] <= 0.2
    assert kept.alphas[1] == 1.0
    assert kept.blocks[0] == AcceptedBlock("torso", 0.5, 0.02, kept.alphas[0], 0.5 * kept.alphas[0] ** 2)


def test_the_joint_budget_shrinks_what_the_blocks_may_alone() -> None:
    """Two blocks that pull alike: each alone at 0.02, together at 0.08; half of each is 0.02."""
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, joint=0.02)
    kept, asked = lead(budgets, {"a": lambda trial: 0.02 * sum(trial) ** 2})
    assert len(asked) == 2
    assert kept.alphas == pytest.approx((0.5, 0.5), rel=0.03)
    assert kept.joint is not None
    assert 0.018 < kept.joint <= 0.02
    assert kept.joint_wanted == 0.08


def test_budgets_hold_for_the_weighted_mean_or_for_the_worst_client() -> None:
    """0.02 and 0.06 with weights 3 and 1 are 0.03 in the mean; alpha is the root of what is allowed."""
    clients = {"calm": lambda trial: 0.02 * trial[0] ** 2, "wild": lambda trial: 0.06 * trial[0] ** 2}
    weights = {"calm": 3.0, "wild": 1.0}
    mean, _ = lead(Budgets({"torso": 0.015}), clients, weights)
    worst, _ = lead(Budgets({"torso": 0.015}, over="worst"), clients, weights)
    assert mean.joint_wanted == pytest.approx(0.03)
    assert worst.joint_wanted == pytest.approx(0.06)
    assert mean.alphas == pytest.approx((0.5**0.5,), rel=0.03)
    assert worst.alphas == pytest.approx((0.5,), rel=0.03)


def test_a_client_without_weight_counts_for_the_worst_alone() -> None:
    clients = {"calm": lambda trial: 0.01 * trial[0], "ghost": lambda _: math.inf}
    weights = {"calm": 1.0, "ghost": 0.0}
    assert lead(Budgets({"torso": 0.02}), clients, weights)[0].alphas == (1.0,)
    assert lead(Budgets({"torso": 0.02}, over="worst"), clients, weights)[0].alphas == (0.0,)


def test_clients_that_do_not_answer_are_left_out() -> None:
    """No answer, too few numbers, a stranger; then all that is left is accepted."""
    search = BudgetSearch(Budgets({"torso": 0.02}), {"a": 1.0, "b": 1.0, "c": 1.0})
    trials = search.next_query()
    fine, bad = [0.01] * len(trials), [9.0] * len(trials)
    kept = search.with_answers({"a": fine, "b": bad[1:], "stranger": bad}).accepted()
    assert kept.alphas == (1.0,)
    assert kept.clients == ("a",)


def test_if_nobody_answers_the_question_is_put_again_and_in_the_end_nothing_moves() -> None:
    search, asked = BudgetSearch(Budgets({"torso": 0.02}), {"a": 1.0}), []
    while trials := search.next_query():
        asked.append(trials)
        search = search.with_answers({})
    assert len(asked) == MAX_QUERIES
    assert asked[0] == asked[1] == asked[2]
    assert search.accepted() == AcceptedStep((AcceptedBlock("torso", None, 0.02, 0.0, 0.0),), None, math.inf, 0.0)


def test_without_limits_the_whole_step_is_made_whatever_is_measured() -> None:
    budgets = Budgets({"torso": math.inf, "actor": math.inf})
    for answers in ({}, {"a": [math.nan] * 3}, {"a": [1e300] * 3}):
        kept = BudgetSearch(budgets, {"a": 1.0}).with_answers(answers).accepted()
        assert kept.alphas == (1.0, 1.0)


def test_a_budget_of_0_moves_nothing() -> None:
    """Not even what has no KL; the others move as they may."""
    nothing, asked = lead(Budgets({"torso": 1.0, "actor": 1.0}, joint=0.0), {"a": lambda _: 0.0})
    assert (nothing.alphas, asked) == ((0.0, 0.0), [])
    nothing, asked = lead(Budgets({"torso": 0.0, "actor": 0.0}), {"a": lambda _: 0.0})
    assert (nothing.alphas, asked) == ((0.0, 0.0), [])
    kept, _ = lead(Budgets({"torso": 0.0, "actor": 0.1}), {"a": lambda trial: 0.1 * trial[1] + trial[0]})
    assert kept.alphas == (0.0, 1.0)
    assert kept.blocks[0] == AcceptedBlock("torso", 1.0, 0.0, 0.0, 0.0)
    assert kept.joint_wanted == 1.1


def test_what_is_no_number_is_within_no_budget() -> None:
    for wrong in (math.nan, math.inf):
        kept, _ = lead(Budgets({"torso": 0.02, "actor": 0.02}), {"a": lambda t, wrong=wrong: wrong if t[0] else 0.0})
        assert kept.alphas == (0.0, 1.0)


def test_a_policy_that_breaks_down_under_the_whole_step_still_goes_part_of_it() -> None:
    """Nothing is known of how the blocks add up, so they are taken to pull alike: 0.02 * 2^2 is 4 times the budget."""

    def breaks(trial: StepFractions) -> float:
        return math.inf if sum(trial) > 1.5 else 0.02 * sum(trial) ** 2

    kept, asked = lead(Budgets({"torso": 0.02, "actor": 0.02}, joint=0.02), {"a": breaks})
    assert len(asked) == 2
    assert kept.alphas == pytest.approx((0.5, 0.5))


def test_where_the_estimate_is_wrong_the_step_goes_down_from_what_was_measured_alone() -> None:
    """Within its budget at 1/4 and below 1/50 but nowhere between: only the third message finds it again."""

    def gap(trial: StepFractions) -> float:
        return 0.01 if trial[0] == 0.25 or trial[0] < 0.02 else 1.0

    kept, asked = lead(Budgets({"torso": 0.02}), {"a": gap})
    assert len(asked) == 3
    assert kept.alphas == (0.25,)


# Measured, for any KL


def monotone(generator: np.random.Generator, blocks: int) -> Measure:
    """A quadratic form that couples the blocks, bent, so that it grows as another power than 2."""
    root = generator.normal(size=(generator.integers(1, 4), blocks)) * np.exp(2 * generator.normal(size=blocks))
    power = generator.uniform(0.5, 2.0)
    return lambda trial: float((root @ np.array(trial)) @ (root @ np.array(trial))) ** power


def wild(generator: np.random.Generator, blocks: int) -> Measure:
    """Up and down along every way, with jumps, and sometimes no number."""
    inner, seed = monotone(generator, blocks), int(generator.integers(2**32))
    waves = generator.normal(size=blocks) * 30

    def measure(trial: StepFractions) -> float:
        jump = np.random.default_rng([seed, hash(trial) % 2**32]).choice(
            [0.0, 0.01, 1.0, 1.0, 10.0, math.inf, math.nan]
        )
        return inner(trial) * float(np.sin(waves @ np.array(trial)) ** 2 * jump)

    return measure


@given(
    SEEDS,
    st.sampled_from([monotone, wild]),
    st.lists(LIMITS, min_size=1, max_size=4),
    LIMITS,
    st.sampled_from(["mean", "worst"]),
)
def test_no_accepted_step_exceeds_a_budget_on_what_was_measured(
    seed: int, kind: Callable[[np.random.Generator, int], Measure], limits: list[float], joint: float, over: str
) -> None:
    """By a record of all answers of its own: whoever answered the message that the accepted step was in."""
    generator = np.random.default_rng(seed)
    count = len(limits)
    weights = {name: float(generator.uniform(0.1, 2.0)) for name in "abc"}
    measures = {name: kind(generator, count) for name in weights}
    budgets = Budgets({f"block {i}": limit for i, limit in enumerate(limits)}, joint, over)  # type: ignore[arg-type]
    search, record = BudgetSearch(budgets, weights), []
    while trials := search.next_query():
        answers = {name: [m(trial) for trial in trials] for name, m in measures.items() if generator.random() < 0.8}
        record.append((trials, answers))
        search = search.with_answers(answers)
    kept = search.accepted()
    assert len(record) <= MAX_QUERIES

    def within(trial: StepFractions, limit: float) -> bool:
        if limit == math.inf or not any(trial):
            return True
        return any(
            trial in trials
            and answers
            and everyone([answers[n][trials.index(trial)] for n in answers], answers) <= limit
            for trials, answers in record
            if tuple(sorted(answers)) == kept.clients
        )

    def everyone(kl: Sequence[float], names: Mapping[str, object]) -> float:
        if any(math.isnan(one) for one in kl):
            return math.inf
        return max(kl) if over == "worst" else float(np.average(kl, weights=[weights[n] for n in names])) * (1 - 1e-12)

    alphas = kept.alphas
    assert all(0.0 <= alpha <= 1.0 for alpha in alphas)
    assert within(alphas, joint)
    for number, (alpha, limit) in enumerate(zip(alphas, limits, strict=True)):
        assert within(tuple(alpha if other == number else 0.0 for other in range(count)), limit)
        assert alpha == 0.0 or (limit > 0 and joint > 0)
    if all(limit == math.inf for limit in (*limits, joint)):
        assert alphas == (1.0,) * count


@given(SEEDS, st.integers(1, 6), st.booleans())
def test_where_kl_grows_as_a_quadratic_two_messages_are_enough(seed: int, blocks: int, pull_alike: bool) -> None:
    """And where the blocks' steps add up, at least half of the best: each block's root, then one shrink of all."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(4, blocks)) * np.exp(generator.normal(size=blocks))
    root = np.abs(root) if pull_alike else root
    limits, joint = np.exp(generator.normal(size=blocks) - 2), float(np.exp(generator.normal() - 1))
    budgets = Budgets({str(i): float(limit) for i, limit in enumerate(limits)}, joint)
    kept, asked = lead(budgets, {"a": lambda trial: float(np.square(root @ np.array(trial)).sum())})
    assert len(asked) <= 2
    assert all(kept.alphas)
    if pull_alike:
        best = np.minimum(1, np.sqrt(limits / np.square(root).sum(0)))
        best *= min(1, np.sqrt(joint / np.square(root @ best).sum()))
        assert (np.array(kept.alphas) >= 0.5 * best).all()


def test_a_message_asks_for_a_few_policies_each_once() -> None:
    for blocks in (1, 3, 6):
        budgets = Budgets({str(i): 0.01 for i in range(blocks)}, 0.02)
        _, asked = lead(budgets, {"a": lambda trial: sum(trial) ** 2})
        for trials, most in zip(
            asked, (len(BLOCK_FRACTIONS), len(JOINT_MULTIPLES) + 1, len(BACKTRACKING)), strict=False
        ):
            assert len(set(trials)) == len(trials) <= 1 + most * (blocks + 1)


def test_the_order_of_answers_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    clients = {name: monotone(generator, 2) for name in "dbca"}
    weights = {name: float(generator.uniform()) for name in clients}
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, 0.03)
    for order in itertools.permutations(clients):
        assert lead(budgets, {name: clients[name] for name in order}, weights) == lead(budgets, clients, weights)


def test_a_real_policy_stays_within_its_budgets_on_the_states_of_its_clients() -> None:
    """Two hidden layers and a softmax; the clients' states stay with them, and budgets hold in mean over clients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 4), (16, 16), (3, 16)]
    ends = np.cumsum([rows * columns for rows, columns in shapes]).tolist()
    cuts = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    old = 0.5 * torch.randn(ends[-1], generator=generator)
    new = old + 0.3 * torch.randn(ends[-1], generator=generator)
    states = {name: torch.randn(64, 4, generator=generator) for name in ("a", "b", "c")}

    def logits(point: Tensor, x: Tensor) -> Tensor:
        for cut, shape in zip(cuts, shapes, strict=True):
            x = (x if shape[1] == 4 else x.tanh()) @ point[cut].view(shape).T
        return x

    def kl(point: Tensor, x: Tensor) -> float:
        return float(Categorical(3).kl(logits(old, x), logits(point, x)).mean())

    budgets = Budgets({"torso.0": 0.02, "torso.1": 0.02, "actor": 0.02}, joint=0.03)
    clients = {n: lambda trial, x=x: kl(interpolate(old, new, cuts, trial), x) for n, x in states.items()}  # type: ignore[misc]
    kept, asked = lead(budgets, clients)
    assert len(asked) == 2
    accepted = interpolate(old, new, cuts, kept.alphas)
    found = sum(kl(accepted, x) for x in states.values()) / 3
    assert found == pytest.approx(kept.joint)
    assert 0.8 * 0.03 < found <= 0.03
    assert all(block.kl is not None and block.kl <= 0.02 < (block.wanted or 0.0) for block in kept.blocks)


# Budgets that adapt


def kept_with(alpha: float, kl: float, budget: float = 0.02) -> AcceptedStep:
    return AcceptedStep((AcceptedBlock("actor", 1.0, budget, alpha, kl),), None, math.inf, None)


def test_a_budget_widens_where_it_held_back_a_gain_and_tightens_where_it_allowed_a_loss() -> None:
    start = {"actor": 0.02}
    gained, lost, chance = [0.5, 0.4, 0.6], [-0.5, -0.4, -0.6], [0.5, -0.5, 0.1]
    for gains, alpha, kl, expected in (
        (gained, 0.7, 0.02, 0.03),
        (gained, 1.0, 0.02, 0.02),
        (lost, 0.7, 0.02, 0.01),
        (lost, 1.0, 0.011, 0.01),
        (lost, 1.0, 0.009, 0.02),
        (chance, 0.7, 0.02, 0.02),
        (gained[:1], 0.7, 0.02, 0.02),
    ):
        assert adapt_budgets(start, start, kept_with(alpha, kl), gains) == {"actor": pytest.approx(expected)}


def test_a_budget_stays_within_a_factor_of_ten() -> None:
    for gains, expected in (([1.0, 1.0], 0.2), ([-1.0, -1.0], 0.002)):
        budgets = {"actor": 0.02}
        for _ in range(20):
            kept = kept_with(0.5, budgets["actor"], budgets["actor"])
            budgets = adapt_budgets(budgets, {"actor": 0.02}, kept, gains)
        assert budgets["actor"] == pytest.approx(expected)


def test_no_limit_and_no_budget_stay_what_they_are() -> None:
    for budget in (0.0, math.inf):
        for gains in ([1.0, 1.0], [-1.0, -1.0]):
            assert adapt_budgets({"actor": budget}, {"actor": budget}, kept_with(0.0, 0.0), gains) == {"actor": budget}


@pytest.mark.parametrize("claims", [[1e200, -1.0, -1.0], [math.inf, -math.inf, 0.5], [-1.7e308, -1.7e308, -1.7e308]])
def test_a_client_that_claims_beyond_all_measure_does_not_stop_the_others(claims: list[float]) -> None:
    budgets = adapt_budgets({"actor": 0.02}, {"actor": 0.02}, kept_with(0.5, 0.02), claims)
    assert 0.002 <= budgets["actor"] <= 0.2
