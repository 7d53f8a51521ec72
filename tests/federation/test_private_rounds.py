"""Private rounds: what the server releases, by hand and beside its clients' own numbers; its budget; resuming."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from grpo_fed.federation.messages import Start, Trained
from grpo_fed.federation.participation import sample_clients
from grpo_fed.federation.private_merge import PrivacyState, PrivateMerge, add_local_noise, mechanism_of
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.reports.explain_privacy import WITHOUT_NOISE, explain_privacy
from grpo_fed.reports.figures.privacy import draw_privacy
from grpo_fed.reports.outcome import print_outcome
from grpo_fed.reports.privacy_section import privacy_section
from grpo_fed.runs.checkpoint import Checkpoint, latest
from grpo_fed.runs.history import read_history
from grpo_fed.scenario.toml.source import ScenarioError
from tests.support.numeric_clients import NumericTransport, numeric_federation, numeric_scenario

PRIVATE = ("privacy.epsilon=8",)
FIXED = (*PRIVATE, "privacy.rate=0")


def learned(point: np.ndarray) -> Trained:
    return Trained(point.astype(np.float32), 128, 3, 0.0, 1.0, {})


def shared_after(folder: Path, *overrides: str, count: int = 4) -> np.ndarray:
    """Run a federation of numeric clients; return the shared blocks at the end."""
    federation = Federation(*numeric_federation(*overrides, count=count), folder)
    federation.run()
    return federation.state.shared


# A merge -------------------------------------------------------------------------------------------------------------


def test_a_merge_is_the_mean_of_cut_differences_and_noise_of_the_stated_size():
    scenario = numeric_scenario(*FIXED, "privacy.multiplier=1.5", "privacy.clip=0.5", count=40)
    shared_blocks = resolve_shared_blocks(scenario)
    mechanism = mechanism_of(scenario, shared_blocks)
    assert mechanism is not None
    shared, draws = shared_blocks.initial.numpy(), np.random.default_rng(0)
    points = [shared + draws.normal(0, 0.2, shared.size).astype(np.float32) for _ in range(40)]
    released = []
    for number in range(1, 401):
        merge = PrivateMerge(mechanism, PrivacyState.first(mechanism), shared, scenario, number)
        for client, point in enumerate(points):
            merge.add(f"c-{client}", learned(point))
        released.append(merge.target(torch.from_numpy(shared)).point.double().numpy() - shared)
    noise = np.array(released)
    # each group by itself, in a loop over clients
    ids, expected = shared_blocks.groups.ids.numpy(), np.zeros(shared.size)
    for point in points:
        difference = point.astype(np.float64) - shared
        for group in range(len(shared_blocks.groups.names)):
            inside = ids == group
            length = np.linalg.norm(difference[inside])
            expected[inside] += difference[inside] * min(1.0, 0.5 / length) / 40
    scale = 1.5 * np.sqrt(len(shared_blocks.groups.names)) * 0.5 / 40
    np.testing.assert_allclose(noise.mean(0), expected, atol=5 * scale / 20)
    assert noise.std(0).mean() == pytest.approx(scale, rel=0.02)
    lengths = np.linalg.norm(noise - expected, axis=1)
    ours = mechanism.price_of(mechanism.bounds.tolist()) * np.sqrt(len(mechanism.bounds)) * 0.5
    assert lengths.mean() == pytest.approx(ours, rel=0.05)  # the price that `explain` prints


def test_one_client_moves_the_sum_by_its_bounds_at_most_whatever_it_sends():
    scenario = numeric_scenario(*FIXED, count=4)
    shared_blocks = resolve_shared_blocks(scenario)
    mechanism = mechanism_of(scenario, shared_blocks)
    assert mechanism is not None
    shared = shared_blocks.initial.numpy()
    targets = []
    for sent in (None, shared + 1e4, shared - 3.0):
        merge = PrivateMerge(mechanism, PrivacyState.first(mechanism), shared, scenario, 7)
        merge.add("c-0", learned(shared + 0.01))
        if sent is not None:
            merge.add("c-1", learned(sent))
        targets.append(merge.target(torch.from_numpy(shared)).point.double().numpy())
    bound = 0.1 * np.sqrt(len(mechanism.bounds)) / 4
    for target in targets[1:]:
        assert np.linalg.norm(target - targets[0]) == pytest.approx(bound, rel=1e-3)  # the same noise in all


def test_a_merge_of_nobody_is_noise_and_counts():
    scenario = numeric_scenario(*PRIVATE, "round.fraction=0.5", count=4)
    shared_blocks = resolve_shared_blocks(scenario)
    mechanism = mechanism_of(scenario, shared_blocks)
    assert mechanism is not None
    shared = shared_blocks.initial.numpy()
    merge = PrivateMerge(mechanism, PrivacyState.first(mechanism), shared, scenario, 1)
    target = merge.target(torch.from_numpy(shared))
    assert (target.point.numpy() != shared).all()
    assert target.privacy is not None
    assert [each.merges for each in target.privacy.spent] == [1]
    assert target.privacy.bounds != PrivacyState.first(mechanism).bounds


def test_local_noise_is_added_where_the_client_is_and_cannot_be_told_apart_by_the_server():
    overrides = (*PRIVATE, 'privacy.noise="local"', "privacy.multiplier=2")
    scenario = numeric_scenario(*overrides)
    shared_blocks = resolve_shared_blocks(scenario)
    shared = shared_blocks.initial.numpy()
    sent = [
        add_local_noise(scenario, shared_blocks, seed, Start("run", 3, shared), shared + np.float32(9.0)) - shared
        for seed in range(200)
    ]
    groups = shared_blocks.groups
    scale = 2 * 2.0 * np.sqrt(len(groups.names)) * 0.1
    assert np.array(sent).std(0).mean() == pytest.approx(scale, rel=0.03)
    expected = 0.1 / np.sqrt(groups.sizes.numpy())[groups.ids.numpy()]
    np.testing.assert_allclose(np.array(sent).mean(0), expected, atol=5 * scale / np.sqrt(200))
    again = add_local_noise(scenario, shared_blocks, 0, Start("run", 3, shared), shared + np.float32(9.0)) - shared
    assert np.array_equal(again, sent[0])
    central = numeric_scenario(*PRIVATE)
    point = shared + np.float32(9.0)
    assert add_local_noise(central, shared_blocks, 0, Start("run", 3, shared), point) is point


def test_a_deployed_client_that_knows_itself_alone_adds_as_much_noise():
    scenario = numeric_scenario(*PRIVATE, 'privacy.noise="local"', count=50)
    shared_blocks = resolve_shared_blocks(scenario)
    alone = replace(shared_blocks, clients=("c-3",))
    both = [mechanism_of(scenario, blocks) for blocks in (shared_blocks, alone)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].noise_scale == both[1].noise_scale


# Who takes part ------------------------------------------------------------------------------------------------------


def test_with_a_budget_each_client_takes_part_by_its_own_coin():
    scenario = numeric_scenario(*PRIVATE, "round.fraction=0.25", count=40)
    names = tuple(f"c-{number}" for number in range(40))
    samples = [sample_clients(scenario, names, round) for round in range(1, 201)]
    counts = np.array([len(sample) for sample in samples])
    assert counts.mean() == pytest.approx(10, abs=0.7)
    assert counts.std() == pytest.approx(np.sqrt(40 * 0.25 * 0.75), rel=0.15)  # binomial, not a fixed number
    without = [sample_clients(scenario, names[1:], round) for round in range(1, 201)]
    assert [[name for name in sample if name != "c-0"] for sample in samples] == without
    system = numeric_scenario(*PRIVATE, "round.fraction=0.25", 'privacy.source="system"', count=40)
    assert sample_clients(system, names, 1) != sample_clients(system, names, 1)


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_logs_epsilon_by_round_and_spends_its_budget_in_the_last_one(tmp_path: Path):
    federation = Federation(*numeric_federation(*PRIVATE), tmp_path)
    result = federation.run()
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    epsilons = [line["privacy/epsilon"] for line in lines]
    assert epsilons == sorted(epsilons)
    assert 7.99 < epsilons[-1] <= 8.0 * (1 + 1e-4)
    assert all(line["privacy_bound/actor"] > 0 for line in lines)
    assert result.privacy is not None
    assert (result.privacy.epsilon, result.privacy.merges) == (epsilons[-1], 4)
    saved = json.loads((tmp_path / "results.json").read_text())["privacy"]
    assert (saved["epsilon"], saved["delta"], saved["noise"]) == (epsilons[-1], 0.01, "central")
    assert not result.notes
    history = read_history(tmp_path)
    drawing, section = draw_privacy(history), privacy_section(history)
    assert drawing is not None
    assert "At the end epsilon is 8 of 8; bounds: torso.0" in drawing.alt
    assert section is not None
    assert "The merges have spent epsilon 8 of 8 with delta 0.01" in section.paragraphs[0]
    assert section.paragraphs[0].endswith(WITHOUT_NOISE)
    console = Console(record=True, width=200, file=io.StringIO())
    print_outcome(console, result)
    assert "privacy: epsilon 8 of 8 with delta 0.01, towards whoever sees the shared blocks" in console.export_text()


def test_a_run_ends_before_the_merge_that_would_exceed_its_budget_and_says_so(tmp_path: Path):
    federation = Federation(*numeric_federation(*PRIVATE, "privacy.multiplier=0.8", "rounds=30"), tmp_path)
    result = federation.run()
    mechanism = federation.server.privacy
    assert mechanism is not None
    assert 1 <= result.rounds < 30
    assert mechanism.epsilon <= 8
    assert mechanism.is_spent
    assert result.status == "stopped"
    note = result.reason
    assert note is not None
    assert note.startswith("the privacy budget is spent: epsilon is ")
    assert note.endswith(f"after {result.rounds} merges, and one more would exceed privacy.epsilon = 8")
    assert json.loads((tmp_path / "results.json").read_text())["reason"] == note
    assert result.score_mean is not None  # it was evaluated at its end


@pytest.mark.parametrize(
    "more", [(), ("round.fraction=0.5",), ('privacy.noise="local"',)], ids=["all", "part", "local"]
)
def test_a_private_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, more: tuple[str, ...]):
    overrides = (*PRIVATE, *more)
    whole = shared_after(tmp_path / "whole", *overrides)
    scenario, shared_blocks, transport = numeric_federation(*overrides)
    stopped = Federation(scenario, shared_blocks, transport, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(lambda record: stop_after(2, record.round))
    checkpoint = newest(tmp_path / "stopped")
    assert checkpoint.round == 2
    resumed = Federation(scenario, shared_blocks, transport, tmp_path / "stopped", checkpoint)
    result = resumed.run()
    assert np.array_equal(resumed.state.shared, whole)
    assert result.privacy is not None
    assert result.privacy.merges == 4


def test_a_resumed_run_with_noise_of_the_system_counts_the_round_that_it_may_have_merged(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation(*PRIVATE, 'privacy.source="system"', "rounds=9")
    stopped = Federation(scenario, shared_blocks, transport, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(lambda record: stop_after(2, record.round))
    resumed = Federation(scenario, shared_blocks, transport, tmp_path, newest(tmp_path))
    assert resumed.server.privacy is not None
    assert resumed.server.privacy.merges == 3


def test_a_run_without_privacy_cannot_go_on_with_it(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation("merge.weights=uniform")
    Federation(scenario, shared_blocks, transport, tmp_path).run()
    private = numeric_scenario(*PRIVATE, "rounds=9")
    with pytest.raises(ValueError, match="its 4 rounds were without privacy"):
        Federation(private, shared_blocks, NumericTransport(shared_blocks), None, newest(tmp_path))


def stop_after(last: int, round: int) -> None:
    if round == last:
        raise KeyboardInterrupt


def newest(folder: Path) -> Checkpoint:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return checkpoint


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("merge.rule=median", 'merge.rule = "median" compares single clients without noise: use merge.rule = "mean"'),
        ("merge.weights=steps", 'merge.weights = "steps" depends on what clients did'),
        ("merge.mix=1", "merge.mix compares single clients"),
        ("merge.correct_drift=true", "merge.correct_drift takes the noise"),
        ("proximity.mode=measured", 'proximity.mode = "measured" goes by what clients measure'),
        ("round.mode=buffered", 'use round.mode = "sync"'),
        ("stop.patience=2", "the end of the run would tell returns without noise"),
        ("policy.shared=[]", "there is nothing to protect where nothing is shared"),
        ('penalty={ toward = "zero", weight = 0.1 }', 'penalty.toward = "zero" sets groups to zero by a vote'),
        ("sites=[{ name = 'all', clients = ['*'] }]", "leave [[sites]] out"),
    ],
)
def test_what_reads_more_of_single_clients_is_refused(override: str, words: str):
    with pytest.raises(ScenarioError) as error:
        numeric_scenario(*PRIVATE, "evaluate.every=1", override)
    assert f"with privacy.epsilon {words}" in str(error.value) or words in str(error.value)


def test_levels_by_the_server_and_lost_noise_are_refused():
    levels = "clients.c.curriculum={ kind = 'return', ranges = { length = [0.1, 0.9] }, target = 9 }"
    with pytest.raises(ScenarioError, match="steer levels by returns without noise"):
        numeric_scenario(*PRIVATE, levels, "curriculum.by=server")
    with pytest.raises(ScenarioError, match=r"use checkpoint\.every = 1, or 0"):
        numeric_scenario(*PRIVATE, 'privacy.source="system"', "checkpoint.every=2")


def test_a_budget_makes_weights_uniform_unless_they_are_given():
    assert numeric_scenario(*PRIVATE).merge.weights == "uniform"
    assert numeric_scenario("privacy.epsilon=inf").merge.weights == "steps"


# Words ---------------------------------------------------------------------------------------------------------------


def test_explain_tells_the_price_and_what_is_not_covered():
    scenario = numeric_scenario(*PRIVATE, count=4)
    text = " ".join(explain_privacy(scenario, resolve_shared_blocks(scenario)))
    assert "the budget of epsilon 8 with delta 0.01 lasts for 4 rounds" in text
    assert "expect no learning in common" in text
    assert "Returns and other metrics that clients report are not covered" in text
    many = numeric_scenario(*PRIVATE, "round.fraction=0.1", 'policy.shared=["actor"]', count=1000)
    text = " ".join(explain_privacy(many, resolve_shared_blocks(many)))
    assert "expect no learning" not in text
    assert "with probability 0.1" in text
    assert not list(explain_privacy(numeric_scenario(), resolve_shared_blocks(scenario)))
