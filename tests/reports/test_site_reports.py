"""What people see of sites: lines of rounds, results, tables, the summary, the figure, and words before a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from grpo_fed.federation.rounds import Federation
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.reports.figures.sharing import draw_sites
from grpo_fed.reports.progress import server_line
from grpo_fed.reports.sections import make_sections
from grpo_fed.reports.tables import sites_table
from grpo_fed.runs.history import read_history
from grpo_fed.runs.metrics import TEXTS, is_tracked
from grpo_fed.runs.records import ServerRecord, SiteRecord
from grpo_fed.runs.results import Result, read_results
from tests.support.numeric_clients import numeric_federation

SITES = 'sites=[{ name = "near", clients = ["c-[0-2]"] }, { name = "far", clients = ["c-[3-5]"] }]'


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine rounds in which the far site leaves the actor, where its clients want the opposite."""
    folder = tmp_path_factory.mktemp("sites") / "run"
    overrides = [SITES, "rounds=9", "merge.rule=persistence", "merge.confirm=evidence", "proximity.mode=measured"]
    scenario, shared_blocks, transport = numeric_federation(*overrides, count=6)
    goal, actor = 50 * transport.numbers("all", 0), shared_blocks.slices["actor"]
    opposite = goal.copy()
    opposite[actor] = -opposite[actor]
    transport.goals = {name: opposite if name in ("c-3", "c-4", "c-5") else goal for name in shared_blocks.clients}
    transport.steps = {f"c-{number}": 64 for number in (3, 4, 5)}  # of two sites the lighter one leaves
    Federation(scenario, shared_blocks, transport, folder).run()
    return folder


def test_a_line_has_the_metrics_of_each_site_and_what_it_left(run_folder: Path):
    lines = [json.loads(line) for line in (run_folder / "rounds.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert last["sites"] == {"near": {}, "far": {"personal_groups": ["actor"]}}
    ((round, left),) = [
        (line["round"], line["sites"]["far"]["left"]) for line in lines if "left" in line["sites"]["far"]
    ]
    assert round == 7
    assert left.keys() == {"actor"}
    assert last["site/far/fed/personal_groups"] == 1
    assert last["site/near/fed/personal_groups"] == 0
    of_clients = [last["clients"][f"c-{number}"]["charts/episodic_return"] for number in range(3)]
    assert last["site/near/charts/episodic_return"] == pytest.approx(np.mean(of_clients))
    assert last["site/far/kl/joint"] <= last["site/far/budget/joint"] == 0.05
    assert all(is_tracked(key) for key in last if key not in TEXTS | {"round"})


def test_the_results_say_when_a_site_left_what(run_folder: Path):
    document = read_results(run_folder)
    assert document is not None
    assert document["sites"]["near"] == {"clients": ["c-0", "c-1", "c-2"], "personal_groups": []}
    far = Result.from_json(document).sites["far"]
    assert far.personal_groups == ("actor",)
    assert far.departures["actor"].round == 7


def test_the_table_of_sites_has_returns_departures_and_rho(run_folder: Path):
    document = read_results(run_folder)
    assert document is not None
    result = Result.from_json(document)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(sites_table(result))
    rows = [line.split() for line in captured.get().splitlines()]
    near, far = [row for row in rows if row[:1] in (["near"], ["far"])]
    rho = f"{result.sites['far'].departures['actor'].rho:.2f}"
    assert far[-3:] == ["actor", "7", rho]
    assert near[:2] == ["near", "3"]


def test_the_summary_has_a_section_of_sites(run_folder: Path):
    (section,) = [each for each in make_sections(read_history(run_folder)) if each.title == "Sites"]
    near, far = section.tables[0].rows
    assert near[0] == "near"
    assert near[-1] == "none"
    assert far[-1].startswith("actor since round 7, rho ")


def test_the_figure_shows_the_departure_from_its_round_on(run_folder: Path):
    history = read_history(run_folder)
    actor = list(history.block_of_group).index("actor")
    assert [int(history.rounds[row]) for row in np.flatnonzero(history.site_departed[:, 1, actor])] == [7, 8, 9]
    assert not history.site_departed[:, 0].any()
    drawing = draw_sites(history)
    assert drawing is not None
    assert drawing.alt == "At the end departed: far from actor."


def test_the_line_of_a_round_names_the_sites_that_have_departed():
    server, left = ServerRecord(None, {}, 500_000, 500_000, 0), SiteRecord("far", (), departed=("torso.0", "actor"))
    assert server_line(server, [SiteRecord("near", ()), left]) == "1.00 MB  site far departed from torso.0, actor"


def test_a_scenario_with_sites_is_explained():
    scenario, _, _ = numeric_federation(
        'sites=[{ name = "near", clients = ["c-0"], merge = { rule = "mean" } }, { name = "far", clients = ["c-1"] }]',
        "merge.rule=persistence",
        count=2,
    )
    (part,) = [part for part in explain_scenario(scenario) if part.title == "Sites"]
    text = " ".join(part.sentences)
    assert "2 sites: near with 1 client, far with 1 client." in text
    assert "its clients play 20 episodes each" in text
    assert 'At near: merge.rule = "mean".' in text
