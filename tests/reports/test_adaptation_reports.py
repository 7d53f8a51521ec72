"""What people see of adaptation: the summary, the figure, the terminal, MLflow, comparisons and explanations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_fed.reports.comparison.compare import compare
from grpo_fed.reports.comparison.page import adaptation_curve
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.reports.figures.write import draw_figures
from grpo_fed.reports.outcome import result_line
from grpo_fed.reports.sections import make_sections
from grpo_fed.reports.summary import headline
from grpo_fed.runs.history import read_history
from grpo_fed.runs.recorder import Recorder
from grpo_fed.runs.records import ClientRecord, RoundRecord, ServerRecord
from grpo_fed.runs.results import Result
from grpo_fed.runs.tracking.run_page import client_page, clients_table, page_at_end
from grpo_fed.runs.tracking.selection import tracked_metrics
from grpo_fed.runs.tracking.views import make_views
from grpo_fed.scenario.scenario import Scenario

SOURCE = """
name = "made"
rounds = 2
[evaluate]
adapt = 2
[[clients]]
name = "cart"
count = 2
env = "CartPole-v1"
[[clients]]
name = "new"
count = 2
env = "CartPole-v1"
trains = false
"""


def write_run(folder: Path, scenario: Scenario, gain: float = 10.0) -> Path:
    """Write a run at whose end client k has the return 100 (k + 1), and `gain` more after each local update."""
    recorder = Recorder(scenario, folder, "cpu", scenario.method)
    recorder.open(lambda record: None)
    entries = [(settings, name) for settings in scenario.clients for name in settings.names]
    adapts = bool(scenario.evaluate.adapt)
    for round in range(3):
        clients = []
        for k, (settings, name) in enumerate(entries):
            start = 100.0 * (k + 1) if round == 2 else 1.0
            score = None if round == 1 else start
            curve = (start + gain, start + 2 * gain) if adapts and score is not None else ()
            steps = 64 if settings.trains and round else 0
            metrics = {"charts/episodic_return": 50.0 * round} if steps else {}
            clients.append(
                ClientRecord(name, settings.name, steps, 2, metrics, score, adapted=curve, trains=settings.trains)
            )
        server = ServerRecord(None, {}, 1, 2, 3)
        recorder.round_finished(RoundRecord(round, 2, 1.0, 128 * round, clients, server), None)
    recorder.finish()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", Scenario.loads(SOURCE))


def result_of(folder: Path) -> Result:
    return Result.from_json(json.loads((folder / "results.json").read_text()), folder)


def test_results_keep_the_curves_and_count_trained_clients_alone(folder: Path):
    result = result_of(folder)
    assert result.clients["new-1"].adapted_first == (1.0, 11.0, 21.0)
    assert result.clients["new-1"].adapted_last == (400.0, 410.0, 420.0)
    assert result.returns.tolist() == [100.0, 200.0]
    assert [client.trains for client in result.clients.values()] == [True, True, False, False]


def test_the_summary_has_the_returns_before_after_and_in_between(folder: Path):
    history = read_history(folder)
    words = "2 held-out clients adapted from 350.0 to 370.0 in 2 local updates"
    assert headline(history) == f"return 150.0 (mean of 2 clients), 1.00 before, worst client 100.0; {words}"
    section = next(section for section in make_sections(history) if section.title == "Adaptation")
    (table,) = section.tables
    assert table.head == ("client", "before", "after 1", "after 2", "by local update")
    assert [row[:4] for row in table.rows] == [
        ("new-0", "300.0", "310.0", "320.0"),
        ("new-1", "400.0", "410.0", "420.0"),
        ("mean", "350.0", "360.0", "370.0"),
        ("mean of the first policies", "1.00", "11.0", "21.0"),
    ]


def test_the_last_line_of_the_terminal_has_the_adaptation(folder: Path):
    line, words = result_line(result_of(folder)), "2 held-out clients adapted from 350.0 to 370.0"
    assert f"return 150.0 (interquartile mean 150.0, worst 100.0), {words}" in line


def test_the_figure_shows_the_clients_that_are_held_out(folder: Path):
    draw_figures(folder)
    text = (folder / "figures" / "adaptation.svg").read_text()
    assert all(name in text for name in ("new-0", "new-1", "mean", "first policies", "local updates"))
    assert "cart-0" not in text


def test_mlflow_has_the_curve_and_the_page_the_result(folder: Path):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    metrics = tracked_metrics(lines[-1])
    assert [metrics[f"adaptation/{number}"] for number in range(3)] == [350.0, 360.0, 370.0]
    assert metrics["eval/adapted_return"] == 370.0
    charts = {chart.metrics for view in make_views(list(metrics)) for part in view.sections.values() for chart in part}
    assert ("adaptation/0", "eval/adapted_return") in charts
    document = json.loads((folder / "results.json").read_text())
    params = {"rounds": 2, "method": "grpo", "seed": 0}
    begin = {"scenario": "made", "description": "", "params": params, "clients": list(document["clients"])}
    page = page_at_end(begin, document, "finished")
    assert "**The last policies adapted** to 370.0 in 2 local updates, 350.0 before" in page
    assert page.count("(mean of 2 held-out clients).") == 2
    assert "**The first policies adapted** to 21.0 in 2 local updates, 1.0 before" in page
    assert "| client | before | after | adapted | personal groups |" in page
    assert "| new-1 | 1.0 | 400.0 | 420.0 | - |" in page
    words = "1.0 before. After 2 local updates: 420.0. It takes no part in training. Personal groups: none."
    assert client_page(document["clients"]["new-1"]) == f"**Return 400.0**, {words}"
    table = clients_table(document)
    column = table["columns"].index("return_adapted")
    assert [row[column] for row in table["data"]] == [120.0, 220.0, 320.0, 420.0]


def test_a_comparison_has_each_methods_adaptation(tmp_path: Path):
    (tmp_path / "made.toml").write_text(SOURCE)
    gains = {"fedavg": 10.0, "reptile": 40.0}
    comparison = compare(
        tmp_path / "made.toml",
        ["fedavg", "reptile"],
        [0, 1],
        tmp_path / "out",
        lambda scenario, folder: write_run(folder, scenario, gains[scenario.method]),
    )
    assert comparison.clients == ("cart-0", "cart-1")
    _, reptile = comparison.methods
    assert reptile.adaptation is not None
    np.testing.assert_array_equal(reptile.adaptation, [[[300, 340, 380], [400, 440, 480]]] * 2)
    np.testing.assert_array_equal(reptile.scores, [[100, 200]] * 2)
    assert reptile.entries == {"cart": 150.0, "new": 350.0}
    assert reptile.verdict == "no difference"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| method | return | cart | new | before adaptation | after 2 updates |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `reptile` |")]
    assert "| 350.0 [350.0, 350.0] | 430.0 [430.0, 430.0] |" in row  # the seeds have the same numbers
    assert "![curves](figures/adaptation.png)" in text
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["methods"]["fedavg"]["adaptation"]["curve"] == [350.0, 360.0, 370.0]


def test_the_interval_of_an_adaptation_resamples_whole_seeds():
    """Of two seeds whose clients have 0 and 100 each, the middle half of a resample is 0, 50 or 100."""
    curve = adaptation_curve(np.array([[[0.0]] * 4, [[100.0]] * 4]))
    assert (curve.rounds.tolist(), curve.mean.tolist()) == ([0], [50.0])
    assert (curve.low.tolist(), curve.high.tolist()) == ([0.0], [100.0])


def test_a_run_without_adaptation_shows_none(tmp_path: Path):
    folder = write_run(tmp_path, Scenario.loads(SOURCE, overrides=["evaluate.adapt=0"]))
    assert "adapted" not in headline(read_history(folder))
    assert "adapt" not in (folder / "results.json").read_text()
    assert "adapt" not in (folder / "rounds.jsonl").read_text()
    assert "adaptation" not in [path.stem for path in draw_figures(folder)]


def test_it_is_explained_who_is_held_out_and_what_adapts():
    parts = explain_scenario(Scenario.loads(SOURCE, overrides=["rollout.num_envs=4", "rollout.horizon=32"]))
    text = "\n".join(sentence for part in parts for sentence in part.sentences)
    assert "2 clients of new take no part in training, and no score counts them" in text
    assert "each client makes 2 local updates on 128 steps of its own each on a copy of its policy" in text
    assert "All connected clients that train take part in a round" in text
