"""Group penalties: the proximal steps against numerical minimisers, their exact zeros, and what they do under Adam."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.groups import Groups, cut_groups
from grpo_fed.rl import penalty
from grpo_fed.rl.penalty import (
    preconditioned_proximal,
    proximal,
    proximal_group,
    proximal_nested,
    proximal_sparse_group,
)
from grpo_fed.rl.preconditioned import preconditioned_group, preconditioned_nested
from grpo_fed.scenario.settings import PenaltySettings, PolicySettings

SHAPES = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (1, 4), "c.weight": (1, 2)}
LAYOUT = Layout.from_shapes(SHAPES.items(), PolicySettings())
GROUPS = cut_groups(LAYOUT, {"a": "row", "b": {"left": {"b.weight:columns": [0, 1]}}}, only=LAYOUT.select(["a", "b"]))
"""Two rows of four in block a, two pairs in block b, and the two columns of block c in no group."""
MEMBERS = {"a": [[0, 1, 2, 6], [3, 4, 5, 7]], "b": [[8, 9], [10, 11]]}
"""The same written by hand."""
P, LOOSE = 14, [12, 13]

Kind = Literal["group", "sparse-group", "nested"]
KINDS: list[Kind] = ["group", "sparse-group", "nested"]


def penalty_settings(
    kind: Kind, toward: Literal["zero", "shared"] = "zero", l1: float = 0.0, outer: float = 0.0
) -> PenaltySettings:
    return PenaltySettings(kind=kind, toward=toward, l1=l1, outer=outer)


def as_bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def normal(seed: int, clients: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[K, P] with groups of unlike lengths, some of them exactly 0."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(clients, P)) * np.exp(generator.normal(size=(clients, P)))
    x[:, MEMBERS["b"][generator.integers(2)]] = 0.0
    return torch.from_numpy(x).to(dtype)


# Numbers by hand


def test_a_group_is_shortened_by_the_threshold_times_its_root_size() -> None:
    x = torch.zeros(1, P)
    x[0, [0, 1]] = torch.tensor([3.0, -4.0])  # length 5, four members: 1 * sqrt(4) = 2 shorter
    x[0, [10, 11]] = torch.tensor([0.6, 0.8])  # length 1, two members: within sqrt(2)
    x[0, LOOSE] = 0.25
    expected = torch.zeros(1, P)
    expected[0, [0, 1]] = torch.tensor([1.8, -2.4])
    expected[0, LOOSE] = 0.25
    torch.testing.assert_close(proximal_group(x, GROUPS, 1.0), expected)


def test_l1_shrinks_each_entry_before_the_group() -> None:
    x = torch.zeros(1, P)
    x[0, [0, 1, 2]] = torch.tensor([3.5, -4.5, 0.25])  # less 0.5: 3, -4, 0; then 2 shorter
    x[0, LOOSE] = 0.25
    expected = torch.zeros(1, P)
    expected[0, [0, 1]] = torch.tensor([1.8, -2.4])
    expected[0, LOOSE] = 0.25
    torch.testing.assert_close(proximal_sparse_group(x, GROUPS, 1.0, 0.5), expected)


def test_a_block_is_shortened_after_its_groups() -> None:
    x = torch.zeros(1, P)
    x[0, [0, 3]] = torch.tensor([5.0, 6.0])  # each 2 shorter: 3 and 4, length 5; then sqrt(8) shorter
    expected = torch.zeros(1, P)
    expected[0, [0, 3]] = torch.tensor([3.0, 4.0]) * (1 - 8**0.5 / 5)
    torch.testing.assert_close(proximal_nested(x, GROUPS, 1.0, 1.0), expected)


def test_penalty_values_match_a_worked_example() -> None:
    x = torch.zeros(2, P)
    x[0, [0, 1]] = torch.tensor([3.0, -4.0])  # 2 * 5
    x[1, [8, 9]] = torch.tensor([-1.0, 1.0])  # sqrt(2) * sqrt(2)
    x[:, LOOSE] = 9.0
    weight = torch.tensor([[0.1], [10.0]])
    of = {
        kind: penalty.penalty_value(x, None, penalty_settings(kind, l1=0.5, outer=2.0), GROUPS, weight)
        for kind in KINDS
    }
    torch.testing.assert_close(of["group"], torch.tensor([1.0, 20.0]))
    torch.testing.assert_close(of["sparse-group"], torch.tensor([1.0 + 0.5 * 7, 20.0 + 0.5 * 2]))
    torch.testing.assert_close(of["nested"], torch.tensor([1.0 + 2 * 8**0.5 * 5, 20.0 + 2 * 2 * 2**0.5]))
    moved = penalty.penalty_value(x + 3.0, torch.full_like(x, 3.0), penalty_settings("group", "shared"), GROUPS, weight)
    torch.testing.assert_close(moved, of["group"])


# Against a minimiser


def objective(z: np.ndarray, x: np.ndarray, weight: float, l1: float, outer: float, smooth: float) -> tuple[float, Any]:
    """1/2 ||z - x||^2 + penalty(z) of one client and its gradient; a norm is sqrt(z'z + smooth^2)."""
    value, gradient = 0.5 * float((z - x) @ (z - x)), z - x
    norms = [(weight, group) for groups in MEMBERS.values() for group in groups if weight]
    norms += [(outer, groups[0] + groups[1]) for groups in MEMBERS.values() if outer]
    for strength, entries in norms:
        length = np.sqrt(z[entries] @ z[entries] + smooth**2)
        value += strength * len(entries) ** 0.5 * length
        gradient[entries] += strength * len(entries) ** 0.5 * z[entries] / max(length, 1e-300)
    sizes = np.sqrt(z[:12] ** 2 + smooth**2)
    gradient[:12] += l1 * z[:12] / np.maximum(sizes, 1e-300)
    return value + l1 * float(sizes.sum()), gradient


def minimise_numerically(x: np.ndarray, weight: float, l1: float, outer: float) -> np.ndarray:
    """The minimum by quasi-Newton steps on ever less smoothed norms."""
    z = x
    for smooth in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 30}
        z = minimize(objective, z, (x, weight, l1, outer, smooth), "L-BFGS-B", jac=True, options=options).x
    return z


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.floats(0.0, 1.5),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 2.0),
    st.booleans(),
)
def test_the_proximal_step_minimises_its_objective(
    seed: int, kind: Kind, weight: float, l1: float, outer: float, step: float, anchored: bool
) -> None:
    x = normal(seed, 1, torch.float64)
    anchor = normal(seed + 1, 1, torch.float64) if anchored else None
    ours = proximal(
        x, anchor, penalty_settings(kind, "shared" if anchored else "zero", l1, outer), GROUPS, step, weight
    )
    strengths = (step * weight, step * l1 * (kind == "sparse-group"), step * outer * (kind == "nested"))
    base = torch.zeros_like(x) if anchor is None else anchor
    target, point = (x - base)[0].numpy(), (ours - base)[0].numpy()
    theirs = minimise_numerically(target, *strengths)
    assert objective(point, target, *strengths, 0.0)[0] <= objective(theirs, target, *strengths, 0.0)[0] + 1e-6
    np.testing.assert_allclose(point, theirs, rtol=0, atol=2e-4)


# Properties

inputs = st.integers(0, 2**32 - 1)
strengths = st.floats(0.0, 3.0)


@settings(deadline=None, max_examples=40)
@given(inputs, st.sampled_from(KINDS), strengths, strengths, strengths)
def test_the_proximal_step_is_nonexpansive(seed: int, kind: Kind, weight: float, l1: float, outer: float) -> None:
    x, y, anchor = (normal(seed + i, 3) for i in range(3))
    for towards in (None, anchor):
        settings_ = penalty_settings(kind, "zero" if towards is None else "shared", l1, outer)
        mapped = [proximal(point, towards, settings_, GROUPS, 0.5, weight) for point in (x, y)]
        apart = torch.linalg.vector_norm((mapped[0] - mapped[1]).double(), dim=1)
        before = torch.linalg.vector_norm((x - y).double(), dim=1)
        assert (apart <= before * (1 + 1e-6) + 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(inputs, st.sampled_from(KINDS))
def test_a_threshold_of_zero_changes_no_bit(seed: int, kind: Kind) -> None:
    x, anchor = normal(seed, 3) * 10.0 ** np.random.default_rng(seed).integers(-40, 30), normal(seed + 1, 3)
    for weight in (0.0, torch.zeros(3, 1)):
        assert torch.equal(as_bits(proximal(x, None, penalty_settings(kind), GROUPS, 0.1, weight)), as_bits(x))
        assert torch.equal(
            as_bits(proximal(x, anchor, penalty_settings(kind, "shared"), GROUPS, 0.1, weight)), as_bits(x)
        )


@settings(deadline=None, max_examples=40)
@given(inputs, st.sampled_from(KINDS), st.sampled_from([1e3, 1e15, 1e37]))
def test_a_huge_threshold_leaves_exactly_zero_or_exactly_the_anchor(seed: int, kind: Kind, huge: float) -> None:
    x, anchor = normal(seed, 3), normal(seed + 1, 3)
    assume(x.abs().max() < 1e3 and (x - anchor).abs().max() < 1e3)
    zeros, anchored = x.clone(), x.clone()
    zeros[:, :12], anchored[:, :12] = 0.0, anchor[:, :12]
    assert torch.equal(proximal(x, None, penalty_settings(kind, l1=huge, outer=huge), GROUPS, 1.0, huge), zeros)
    after = proximal(x, anchor, penalty_settings(kind, "shared", l1=huge, outer=huge), GROUPS, 1.0, huge)
    assert torch.equal(as_bits(after), as_bits(anchored))


def test_an_infinite_threshold_zeroes_exactly_what_is_in_a_group() -> None:
    x = normal(0, 2)
    expected = x.clone()
    expected[:, :12] = 0.0
    endless = float("inf")
    assert torch.equal(proximal_group(x, GROUPS, endless), expected)
    assert torch.equal(proximal_sparse_group(x, GROUPS, 0.0, endless), expected)
    assert torch.equal(proximal_nested(x, GROUPS, 0.0, endless), expected)


@settings(deadline=None, max_examples=40)
@given(inputs, st.sampled_from(KINDS), strengths)
def test_a_group_without_departure_equals_the_anchor_bit_for_bit(seed: int, kind: Kind, weight: float) -> None:
    x, anchor = normal(seed, 4), normal(seed + 1, 4)
    after = proximal(x, anchor, penalty_settings(kind, "shared", outer=0.2), GROUPS, 0.3, weight)
    shrunk = proximal(x - anchor, None, penalty_settings(kind, outer=0.2), GROUPS, 0.3, weight)
    gone = shrunk == 0
    assert torch.equal(as_bits(after[gone]), as_bits(anchor[gone]))
    assert torch.equal(as_bits(after[:, LOOSE]), as_bits(x[:, LOOSE]))


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), st.booleans(), st.permutations(range(4)))
def test_a_clients_step_is_the_same_alone_and_in_a_stack(
    seed: int, kind: Kind, anchored: bool, order: list[int]
) -> None:
    x, anchor = normal(seed, 4), normal(seed + 1, 4) if anchored else None
    step, weight = torch.tensor([[0.1], [0.2], [0.3], [1.0]]), torch.tensor([[1.0], [0.0], [3.0], [0.1]])
    settings_ = penalty_settings(kind, "shared" if anchored else "zero", l1=0.3, outer=0.2)

    def rows(of: list[int]) -> Tensor:
        towards = None if anchor is None else anchor[of]
        return proximal(x[of], towards, settings_, GROUPS, step[of], weight[of])

    together = rows([0, 1, 2, 3])
    assert torch.equal(as_bits(rows(order)), as_bits(together[order]))
    for client in range(4):
        assert torch.equal(as_bits(rows([client])), as_bits(together[[client]]))


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), st.permutations(range(4)), st.permutations(range(P)))
def test_the_order_of_groups_and_of_parameters_does_not_matter(
    seed: int, kind: Kind, names: list[int], columns: list[int]
) -> None:
    x, settings_ = normal(seed, 2), penalty_settings(kind, l1=0.1, outer=0.2)
    before = proximal(x, None, settings_, GROUPS, 0.5, 1.0)

    rank = torch.tensor([names.index(group) for group in range(4)] + [-1])
    renamed = Groups(
        tuple(GROUPS.names[name] for name in names),
        rank[GROUPS.ids],
        GROUPS.sizes[names],
        tuple(GROUPS.blocks[name] for name in names),
    )
    assert torch.equal(as_bits(proximal(x, None, settings_, renamed, 0.5, 1.0)), as_bits(before))

    moved = Groups(GROUPS.names, GROUPS.ids[columns], GROUPS.sizes, GROUPS.blocks)
    after = proximal(x[:, columns], None, settings_, moved, 0.5, 1.0)
    torch.testing.assert_close(after, before[:, columns])
    assert torch.equal(after == 0, before[:, columns] == 0)


@settings(deadline=None, max_examples=30)
@given(inputs, strengths, strengths)
def test_penalties_without_extra_terms_equal_the_group_penalty(seed: int, weight: float, l1: float) -> None:
    x = normal(seed, 3)
    group = proximal_group(x, GROUPS, weight)
    assert torch.equal(as_bits(proximal_sparse_group(x, GROUPS, weight, 0.0)), as_bits(group))
    assert torch.equal(as_bits(proximal_nested(x, GROUPS, weight, 0.0)), as_bits(group))
    torch.testing.assert_close(proximal_nested(x, GROUPS, 0.0, weight), proximal_group(x, GROUPS.as_blocks, weight))
    soft = torch.nn.functional.softshrink(x, l1)
    soft[:, LOOSE] = x[:, LOOSE]
    torch.testing.assert_close(proximal_sparse_group(x, GROUPS, 0.0, l1), soft, rtol=0, atol=0)


def test_the_nested_step_equals_two_steps_in_turn() -> None:
    x = normal(5, 6)
    in_turn = proximal_group(proximal_group(x, GROUPS, 0.3), GROUPS.as_blocks, 0.4)
    torch.testing.assert_close(proximal_nested(x, GROUPS, 0.3, 0.4), in_turn)
    assert torch.equal(proximal_nested(x, GROUPS, 0.3, 0.4) == 0, in_turn == 0)


def test_the_input_and_the_anchor_are_not_changed() -> None:
    x, anchor = normal(0, 3), normal(1, 3)
    copies = x.clone(), anchor.clone()
    for kind in KINDS:
        proximal(x, None, penalty_settings(kind, l1=0.1, outer=0.1), GROUPS, 1.0, 1.0)
        proximal(x, anchor, penalty_settings(kind, "shared", l1=0.1, outer=0.1), GROUPS, 1.0, 1.0)
    assert torch.equal(x, copies[0])
    assert torch.equal(anchor, copies[1])


def test_nothing_shrinks_without_groups() -> None:
    x, nobody = normal(0, 2), cut_groups(LAYOUT, {}, only=())
    for kind in KINDS:
        assert torch.equal(
            as_bits(proximal(x, None, penalty_settings(kind, l1=1.0, outer=1.0), nobody, 1.0, 1.0)), as_bits(x)
        )
        assert penalty.penalty_value(x, None, penalty_settings(kind, l1=1.0, outer=1.0), nobody, 1.0).tolist() == [
            0.0,
            0.0,
        ]
    assert penalty.group_norms(x, nobody).shape == (2, 0)


def test_nan_stays_nan() -> None:
    x = normal(0, 2)
    x[0, 1] = torch.nan
    after = proximal(x, None, penalty_settings("group"), GROUPS, 1.0, 0.1)
    assert after[0, 1].isnan()
    assert torch.equal(after[1], proximal(x[1:], None, penalty_settings("group"), GROUPS, 1.0, 0.1)[0])


def test_an_anchor_without_a_penalty_toward_it_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        proximal(normal(0, 1), normal(1, 1), penalty_settings("group", "zero"), GROUPS, 1.0, 1.0)


# In the metric of Adam's preconditioner


def random_steps(seed: int, clients: int, spread: float = 1.5) -> Tensor:
    """[K, P]: step lengths around 0.3 that differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(0.3 * np.exp(spread * generator.normal(size=(clients, P))))


def test_a_preconditioned_group_matches_a_worked_example() -> None:
    """z_i = x_i r / (r + t h_i): with r = t = 5 and lengths 1/2 and 1, (4.5, 8) becomes (3, 4), whose norm is 5."""
    x, steps = torch.zeros(1, P, dtype=torch.float64), torch.ones(1, P, dtype=torch.float64)
    target = torch.tensor([3.0, 4.0]).double()  # of length 5
    steps[0, [8, 9]] = torch.tensor([0.5, 1.0]).double()
    x[0, [8, 9]] = target * (1 + 5 * steps[0, [8, 9]] / 5)  # 4.5, 8
    x[0, LOOSE] = 0.25
    expected = torch.zeros_like(x)
    expected[0, [8, 9]], expected[0, LOOSE] = target, 0.25
    after = preconditioned_group(x, steps, GROUPS, torch.tensor([[5 / 2**0.5]]).double())
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=0)


def test_a_preconditioned_group_is_zero_exactly_within_its_threshold() -> None:
    """||x / h|| = ||(6, 8)|| = 10 = t: zero at t = 10, and not at a little less."""
    x, steps = torch.zeros(1, P).double(), torch.ones(1, P).double()
    x[0, [8, 9]], steps[0, [8, 9]] = torch.tensor([3.0, 0.8]).double(), torch.tensor([0.5, 0.1]).double()
    for threshold, zero in ((10.001, True), (9.999, False)):
        after = preconditioned_group(x, steps, GROUPS, torch.tensor([[threshold / 2**0.5]]).double())
        assert (after[0, [8, 9]] == 0).tolist() == [zero] * 2


def weighted_objective(
    z: np.ndarray, x: np.ndarray, steps: np.ndarray, strengths: tuple[float, float, float], smooth: float
) -> tuple[float, Any]:
    """The same as `objective`, with 1/2 (z - x)^2 / h."""
    value, gradient = objective(z, z, *strengths, smooth)
    return value + 0.5 * float((z - x) @ ((z - x) / steps)), gradient + (z - x) / steps


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.floats(0.0, 1.5),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_the_preconditioned_step_minimises_its_objective(
    seed: int, kind: Kind, weight: float, l1: float, outer: float, anchored: bool
) -> None:
    x, steps = normal(seed, 1, torch.float64), random_steps(seed, 1, 1.0)
    anchor = normal(seed + 1, 1, torch.float64) if anchored else None
    settings_ = penalty_settings(kind, "shared" if anchored else "zero", l1, outer)
    ours = preconditioned_proximal(x, anchor, settings_, GROUPS, steps, weight)
    strengths = (weight, l1 * (kind == "sparse-group"), outer * (kind == "nested"))
    base = torch.zeros_like(x) if anchor is None else anchor
    target, point = (x - base)[0].numpy(), (ours - base)[0].numpy()
    theirs, metric = target, steps[0].numpy()
    for smooth in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 30}
        given_ = (target, metric, strengths, smooth)
        theirs = minimize(weighted_objective, theirs, given_, "L-BFGS-B", jac=True, options=options).x
    best = weighted_objective(theirs, target, metric, strengths, 0.0)[0]
    assert weighted_objective(point, target, metric, strengths, 0.0)[0] <= best + 1e-6
    np.testing.assert_allclose(point, theirs, rtol=0, atol=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 3.0), st.floats(1e-3, 2.0), st.floats(0.0, 4.0))
def test_a_nested_step_meets_the_optimality_conditions(seed: int, weight: float, outer: float, spread: float) -> None:
    """(x - z) / h = t z / ||z_g|| + o z / ||z_b|| on groups that remain, however unlike the lengths are."""
    x, steps = normal(seed, 1, torch.float64), random_steps(seed, 1, spread)
    z = preconditioned_nested(x, steps, GROUPS, torch.tensor([[weight]]).double(), outer)
    for groups in MEMBERS.values():
        block = groups[0] + groups[1]
        for group in groups:
            if not z[0, group].any():
                continue
            pull = weight * len(group) ** 0.5 / z[0, group].norm() + outer * len(block) ** 0.5 / z[0, block].norm()
            force = ((x - z) / steps)[0, group]
            torch.testing.assert_close(force, pull * z[0, group], rtol=1e-6, atol=1e-7 * float(force.norm()))


def test_blocks_after_groups_are_not_the_nested_step_in_a_metric() -> None:
    x, steps, weight = normal(3, 1, torch.float64), random_steps(3, 1), torch.tensor([[0.2]]).double()
    nested = preconditioned_nested(x, steps, GROUPS, weight, 0.2)
    groups = preconditioned_group(x, steps, GROUPS, weight)
    in_turn = preconditioned_group(groups, steps, GROUPS.as_blocks, torch.tensor([[0.2]]).double())
    assert (nested - in_turn).abs().max() > 1e-3


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), strengths, st.booleans())
def test_with_equal_lengths_both_steps_are_the_same(seed: int, kind: Kind, weight: float, anchored: bool) -> None:
    x, anchor = normal(seed, 3, torch.float64), normal(seed + 1, 3, torch.float64) if anchored else None
    settings_ = penalty_settings(kind, "shared" if anchored else "zero", l1=0.3, outer=0.2)
    ours = preconditioned_proximal(x, anchor, settings_, GROUPS, torch.full_like(x, 0.4), weight)
    torch.testing.assert_close(ours, proximal(x, anchor, settings_, GROUPS, 0.4, weight), rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), st.booleans(), st.permutations(range(4)))
def test_a_clients_preconditioned_step_is_the_same_alone_and_in_a_stack(
    seed: int, kind: Kind, anchored: bool, order: list[int]
) -> None:
    x, anchor = normal(seed, 4), normal(seed + 1, 4) if anchored else None
    steps, weight = random_steps(seed, 4).float(), torch.tensor([[1.0], [0.0], [3.0], [0.1]])
    settings_ = penalty_settings(kind, "shared" if anchored else "zero", l1=0.3, outer=0.2)

    def rows(of: list[int]) -> Tensor:
        towards = None if anchor is None else anchor[of]
        return preconditioned_proximal(x[of], towards, settings_, GROUPS, steps[of], weight[of])

    together = rows([0, 1, 2, 3])
    assert torch.equal(as_bits(rows(order)), as_bits(together[order]))
    for client in range(4):
        assert torch.equal(as_bits(rows([client])), as_bits(together[[client]]))


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), st.booleans())
def test_a_preconditioned_step_without_weight_or_length_changes_no_bit(seed: int, kind: Kind, anchored: bool) -> None:
    x, anchor = normal(seed, 3), normal(seed + 1, 3) if anchored else None
    steps, toward = random_steps(seed, 3).float(), "shared" if anchored else "zero"
    for lengths, weight in ((steps, 0.0), (steps * 0, 1.0)):
        after = preconditioned_proximal(x, anchor, penalty_settings(kind, toward), GROUPS, lengths, weight)
        assert torch.equal(as_bits(after), as_bits(x))


@settings(deadline=None, max_examples=30)
@given(inputs, st.sampled_from(KINDS), st.sampled_from([1e3, 1e15, 1e37, float("inf")]))
def test_a_huge_weight_leaves_exactly_zero_or_exactly_the_anchor_in_a_metric(
    seed: int, kind: Kind, huge: float
) -> None:
    x, anchor, steps = normal(seed, 3), normal(seed + 1, 3), random_steps(seed, 3, 0.5).float()
    assume(x.abs().max() < 20 and (x - anchor).abs().max() < 20)
    zeros, anchored = x.clone(), x.clone()
    zeros[:, :12], anchored[:, :12] = 0.0, anchor[:, :12]
    l1 = min(huge, 1e37)
    toward_zero, toward_anchor = (penalty_settings(kind, toward, l1, l1) for toward in ("zero", "shared"))
    assert torch.equal(preconditioned_proximal(x, None, toward_zero, GROUPS, steps, huge), zeros)
    after = preconditioned_proximal(x, anchor, toward_anchor, GROUPS, steps, huge)
    assert torch.equal(as_bits(after), as_bits(anchored))


def test_nothing_moves_without_groups_in_a_metric() -> None:
    x, nobody, steps = normal(0, 2), cut_groups(LAYOUT, {}, only=()), random_steps(0, 2).float()
    for kind in KINDS:
        after = preconditioned_proximal(x, None, penalty_settings(kind, l1=1.0, outer=1.0), nobody, steps, 1.0)
        assert torch.equal(as_bits(after), as_bits(x))


def test_nan_stays_nan_in_a_metric() -> None:
    x, steps = normal(0, 2), random_steps(0, 2).float()
    x[0, 1] = torch.nan
    for kind in KINDS:
        settings_ = penalty_settings(kind, l1=0.1, outer=0.1)
        after = preconditioned_proximal(x, None, settings_, GROUPS, steps, 0.1)
        assert after[0, 1].isnan()
        assert torch.equal(after[1], preconditioned_proximal(x[1:], None, settings_, GROUPS, steps[1:], 0.1)[0])


# Under Adam

INPUTS, FEATURES, CLIENTS = 4, 3, 3
"""Four inputs of three features each; three clients, each with a task of its own."""
SENSORS = Layout.from_shapes([("regression.weight", (1, INPUTS * FEATURES))], PolicySettings())
SETS = {f"input{i}": {"regression.weight:columns": [3 * i, 3 * i + 1, 3 * i + 2]} for i in range(INPUTS)}
BY_INPUT = cut_groups(SENSORS, {"*": SETS})


def trained(relevant: Tensor, anchor: Tensor | None, weight: Tensor, start: Tensor) -> Tensor:
    """[K, P] after 1,500 minibatches of regressions y = x . relevant + noise, Adam and then our proximal step."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.nn.Parameter(start.clone())
    rate = 5e-3
    adam = torch.optim.Adam([parameters], lr=rate)
    settings_ = penalty_settings("group", "zero" if anchor is None else "shared")
    for _ in range(1500):
        x = torch.randn(CLIENTS, 16, INPUTS * FEATURES, generator=generator)
        y = (x * relevant[:, None]).sum(-1) + 0.3 * torch.randn(CLIENTS, 16, generator=generator)
        loss = ((x * parameters[:, None]).sum(-1) - y).square().mean(1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            parameters.copy_(proximal(parameters, anchor, settings_, BY_INPUT, rate, weight))
    return parameters.detach()


def true_weights(*inputs: list[int]) -> Tensor:
    """[K, P]: 1, -1, 1 on the features of each client's inputs, 0 elsewhere."""
    values = torch.zeros(CLIENTS, INPUTS, FEATURES)
    for client, chosen in enumerate(inputs):
        values[client, chosen] = torch.tensor([1.0, -1.0, 1.0])
    return values.flatten(1)


def test_adam_with_the_proximal_step_zeroes_exactly_the_irrelevant_inputs() -> None:
    relevant = true_weights([0], [1, 3], [0, 1, 2, 3])
    start = torch.randn(CLIENTS, INPUTS * FEATURES, generator=torch.Generator().manual_seed(1))
    found = trained(relevant, None, torch.full((CLIENTS, 1), 0.4), start)
    norms = penalty.group_norms(found, BY_INPUT)
    assert torch.equal(norms == 0, penalty.group_norms(relevant, BY_INPUT) == 0)
    assert torch.equal(found == 0, relevant == 0)
    assert (norms[norms > 0] > 1.0).all()  # of sqrt(3)

    free = trained(relevant, None, torch.zeros(CLIENTS, 1), start)
    assert (free != 0).all()  # no penalty, no zeros: what is above is the penalty's doing


def test_a_client_leaves_the_anchor_only_where_its_task_differs() -> None:
    anchor = true_weights([0, 1], [0, 1], [0, 1])
    relevant = true_weights([0, 1], [0, 1, 2], [1])
    found = trained(relevant, anchor, torch.full((CLIENTS, 1), 0.4), anchor)
    departed = penalty.group_norms(found - anchor, BY_INPUT) > 0
    assert departed.tolist() == [[False] * 4, [False, False, True, False], [True, False, False, False]]
    stays = ~departed.repeat_interleave(FEATURES, 1)
    assert torch.equal(as_bits(found[stays]), as_bits(anchor[stays]))
    torch.testing.assert_close(found, relevant, rtol=0, atol=0.5)
