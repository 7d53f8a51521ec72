"""MLflow shows the evidence of the merge rule `persistence`: rho, its limit, and departures in words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from grpo_fed.runs.tracking import Tracker
from grpo_fed.runs.tracking.run_page import client_page, clients_table, page_at_end
from grpo_fed.runs.tracking.selection import client_metrics, metric_keys
from grpo_fed.runs.tracking.views import make_views
from tests.support.tracking_runs import Database, document, line, scenario


def with_rho(given: dict[str, Any]) -> dict[str, Any]:
    """Add what the rule `persistence` adds to a line."""
    for name, client in given["clients"].items():
        client |= {"rho/torso.0": 0.1, "rho/actor": 0.9 if name == "backwards" else 0.2, "rho_by_group": {"x": 0.1}}
    given["clients"]["backwards"]["left"] = {"actor": 0.9}
    return given | {"rho/torso.0": 0.1, "rho/actor": 0.9, "fed/rho_limit": 0.5}


def test_departures_have_their_round_and_rho_on_the_pages():
    done = document(scenario(), 9)
    left = {
        "actor": {"round": 4, "rho": 0.934},
        "torso.0": {"round": 8, "rho": 0.61},
        "torso.1": {"round": 8, "rho": 0.7},
    }
    done["clients"]["backwards"] |= {"personal_groups": ["torso.0", "torso.1", "actor"], "departures": left}
    begin = {"scenario": "carts", "description": "", "params": {"rounds": 9, "method": "grpo", "seed": 0}}
    page = page_at_end({**begin, "clients": done["clients"]}, done, "finished")
    words = "actor since round 4, rho 0.93; torso.0, torso.1 since round 8, rho 0.61 to 0.70"
    assert f"| backwards | 1.0 | 92.0 | {words} |" in page
    assert client_page(done["clients"]["backwards"]).endswith(
        "Personal groups: `actor` since round 4, rho 0.93; `torso.0`, `torso.1` since round 8, rho 0.61 to 0.70."
    )
    assert clients_table(done)["data"][-1][-1] == words
    assert client_page(done["clients"]["cart-0"]).endswith("Personal groups: none.")


def test_rho_has_a_chart_with_the_limit_and_one_of_the_clients_for_each_block():
    given = with_rho(line(scenario(), 5))
    assert dict(client_metrics(given))["backwards"]["rho/actor"] == 0.9
    views = {view.key: view for view in make_views(sorted(metric_keys([given])))}
    charts = {key: [c.metrics for charts in view.sections.values() for c in charts] for key, view in views.items()}
    assert ("rho/actor", "rho/torso.0", "fed/rho_limit") in charts["federation"]
    assert ("rho/actor",) in charts["clients"]
    assert ("rho/torso.0",) in charts["clients"]
    without = make_views(sorted(metric_keys([line(scenario(), 5)])))
    assert "rho" not in str([view.sections for view in without])


def test_metrics_that_begin_late_are_in_the_saved_views_and_departures_in_the_tags(tmp_path: Path):
    database, folder = Database(tmp_path / "mlflow.db"), tmp_path / "run"
    given = scenario("late", rounds=3)
    tracker = Tracker.open(database.uri, folder, given, models=False)
    for number in range(3):
        tracker.round(line(given, number))
    view = "mlflow.sharedViewState.federation"
    until = time.monotonic() + 60
    while tracker.run_id is None or view not in database.experiment_tags("late"):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "rho/actor" not in database.experiment_tags("late")[view]
    tracker.round(with_rho(line(given, 3)))
    done = document(given, 3)
    done["clients"]["backwards"]["departures"] = {"actor": {"round": 3, "rho": 0.9}}
    tracker.close(done, "finished")
    assert tracker.trouble is None
    assert "rho/actor" in database.experiment_tags("late")[view]
    runs = database.runs("late")
    assert database.metric(runs["grpo seed 0"], "rho/actor") == [(3, 0.9)]
    assert database.metric(runs["cart-0"], "rho/actor") == [(3, 0.2)]
    assert database.tags(runs["backwards"])["departures"] == "actor since round 3, rho 0.90"
    assert "departures" not in database.tags(runs["cart-0"])
