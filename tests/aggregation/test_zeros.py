"""Groups that most clients have at zero are merged to exactly zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from grpo_fed.aggregation.merge.clustering import ClusterEvidence, no_cluster_evidence
from grpo_fed.aggregation.merge.evidence import Evidence, no_evidence
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_merge import MergeTarget, RoundMerge
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from tests.support.numeric_clients import numeric_scenario

ROWS = 'policy.groups={ "*" = "row" }'
TOWARD_ZERO = ('penalty={ toward = "zero", weight = 0.1 }', ROWS)
THRESHOLD = ("merge.threshold=inf",)
RULES = ["mean", "huber", "fisher", "median", "trimmed-mean", "krum", "geometric-median", "clusters", "persistence"]
SHARED = resolve_shared_blocks(numeric_scenario(ROWS))


def evidence_of(rule: str, shared_blocks: SharedBlocks) -> Evidence | ClusterEvidence:
    make = no_cluster_evidence if rule == "clusters" else no_evidence
    return make(shared_blocks.clients, shared_blocks.groups)


def merge(rule: str, zeros: Sequence[Sequence[int]], *overrides: str, steps: Sequence[int] = (1,) * 9) -> MergeTarget:
    """Merge clients whose parameters are all near 1 but for the groups that each has at exactly zero."""
    scenario = numeric_scenario(f'merge.rule="{rule}"', *overrides, count=len(zeros))
    shared_blocks = resolve_shared_blocks(scenario)
    merging = RoundMerge(scenario, shared_blocks, evidence_of(rule, shared_blocks))
    generator = np.random.default_rng(0)
    for index, own in enumerate(zeros):
        point = (1 + 0.001 * generator.normal(size=shared_blocks.size)).astype(np.float32)
        point[shared_blocks.columns_of_groups(own).numpy()] = 0.0
        fisher = np.ones_like(point) if rule == "fisher" else None
        merging.add(f"c-{index}", Trained(point, steps[index], 1, 0.0, 0.0, {}, fisher))
    return merging.target(torch.ones(shared_blocks.size))


def is_zero(point: torch.Tensor, group: int) -> torch.Tensor:
    return point[SHARED.columns_of_groups([group])] == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_most_clients_have_at_zero_is_merged_to_zero(rule: str) -> None:
    target = merge(rule, [[0], [0], [0], [], []], *TOWARD_ZERO, *(THRESHOLD if rule == "huber" else ()))
    assert is_zero(target.point, 0).all()
    assert not is_zero(target.point, 1).any()


@pytest.mark.parametrize("rule", ["mean", "fisher"])
def test_half_of_the_weight_is_no_majority(rule: str) -> None:
    assert not is_zero(merge(rule, [[0], [0], [], []], *TOWARD_ZERO).point, 0).any()
    assert is_zero(merge(rule, [[0], [0], [], []], *TOWARD_ZERO, steps=[2, 1, 1, 1]).point, 0).all()
    assert not is_zero(merge(rule, [[0], [0], [0], []], *TOWARD_ZERO, steps=[1, 1, 1, 3]).point, 0).any()


@pytest.mark.parametrize(
    "overrides",
    [
        (ROWS,),
        ('penalty={ toward = "shared", weight = 0.1 }', ROWS),
        ('penalty={ toward = "zero", weight = 0.1, blocks = ["critic*"] }', ROWS),
    ],
    ids=["no penalty", "toward shared", "another block"],
)
def test_a_merge_is_the_plain_mean_where_nothing_is_penalised_toward_zero(overrides: tuple[str, ...]) -> None:
    zeros = [[0], [0], [0], []]
    ours, plain = merge("mean", zeros, *overrides).point, merge("mean", zeros, ROWS).point
    assert ours.numpy().tobytes() == plain.numpy().tobytes()
    assert not is_zero(ours, 0).any()


def test_other_groups_are_those_of_the_plain_mean_bit_for_bit() -> None:
    zeros = [[0], [0], [0], []]
    ours, plain = merge("mean", zeros, *TOWARD_ZERO).point, merge("mean", zeros, ROWS).point
    others = ~SHARED.columns_of_groups([0])
    assert ours[others].numpy().tobytes() == plain[others].numpy().tobytes()


def test_a_client_that_departed_has_no_vote() -> None:
    """By the rule `huber` the three clients at zero would be the outliers of seven; the others share the group."""
    target = merge("huber", [[0], [0], [0], [], [], [], []], *TOWARD_ZERO, "merge.threshold=0.02")
    assert [0 in target.departed[f"c-{client}"] for client in range(7)] == [True] * 3 + [False] * 4
    assert not is_zero(target.point, 0).any()


def test_each_cluster_has_its_own_majority() -> None:
    """Of the block's row 0 one cluster has zeros in two of three clients, the other in none."""
    scenario = numeric_scenario('merge.rule="clusters"', *TOWARD_ZERO, count=6)
    shared_blocks = resolve_shared_blocks(scenario)
    nothing = no_cluster_evidence(shared_blocks.clients, shared_blocks.groups)
    labels = torch.zeros_like(nothing.labels)
    labels[3:, 0] = 1
    merging = RoundMerge(scenario, shared_blocks, ClusterEvidence(nothing.panel, labels))
    for client in range(6):
        point = torch.full((SHARED.size,), 1.0 + 0.001 * client)
        point[SHARED.columns_of_groups([0])] = 0.0 if client in (3, 4) else 0.1
        merging.add(f"c-{client}", Trained(point.numpy(), 1, 1, 0.0, 0.0, {}))
    target = merging.target(torch.ones(SHARED.size))
    assert [target.clusters[f"c-{client}"][0] for client in range(6)] == [0, 0, 0, 1, 1, 1]
    assert all(is_zero(target.points[f"c-{client}"], 0).all() for client in (3, 4, 5))
    assert not any(is_zero(target.points[f"c-{client}"], 0).any() for client in (0, 1, 2))
    assert not any(is_zero(target.points[f"c-{client}"], 1).any() for client in range(6))
