"""Newcomers: they join a run that has ended, begin with what is shared, and are asked what fits them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grpo_fed.aggregation.merge.evidence import Evidence, no_evidence
from grpo_fed.aggregation.merge.persistence import Asking, Heard, persistence
from grpo_fed.cli import app
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.start import run
from grpo_fed.federation.comparison import RETURNS, ReturnHistory
from grpo_fed.federation.joining import admit_newcomers, prepare_joining
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs import checkpoint
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.folder import read_scenario, read_shared_names
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from tests.aggregation.test_persistence import ALIKE, NAMES, TWO_GROUPS, replies_at
from tests.support.small_federation import TINY

OVERRIDES = ['merge.rule="persistence"', 'proximity.mode="measured"', "checkpoint.keep=9"]
DOE = '{ name = "doe", env = "grpo_fed/CartPole-v1", kwargs = { length = 0.3 } }'
SITES = "sites=[{ name = 'one', clients = ['ant', 'd*'] }, { name = 'two', clients = ['bee', 'cat'] }]"
VETERANS = ("ant", "bee", "cat")


def join(source: Path, folder: Path, *overrides: str, newcomers: tuple[str, ...] = (DOE,)) -> Result:
    prepare_joining(source, newcomers, ["rounds=4", *overrides], folder)
    with LocalEngine.resumed(folder) as engine:
        return engine.run()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "run"
    run(Scenario.loads(TINY, overrides=OVERRIDES), folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def joined(ended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined") / "run"
    join(ended, folder)
    return folder


def test_a_newcomer_takes_part_from_the_next_round_on(ended: Path, joined: Path):
    document = json.loads((joined / "results.json").read_text())
    assert document["clients"]["doe"]["joined"] == 3
    assert "joined" not in document["clients"]["ant"]
    assert document["clients"]["doe"]["env_steps"] == 2 * 64
    assert document["clients"]["ant"]["env_steps"] == 4 * 64
    lines = [json.loads(line) for line in (joined / "rounds.jsonl").read_text().splitlines()]
    assert ["doe" in line["clients"] for line in lines] == [False, False, True, True]
    before = (ended / "rounds.jsonl").read_text()
    assert (joined / "rounds.jsonl").read_text().startswith(before), "the rounds before are as they were"
    assert (joined / "policies" / "doe.safetensors").is_file()


def test_a_newcomer_begins_with_the_shared_blocks_as_they_are(ended: Path, joined: Path):
    shared = load_file(ended / "checkpoints" / "round-0002" / "shared.safetensors")
    state = load_file(joined / "checkpoints" / "round-0003" / "clients" / "doe.safetensors")
    slots = resolve_shared_blocks(read_scenario(ended)).layout.slots
    began = np.concatenate([shared[slot.name].reshape(-1) for slot in slots])
    assert np.array_equal(state["round.shared"], began)


def test_veterans_learn_the_same_until_the_first_merge_with_the_newcomer(ended: Path, joined: Path, tmp_path: Path):
    prepare_continuation(ended, ["rounds=4"], tmp_path / "alone")
    with LocalEngine.resumed(tmp_path / "alone") as engine:
        engine.run()
    for name in VETERANS:
        states = [
            load_file(folder / "checkpoints" / "round-0003" / "clients" / f"{name}.safetensors")
            for folder in (joined, tmp_path / "alone")
        ]
        assert np.array_equal(*(state["parameters"] for state in states))


def test_a_run_that_was_joined_resumes_to_the_same_bits(ended: Path, joined: Path, tmp_path: Path):
    folder = tmp_path / "stopped"
    shutil.copytree(joined, folder)
    shutil.rmtree(folder / "checkpoints" / "round-0004")
    (folder / "results.json").unlink()
    with LocalEngine.resumed(folder) as engine:
        engine.run()
    for path in sorted((joined / "policies").iterdir()):
        again = load_file(folder / "policies" / path.name)
        assert all(np.array_equal(array, again[name]) for name, array in load_file(path).items())


def test_what_a_policy_returns_that_has_learned_nothing_counts_as_the_lowest(joined: Path):
    """The first policy balances for some 20 steps; nothing that the newcomer saw in training counts as less."""
    state = load_file(joined / "checkpoints" / "round-0003" / "clients" / "doe.safetensors")
    history = ReturnHistory.read(state)
    assert 8 < history.lowest < 60
    assert history.lowest <= min(history.highest, history.last)
    assert len(state[RETURNS]) == 4


def test_the_floor_of_a_round_without_episodes_is_kept():
    history = ReturnHistory().after(float("nan"), 0.0, floor=20.0)
    assert history.lowest == 20.0
    assert history.after(300.0, 5.0).lowest == 20.0
    assert np.isnan(ReturnHistory().after(float("nan"), 0.0).lowest)


def test_a_checkpoint_with_newcomers_keeps_what_is_known_of_veterans(ended: Path, joined: Path):
    latest, names = checkpoint.latest(ended), read_shared_names(ended)
    assert latest is not None
    assert latest.shared is not None
    assert names is not None
    parts = {**latest.parts, "server": {**latest.parts["server"], "departed": {"cat": [1]}}}
    admitted = admit_newcomers(replace(latest, parts=parts), read_scenario(joined), names).shared
    assert admitted is not None
    assert admitted["evidence:0.departed"].sum(axis=1).tolist() == [0, 0, 1, 0]
    assert admitted["evidence:0.departed"][2, 1]
    assert admitted["evidence:0.newcomers"].tolist() == [False, False, False, True]
    before = latest.shared["evidence:0.common"]
    assert before.any()
    assert np.array_equal(admitted["evidence:0.common"][:3, :3], before)
    assert not admitted["evidence:0.common"][3].any()
    assert np.array_equal(admitted["evidence:0.sums"][:3], latest.shared["evidence:0.sums"])
    kept = {name for name in latest.shared if not name.startswith("evidence:")}
    assert all(np.array_equal(admitted[name], latest.shared[name]) for name in kept)


# The question ---------------------------------------------------------------------------------------------------------


def play_rounds(rounds: int, answer: bool) -> tuple[Evidence, dict[int, object], dict[int, dict[str, tuple[int, ...]]]]:
    """Rounds of clients that learn alike, of which the last has just joined."""
    (panel,) = no_evidence(NAMES, TWO_GROUPS).panels
    is_new = torch.tensor([name == "f" for name in panel.clients])
    evidence, shared = Evidence((replace(panel, newcomers=is_new),)), torch.zeros(80)
    found, asked = {}, {}
    for number in range(1, rounds + 1):
        points = {name: shared + ALIKE(name, number) for name in NAMES}  # type: ignore[operator]
        heard = Heard(dict.fromkeys(evidence.asked, answer))
        merged, evidence, found[number] = persistence(
            replies_at(points), shared, TWO_GROUPS, evidence, Asking(confirm=True), heard
        )
        asked[number], shared = dict(evidence.asked), merged.point
    return evidence, found, {number: each for number, each in asked.items() if each}


def test_a_newcomer_is_asked_once_whatever_its_updates_are():
    evidence, found, asked = play_rounds(30, answer=True)
    assert asked == {4: {"f": (0, 1)}}
    assert list(found[5].stayed) == ["f"]  # type: ignore[attr-defined]
    assert not evidence.panels[0].newcomers.any()
    assert not evidence.panels[0].departed.any()


def test_a_newcomer_that_does_better_with_its_own_leaves_everything():
    evidence, found, _ = play_rounds(5, answer=False)
    assert set(found[5].left["f"]) == {0, 1}  # type: ignore[attr-defined]
    assert evidence.panels[0].departed.sum(1).tolist() == [0, 0, 0, 0, 0, 2]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newcomer", "words"),
    [
        ('name = "doe"', "write an inline table of TOML"),
        ("3", "it is no table; write an inline table"),
        ('{ name = "ant", env = "CartPole-v1" }', "ant"),
        ('{ name = "doe", env = "Pendulum-v1" }', "policy.shared matches block torso.0"),
        ('{ name = "doe", env = "NoSuch-v0" }', "NoSuch"),
        ('{ name = "doe", env = "CartPole-v1", colour = "red" }', "colour"),
    ],
)
def test_newcomers_that_do_not_fit_are_refused_before_anything_is_written(
    newcomer: str, words: str, ended: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=words):
        prepare_joining(ended, [newcomer], ["rounds=4"], tmp_path / "next")
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["merge.rule=clusters"], "newcomers would have no cluster"),
        ([SITES], "the state of each is of the clients that it began with"),
        (["policy.shared=[]"], "share nothing that a newcomer could begin with"),
        (["checkpoint.every=0"], "has no checkpoint to go on from"),
    ],
)
def test_runs_that_cannot_take_newcomers_are_refused(overrides: list[str], words: str, tmp_path: Path):
    run(Scenario.loads(TINY, overrides=[*OVERRIDES, *overrides]), tmp_path / "run", workers=0)
    with pytest.raises(ValueError, match=words):
        prepare_joining(tmp_path / "run", [DOE], ["rounds=4"], tmp_path / "next")


def test_a_newcomer_with_levels_that_the_server_would_steer_is_refused(tmp_path: Path):
    run(Scenario.loads(TINY, overrides=[*OVERRIDES, "curriculum.by=server"]), tmp_path / "run", workers=0)
    levels = "{ kind = 'return', ranges = { length = [0.3, 0.9] }, start = { length = [0.4, 0.5] }, target = 50 }"
    doe = f'{{ name = "doe", env = "grpo_fed/CartPole-v1", curriculum = {levels} }}'
    with pytest.raises(ValueError, match=r"client doe: .*the server of the run steers no levels of it; leave"):
        prepare_joining(tmp_path / "run", [doe], ["rounds=4"], tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_a_newcomer_without_the_shared_blocks_is_refused(tmp_path: Path):
    """With `*` the blocks are shared that are alike, and with a pendulum these are fewer."""
    overrides = [*OVERRIDES, 'policy.shared=["*"]', 'objective.preset="ppo"']
    run(Scenario.loads(TINY, overrides=overrides), tmp_path / "run", workers=0)
    pendulum = '{ name = "doe", env = "Pendulum-v1" }'
    with pytest.raises(ValueError, match=r"share torso.0, .* with the newcomers' policies torso.0, .* would not be"):
        prepare_joining(tmp_path / "run", [pendulum], ["rounds=4"], tmp_path / "next")


def test_a_folder_without_a_run_is_said_to_be_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing: .*run"):
        prepare_joining(tmp_path / "nothing", [DOE], ["rounds=4"], tmp_path / "next")


def test_more_clients_are_no_change_of_a_setting(ended: Path, tmp_path: Path):
    entries = ", ".join(f"{{ name = '{name}', env = 'grpo_fed/CartPole-v1' }}" for name in (*VETERANS, "doe"))
    with pytest.raises(ValueError, match="cannot change it"):
        prepare_continuation(ended, [f"clients=[{entries}]", "rounds=4"], tmp_path / "next")


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_goes_on_with_the_newcomer(ended: Path, tmp_path: Path):
    arguments = ["join", str(ended), "--client", DOE, "--set", "rounds=3", "--out", str(tmp_path / "next")]
    result = CliRunner().invoke(app, [*arguments, "--track", "off", "--no-figures"])
    assert result.exit_code == 0, result.output
    assert "doe" in result.output
    assert "joined: doe in round 3" in result.output
    wrong = CliRunner().invoke(app, ["join", str(ended), "--client", "{}", "--set", "rounds=3", "--track", "off"])
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.output
