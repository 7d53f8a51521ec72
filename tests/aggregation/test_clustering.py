"""Learned clusters of clients, against scipy's linkage and Rousseeuw's definition of the silhouette."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist
from torch import Tensor

from grpo_fed.aggregation.merge import clusters, mean
from grpo_fed.aggregation.merge.clustering import cluster_clients, silhouette
from tests.support.merge_replies import GROUPS, P, bits, make_groups, make_replies, random_replies

SEEDS = st.integers(0, 2**32 - 1)


def two_kinds(seed: int = 0, clients: int = 10) -> Tensor:
    """[K, P]: in block a the first four differ from the rest, in block b there is no structure."""
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, P))).float()
    points[:4, :8] += 12.0
    return points


def test_similar_clients_share_a_mean_in_the_separating_block() -> None:
    points = two_kinds()
    merged = clusters(make_replies(points), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.blocks == ("a", "b")
    assert merged.clusters.members.T.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 10]
    for client, kind in ((0, slice(0, 4)), (9, slice(4, 10))):
        own = merged.clusters.point(client)
        torch.testing.assert_close(own[:8], points[kind, :8].mean(0))
        assert bits(own[8:]) == bits(mean(make_replies(points), torch.zeros(P), GROUPS).point[8:])
    assert torch.equal(merged.point, merged.clusters.point(9))
    assert not merged.departed.any()


def test_the_cluster_of_most_weight_is_the_first() -> None:
    weights = [10.0] * 4 + [1.0] * 6
    merged = clusters(make_replies(two_kinds(), weights), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.members[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_a_client_without_weight_joins_the_nearest_cluster() -> None:
    weights = [0.0, 1.0, 1.0, 1.0, 0.0] + [1.0] * 5
    merged = clusters(make_replies(two_kinds(), weights), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.members[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("clients", [2, 3, 6, 20])
def test_no_structure_gives_one_cluster_with_the_means_bits(clients: int) -> None:
    groups = make_groups([0] * 20 + [1] * 40)
    for seed in range(20):
        replies, shared = random_replies(seed, clients, 60)
        points = torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, 60))).float()
        replies = make_replies(points, [reply.weight for reply in replies.all])
        merged = clusters(replies, shared, groups)
        assert merged.clusters is not None
        assert not merged.clusters.members.any()
        assert bits(merged.point) == bits(mean(replies, shared, groups).point)


def test_equal_replies_are_one_cluster() -> None:
    merged = clusters(make_replies(torch.ones(5, P)), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert not merged.clusters.members.any()


def test_three_kinds_are_three_clusters_unless_fewer_are_allowed() -> None:
    points = torch.zeros(9, P)
    points[:, 0] = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 30.0, 30.1, 30.2])
    for most, expected in ((8, [0, 0, 0, 1, 1, 1, 2, 2, 2]), (2, [0, 0, 0, 0, 0, 0, 1, 1, 1])):
        merged = clusters(make_replies(points), torch.zeros(P), GROUPS, most=most)
        assert merged.clusters is not None
        assert merged.clusters.members[:, 0].tolist() == expected


def test_clusters_nearer_than_the_threshold_are_one() -> None:
    # In block a of 8 the kinds are 4 distance at one parameter: a root mean square of 4 / sqrt(8) = 1.414.
    points = torch.zeros(6, P)
    points[3:, 0] = 4.0
    for threshold, kinds in ((0.0, 2), (1.41, 2), (1.42, 1), (math.inf, 1)):
        merged = clusters(make_replies(points), torch.zeros(P), GROUPS, threshold=threshold)
        assert merged.clusters is not None
        assert len(merged.clusters.members[:, 0].unique()) == kinds
    merged = clusters(make_replies(points), torch.zeros(P), GROUPS, threshold=math.inf, blocks={"a": 1.0})
    assert merged.clusters is not None
    assert len(merged.clusters.members[:, 0].unique()) == 2


def test_tiny_steps_do_not_form_clusters_by_chance() -> None:
    """Some seeds divide six points of one distribution by the silhouette alone, which does not depend on scale."""
    divided = {0.0: 0, 0.02: 0}
    for seed in range(60):
        points = torch.from_numpy(np.random.default_rng(seed).normal(size=(6, P)) * 1e-3).float()
        points[:, 2:] = 0.0
        for threshold in divided:
            merged = clusters(make_replies(points), torch.zeros(P), GROUPS, threshold=threshold)
            assert merged.clusters is not None
            divided[threshold] += bool(merged.clusters.members.any())
    assert divided[0.0] > 10
    assert divided[0.02] == 0


def naive_silhouette(distance: np.ndarray, labels: list[int]) -> float:
    """Rousseeuw's definition, client by client."""
    scores = []
    for client, label in enumerate(labels):
        others = {
            other: np.mean([distance[client, i] for i, own in enumerate(labels) if own == other and i != client])
            for other in set(labels)
            if other != label or labels.count(label) > 1
        }
        a, b = others.get(label), min(value for other, value in others.items() if other != label)
        scores.append(0.0 if a is None else (b - a) / max(a, b))
    return float(np.mean(scores))


@given(SEEDS, st.integers(4, 9), st.integers(2, 4))
def test_partitions_are_those_of_scipy_with_the_best_silhouette(seed: int, clients: int, kinds: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, 3)) + 3 * generator.normal(size=(kinds, 3))[np.arange(clients) % kinds]
    distance = cdist(points, points)
    tree = linkage(points, "average")
    divisions = [fcluster(tree, count, "maxclust").tolist() for count in range(2, clients)]
    scores = [naive_silhouette(distance, labels) for labels in divisions]
    for labels, score in zip(divisions, scores, strict=True):
        assert silhouette(torch.from_numpy(distance), torch.tensor(labels)) == pytest.approx(score)
    labels_found = cluster_clients(torch.from_numpy(distance), 0.0, clients).tolist()
    best = divisions[int(np.argmax(scores))]
    assert len(set(zip(labels_found, best, strict=True))) == len(set(best)) == len(set(labels_found))
