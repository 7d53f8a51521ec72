"""Runs on the local engine whose files are damaged: what is damaged is named, and costs nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from grpo_fed.engines.start import resume, resume_engine, run
from grpo_fed.reports.summary import summary_markdown
from grpo_fed.runs.history import read_history
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


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda lines: "", "2 rounds from 1 on"),
        (lambda lines: lines.replace('"round": 2', '"round": 7'), "round 2"),
        (lambda lines: lines[9:], "round 1"),
        (None, "2 rounds from 1 on"),
    ],
    ids=["emptied", "changed", "beginning cut off", "deleted"],
)
def test_lost_lines_of_rounds_are_named_and_cost_nothing_else(
    tmp_path: Path, damage: Callable[[str], str] | None, lost: str, caplog: pytest.LogCaptureFixture
):
    def stop(record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SCENARIO, tmp_path / "cut", stop, workers=0)
    file = tmp_path / "cut" / "rounds.jsonl"
    lines = file.read_text()
    file.unlink()
    if damage is not None:
        file.write_text(damage(lines))
    result = resume(tmp_path / "cut", lambda record: None)
    assert (result.status, len(result.clients)) == ("finished", 3)
    what = f"rounds.jsonl: has no whole line of {lost}"
    assert what in caplog.text
    assert what in result.notes[0]
    assert list(read_history(tmp_path / "cut").rounds)[-2:] == [3, 4]


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


# Files of another form -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stop a run after two rounds."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SCENARIO, folder, stop, workers=0)
    return folder


def change_json(file: Path, keys: tuple[str, ...], value: object) -> None:
    """Change a value in a file of JSON; None removes it."""
    document = json.loads(file.read_text())
    *above, last = keys
    inner = document
    for key in above:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    file.unlink()
    file.write_text(json.dumps(document))


def reseal(checkpoint: Path) -> None:
    """Write a checkpoint's digests as its files are now."""
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != "SHA256SUMS"]
    lines = (f"{sha256(file.read_bytes()).hexdigest()}  {file.relative_to(checkpoint)}\n" for file in files)
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    ("keys", "value", "what"),
    [
        (("parts", "server"), None, "it has no server"),
        (("parts", "server", "trained", "cart-0"), 99, "trained oftener than"),
        (("parts", "server", "trained", "nobody"), 1, "it has a client nobody"),
        (("parts", "server", "budgets"), {}, "it has budgets of no block"),
        (("parts", "server", "departed"), {"cart-0": [77]}, "groups other than"),
        (("parts", "server", "clusters"), {"cart-0": [0]}, "clusters of other than"),
        (("parts", "server", "name"), "../../x", "clients cannot make a folder"),
        (("parts", "server", "last_step"), 5, "last_step"),
        (("parts", "recorder", "totals"), [], "totals"),
        (("parts", "stopping"), "x", "stopping"),
        (("parts", "rounds_below_quorum"), None, "rounds_below_quorum"),
        (("parts", "engine"), [], "engine"),
        (("parts", "engine", "workers"), "many", "workers"),
        (("parts", "engine", "set_aside"), [["nobody"]], "nobody"),
        (("origins", "cart-0"), None, "lacks the state of the clients"),
        (("clients",), ["nobody"], "no other checkpoint is whole"),
    ],
)
def test_a_state_of_another_form_is_an_error_for_users(
    stopped: Path, tmp_path: Path, keys: tuple[str, ...], value: object, what: str
):
    shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-0001")
    checkpoint = tmp_path / "run" / "checkpoints" / "round-0002"
    change_json(checkpoint / "state.json", keys, value)
    reseal(checkpoint)
    with pytest.raises(ValueError, match=what):
        resume_engine(tmp_path / "run")


def test_arrays_of_another_form_are_an_error_for_users(stopped: Path, tmp_path: Path):
    shutil.copytree(stopped, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "round-0002"
    shared = load_file(checkpoint / "shared.safetensors")
    for change in (lambda array: array[..., :1], lambda array: array.astype("f8"), lambda array: array * float("nan")):
        save_file({name: change(array).copy() for name, array in shared.items()}, checkpoint / "shared.safetensors")
        reseal(checkpoint)
        with pytest.raises(ValueError, match="its state does not fit the scenario"):
            resume_engine(tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("eval",), {}),
        (("rounds",), "3"),
        (("clients", "cart-0"), 5),
        (("clients", "cart-0", "return"), None),
        (("missing",), {"cart-0": [[1]]}),
        (("env_steps",), []),
    ],
)
def test_results_of_another_form_are_read_or_an_error_for_users(
    stopped: Path, tmp_path: Path, keys: tuple[str, ...], value: object
):
    shutil.copytree(stopped, tmp_path / "run")
    change_json(tmp_path / "run" / "results.json", keys, value)
    if keys in (("rounds",), ("eval",)):
        assert "damaged" in summary_markdown(read_history(tmp_path / "run"))
    else:
        with pytest.raises(ValueError, match=r"results\.json: is damaged"):
            read_history(tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("notes",), 5),
        (("clients", "cart-0", "personal_groups"), {}),
        (("clients", "cart-0", "left"), [1]),
        (("clients", "cart-0", "comparison"), {"own": "x"}),
        (("clients", "cart-0", "failure"), 3),
        (("clients", "cart-0"), []),
        (("global_step",), None),
    ],
)
def test_lines_of_another_form_are_read_or_an_error_for_users(
    stopped: Path, tmp_path: Path, keys: tuple[str, ...], value: object
):
    shutil.copytree(stopped, tmp_path / "run")
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    (tmp_path / "line").write_text(lines[-1])
    change_json(tmp_path / "line", keys, value)
    (tmp_path / "run" / "rounds.jsonl").write_text("\n".join([*lines[:-1], (tmp_path / "line").read_text(), ""]))
    if keys == ("global_step",):
        assert "0 environment steps" in summary_markdown(read_history(tmp_path / "run"))
    else:
        with pytest.raises(ValueError, match=r"rounds\.jsonl:2: is no line of a run"):
            read_history(tmp_path / "run")
