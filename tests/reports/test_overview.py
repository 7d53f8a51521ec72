"""The tables of `check` are legible on narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from grpo_fed.federation.setup import FederationSetup
from grpo_fed.reports.overview import FittingTable, scenario_overview
from grpo_fed.rl.make import make_learner
from grpo_fed.scenario.scenario import Scenario


def printed(part: object, width: int) -> list[str]:
    """Print something on a terminal of a width; return its lines."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(part)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.fixture
def table() -> FittingTable:
    table = FittingTable("client", "obs", "task")
    table.rows.append(("cart-0 to cart-5 (6)", "4", "grpo_fed/CartPole-v1 length = 0.3 to 0.7"))
    return table


def test_a_long_text_is_broken_between_words(table: FittingTable):
    lines = printed(table, 51)
    assert lines[2].split() == ["cart-0", "to", "cart-5", "(6)", "4", "grpo_fed/CartPole-v1"]
    assert [word for line in lines[3:] for word in line.split()] == ["length", "=", "0.3", "to", "0.7"]


def test_a_word_that_does_not_fit_has_a_table_of_its_own(table: FittingTable):
    for width in (45, 50):
        lines = printed(table, width)
        assert [line.split() for line in lines if "obs" in line or "task" in line] == [
            ["client", "obs"],
            ["client", "task"],
        ]
        assert any("grpo_fed/CartPole-v1" in line for line in lines)
        assert max(map(len, lines)) <= width


def test_clients_that_differ_in_a_number_share_a_row():
    scenario = Scenario.loads(
        'name = "a"\nrounds = 1\nsteps = 64\n[rollout]\nnum_envs = 2\nhorizon = 32\n[objective]\nminibatches = 2\n'
        '[[clients]]\nname = "cart"\ncount = 30\nenv = "grpo_fed/CartPole-v1"\nspread = { length = [0.3, 0.7] }\n'
        '[[clients]]\nname = "one"\nenv = "grpo_fed/CartPole-v1"\nkwargs = { swap_actions = true }\n'
    )
    setup = FederationSetup.of(scenario)
    learners = [make_learner(tasks, scenario) for tasks in setup.tasks_by_policy]
    parts = list(scenario_overview(scenario, learners, setup.shared_blocks))
    rows = [row for part in parts if isinstance(part, FittingTable) for row in part.rows if "CartPole" in str(row[-1])]
    assert [(row[0], row[-1]) for row in rows] == [
        ("cart-0 to cart-29 (30)", "grpo_fed/CartPole-v1 length = 0.3 to 0.7"),
        ("one", "grpo_fed/CartPole-v1 swap_actions = true"),
    ]
    assert "Policy of cart (30), one: " in "\n".join(map(str, parts))
    for learner in learners:
        learner.close()
