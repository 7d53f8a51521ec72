"""Rounds with the merge rule `clusters`: each cluster of clients has shared blocks of its own."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from grpo_fed.aggregation.merge.persistence import MIN_ROUNDS, rounds_of_evidence
from grpo_fed.federation.messages import Train
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.runs.serialisation import from_json, to_json
from tests.support.numeric_clients import NumericTransport, numeric_federation

MEASURED = ('proximity.mode="measured"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")
QUADRATIC = ('proximity.mode="quadratic"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")


KINDS = ((0, 1, 2, 3), (4, 5))
"""The clients of each kind."""
FIRST = rounds_of_evidence(20)
ALL = FIRST + 2 * MIN_ROUNDS
"""The rounds in which the kinds part in the first layer, and then in the actor: after twice as many rounds more."""


def run_two_kinds(*overrides: str, rounds: int = ALL + 1) -> tuple[Federation, NumericTransport, list[RoundRecord]]:
    """Run a federation of four clients with one goal and two with the opposite one."""
    scenario, shared_blocks, transport = numeric_federation(
        'merge.rule="clusters"', f"rounds={rounds}", *overrides, count=6
    )
    here = np.zeros(shared_blocks.size, np.float32)
    transport.goals = {f"c-{number}": here + (8.0 if number in KINDS[1] else -8.0) for number in range(6)}
    federation, records = Federation(scenario, shared_blocks, transport), []
    federation.run(records.append)
    return federation, transport, records


def test_clients_share_with_their_own_kind_alone():
    federation, transport, _ = run_two_kinds()
    points = federation.state.cluster_points
    for kind in KINDS:
        kind_points = [transport.states[f"c-{number}"][ALL + 1]["point"].astype(np.float64) for number in kind]
        for number in kind:
            assert points[f"c-{number}"] == pytest.approx(np.mean(kind_points, 0), abs=1e-5)
            assert points[f"c-{number}"] is points[f"c-{kind[0]}"]
    begun = {name: train.start.shared for name, train in transport.sent_of(Train) if train.start.round == ALL + 1}
    assert begun["c-0"] is begun["c-3"]
    assert begun["c-4"] is begun["c-5"]
    assert np.abs(begun["c-0"] - begun["c-4"]).mean() > 1


def test_kinds_part_block_by_block_from_the_input_on():
    federation, transport, records = run_two_kinds()
    blocks = federation.shared_blocks.slices
    starts = {(name, train.start.round): train.start.shared for name, train in transport.sent_of(Train)}
    for record in records[1:]:
        for client in record.clients:
            is_other = client.client in ("c-4", "c-5")
            expected = {"torso.0": is_other and record.round >= FIRST, "actor": is_other and record.round >= ALL}
            assert client.clusters == expected
        first, other = starts["c-0", record.round], starts["c-4", record.round]
        apart = {block: bool((first[columns] != other[columns]).all()) for block, columns in blocks.items()}
        assert apart == {"torso.0": record.round > FIRST, "actor": record.round > ALL}


def test_clusters_are_in_the_line_the_results_and_the_record():
    federation, _, records = run_two_kinds()
    blocks = federation.shared_blocks.groups.as_blocks.names
    line = record_to_line(records[ALL])
    assert [line[f"clusters/{block}"] for block in blocks] == [2] * len(blocks)
    for number in range(6):
        clusters = [line["clients"][f"c-{number}"][f"cluster/{block}"] for block in blocks]
        assert clusters == [int(number in KINDS[1])] * len(blocks)
    assert federation.result is not None
    assert federation.result.clients["c-4"].clusters == dict.fromkeys(blocks, 1)
    document = federation.result.to_json()["clients"]["c-4"]
    assert document["clusters"] == dict.fromkeys(blocks, 1)
    loaded = from_json(RoundRecord, json.loads(to_json(records[ALL])))
    assert [client.clusters for client in loaded.clients] == [client.clusters for client in records[ALL].clients]
    assert not records[0].clients[0].clusters


def test_clients_of_one_cluster_have_equal_blocks():
    """A client that was not sampled for a merge is in no cluster of its record."""
    federation, _, records = run_two_kinds("round.fraction=0.5", "seed=3", rounds=14)
    state, blocks = federation.state, federation.shared_blocks.slices
    clusters = {client.client: client.clusters for client in records[-1].clients}
    sampled = {client.client for client in records[-1].clients if client.steps}
    assert {name for name, of_client in clusters.items() if of_client} == sampled
    assert len(sampled) == 3
    is_divided = False
    for block, columns in blocks.items():
        for first, second in itertools.combinations(sorted(sampled), 2):
            is_same = clusters[first][block] == clusters[second][block]
            points = [state.cluster_points[name][columns].tobytes() for name in (first, second)]
            assert is_same == (points[0] == points[1])
            is_divided |= not is_same
    assert is_divided


@pytest.mark.parametrize("mode", [MEASURED, QUADRATIC])
def test_the_mean_kl_of_the_clusters_steps_stays_within_its_budgets(mode: tuple[str, ...]):
    federation, transport, records = run_two_kinds(*mode)
    starts = {(name, train.start.round): train.start.shared for name, train in transport.sent_of(Train)}
    names = sorted({name for name, _ in starts})
    old, new = ({name: starts[name, number].astype(np.float64) for name in names} for number in (ALL, ALL + 1))
    fisher = np.mean([transport.fisher(name) for name in names], 0)
    step = records[ALL].server.step if records[ALL].server else None
    assert step is not None
    alphas = dict(zip(federation.shared_blocks.blocks, step.alphas, strict=True))
    assert min(alphas.values()) < 1
    for block, columns in federation.shared_blocks.slices.items():
        for kind in KINDS:
            mean = np.mean([transport.states[f"c-{number}"][ALL]["point"].astype(np.float64) for number in kind], 0)
            begun = old[f"c-{kind[0]}"]
            stepped = begun[columns] + alphas[block] * (mean - begun)[columns]
            assert new[f"c-{kind[0]}"][columns] == pytest.approx(stepped, abs=1e-5)
        if mode == QUADRATIC:  # the mean over the clients of 1/2 d'Fd, each with its own step d
            alone = [0.5 * (fisher * (new[name] - old[name]) ** 2)[columns].sum() for name in names]
        else:
            alone = [0.5 * (transport.fisher(name) * (new[name] - old[name]) ** 2)[columns].sum() for name in names]
        logged = next(row.kl for row in step.blocks if row.block == block)
        assert np.mean(alone) == pytest.approx(logged, rel=1e-3)
        assert np.mean(alone) <= 0.05 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("rule", "last"),
    [(('merge.rule="clusters"',), FIRST), (('merge.rule="huber"', "merge.threshold=0.3"), 1)],
    ids=["clusters", "huber"],
)
def test_a_merge_without_weights_changes_nothing(rule: tuple[str, ...], last: int):
    """No episode ends after round `last`: clients stay in their clusters, and departed from the groups they left."""
    scenario, shared_blocks, transport = numeric_federation(
        *rule, 'merge.weights="episodes"', f"rounds={last + 1}", count=6
    )
    transport.goals = {f"c-{number}": np.full(shared_blocks.size, 8.0 if number > 3 else -8.0) for number in range(6)}
    transport.episodes = {**dict.fromkeys(range(1, last + 1), 1), last + 1: 0}
    federation = Federation(scenario, shared_blocks, transport)
    seen: list[tuple[bytes, ...]] = []

    def watch(record: RoundRecord) -> None:
        seen.append(tuple(start.shared.tobytes() + bytes(start.departed) for start in federation.starts.values()))

    federation.run(watch)
    assert len(set(seen[last])) > 1
    assert seen[last + 1] == seen[last]
