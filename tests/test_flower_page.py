"""The examples of docs/flower.md, used as a reader would use them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from grpo_fed.adapters import TorchLearner, initial_arrays
from grpo_fed.flower import Grouped
from tests.support.in_memory_grid import InMemoryGrid, enter_run

PAGE = (Path(__file__).parents[1] / "docs" / "flower.md").read_text(encoding="utf-8")
MODULES = {
    name: f"# {name}.py\n{text}" for name, text in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
}
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def importable_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the page's modules to a folder on the import path, inside a run of Flower."""
    enter_run(monkeypatch)
    torch.manual_seed(0)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def make_grid(app: object, nodes: int) -> InMemoryGrid:
    """Make a grid whose nodes 1, 2, ... have the parts 0, 1, ... of the data."""
    contexts = {node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {}) for node in range(1, nodes + 1)}

    def answer(message: Message) -> RecordDict:
        return app(message, contexts[message.metadata.dst_node_id]).content

    return InMemoryGrid(dict.fromkeys(contexts, answer))


def run_server(module: ModuleType, capsys: pytest.CaptureFixture[str], nodes: int = 5) -> str:
    """Run an app's server, and return what it prints."""
    module.app(make_grid(importlib.import_module("my_client").app, nodes), Context(1, 0, {}, RecordDict(), {}))
    return capsys.readouterr().out


def test_three_lines_let_the_client_with_swapped_labels_depart(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_server(importlib.import_module("my_server"), capsys)
    departed, accuracy = re.fullmatch(r"(\{.*\}) ([\d.]+)\n", printed).groups()
    assert departed == "{'5': ('torso', 'head')}"
    assert float(accuracy) > 0.95


def test_without_the_three_lines_it_is_an_app_with_fedavg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added, removed = ([line[1:] for line in DIFF.splitlines() if line[0] == sign] for sign in "+-")
    lines = MODULES["my_server"].splitlines()
    assert len(added) == 3
    assert all(lines.count(line) == 1 for line in added)
    pairs = {added[0]: "", **dict(zip(added[1:], removed, strict=True))}
    (tmp_path / "plain_server.py").write_text("\n".join(pairs.get(line, line) for line in lines) + "\n")
    accuracy = float(run_server(importlib.import_module("plain_server"), capsys))
    assert 0.7 < accuracy < 0.85  # four clients of five are right


def test_the_query_of_the_page_keeps_the_steps_within_the_budget() -> None:
    app, net = importlib.import_module("my_query").app, importlib.import_module("my_task").Net()
    from flwr.app import ArrayRecord, ConfigRecord

    strategy = Grouped(joint_budget=0.005)
    strategy.start(
        grid=make_grid(app, 2),
        initial_arrays=ArrayRecord(net.state_dict()),
        num_rounds=2,
        train_config=ConfigRecord({"lr": 0.3}),
    )
    assert all(0.003 < record.step.joint <= 0.005 for record in strategy.history)


def test_ppo_of_the_page_is_a_client_within_the_budget() -> None:
    page = importlib.import_module("my_ppo")
    page.strategy.start(grid=make_grid(page.app, 2), initial_arrays=page.arrays, num_rounds=1)
    (record,) = page.strategy.history
    assert record.weights == {"client-0": 512.0, "client-1": 512.0}
    assert 0 < record.step.joint <= 0.05
    assert len(MODULES["my_ppo"].split("\n\napp =")[0].strip().splitlines()) <= 15


def test_an_agent_of_the_page_is_a_client_and_measures_kl() -> None:
    page = importlib.import_module("my_agent")
    strategy = Grouped(FedAvg(fraction_evaluate=0.0), blocks={"actor": ["actor.*"]}, joint_budget=0.05)
    strategy.start(grid=make_grid(page.app, 2), initial_arrays=initial_arrays(page.make), num_rounds=2)
    for record in strategy.history:
        assert set(record.kl) == {"client-0", "client-1"}
        assert 0 < record.step.joint <= 0.05
        assert all(numbers["return"] >= 8 for numbers in record.train.values())


def test_an_actor_of_torchrl_is_a_client_and_measures_kl() -> None:
    page = importlib.import_module("my_torchrl")
    start = initial_arrays(page.make)
    strategy = Grouped(FedAvg(fraction_evaluate=0.0), blocks={"actor": ["actor.*"]}, joint_budget=1e-3)
    result = strategy.start(grid=make_grid(page.app, 2), initial_arrays=start, num_rounds=1)
    (record,) = strategy.history
    assert record.weights == {"client-0": 512.0, "client-1": 512.0}
    assert 0.5e-3 < record.step.joint <= 1e-3
    assert any((result.arrays[name].numpy() != start[name].numpy()).any() for name in start if name.startswith("actor"))


def test_the_gaussian_of_the_page_has_the_agents_means_and_deviations() -> None:
    agent = nn.Module()
    agent.actor_mean, agent.actor_logstd = nn.Linear(1, 2), nn.Parameter(torch.zeros(1, 2))
    policy = importlib.import_module("my_gaussian").gaussian(agent)(torch.ones(3, 1))
    torch.testing.assert_close(policy.mean, agent.actor_mean(torch.ones(3, 1)))
    assert policy.stddev.tolist() == [[1, 1]] * 3
    assert TorchLearner(agent, lambda: None, lambda x: policy).distribution is not None
