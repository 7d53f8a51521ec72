"""With a limit on costs an evaluation reports what its episodes cost: in records, results, tables, pages and MLflow."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from rich.console import Console
from typer.testing import CliRunner

from grpo_fed.cli import app
from grpo_fed.engines.start import run
from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.federation.messages import Evaluate, Evaluated, EvaluationPlan, EvaluationSummary, Start
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.reports.outcome import print_outcome, result_line
from grpo_fed.reports.sections import make_sections
from grpo_fed.rl.make import make_learners
from grpo_fed.runs.history import read_history
from grpo_fed.runs.results import Result
from grpo_fed.runs.tracking.run_page import client_page, clients_table
from grpo_fed.runs.tracking.selection import tracked_metrics
from grpo_fed.scenario.scenario import Scenario

TEXT = """
name = "tolls"
rounds = 2
steps = 32
device = "cpu"
policy = { hidden = [4] }
rollout = { num_envs = 3, horizon = 8 }
objective = { epochs = 1, minibatches = 1, cost = { limit = 4 } }
evaluate = { every = 2, episodes = 5 }
[[clients]]
name = "toll"
env = "Toll-v0"
count = 2
"""
SCENARIO = Scenario.loads(TEXT)


class Toll(gymnasium.Env):
    """Episodes of two to six steps, of which step t costs t, whatever is done."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(2, 7))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.length, False, {"cost": float(self.steps)}


gymnasium.register("Toll-v0", Toll, max_episode_steps=6)


def sum_of_steps(lengths: np.ndarray) -> np.ndarray:
    """1 + 2 + ... + n."""
    return lengths * (lengths + 1) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tolls") / "run"
    run(SCENARIO, folder, workers=0)
    return folder


@pytest.fixture
def result(folder: Path) -> Result:
    return Result.from_json(json.loads((folder / "results.json").read_text()), folder)


@pytest.mark.parametrize(("overrides", "limit"), [((), 6), (("evaluate.step_limit=3",), 3)])
def test_an_episode_costs_what_its_own_steps_did_and_no_step_after_its_end(overrides: tuple[str, ...], limit: int):
    (learner,) = make_learners(Scenario.loads(TEXT, overrides=overrides))
    for evaluation in learner.evaluate():
        assert len({*evaluation.lengths}) > 1, "episodes that end at different times"
        assert evaluation.lengths.max() <= limit
        assert evaluation.costs is not None
        assert evaluation.costs.tolist() == sum_of_steps(evaluation.lengths).tolist()
        assert evaluation.cost == pytest.approx(sum_of_steps(evaluation.lengths).mean())
    learner.close()


def test_without_a_limit_no_cost_is_read():
    (learner,) = make_learners(Scenario.loads(TEXT, overrides=["objective.cost.limit=inf"]))
    assert [evaluation.cost for evaluation in learner.evaluate()] == [None, None]
    learner.close()


def test_the_lines_the_results_and_mlflow_have_the_costs_of_each_client_and_their_mean(folder: Path, result: Result):
    first, last = (json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines())
    assert "eval/episodic_cost" not in first, "clients were not evaluated in that round"
    costs = {name: client["eval/episodic_cost"] for name, client in last["clients"].items()}
    assert all(3 <= cost <= 21 for cost in costs.values())
    assert last["eval/episodic_cost"] == pytest.approx(np.mean([*costs.values()]))
    assert result.costs == costs == {name: client.cost for name, client in result.clients.items()}
    assert tracked_metrics(last)["eval/episodic_cost"] == last["eval/episodic_cost"]


def test_the_tables_and_pages_have_the_costs(folder: Path, result: Result):
    mean, worst = np.mean([*result.costs.values()]), max(result.costs.values())
    line = result_line(result)
    assert f", cost {mean:.2f} (worst {worst:.2f})," in line or f", cost {mean:.1f} (worst {worst:.1f})," in line
    screen = io.StringIO()
    print_outcome(Console(file=screen, width=200), result)
    assert "cost" in screen.getvalue().splitlines()[1]
    section = next(section for section in make_sections(read_history(folder)) if section.title == "Clients")
    at = section.tables[0].head.index("cost")
    assert [float(row[at]) for row in section.tables[0].rows] == pytest.approx([*result.costs.values()], abs=0.06)
    document = result.to_json()
    assert f"cost {result.costs['toll-0']:.1f}." in client_page(document["clients"]["toll-0"])
    table = clients_table(document)
    at = table["columns"].index("cost")
    assert [row[at] for row in table["data"]] == [*result.costs.values()]


def test_play_shows_what_episodes_cost(folder: Path):
    shown = CliRunner().invoke(app, ["play", str(folder), "--client", "toll-0", "--episodes", "4"])
    assert shown.exit_code == 0, shown.output
    assert "cost" in shown.output


def test_a_cost_travels_where_it_is_limited_and_nowhere_else():
    blocks = resolve_shared_blocks(SCENARIO)
    codec = Codec(blocks, SCENARIO)
    instruction = Evaluate(Start("run", 1, blocks.initial.numpy()), EvaluationPlan(1))
    summary = EvaluationSummary(4.0, 1.0, 2.0, 6.0, 5, 4.0, cost=11.5)
    answer = codec.read_answer(instruction, codec.write_answer(instruction, Evaluated(summary)))
    assert isinstance(answer, Evaluated)
    assert vars(answer.summary) == vars(summary)
    without = Evaluated(dataclasses.replace(summary, cost=None))
    with pytest.raises(InvalidMessageError, match=r"evaluation\.cost is missing"):
        codec.read_answer(instruction, codec.write_answer(instruction, without))
    infinite = Evaluated(dataclasses.replace(summary, cost=float("inf")))
    with pytest.raises(InvalidMessageError, match=r"evaluation\.cost is inf"):
        codec.read_answer(instruction, codec.write_answer(instruction, infinite))
    free = Codec(blocks, Scenario.loads(TEXT, overrides=["objective.cost.limit=inf"]))
    with pytest.raises(InvalidMessageError, match=r"evaluation has \['cost'\]"):
        free.read_answer(instruction, free.write_answer(instruction, Evaluated(summary)))
