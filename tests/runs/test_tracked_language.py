"""What MLflow gets of clients with prompts, of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_fed.engines.start import run
from grpo_fed.rl.records import Example
from grpo_fed.runs.examples import read_examples
from grpo_fed.runs.records import record_to_line
from grpo_fed.runs.tracking import Tracker
from grpo_fed.runs.tracking.run_page import examples_table, page_while_running
from grpo_fed.runs.tracking.views import LONGEST, make_view_tags, make_views
from grpo_fed.scenario.scenario import Scenario
from tests.support.language_run import letters
from tests.support.tracking_runs import Database


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Database, Scenario]:
    """A run of the federation, and the database that it was tracked to."""
    folder = tmp_path_factory.mktemp("runs") / "letters"
    database = Database(folder.parent / "mlflow.db")
    scenario = letters('policy.groups={"layers.*"="tensor"}', "trust.region=penalty")
    tracker = Tracker.open(database.uri, folder, scenario)
    result = run(scenario, folder, watch=lambda record: tracker.round(record_to_line(record)))
    tracker.close(result.to_json(), "finished")
    assert tracker.trouble is None
    return folder, database, scenario


def test_the_federation_and_its_clients_have_the_metrics_of_completions(tracked: tuple[Path, Database, Scenario]):
    _, database, _ = tracked
    runs = database.runs("letters")
    common = {"charts/equal_groups", "charts/cut", "charts/episodic_length", "losses/kl_reference"}
    common |= {"charts/tokens_per_second"}
    assert database.keys(runs["grpo seed 1"]) >= {*common, "reward/exact", "reward/length", "reward/pattern"}
    assert database.keys(runs["up"]) >= {*common, "reward/exact", "reward/length"}
    assert database.metric(runs["flat"], "charts/equal_groups") == [(1, 1.0), (2, 1.0)]


def test_patterns_in_the_names_of_parameters_do_not_lose_the_others(tracked: tuple[Path, Database, Scenario]):
    _, database, _ = tracked
    params = database.params(database.runs("letters")["grpo seed 1"])
    assert params["policy.groups.layers._"] == "tensor"
    assert params["method"] == "grpo"
    assert params["language.rank"] == "2"


def test_saved_views_have_charts_of_completions(tracked: tuple[Path, Database, Scenario]):
    _, database, _ = tracked
    tags = database.experiment_tags("letters")
    for key, rewards in (("federation", 1), ("clients", 3)):
        state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{key}"])["state"])
        (section,) = (each["uuid"] for each in state["compareRunSections"] if each["name"] == "Completions")
        charts = [
            each["selectedMetricKeys"] for each in state["compareRunCharts"] if each["metricSectionId"] == section
        ]
        assert sum(keys[0].startswith("reward/") for keys in charts) == rewards
        assert [keys[0] for keys in charts[rewards:]] == [
            "charts/episodic_length",
            "charts/equal_groups",
            "charts/cut",
            "losses/kl_reference",
            "charts/tokens_per_second",
        ]


def test_runs_without_prompts_have_no_charts_of_completions():
    views = make_views(["charts/episodic_return", "charts/episodic_length"])
    assert not [view for view in views if "Completions" in view.sections]


def test_views_of_many_rewards_and_blocks_fit_into_their_tags():
    metrics = [f"{kind}/{number}" for number in range(24) for kind in ("reward", "rho", "kl", "alpha", "budget")]
    metrics += ["charts/equal_groups", "charts/cut", "losses/kl_reference", "charts/episodic_length"]
    tags = make_view_tags(make_views(metrics), 0)
    assert len(tags) == 3
    assert max(map(len, tags.values())) <= LONGEST


def test_examples_are_a_table_that_mlflow_shows(tracked: tuple[Path, Database, Scenario]):
    folder, database, _ = tracked
    parent = database.runs("letters")["grpo seed 1"]
    table = json.loads((database.artifacts(parent) / "examples.json").read_text())
    assert table["columns"] == ["client", "prompt", "before", "reward before", "after", "reward after"]
    assert [row[0] for row in table["data"]] == ["up", "up", "flat", "flat"]
    first = read_examples(folder, "up")[0]
    assert table["data"][0][1:] == [
        first.prompt,
        first.before,
        first.before_reward,
        first.after,
        first.after_reward,
    ]
    assert json.loads(database.tags(parent)["mlflow.loggedArtifacts"]) == [{"path": "examples.json", "type": "table"}]
    assert not (database.artifacts(parent) / "examples").exists()


def test_control_characters_of_examples_are_replaced():
    table = examples_table({"up": [Example("a\nb", "\x1b[31mred", 0.0, "<b>\u202e", 1.0)], "flat": []})
    assert table is not None
    assert table["data"] == [["up", "a↵b", "\ufffd[31mred", 0.0, "<b>\ufffd", 1.0]]
    assert examples_table({"up": []}) is None


def test_a_client_has_its_adapters_as_files_and_no_model(tracked: tuple[Path, Database, Scenario]):
    folder, database, _ = tracked
    sent = database.artifacts(database.runs("letters")["up"]) / "adapters"
    assert {path.name for path in sent.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for path in sent.iterdir():
        assert path.read_bytes() == (folder / "policies" / "up" / path.name).read_bytes()
    assert not database.rows("select 1 from logged_models")
    log = folder / "tracking" / "writer.log"
    assert "left out" not in log.read_text()


def test_the_page_of_the_run_says_who_could_learn_nothing(tracked: tuple[Path, Database, Scenario]):
    folder, database, scenario = tracked
    page = database.tags(database.runs("letters")["grpo seed 1"])["mlflow.note.content"]
    assert "**Note**: every group had equal rewards, so that nothing could be learned: flat in rounds 1 to 2;" in page
    assert ": 64 completions in " in page
    line = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    begin = {
        "params": {"rounds": 2, "method": "grpo", "seed": 1},
        "clients": dict.fromkeys(line["clients"]),
        "scenario": scenario.name,
    }
    assert page_while_running(begin, line).endswith(
        "\n\nIn this round every group of flat had equal rewards: nothing could be learned from them."
    )
