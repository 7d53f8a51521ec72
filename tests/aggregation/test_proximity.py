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

from grpo_fed.aggregation.outliers import medians_of_others, weighted_median
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
from grpo_fed.aggregation.proximity.measured import (
    BACKTRACKING,
    BLOCK_FRACTIONS,
    JOINT_MULTIPLES,
    MAX_QUERIES,
    SAFETY,
    backtracking_steps,
    fraction_at_budget,
    joint_multiples,
)
from grpo_fed.policy.distributions import Categorical

SEEDS = st.integers(0, 2**32 - 1)
LIMITS = st.sampled_from([0.0, 1e-9, 1e-3, 0.02, 0.5, math.inf])
BLOCKS = {"torso": slice(0, 3), "actor": slice(3, 5)}

Measure = Callable[[StepFractions], float]


def run_search(
    budgets: Budgets, clients: Mapping[str, Measure], weights: Mapping[str, float] | None = None
) -> tuple[AcceptedStep, list[tuple[StepFractions, ...]]]:
    """Run a search with clients that always answer; return the accepted step and all queries."""
    search, asked = BudgetSearch(budgets, weights or dict.fromkeys(clients, 1.0)), []
    while steps := search.next_query():
        asked.append(steps)
        search = search.with_answers({name: [measure(step) for step in steps] for name, measure in clients.items()})
    return search.accepted(), asked


def bits(value: Tensor) -> list[int]:
    return value.view(torch.int32).tolist()


# Interpolation


def test_a_block_moves_by_its_fraction_of_the_step() -> None:
    old, new = torch.zeros(5), torch.tensor([1.0, 2.0, 4.0, 8.0, -8.0])
    actual = interpolate(old, new, list(BLOCKS.values()), (0.25, 0.5))
    assert actual.tolist() == [0.25, 0.5, 1.0, 4.0, -4.0]
    assert old.tolist() == [0.0] * 5


def test_fractions_0_and_1_of_a_step_are_exact() -> None:
    old = torch.tensor([0.1, -0.0, 1e-30, 3e38, -3e38])
    new = torch.tensor([-0.3, -0.0, 1e30, -3e38, 3e38])
    assert bits(interpolate(old, new, [slice(0, 5)], (1.0,))) == bits(new)
    assert bits(interpolate(old, new, [slice(0, 5)], (0.0,))) == bits(old)
    assert bits(interpolate(old, new, [slice(0, 2)], (1.0,))) == bits(torch.cat([new[:2], old[2:]]))


def test_a_full_step_moves_every_block_by_its_whole_step() -> None:
    accepted = full_step(["torso", "actor"])
    assert accepted.alphas == (1.0, 1.0)
    assert accepted.joint is None


# Quadratic


def test_the_quadratic_step_by_hand() -> None:
    """1/2 d'Fd is 1/2 * 3 * 4 = 6 for the torso, 24 times its budget, and 1/2 * (0.04 + 0.04) for the actor's 0.05."""
    step, fisher = torch.tensor([2.0, 2.0, 2.0, 0.2, -0.1]), torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])
    accepted = predicted_step(step, fisher, BLOCKS, Budgets({"torso": 0.25, "actor": 0.05}))
    assert accepted.alphas == (pytest.approx(24**-0.5), 1.0)
    assert [block.wanted for block in accepted.blocks] == pytest.approx([6.0, 0.04])
    assert [block.kl for block in accepted.blocks] == pytest.approx([0.25, 0.04])
    assert (accepted.joint_wanted, accepted.joint) == (pytest.approx(6.04), pytest.approx(0.29))


def test_the_joint_budget_shrinks_all_blocks_alike() -> None:
    """0.25 + 0.04 is 4 times the joint budget: half of each step."""
    step, fisher = torch.tensor([2.0, 2.0, 2.0, 0.2, -0.1]), torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])
    accepted = predicted_step(step, fisher, BLOCKS, Budgets({"torso": 0.25, "actor": 0.05}, joint=0.0725))
    assert accepted.alphas == pytest.approx((0.5 * 24**-0.5, 0.5))
    assert accepted.joint == pytest.approx(0.0725)


@given(SEEDS, LIMITS, LIMITS, LIMITS)
def test_a_quadratic_step_is_within_its_budgets(seed: int, torso: float, actor: float, joint: float) -> None:
    generator = np.random.default_rng(seed)
    step = torch.from_numpy(generator.normal(size=5) * np.exp(3 * generator.normal())).float()
    fisher = torch.from_numpy(generator.exponential(size=5) * generator.integers(0, 2, 5)).float()
    accepted = predicted_step(step, fisher, BLOCKS, Budgets({"torso": torso, "actor": actor}, joint))
    for block in accepted.blocks:
        assert block.kl is not None
        assert block.kl <= block.budget
        assert 0.0 <= block.alpha <= 1.0
        assert block.alpha == 0.0 or block.budget > 0
    assert accepted.joint is not None
    assert accepted.joint <= joint
    if torso == actor == joint == math.inf:
        assert accepted.alphas == (1.0, 1.0)


@given(SEEDS)
def test_the_quadratic_step_is_the_nearest_point_within_the_budget(seed: int) -> None:
    """The nearest point in the norm of the Fisher matrix, subject to 1/2 x'Fx within the budget."""
    generator = np.random.default_rng(seed)
    step, fisher = generator.normal(size=3), generator.exponential(size=3) + 0.1
    budget = float(0.5 * fisher @ step**2 * generator.uniform(0.1, 2.0))
    accepted = predicted_step(
        torch.from_numpy(step), torch.from_numpy(fisher), {"b": slice(0, 3)}, Budgets({"b": budget})
    )
    nearest = minimize(
        lambda x: 0.5 * fisher @ (x - step) ** 2,
        np.zeros(3),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: budget - 0.5 * fisher @ x**2},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(accepted.alphas[0] * step, nearest.x, atol=1e-4)


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_joint_kl_is_at_most_blocks_times_the_sum(seed: int, sizes: list[int]) -> None:
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


# Estimates of the measured search, by hand


@pytest.mark.parametrize(
    ("kl", "budget", "fraction"),
    [
        ((0.32, 0.02, 0.00125), 0.5, 1.0),
        ((0.32, 0.02, 0.00125), 0.08, SAFETY / 2),  # KL grows as the square: a quarter of it at half of the step
        ((0.32, 0.02, 0.00125), 0.02, 1 / 4),  # measured to be within, so not shortened by SAFETY
        ((4.0, 1.0, 0.25), 2.0, SAFETY / 2),  # as the power 1/2 of the fraction: 2^(1/2 * 2) = 2 above 1/4
        ((0.32, 0.02, 0.004), 0.001, SAFETY / 32),  # below the smallest fraction as the square: a quarter at its half
        ((math.inf, 0.02, 0.004), 0.03, 1 / 4),
        ((0.32, 0.0, 0.0), 0.01, 1 / 4),
        ((math.inf, math.inf, math.inf), math.inf, 1.0),
        ((0.0, 0.0, 0.0), 0.0, 0.0),
    ],
)
def test_the_fraction_at_a_budget_by_hand(kl: tuple[float, ...], budget: float, fraction: float) -> None:
    assert fraction_at_budget(kl, budget) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("alone", "together", "limits", "joint", "shrink"),
    [
        ([0.02, 0.02], 0.08, [0.01, 0.01], 0.01, 0.5),  # twice the sum: 0.04 within the limits, a quarter is allowed
        ([0.02, 0.02], 0.01, [0.01, 0.01], 0.005, 0.5),  # less than the sum counts as the sum: 0.02
        ([0.02, 0.02], 1.0, [0.01, 0.01], 0.01, 0.5),  # more than twice the sum cannot be for two blocks: 0.04
        ([0.02, 0.02], math.inf, [0.01, 0.01], 0.01, 0.5),
        ([0.02, 0.02], 0.04, [0.01, 0.01], 0.02, 1.0),
        ([math.inf, 0.02], math.inf, [math.inf, 0.01], 0.02, 0.5),  # nothing is known, so half
    ],
)
def test_the_joint_multiples_by_hand(
    alone: list[float], together: float, limits: list[float], joint: float, shrink: float
) -> None:
    expected = sorted({1.0, *(min(1.0, shrink * multiple) for multiple in JOINT_MULTIPLES)}, reverse=True)
    assert joint_multiples(alone, together, limits, joint) == pytest.approx(expected)


def test_backtracking_halves_the_largest_fractions_within_budget() -> None:
    measured = [
        ((1.0, 1.0), 0.01),  # two blocks together tell nothing of one alone
        ((1.0, 0.0), 0.5),
        ((0.25, 0.0), 0.01),
        ((0.0625, 0.0), 0.001),
        ((0.0, 1.0), 0.001),
    ]
    steps = backtracking_steps(measured, [0.02, 0.02])
    assert steps[:3] == [(0.25, 1.0), (0.125, 0.5), (0.0625, 0.25)]
    assert len(steps) == len(BACKTRACKING)
    assert backtracking_steps([((1.0,), 0.5)], [0.02])[0] == (0.0,)


# Measured, by hand


def test_a_whole_step_within_all_budgets_needs_one_query() -> None:
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, joint=0.05)
    accepted, asked = run_search(budgets, {"a": lambda step: 0.01 * sum(step) ** 2})
    assert accepted.alphas == (1.0, 1.0)
    assert [block.wanted for block in accepted.blocks] == [block.kl for block in accepted.blocks] == [0.01, 0.01]
    assert accepted.joint_wanted == accepted.joint == 0.04
    assert accepted.clients == ("a",)
    assert len(asked) == 1
    assert len(asked[0]) == 1 + 2 * len(BLOCK_FRACTIONS)


def test_a_block_over_its_budget_meets_it_in_two_queries() -> None:
    """KL 0.5 alpha^2 is 0.02 at 0.2; the other block, uncoupled, goes all its way: a common shrink would not let it."""
    budgets = Budgets({"torso": 0.02, "actor": 0.02})
    accepted, asked = run_search(budgets, {"a": lambda step: 0.5 * step[0] ** 2 + 0.001 * step[1] ** 2})
    assert len(asked) == 2
    assert 0.19 < accepted.alphas[0] <= 0.2
    assert accepted.alphas[1] == 1.0
    assert accepted.blocks[0] == AcceptedBlock("torso", 0.5, 0.02, accepted.alphas[0], 0.5 * accepted.alphas[0] ** 2)


def test_the_joint_budget_shrinks_the_steps_of_all_blocks() -> None:
    """Two blocks that pull alike: each alone at 0.02, together at 0.08; half of each is 0.02."""
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, joint=0.02)
    accepted, asked = run_search(budgets, {"a": lambda step: 0.02 * sum(step) ** 2})
    assert len(asked) == 2
    assert accepted.alphas == pytest.approx((0.5, 0.5), rel=0.03)
    assert accepted.joint is not None
    assert 0.018 < accepted.joint <= 0.02
    assert accepted.joint_wanted == 0.08


def test_budgets_hold_for_the_weighted_mean_or_the_worst_client() -> None:
    """0.02 and 0.06 with weights 3 and 1 are 0.03 in the mean; alpha is the root of what is allowed."""
    clients = {"calm": lambda step: 0.02 * step[0] ** 2, "wild": lambda step: 0.06 * step[0] ** 2}
    weights = {"calm": 3.0, "wild": 1.0}
    mean, _ = run_search(Budgets({"torso": 0.015}), clients, weights)
    worst, _ = run_search(Budgets({"torso": 0.015}, over="worst"), clients, weights)
    assert mean.joint_wanted == pytest.approx(0.03)
    assert worst.joint_wanted == pytest.approx(0.06)
    assert mean.alphas == pytest.approx((0.5**0.5,), rel=0.03)
    assert worst.alphas == pytest.approx((0.5,), rel=0.03)


def test_a_client_without_weight_counts_only_for_the_worst() -> None:
    clients = {"calm": lambda step: 0.01 * step[0], "weightless": lambda _: math.inf}
    weights = {"calm": 1.0, "weightless": 0.0}
    assert run_search(Budgets({"torso": 0.02}), clients, weights)[0].alphas == (1.0,)
    assert run_search(Budgets({"torso": 0.02}, over="worst"), clients, weights)[0].alphas == (0.0,)


def test_clients_without_a_valid_answer_are_left_out() -> None:
    """No answer, too few numbers, a stranger; then all that is left is accepted."""
    search = BudgetSearch(Budgets({"torso": 0.02}), {"a": 1.0, "b": 1.0, "c": 1.0})
    steps = search.next_query()
    fine, bad = [0.01] * len(steps), [9.0] * len(steps)
    accepted = search.with_answers({"a": fine, "b": bad[1:], "stranger": bad}).accepted()
    assert accepted.alphas == (1.0,)
    assert accepted.clients == ("a",)


def test_a_query_without_answers_is_repeated_and_nothing_moves() -> None:
    search, asked = BudgetSearch(Budgets({"torso": 0.02}), {"a": 1.0}), []
    while steps := search.next_query():
        asked.append(steps)
        search = search.with_answers({})
    assert len(asked) == MAX_QUERIES
    assert asked[0] == asked[1] == asked[2]
    assert search.accepted() == AcceptedStep((AcceptedBlock("torso", None, 0.02, 0.0, 0.0),), None, math.inf, 0.0)


def test_infinite_budgets_accept_the_whole_step_whatever_is_measured() -> None:
    budgets = Budgets({"torso": math.inf, "actor": math.inf})
    for answers in ({}, {"a": [math.nan] * 3}, {"a": [1e300] * 3}):
        accepted = BudgetSearch(budgets, {"a": 1.0}).with_answers(answers).accepted()
        assert accepted.alphas == (1.0, 1.0)


def test_a_budget_of_0_moves_nothing() -> None:
    """Not even what has no KL; the others move as they may."""
    nothing, asked = run_search(Budgets({"torso": 1.0, "actor": 1.0}, joint=0.0), {"a": lambda _: 0.0})
    assert (nothing.alphas, asked) == ((0.0, 0.0), [])
    nothing, asked = run_search(Budgets({"torso": 0.0, "actor": 0.0}), {"a": lambda _: 0.0})
    assert (nothing.alphas, asked) == ((0.0, 0.0), [])
    accepted, _ = run_search(Budgets({"torso": 0.0, "actor": 0.1}), {"a": lambda step: 0.1 * step[1] + step[0]})
    assert accepted.alphas == (0.0, 1.0)
    assert accepted.blocks[0] == AcceptedBlock("torso", 1.0, 0.0, 0.0, 0.0)
    assert accepted.joint_wanted == 1.1


def test_a_kl_that_is_not_finite_is_within_no_budget() -> None:
    for wrong in (math.nan, math.inf):
        accepted, _ = run_search(
            Budgets({"torso": 0.02, "actor": 0.02}), {"a": lambda t, wrong=wrong: wrong if t[0] else 0.0}
        )
        assert accepted.alphas == (0.0, 1.0)


def test_an_infinite_kl_of_the_whole_step_allows_part() -> None:
    """How the blocks add up is unknown, so they are taken to add up most: 0.02 * 2^2 is 4 times the budget."""

    def breaks(step: StepFractions) -> float:
        return math.inf if sum(step) > 1.5 else 0.02 * sum(step) ** 2

    accepted, asked = run_search(Budgets({"torso": 0.02, "actor": 0.02}, joint=0.02), {"a": breaks})
    assert len(asked) == 2
    assert accepted.alphas == pytest.approx((0.5, 0.5))


def test_a_wrong_estimate_leads_to_backtracking() -> None:
    """Within its budget at 1/4 and below 1/50 but nowhere between: only the third message finds it again."""

    def gap(step: StepFractions) -> float:
        return 0.01 if step[0] == 0.25 or step[0] < 0.02 else 1.0

    accepted, asked = run_search(Budgets({"torso": 0.02}), {"a": gap})
    assert len(asked) == 3
    assert accepted.alphas == (0.25,)


# Measured, for any KL


def monotone(generator: np.random.Generator, blocks: int) -> Measure:
    """A quadratic form that couples the blocks, bent, so that it grows as another power than 2."""
    root = generator.normal(size=(generator.integers(1, 4), blocks)) * np.exp(2 * generator.normal(size=blocks))
    power = generator.uniform(0.5, 2.0)
    return lambda step: float((root @ np.array(step)) @ (root @ np.array(step))) ** power


def irregular(generator: np.random.Generator, blocks: int) -> Measure:
    """Up and down along every way, with jumps, and sometimes no number."""
    inner, seed = monotone(generator, blocks), int(generator.integers(2**32))
    waves = generator.normal(size=blocks) * 30

    def measure(step: StepFractions) -> float:
        jump = np.random.default_rng([seed, hash(step) % 2**32]).choice([0.0, 0.01, 1.0, 1.0, 10.0, math.inf, math.nan])
        return inner(step) * float(np.sin(waves @ np.array(step)) ** 2 * jump)

    return measure


@given(
    SEEDS,
    st.sampled_from([monotone, irregular]),
    st.lists(LIMITS, min_size=1, max_size=4),
    LIMITS,
    st.sampled_from(["mean", "median", "worst"]),
)
def test_no_accepted_step_exceeds_a_budget_where_it_was_measured(
    seed: int, kind: Callable[[np.random.Generator, int], Measure], limits: list[float], joint: float, over: str
) -> None:
    """The test keeps all answers, and looks at those of the clients that answered the query with the accepted step."""
    generator = np.random.default_rng(seed)
    count = len(limits)
    weights = {name: float(generator.uniform(0.1, 2.0)) for name in "abc"}
    measures = {name: kind(generator, count) for name in weights}
    budgets = Budgets({f"block {i}": limit for i, limit in enumerate(limits)}, joint, over)  # type: ignore[arg-type]
    search, record = BudgetSearch(budgets, weights), []
    while steps := search.next_query():
        answers = {name: [m(step) for step in steps] for name, m in measures.items() if generator.random() < 0.8}
        record.append((steps, answers))
        search = search.with_answers(answers)
    accepted = search.accepted()
    assert len(record) <= MAX_QUERIES

    def within(step: StepFractions, limit: float) -> bool:
        if limit == math.inf or not any(step):
            return True
        counted = [
            (steps, {name: kl for name, kl in answers.items() if name not in search.set_aside})
            for steps, answers in record
        ]
        return any(
            step in steps and answers and everyone([answers[n][steps.index(step)] for n in answers], answers) <= limit
            for steps, answers in counted
            if tuple(sorted(answers)) == accepted.clients
        )

    def everyone(kl: Sequence[float], names: Mapping[str, object]) -> float:
        if over == "median":
            least = [
                limit
                for limit in kl
                if 2 * sum(weights[n] for n, one in zip(names, kl, strict=True) if one <= limit)
                >= sum(weights[n] for n in names)
            ]
            return min(least, default=math.inf)
        if any(math.isnan(one) for one in kl):
            return math.inf
        return max(kl) if over == "worst" else float(np.average(kl, weights=[weights[n] for n in names])) * (1 - 1e-12)

    alphas = accepted.alphas
    assert all(0.0 <= alpha <= 1.0 for alpha in alphas)
    assert within(alphas, joint)
    for number, (alpha, limit) in enumerate(zip(alphas, limits, strict=True)):
        assert within(tuple(alpha if other == number else 0.0 for other in range(count)), limit)
        assert alpha == 0.0 or (limit > 0 and joint > 0)
    if all(limit == math.inf for limit in (*limits, joint)):
        assert alphas == (1.0,) * count


@given(SEEDS, st.integers(1, 6), st.booleans())
def test_two_queries_are_enough_where_kl_is_quadratic(seed: int, blocks: int, pull_alike: bool) -> None:
    """And where the blocks' steps add up, at least half of the best: each block's root, then one shrink of all."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(4, blocks)) * np.exp(generator.normal(size=blocks))
    root = np.abs(root) if pull_alike else root
    limits, joint = np.exp(generator.normal(size=blocks) - 2), float(np.exp(generator.normal() - 1))
    budgets = Budgets({str(i): float(limit) for i, limit in enumerate(limits)}, joint)
    accepted, asked = run_search(budgets, {"a": lambda step: float(np.square(root @ np.array(step)).sum())})
    assert len(asked) <= 2
    assert all(accepted.alphas)
    if pull_alike:
        best = np.minimum(1, np.sqrt(limits / np.square(root).sum(0)))
        best *= min(1, np.sqrt(joint / np.square(root @ best).sum()))
        assert (np.array(accepted.alphas) >= 0.5 * best).all()


def test_a_query_asks_for_few_steps_and_for_each_once() -> None:
    for blocks in (1, 3, 6):
        budgets = Budgets({str(i): 0.01 for i in range(blocks)}, 0.02)
        _, asked = run_search(budgets, {"a": lambda step: sum(step) ** 2})
        for steps, most in zip(
            asked, (len(BLOCK_FRACTIONS), len(JOINT_MULTIPLES) + 1, len(BACKTRACKING)), strict=False
        ):
            assert len(set(steps)) == len(steps) <= 1 + most * (blocks + 1)


def test_the_order_of_answers_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    clients = {name: monotone(generator, 2) for name in "dbca"}
    weights = {name: float(generator.uniform()) for name in clients}
    budgets = Budgets({"torso": 0.02, "actor": 0.02}, 0.03)
    for order in itertools.permutations(clients):
        assert run_search(budgets, {name: clients[name] for name in order}, weights) == run_search(
            budgets, clients, weights
        )


def test_a_neural_policy_stays_within_its_budgets_on_clients_states() -> None:
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
    clients = {n: lambda step, x=x: kl(interpolate(old, new, cuts, step), x) for n, x in states.items()}  # type: ignore[misc]
    accepted, asked = run_search(budgets, clients)
    assert len(asked) == 2
    moved = interpolate(old, new, cuts, accepted.alphas)
    actual = sum(kl(moved, x) for x in states.values()) / 3
    assert actual == pytest.approx(accepted.joint)
    assert 0.8 * 0.03 < actual <= 0.03
    assert all(block.kl is not None and block.kl <= 0.02 < (block.wanted or 0.0) for block in accepted.blocks)


# Budgets that adapt


def accepted_step(alpha: float, kl: float, budget: float = 0.02) -> AcceptedStep:
    return AcceptedStep((AcceptedBlock("actor", 1.0, budget, alpha, kl),), None, math.inf, None)


def test_a_budget_widens_after_gains_and_tightens_after_losses() -> None:
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
        assert adapt_budgets(start, start, accepted_step(alpha, kl), gains) == {"actor": pytest.approx(expected)}


def test_a_budget_stays_within_a_factor_of_ten() -> None:
    for gains, expected in (([1.0, 1.0], 0.2), ([-1.0, -1.0], 0.002)):
        budgets = {"actor": 0.02}
        for _ in range(20):
            accepted = accepted_step(0.5, budgets["actor"], budgets["actor"])
            budgets = adapt_budgets(budgets, {"actor": 0.02}, accepted, gains)
        assert budgets["actor"] == pytest.approx(expected)


def test_zero_and_infinite_budgets_do_not_adapt() -> None:
    for budget in (0.0, math.inf):
        for gains in ([1.0, 1.0], [-1.0, -1.0]):
            assert adapt_budgets({"actor": budget}, {"actor": budget}, accepted_step(0.0, 0.0), gains) == {
                "actor": budget
            }


@pytest.mark.parametrize("claims", [[1e200, -1.0, -1.0], [math.inf, -math.inf, 0.5], [-1.7e308, -1.7e308, -1.7e308]])
def test_an_absurd_gain_keeps_budgets_within_their_range(claims: list[float]) -> None:
    budgets = adapt_budgets({"actor": 0.02}, {"actor": 0.02}, accepted_step(0.5, 0.02), claims)
    assert 0.002 <= budgets["actor"] <= 0.2


# Clients that lie about their KL -------------------------------------------------------------------------------------

HONEST = dict(zip("abcd", (0.05, 0.08, 0.1, 0.12), strict=True))
LIES: dict[str, Callable[[float], float]] = {
    "1e300": lambda size: 1e300,
    "1": lambda size: 1.0,
    "NaN": lambda size: math.nan,
    "infinity": lambda size: math.inf,
    "1e300 times a square": lambda size: 1e300 * size**2,
    "0": lambda size: 0.0,
}


def search_with_liar(lie: str, over: str, blocks: int = 2) -> tuple[AcceptedStep, BudgetSearch]:
    """Search with four honest clients, whose KL grows as the square of the step, and one liar."""
    budgets = Budgets({f"block {number}": 0.02 for number in range(blocks)}, 0.05, over)  # type: ignore[arg-type]
    search = BudgetSearch(budgets, dict.fromkeys([*HONEST, "liar"], 1.0))
    while steps := search.next_query():
        sizes = [math.hypot(*step) for step in steps]
        answers = {name: [scale * size**2 for size in sizes] for name, scale in HONEST.items()}
        search = search.with_answers({**answers, "liar": [LIES[lie](size) for size in sizes]})
    return search.accepted(), search


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("over", ["mean", "median"])
def test_no_single_client_holds_back_the_steps_of_all(lie: str, over: str) -> None:
    """Without a liar the fractions are about 0.48: the mean of the honest is 0.0875, and 0.0875 x 0.48^2 is 0.02."""
    accepted, search = search_with_liar(lie, over)
    assert min(accepted.alphas) > 0.3
    honest = [scale * math.hypot(*accepted.alphas) ** 2 for scale in HONEST.values()]
    assert np.mean(honest) <= 0.0501 * 5 / 4, "a fifth of the weight cannot do more than claim a KL of 0"
    if over == "mean" and lie != "0":
        assert list(search.set_aside) == ["liar"]
        assert "liar" not in accepted.clients


def test_honest_clients_that_differ_are_not_set_aside() -> None:
    """A client on whose states the step is 100 times as large counts as all others."""
    budgets = Budgets({"actor": 0.02}, math.inf)
    search = BudgetSearch(budgets, dict.fromkeys([*HONEST, "far"], 1.0))
    while steps := search.next_query():
        answers = {name: [scale * step[0] ** 2 for step in steps] for name, scale in {**HONEST, "far": 8.0}.items()}
        search = search.with_answers(answers)
    assert not search.set_aside
    assert float(np.mean([*HONEST.values(), 8.0])) * search.accepted().alphas[0] ** 2 <= 0.02


def test_two_clients_cannot_tell_which_of_them_lies() -> None:
    budgets = Budgets({"actor": 0.02}, math.inf)
    search = BudgetSearch(budgets, {"a": 1.0, "b": 1.0})
    while steps := search.next_query():
        search = search.with_answers({"a": [0.1 * step[0] ** 2 for step in steps], "b": [1e300] * len(steps)})
    assert not search.set_aside
    assert search.accepted().alphas == (0.0,)


def test_medians_of_others_by_hand() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 100.0, "zero": 0.0, "nan": math.nan, "inf": math.inf}
    assert medians_of_others(values) == {"a": 3, "b": 3, "c": 2, "d": 2, "zero": 3, "nan": 3, "inf": 3}
    assert set(medians_of_others({"a": 1.0, "b": 2.0}).values()) == {math.inf}


def test_the_weighted_median_by_hand() -> None:
    assert weighted_median([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == 2.0
    assert weighted_median([3.0, 1.0], [1.0, 1.0]) == 1.0
    assert weighted_median([3.0, 1.0], [3.0, 1.0]) == 3.0
    assert weighted_median([3.0, 0.0], [1.0, 0.0]) == 3.0
    assert weighted_median([], []) == math.inf
