"""Federations of clients with prompts: the real loop, real adapters of the tiny model, few completions."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributions import Categorical, kl_divergence

from grpo_fed.engines.alone import AloneEngine, train
from grpo_fed.engines.start import resume, run
from grpo_fed.engines.workers.fork_server import is_possible
from grpo_fed.federation.messages import Measure
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.runs.adapters import LoadedAdapters
from grpo_fed.runs.checkpoint import latest
from grpo_fed.runs.examples import read_examples
from grpo_fed.runs.policies import LoadedPolicy, load_network, load_policy
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from tests.support import real_clients
from tests.support.real_clients import RealTransport
from tests.support.small_language import CLIENTS, plain_distribution, words

ROOT = Path(__file__).parents[2]
THREE = ("rounds=3", "evaluate.every=1")
FEDAVG = ("method=fedavg", "merge.weights=uniform")


def adapters(folder: Path, client: str) -> LoadedAdapters:
    """Load a client's adapters from a run's folder."""
    policy = load_policy(folder, client)
    assert isinstance(policy, LoadedAdapters)
    return policy


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Three rounds of the default method, with evaluations after each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(words(*THREE), folder, workers=0)


# Methods and rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "alike"),
    [
        ("grpo", True),
        ("local", False),
        ("fedavg", True),
        ("fedprox", True),
        ("fedkl", True),
        ("fisher", True),
        ("ditto", False),
        ("clusters", True),
    ],
)
def test_every_method_trains_adapters(tmp_path: Path, method: str, alike: bool):
    """After the last merge all clients have the same adapters, unless the method gives each its own."""
    given = words(f"method={method}", "steps=16", "evaluate.episodes=2", "language.show=0")
    result = run(given, tmp_path, workers=0)
    assert (result.status, result.missing) == ("finished", {})
    assert {client.env_steps for client in result.clients.values()} == {32}
    parameters = [adapters(tmp_path, client).parameters for client in CLIENTS]
    assert all(each.abs().max() > 1e-3 for each in parameters)
    assert torch.equal(parameters[0], parameters[1]) == alike
    assert torch.equal(parameters[0], parameters[2]) == alike
    losses = {name for line in lines(tmp_path)[1:] for client in line["clients"].values() for name in client}
    assert ("losses/kl_reference" in losses) == (method == "fedkl")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (("merge.rule=median",), lambda points, start: np.median(points, 0)),
        (("merge.rule=trimmed-mean", "merge.fraction=0.34"), lambda points, start: np.median(points, 0)),
        (("merge.rule=huber", "merge.threshold=inf"), lambda points, start: np.mean(points, 0)),
        (("merge.rule=huber", "merge.threshold=0"), lambda points, start: start),
        (("merge.rule=mean",), lambda points, start: np.mean(points, 0)),
    ],
    ids=["median", "trimmed-mean", "huber without a threshold", "huber with one of 0", "mean"],
)
def test_a_rule_merges_adapters_as_it_merges_other_parameters(tmp_path: Path, rule: tuple[str, ...], expected: Any):
    federation, transport, _ = real_clients.run(words(*FEDAVG, *rule), tmp_path)
    for number in (1, 2):
        points = np.stack([reply.point for _, trained, reply in transport.trained if trained == number])
        assert points.std(0).max() > 1e-3
        after = federation.state.shared if number == 2 else transport.shared(2)
        np.testing.assert_allclose(after, expected(points, transport.shared(number)), atol=1e-6)


def test_krum_takes_the_adapters_of_the_client_that_is_nearest_to_the_others(tmp_path: Path):
    given = words(*FEDAVG, "merge.rule=krum", "merge.byzantine=0", "merge.keep=1")
    federation, transport, _ = real_clients.run(given, tmp_path)
    points = np.stack([reply.point for _, trained, reply in transport.trained if trained == 2])
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    nearest = np.sort(distances, 1)[:, 1].argmin()  # n - f - 2 = 1 neighbour
    pair = points[distances[nearest] <= np.sort(distances[nearest])[1]]
    assert any(np.array_equal(federation.state.shared, point) for point in pair)


# Trust in the server's steps -----------------------------------------------------------------------------------------


BUDGETS = ("merge.rule=mean", "proximity.kl_block=0.0004", "proximity.kl_joint=0.0008", "objective.learning_rate=0.05")


def plain_kl(transport: RealTransport, run: str, name: str, number: int, old: np.ndarray, new: np.ndarray) -> float:
    """Compute KL(old, new) of one client's policy on its stored completions, one at a time in transformers."""
    stored = transport.store.read(run, name, number)
    assert stored is not None
    state, policy = stored.arrays, transport.clients[name].policies.policy
    columns = transport.shared_blocks.columns_in(policy.layout).numpy()
    width = int(state["measurement_rows.width"][0])
    divergences = []
    for row, (before, after) in zip(
        state["measurement_rows.tokens"].tolist(), state["measurement_rows.lengths"].tolist(), strict=True
    ):
        prompt, tokens = row[width - before : width], row[width : width + after]
        pair = []
        for shared in (old, new):
            flat = state["parameters"].copy()
            flat[columns] = shared
            factors = policy.frozen_factors(transport.scenario.seed)  # type: ignore[attr-defined]
            with torch.no_grad():
                pair.append(Categorical(logits=plain_distribution(policy, factors, torch.tensor(flat), prompt, tokens)))  # type: ignore[arg-type]
        divergences.append(kl_divergence(*pair))
    return float(torch.cat(divergences).mean())


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_no_accepted_step_exceeds_its_budgets_on_the_clients_completions(tmp_path: Path, over: str):
    federation, transport, records = real_clients.run(words(*BUDGETS, f"proximity.over={over}"), tmp_path)
    shortened = 0
    for number in (1, 2):
        server = records[number].server
        assert server is not None
        accepted = server.step
        assert accepted is not None
        old, new = transport.shared(number), federation.state.shared if number == 2 else transport.shared(2)

        def over_clients(step: np.ndarray, old: np.ndarray = old, number: int = number) -> float:
            kl = [plain_kl(transport, federation.state.name, name, number, old, step) for name in CLIENTS]
            return float(np.mean(kl) if over == "mean" else np.max(kl))

        joint = over_clients(new)
        assert 0 < joint <= 0.0008 * (1 + 1e-3)
        assert joint == pytest.approx(accepted.joint, rel=1e-2, abs=1e-6)
        for block in accepted.blocks:
            moved, columns = old.copy(), transport.shared_blocks.slices[block.block]
            moved[columns] = new[columns]
            kl = over_clients(moved)
            assert kl <= 0.0004 * (1 + 1e-3)
            assert kl == pytest.approx(block.kl, rel=1e-2, abs=1e-6)
            shortened += 0 < block.alpha < 1
    assert shortened >= 3  # otherwise the budgets were no limits
    assert any(isinstance(instruction, Measure) for _, instruction in transport.sent)


def test_a_predicted_kl_has_the_size_of_the_measured_one(tmp_path: Path):
    given = words(*BUDGETS, "proximity.mode=quadratic", "rounds=3", "steps=16", "rollout.num_envs=16")
    _, transport, records = real_clients.run(given, tmp_path)
    assert not any(isinstance(instruction, Measure) for _, instruction in transport.sent)
    for before, after in itertools.pairwise(records[1:]):
        assert before.server is not None
        assert before.server.step is not None
        assert before.server.step.joint is not None
        assert after.server is not None
        assert 0 < before.server.step.joint <= 0.0008
        assert set(after.server.last_kl) == {"joint", "layers.0", "layers.1", "layers.2"}
        assert 0.1 < after.server.last_kl["joint"] / before.server.step.joint < 10


# Runs again ----------------------------------------------------------------------------------------------------------


CLOCKS = {"seconds", "charts/seconds", "charts/SPS", "charts/tokens_per_second", "time/round_s"}


def without_times(document: Any) -> Any:
    """Remove from JSON what depends on a clock."""
    if isinstance(document, list):
        return [without_times(part) for part in document]
    if isinstance(document, dict):
        return {name: without_times(value) for name, value in document.items() if name not in CLOCKS}
    return document


def content_of(folder: Path) -> dict[str, Any]:
    """Read all that a run has left in its folder, without times and the run's random name."""
    checkpoint = latest(folder)
    assert checkpoint is not None
    files = [*folder.glob("policies/*/*"), *folder.glob("examples/*")]
    return {
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in files},
        "shared": {name: array.tobytes() for name, array in (checkpoint.shared or {}).items()},
        "states": {
            f"{client} {name}": array.tobytes()
            for client, arrays in checkpoint.states().items()
            for name, array in arrays.items()
        },
        "rounds": without_times(lines(folder)),
        "results": without_times(json.loads((folder / "results.json").read_text())),
    }


def test_an_interrupted_run_resumes_to_the_same_end(whole: tuple[Path, Result], tmp_path: Path):
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(words(*THREE), tmp_path / "cut", stop, workers=0)
    resume(tmp_path / "cut")
    assert content_of(tmp_path / "cut") == content_of(whole[0])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_run_resumes_to_the_same_end(whole: tuple[Path, Result], tmp_path: Path):
    (tmp_path / "words.toml").write_text(words(*THREE).dumps())
    code = f"""
from grpo_fed import Scenario, run
run(Scenario.load({str(tmp_path / "words.toml")!r}), {str(tmp_path / "killed")!r}, workers=0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    written = tmp_path / "killed" / "rounds.jsonl"
    while not written.exists() or len(written.read_text().splitlines()) < 2:
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = latest(tmp_path / "killed")
    assert checkpoint is not None
    assert 1 <= checkpoint.round < 3
    resume(tmp_path / "killed")
    assert content_of(tmp_path / "killed") == content_of(whole[0])


@pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")
def test_the_number_of_workers_changes_the_last_bits_alone(whole: tuple[Path, Result], tmp_path: Path):
    result = run(words(*THREE), tmp_path, workers=2)
    assert (result.status, result.missing) == ("finished", {})
    for client in CLIENTS:
        torch.testing.assert_close(
            adapters(tmp_path, client).parameters, adapters(whole[0], client).parameters, rtol=0, atol=2e-4
        )
    assert {name: client.before for name, client in result.clients.items()} == {
        name: client.before for name, client in whole[1].clients.items()
    }


# Folders -------------------------------------------------------------------------------------------------------------


def test_policies_are_folders_of_peft_that_repeat_the_evaluation(whole: tuple[Path, Result]):
    folder, result = whole
    assert {path.name for path in (folder / "policies").iterdir()} == set(CLIENTS)
    for client in CLIENTS:
        names = {path.name for path in (folder / "policies" / client).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        tensors = load_file(folder / "policies" / client / "adapter_model.safetensors")
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight" in tensors
        loaded = adapters(folder, client)
        # a federation's evaluations are numbered by rounds; `play` repeats that of round 0
        before = LoadedAdapters(loaded.scenario, loaded.task, loaded.policy, torch.zeros_like(loaded.parameters))
        assert before.play().score == pytest.approx(result.clients[client].before)
        with pytest.raises(ValueError, match=f"client {client} has adapters of a language model, not a network"):
            load_network(folder, client)


def test_examples_show_completions_before_and_after(whole: tuple[Path, Result]):
    folder, _ = whole
    for client in CLIENTS:
        examples = read_examples(folder, client)
        loaded = adapters(folder, client)
        assert len(examples) == 4
        prompts = [example.prompt for example in examples]
        assert len(set(prompts)) == 4
        assert loaded.complete(prompts) == [example.after for example in examples]
        base = LoadedAdapters(loaded.scenario, loaded.task, loaded.policy, torch.zeros_like(loaded.parameters))
        assert base.complete(prompts) == [example.before for example in examples]
        digits = [example.prompt[1:-1] for example in examples]
        order: Mapping[str, Any] = {
            "up": lambda text: "".join(sorted(text)),
            "back": lambda text: text[::-1],
            "down": lambda text: "".join(sorted(text, reverse=True)),
        }
        for example, text in zip(examples, digits, strict=True):
            right = order[client](text)
            for written, reward in ((example.before, example.before_reward), (example.after, example.after_reward)):
                near = sum(a == b for a, b in zip(written, right, strict=False)) / max(len(written), len(right))
                assert reward == pytest.approx(near + 0.5 * (written == right) * (client == "down"))


def test_no_examples_are_kept_where_none_are_asked_for(tmp_path: Path):
    run(words("rounds=1", "language.show=0", "evaluate.episodes=1"), tmp_path, workers=0)
    assert not (tmp_path / "examples").exists()
    assert read_examples(tmp_path, "up") == []


# Without a federation, and beside environments -----------------------------------------------------------------------


def test_training_alone_equals_a_federation_that_shares_nothing(tmp_path: Path):
    given = words("policy.shared=[]", "proximity.mode=off", "merge.rule=mean", "rollout.num_envs=12", "steps=16")
    alone = train(given, tmp_path / "alone")
    together = run(given, tmp_path / "together", workers=0)
    for client in CLIENTS:
        one, other = (adapters(tmp_path / name, client).parameters for name in ("alone", "together"))
        assert one.abs().max() > 1e-3
        assert torch.equal(one, other)
        assert alone.clients[client].before == together.clients[client].before
        assert adapters(tmp_path / "alone", client).play().score == alone.clients[client].after


def test_training_alone_resumes_to_the_same_end(tmp_path: Path):
    given = words("policy.shared=[]", "evaluate.episodes=2")
    train(given, tmp_path / "whole")

    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "cut", stop)
    with AloneEngine.resumed(tmp_path / "cut") as engine:
        engine.run()
    assert content_of(tmp_path / "cut") == content_of(tmp_path / "whole")


CART = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
"""


def test_environments_and_prompts_go_together_where_nothing_is_shared(tmp_path: Path):
    text = words(clients=["up"]).dumps() + CART
    given = Scenario.loads(text, overrides=["policy.shared=[]", "rollout.episode_limit=20"])
    result = run(given, tmp_path, workers=0)
    assert (result.status, result.missing) == ("finished", {})
    assert isinstance(load_policy(tmp_path, "up"), LoadedAdapters)
    assert isinstance(load_policy(tmp_path, "cart"), LoadedPolicy)
    assert (tmp_path / "examples").is_dir()
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {"up.jsonl"}


def test_blocks_of_a_network_and_of_adapters_are_not_shared():
    text = words(clients=["up"]).dumps() + CART
    default = ["policy.shared=['torso.*', 'actor', 'layers.*']"]
    with pytest.raises(
        ValueError, match=r"policy\.shared matches block layers\.0, .* no such block for client cart .*: leave"
    ):
        FederationSetup.of(Scenario.loads(text, overrides=default))
    with pytest.raises(ValueError, match=r'client cart .*: policy\.shared: "layers\.\*" matches no block'):
        FederationSetup.of(Scenario.loads(text))
    assert FederationSetup.of(Scenario.loads(text, overrides=["policy.shared=['*']"])).shared_blocks.blocks == ()
