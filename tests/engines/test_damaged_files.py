"""Runs on the local engine whose files are damaged: what is damaged is named, and costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_fed.engines.start import resume, run
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario

SCENARIO = Scenario.loads("""
name = "damaged"
method = "fedavg"
rounds = 4
steps = 64
policy = { hidden = [8] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 1, minibatches = 1 }
evaluate = { episodes = 2 }
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 3
""")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def read_notes(folder: Path) -> dict[int, list[str]]:
    """Read the notes of every round that has some."""
    return {line["round"]: line["notes"] for line in read_lines(folder) if "notes" in line}


def cut_short(file: Path) -> None:
    """Leave the first half of a file; links to it keep the whole."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["state.json", "shared.safetensors", "clients/cart-1.safetensors"])
def test_a_run_goes_on_from_the_last_whole_checkpoint_to_the_same_end(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    run(SCENARIO, tmp_path / "whole", workers=0)

    def stop(record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SCENARIO, tmp_path / "cut", stop, workers=0)
    damaged = tmp_path / "cut" / "checkpoints" / "round-0003" / name
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 4
    damaged.unlink()
    damaged.write_bytes(content)
    seen: list[int] = []
    result = resume(tmp_path / "cut", lambda record: seen.append(record.round))
    assert seen == [3, 4]
    what = f"round-0003: is damaged: {name} does not have the SHA-256"
    assert what in caplog.text
    assert what in read_notes(tmp_path / "cut")[3][0]
    assert what in result.notes[0]
    for client in ("cart-0", "cart-1", "cart-2"):
        file = f"policies/{client}.safetensors"
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def damage_states(folder: Path, client: str, rounds: tuple[int, ...]) -> None:
    """Damage a client's states after these rounds."""
    for number in rounds:
        (state,) = (folder / "clients").glob(f"*/{client}/round-{number:04d}.safetensors")
        cut_short(state)


@pytest.mark.parametrize(
    ("rounds", "note"),
    [
        ((2,), "cart-1 went on from its state of round 1: it no longer has that of round 2"),
        ((1, 2), "cart-1 began anew: it no longer has that of round 2"),
    ],
)
def test_a_client_whose_state_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, rounds: tuple[int, ...], note: str
):
    def damage(record: RoundRecord) -> None:
        if record.round == 2:
            damage_states(tmp_path / "run", "cart-1", rounds)

    result = run(SCENARIO, tmp_path / "run", damage, workers=0)
    assert result.status == "finished"
    assert not result.missing
    assert read_notes(tmp_path / "run") == {3: [note]}
    assert len(list((tmp_path / "run" / "policies").iterdir())) == 3


def test_a_damaged_last_state_costs_no_results(tmp_path: Path):
    def damage(record: RoundRecord) -> None:
        if record.round == 4:
            damage_states(tmp_path / "run", "cart-1", (4,))

    run(SCENARIO, tmp_path / "run", damage, workers=0)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "finished"
    for client in ("cart-0", "cart-1", "cart-2"):
        assert load_policy(tmp_path / "run", client).parameters.shape[0] == 1


def test_a_policy_that_cannot_be_saved_is_named_and_costs_no_other(tmp_path: Path):
    def obstruct(record: RoundRecord) -> None:
        if record.round == 4:
            (tmp_path / "run" / "policies" / "cart-1.safetensors").mkdir(parents=True)

    result = run(SCENARIO, tmp_path / "run", obstruct, workers=0)
    (note,) = json.loads((tmp_path / "run" / "results.json").read_text())["notes"]
    assert note.startswith("the policy of cart-1 could not be saved: IsADirectoryError")
    assert result.notes == (note,)
    for client in ("cart-0", "cart-2"):
        assert load_policy(tmp_path / "run", client).task.client == client
