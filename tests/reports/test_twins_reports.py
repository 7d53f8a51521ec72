"""What people see of twins: notes, results, the summary, the figure, MLflow and explanations."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grpo_fed.reports.explain import explain_scenario
from grpo_fed.reports.figures.write import draw_figures
from grpo_fed.reports.outcome import print_outcome
from grpo_fed.reports.sections import make_sections
from grpo_fed.runs.history import read_history
from grpo_fed.runs.recorder import Recorder
from grpo_fed.runs.records import ClientRecord, RoundRecord, ServerRecord
from grpo_fed.runs.results import Result
from grpo_fed.runs.sharing_verdicts import SharingVerdict, verdicts_line
from grpo_fed.runs.tracking.run_page import client_page, page_at_end
from grpo_fed.runs.tracking.selection import tracked_metrics
from grpo_fed.runs.tracking.views import make_views
from grpo_fed.scenario.scenario import Scenario

SOURCE = """
name = "made"
rounds = 3
evaluate = { twins = true }
[[clients]]
name = "cart"
count = 3
env = "CartPole-v1"
"""
GAINS = {"cart-0": -0.75, "cart-1": 0.5, "cart-2": 0.125}
"""What sharing brings each client; the first is warned in round 2, and the second gains from round 3 on."""


def metrics_of(name: str, round: int) -> dict[str, float]:
    gain = GAINS[name]
    since = {"cart-0": 2, "cart-1": 3}.get(name, 0)
    verdict = (1.0 if gain > 0 else -1.0) if 0 < since <= round else 0.0
    return {
        "charts/episodic_return": 10.0 * round,
        "twin/episodic_return": 20.0 * round,
        "twin/gain": gain,
        "twin/gain_low": gain - 0.25,
        "twin/gain_high": gain + 0.25,
        "twin/verdict": verdict,
        "twin/since": since if verdict else 0.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recorder = Recorder(Scenario.loads(SOURCE), tmp_path / "run", "cpu", "grpo")
    recorder.open(lambda record: None)
    for round in range(4):
        clients = [
            ClientRecord(name, "cart", 64 * (round > 0), 2, metrics_of(name, round) if round else {}, score=1.0)
            for name in GAINS
        ]
        recorder.round_finished(RoundRecord(round, 3, 1.0, 64, clients, ServerRecord(None, {}, 1, 2, 3)), None)
    recorder.finish()
    return tmp_path / "run"


def test_a_client_is_warned_once_in_the_round_in_which_it_turns_out(folder: Path):
    notes = {line["round"]: line.get("notes", []) for line in read_history(folder).lines}
    assert notes == {1: [], 2: ["sharing costs cart-0: it learns more alone, as its twin shows"], 3: []}


def test_results_have_the_verdicts(folder: Path):
    document = json.loads((folder / "results.json").read_text())
    result = Result.from_json(document)
    assert result.clients["cart-0"].sharing == SharingVerdict("costs", 2, -0.75, -1.0, -0.5)
    assert result.clients["cart-1"].sharing == SharingVerdict("pays", 3, 0.5, 0.25, 0.75)
    assert document["clients"]["cart-2"]["sharing"]["verdict"] == "open"
    screen = io.StringIO()
    print_outcome(Console(file=screen, width=100), result)
    assert "twins: sharing pays for 1, costs cart-0, is open for 1 of 3 clients" in screen.getvalue()


def test_the_summary_has_a_row_for_each_client(folder: Path):
    section = next(section for section in make_sections(read_history(folder)) if section.title == "Does sharing pay?")
    (table,) = section.tables
    assert table.rows == (
        ("cart-0", "costs", "2", "-75 %", "-100 % to -50 %", "30.0", "60.0"),
        ("cart-1", "pays", "3", "+50 %", "+25 % to +75 %", "30.0", "60.0"),
        ("cart-2", "open", "", "+12 %", "-12 % to +38 %", "30.0", "60.0"),
    )
    assert section.paragraphs[0].startswith("Sharing pays for 1, costs cart-0, is open for 1 of 3 clients")


def test_the_figure_has_a_line_for_each_client(folder: Path):
    draw_figures(folder)
    text = (folder / "figures" / "twins.svg").read_text()
    assert all(words in text for words in (*GAINS, "sharing brings, %", "Bands: intervals"))


def test_without_twins_nothing_is_said(tmp_path: Path):
    assert verdicts_line({}) == ""
    assert SharingVerdict.of({"charts/episodic_return": 3.0}) is None


def test_mlflow_has_the_numbers_and_the_pages_the_verdicts(folder: Path):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    metrics = tracked_metrics(lines[-1]["clients"]["cart-0"])
    assert {key: value for key, value in metrics.items() if key.startswith("twin/")} == {
        key: value for key, value in metrics_of("cart-0", 3).items() if key.startswith("twin/")
    }
    charts = {chart.metrics for view in make_views(list(metrics)) for part in view.sections.values() for chart in part}
    assert ("twin/gain", "twin/gain_low", "twin/gain_high") in charts
    document = json.loads((folder / "results.json").read_text())
    begin = {"scenario": "made", "description": "", "params": {"rounds": 3, "method": "grpo", "seed": 0}}
    page = page_at_end({**begin, "clients": list(GAINS)}, document, "finished")
    assert "**Sharing pays for 1, costs cart-0, is open for 1 of 3 clients**" in page
    assert "Sharing costs since round 2: -75 % (-100 % to -50 %)." in client_page(document["clients"]["cart-0"])


def test_explanations_name_the_twins():
    sentences = [sentence for part in explain_scenario(Scenario.loads(SOURCE)) for sentence in part.sentences]
    (sentence,) = (each for each in sentences if "twin" in each)
    assert "begins as it does and shares nothing" in sentence
