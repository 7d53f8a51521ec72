"""A tree of servers: sites merge their clients, the server merges the sites; with clients whose KL is known exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_fed.federation.messages import EvaluationSummary, Instruction, Measure, Train
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.sites import SiteTree, compare_summaries, make_server
from grpo_fed.runs import checkpoint
from grpo_fed.runs.records import Failure, RoundRecord
from tests.support.numeric_clients import NumericTransport, numeric_federation

THREE = """sites=[
  { name = "north", clients = ["c-[0-3]"] },
  { name = "east", clients = ["c-[4-7]"] },
  { name = "south", clients = ["c-8", "c-9", "c-1?"] },
]""".replace("\n", " ")
"""Three sites of four clients."""
PERSISTENCE = ["merge.rule=persistence", "merge.confirm=evidence", "merge.rejoin=0"]
FIRST = 7
"""The round from which on somebody may leave the actor: 7 x 6 pairs of rounds, of its 10 parameters, are over 400."""


def run(*overrides: str, folder: Path | None = None, count: int = 12) -> tuple[Federation, list[RoundRecord]]:
    """Run a federation of numeric clients; return it with its records."""
    scenario, shared_blocks, transport = numeric_federation(*overrides, count=count)
    federation = Federation(scenario, shared_blocks, transport, folder)
    records: list[RoundRecord] = []
    federation.run(records.append)
    return federation, records


def planted(*overrides: str) -> tuple[Federation, NumericTransport]:
    """Make a federation in which one goal is everybody's, but that of the south is opposite to it in the actor."""
    scenario, shared_blocks, transport = numeric_federation(THREE, *overrides, count=12)
    goal = 50 * transport.numbers("all", 0)
    opposite = goal.copy()
    actor = shared_blocks.slices["actor"]
    opposite[actor] = -opposite[actor]
    south = ("c-8", "c-9", "c-10", "c-11")
    transport.goals = {name: opposite if name in south else goal for name in shared_blocks.clients}
    return Federation(scenario, shared_blocks, transport), transport


def tree(federation: Federation) -> SiteTree:
    assert isinstance(federation.server, SiteTree)
    return federation.server


# The same as without sites --------------------------------------------------------------------------------------------


def budgets(mode: str) -> list[str]:
    return [f"proximity.mode={mode}", "proximity.kl_block=inf", "proximity.kl_joint=inf"]


@pytest.mark.parametrize("mode", ["off", "measured"])
@pytest.mark.parametrize("weights", ["steps", "episodes", "uniform"])
def test_means_of_means_without_budgets_are_the_mean_of_all(mode: str, weights: str):
    overrides = [*budgets(mode), f"merge.weights={weights}", "rounds=5"]
    flat, flat_records = run(*overrides)
    sites, records = run(*overrides, THREE)
    np.testing.assert_allclose(sites.state.shared, flat.state.shared, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(flat.state.shared, flat.shared_blocks.initial.numpy())
    for one, other in zip(records, flat_records, strict=True):
        assert one.returns == pytest.approx(other.returns, rel=1e-4)


def test_sites_of_unequal_weight_count_by_their_clients():
    """The weighted mean by hand: c-0 in one site with 300 steps, c-1 and c-2 in the other with 100 each."""
    uneven = 'sites=[{ name = "one", clients = ["c-0"] }, { name = "two", clients = ["c-1", "c-2"] }]'
    scenario, shared_blocks, transport = numeric_federation(uneven, "rounds=1", count=3)
    transport.steps = {"c-0": 300, "c-1": 100, "c-2": 100}
    federation = Federation(scenario, shared_blocks, transport)
    federation.run()
    points = {name: transport.states[name][1]["point"].astype(np.float64) for name in shared_blocks.clients}
    expected = (300 * points["c-0"] + 100 * points["c-1"] + 100 * points["c-2"]) / 500
    np.testing.assert_allclose(federation.state.shared, expected, rtol=1e-6, atol=1e-7)
    own = tree(federation).sites
    np.testing.assert_array_equal(own["one"].own, transport.states["c-0"][1]["point"])
    np.testing.assert_allclose(own["two"].own, (points["c-1"] + points["c-2"]) / 2, rtol=1e-6, atol=1e-7)


# Departures -----------------------------------------------------------------------------------------------------------


def test_the_site_whose_clients_contradict_the_others_leaves_the_planted_block_alone():
    federation, transport = planted(*PERSISTENCE, "rounds=9")
    records: list[RoundRecord] = []
    federation.run(records.append)
    left = {record.site: record.departed for record in records[-1].sites}
    assert left == {"north": (), "east": (), "south": ("actor",)}
    assert all(client.departed == () for client in records[-1].clients)
    ((round, rho),) = [(each.round, site.left["actor"]) for each in records for site in each.sites if site.left]
    assert round == FIRST
    assert 0.5 < rho <= 1
    # the site's clients share its own block, and the server's is that of the others
    blocks, sites = federation.shared_blocks.slices, tree(federation).sites
    begins = {name: site.server.state.shared for name, site in sites.items()}
    for block, columns in blocks.items():
        is_shared = np.array_equal(begins["south"][columns], federation.state.shared[columns])
        assert is_shared == (block != "actor")
    assert begins["north"] is begins["east"] is federation.state.shared
    np.testing.assert_array_equal(begins["south"][blocks["actor"]], sites["south"].own[blocks["actor"]])
    # by hand, in units of the goal g: six rounds go by 0.3 towards the mean of all, (8 - 4) / 12 = 1/3, to 0.294; from
    # round 7 on the south goes towards -1: 0.7 x 0.294 - 0.3 = -0.094, then -0.366, then -0.556
    actor = blocks["actor"]
    goal, own = transport.goals["c-0"][actor], begins["south"][actor]
    assert float(own @ goal) / float(goal @ goal) == pytest.approx(-0.556, abs=0.005)


def test_a_client_leaves_a_group_at_its_site_and_its_site_stays():
    federation, transport = planted(*PERSISTENCE, "rounds=9")
    goal, opposite = transport.goals["c-0"], transport.goals["c-8"]
    transport.goals = dict.fromkeys(transport.goals, goal) | {"c-2": opposite}
    records: list[RoundRecord] = []
    federation.run(records.append)
    assert {each.client: each.departed for each in records[-1].clients if each.departed} == {"c-2": ("actor",)}
    assert all(site.departed == () for site in records[-1].sites)
    assert federation.result is not None
    assert federation.result.clients["c-2"].personal_groups == ("actor",)


def test_each_site_merges_by_its_own_rule():
    """In the east a hostile client sends a point far away: the median of its site does not follow it."""
    far = THREE.replace('clients = ["c-[4-7]"] }', 'clients = ["c-[4-7]"], merge = { rule = "median" } }')
    scenario, shared_blocks, transport = numeric_federation(far, "rounds=1", count=12)
    transport.goals = {"c-0": np.full(shared_blocks.size, 1e6, np.float32)}
    transport.goals["c-4"] = transport.goals["c-0"]
    federation = Federation(scenario, shared_blocks, transport)
    federation.run()
    own = {name: site.own for name, site in tree(federation).sites.items()}
    assert np.abs(own["north"]).min() > 1e4
    assert np.abs(own["east"]).max() < 10
    points = np.stack([transport.states[f"c-{number}"][1]["point"] for number in range(4, 8)])
    np.testing.assert_allclose(own["east"], np.sort(points, 0)[1:3].mean(0), rtol=1e-5, atol=1e-6)


# Coming back ----------------------------------------------------------------------------------------------------------


def test_a_site_comes_back_where_the_servers_block_is_no_worse_for_its_clients():
    federation, transport = planted("merge.rule=persistence", "merge.rejoin=2", "rounds=18")
    moved: list[tuple[int, str, str]] = []

    def watch(record: RoundRecord) -> None:
        for site in record.sites:
            moved.extend((record.round, site.site, "left") for _ in site.left)
            moved.extend((record.round, site.site, "returned") for _ in site.returned)
        if record.round == 11:  # from now on the south wants what all want
            transport.goals |= dict.fromkeys(("c-8", "c-9", "c-10", "c-11"), transport.goals["c-0"])

    federation.run(watch)
    assert [(site, move) for _, site, move in moved] == [("south", "left"), ("south", "returned")]
    assert moved[0][0] == FIRST + 1  # in conflict after one round, asked to play at the beginning of the next
    assert moved[1][0] > 11
    south = tree(federation).sites["south"]
    assert south.server.state.shared is federation.state.shared


def summary(mean: float, std: float, episodes: int) -> EvaluationSummary:
    return EvaluationSummary(mean, std, mean, mean, episodes, 1.0)


def test_a_site_compares_the_means_of_its_clients():
    """Two clients, 16 episodes each: own (100 + 140) / 2 = 120, the server's (90 + 130) / 2 = 110.

    Their standard errors are sqrt(8^2 / 16 + 8^2 / 16) / 2 = 1.414 and, for the difference of four means, 2.
    """
    pairs = [(summary(100, 8, 16), summary(90, 8, 16)), (summary(140, 8, 16), summary(130, 8, 16))]
    seen = compare_summaries(pairs, lowest=20.0, has_left=True)
    assert seen is not None
    assert (seen.own, seen.shared, seen.learned, seen.episodes) == (120.0, 110.0, 100.0, 64)
    assert seen.error == pytest.approx(2.0)
    # -10 - 2.33 * 2 = -14.66 is below -10 % of 100, and -10 + 4.66 below 0: the site's own blocks are better
    assert not seen.shares
    assert not seen.is_open
    better = [(own, replace(server, mean=server.mean + 9)) for own, server in pairs]
    seen = compare_summaries(better, lowest=20.0, has_left=True)
    assert seen is not None
    assert seen.shares  # -1 - 4.66 is above -10: no worse
    assert compare_summaries([], 20.0, has_left=True) is None


# Budgets --------------------------------------------------------------------------------------------------------------


def fisher_kl(transport: NumericTransport, names: list[str], old: np.ndarray, new: np.ndarray) -> float:
    """The mean over clients of 1/2 d'Fd, by hand."""
    return float(np.mean([transport.kl(name, old, new) for name in names]))


def test_both_levels_keep_within_their_own_budgets():
    given = THREE.replace('clients = ["c-[4-7]"] }', 'clients = ["c-[4-7]"], proximity = { kl_joint = 0.01 } }')
    overrides = [given, "rounds=1", "proximity.mode=measured", "proximity.kl_block=inf", "proximity.kl_joint=0.04"]
    scenario, shared_blocks, transport = numeric_federation(*overrides, count=12)
    federation = Federation(scenario, shared_blocks, transport)
    initial = federation.state.shared.copy()
    federation.run()
    clients = {name: list(site.clients) for name, site in tree(federation).sites.items()}
    for name, site in tree(federation).sites.items():
        kl, limit = fisher_kl(transport, clients[name], initial, site.own), 0.01 if name == "east" else 0.04
        assert 0.5 * limit < kl <= limit * (1 + 1e-6)
        assert site.step is not None
        assert site.step.joint == pytest.approx(kl, rel=1e-4)
    everybody = list(shared_blocks.clients)
    assert federation.state.last_step is not None
    assert federation.state.last_step.joint == pytest.approx(
        fisher_kl(transport, everybody, initial, federation.state.shared), rel=1e-4
    )
    measured = {tuple(sorted({name for name, _ in transport.sent_of(Measure)}))}
    assert measured == {tuple(sorted(everybody))}


def test_a_site_that_left_a_block_measures_no_step_of_the_server_there():
    federation, transport = planted(*PERSISTENCE, "rounds=9", *budgets("measured"))
    federation.run()
    server, actor = tree(federation), federation.shared_blocks.slices["actor"]
    assert server.state.departed["south"]
    of_south = [each for name, each in transport.sent_of(Measure) if name == "c-8" and each.start.round == 9]
    to_site, to_server = of_south[0], of_south[-1]
    assert not np.array_equal(to_site.candidate[actor], to_site.start.shared[actor])
    np.testing.assert_array_equal(to_server.candidate[actor], to_server.start.shared[actor])


# What may go wrong ----------------------------------------------------------------------------------------------------


def silent_south(name: str, instruction: Instruction) -> Failure | None:
    is_south = name in ("c-8", "c-9", "c-10", "c-11")
    return Failure("late", "asleep") if is_south and isinstance(instruction, Train) else None


def test_a_site_without_answers_follows_the_server_and_keeps_its_own_point():
    scenario, shared_blocks, transport = numeric_federation(THREE, "rounds=2", count=12)
    transport.fault = silent_south
    federation = Federation(scenario, shared_blocks, transport)
    federation.run()
    south = tree(federation).sites["south"]
    np.testing.assert_array_equal(south.own, shared_blocks.initial.numpy())
    assert south.server.state.shared is federation.state.shared
    assert south.step is None


def test_nothing_moves_without_a_quorum():
    scenario, shared_blocks, transport = numeric_federation(THREE, "rounds=1", "round.quorum=1.0", count=12)
    transport.fault = silent_south
    federation = Federation(scenario, shared_blocks, transport)
    federation.run()
    for site in tree(federation).sites.values():
        np.testing.assert_array_equal(site.server.state.shared, shared_blocks.initial.numpy())


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_resumed_tree_goes_on_to_the_bit(tmp_path: Path):
    """It is stopped after the round in which the south is asked to play; budgets adapt, and optimisers remember."""
    overrides = ["merge.rule=persistence", "merge.rejoin=2", "rounds=11", "proximity.mode=measured"]
    overrides += ["proximity.adaptive=true", "merge.optimiser=momentum", "merge.momentum=0.5", "merge.rate=0.5"]
    whole, _ = planted(*overrides)
    expected: list[RoundRecord] = []
    whole.run(expected.append)
    assert any(site.left for record in expected for site in record.sites)

    begun, transport = planted(*overrides)
    first = Federation(
        begun.scenario,
        begun.shared_blocks,
        transport,
        tmp_path / "run",
        client_files=lambda round: transport.write(tmp_path / "states", round),
    )

    def stop(record: RoundRecord) -> None:
        if record.round == FIRST:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    after = checkpoint.latest(tmp_path / "run")
    assert after is not None
    again, resumed = planted(*overrides)
    resumed.read(after.files, after.original_names)
    second = Federation(again.scenario, again.shared_blocks, resumed, tmp_path / "run", after)
    records: list[RoundRecord] = []
    second.run(records.append)
    np.testing.assert_array_equal(second.state.shared, whole.state.shared)
    for name, site in tree(second).sites.items():
        np.testing.assert_array_equal(site.server.state.shared, tree(whole).sites[name].server.state.shared)
        np.testing.assert_array_equal(site.own, tree(whole).sites[name].own)
        assert site.server.state.budgets == tree(whole).sites[name].server.state.budgets
        assert site.lowest == tree(whole).sites[name].lowest
    of_both = [
        {each.round: [replace(site, step=None) for site in each.sites] for each in run} for run in (expected, records)
    ]
    assert {round: of_both[0][round] for round in of_both[1] if round > FIRST} == {
        round: sites for round, sites in of_both[1].items() if round > FIRST
    }


def test_a_checkpoint_without_a_site_is_refused(tmp_path: Path):
    run("rounds=1", THREE, folder=tmp_path / "run")
    after = checkpoint.latest(tmp_path / "run")
    assert after is not None
    renamed = THREE.replace('"east"', '"west"')
    scenario, shared_blocks, _ = numeric_federation(renamed, "rounds=1", count=12)
    with pytest.raises(
        ValueError, match="its sites are north, east, south, and those of the scenario north, west, south"
    ):
        make_server(scenario, shared_blocks, after)


def test_the_mean_return_of_a_round_is_a_sites_lowest():
    federation, records = run("rounds=3", THREE)
    for name, site in tree(federation).sites.items():
        means = [np.mean([each.returns[client] for client in site.clients]) for each in records[1:]]
        assert site.lowest == pytest.approx(min(means)), name
        assert math.isfinite(site.lowest)
