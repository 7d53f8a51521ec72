"""MLflow's pages of a tracked run in a real browser have what a user looks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_fed.engines.alone import train
from grpo_fed.runs.tracking import Tracker
from grpo_fed.runs.tracking.spool import Spool
from grpo_fed.runs.tracking.ui import MlflowPages, open_pages
from tests.support.browser import CHROMIUM, Browser
from tests.support.tracking_runs import document, line, scenario

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, of = tmp_path_factory.mktemp("runs") / "carts-0", scenario(rounds=2)
    tracker = Tracker.open(f"sqlite:///{folder.parent}/mlflow.db", folder, of)
    train(of, folder, lambda note: tracker.round(line(of, note.round)))
    (folder / "figures").mkdir()
    (folder / "figures" / "returns.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    tracker.close(document(of, 2), "finished")
    assert tracker.trouble is None
    return folder


@pytest.fixture(scope="module")
def shown(run: Path) -> Iterator[MlflowPages]:
    with open_pages(run, from_run=True) as ready:  # the tests' own environment has tracking off
        yield ready


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


def test_the_link_shows_the_result_and_the_clients(shown: MlflowPages, browser: Browser):
    browser.open(shown.link)
    text = browser.wait_for("grpo seed 0", "Return 21.0", "cart-0", "cart-1", "backwards", "Finished")
    assert "worst client 20.0" in text


def test_the_metrics_of_the_federation_have_charts(shown: MlflowPages, browser: Browser):
    browser.open(shown.link.replace("?", "/model-metrics?"))
    browser.wait_for("grpo seed 0 (alpha/actor)", "\neval\n", "\nkl\n", "\ncomm\n", "\ntask\n", "\nfed\n")


def test_the_artifacts_have_figures_and_results(shown: MlflowPages, browser: Browser):
    browser.open(shown.link.replace("?", "/artifacts?"))
    browser.wait_for("figures", "checkpoints", "results.json", "scenario.toml")
    browser.click("figures")
    browser.wait_for("returns.svg")


def test_the_page_of_a_client_has_its_model(shown: MlflowPages, browser: Browser, run: Path):
    sent = Spool(run).load_state("")
    assert sent.parent is not None
    browser.open(shown.link.replace(sent.parent, sent.clients["backwards"]))
    browser.wait_for("backwards", "Return 22.0", "Parent run", "carts-backwards")


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("federation", "Federation", ["Steps of the shared blocks", "grpo seed 0 (kl/actor)", "1 matching run"]),
        ("clients", "Clients", ["cart-0 (eval/episodic_return)", "backwards (kl/joint)", "3 matching runs"]),
        ("by-method", "By method", ["Group: grpo", "grpo (eval/score_iqm)", "1 matching run"]),
    ],
)
def test_a_saved_view_shows_its_runs_and_charts(
    shown: MlflowPages, browser: Browser, run: Path, key: str, name: str, words: list[str]
):
    query = f"compareRunsMode=CHART&viewStateShareKey={key}&workflowType=machine_learning"
    browser.open(f"{shown.address}/#/experiments/{Spool(run).load_state('').experiment}/runs?{query}")
    browser.wait_for(name, *words)
