"""What the measurement of sites counts as leaving and coming back."""

from __future__ import annotations

from benchmarks.headers import Change
from benchmarks.sites import ROWS, SEEDS, SiteRun, format_table, list_returns, list_site_departures
from grpo_fed.runs import ClientRecord, RoundRecord
from grpo_fed.runs.records import SiteRecord


def round_of(number: int, **changes: dict[str, float]) -> RoundRecord:
    client = ClientRecord("cart-0", "cart", returned={"torso.0": 3.0} if number == 3 else {})
    return RoundRecord(number, 4, 1.0, 0, [client], sites=(SiteRecord("south", ("cart-0",), **changes),))


RECORDS = [round_of(1), round_of(2, left={"actor": 0.8}), round_of(3, returned={"actor": 2.0})]


def test_sites_that_leave_are_listed_with_the_round_and_rho():
    assert list(list_site_departures(RECORDS)) == [Change(2, "south", "actor", 0.8)]


def test_sites_and_clients_that_come_back_are_listed_with_the_gain():
    assert list(list_returns(RECORDS)) == [Change(3, "south", "actor", 2.0), Change(3, "cart-0", "torso.0", 3.0)]


def test_every_row_is_a_scenario_that_loads_with_every_seed():
    assert all(row.load(seed).seed == seed for row in ROWS.values() for seed in SEEDS)
    assert len({row.settings(seed) for row in ROWS.values() for seed in SEEDS}) == len(ROWS) * len(SEEDS)


def test_the_table_counts_the_runs_in_which_a_site_left_a_group():
    runs = [
        SiteRun(
            row="nothing planted",
            seed=seed,
            settings=str(seed),
            tasks={"cart-0": "cart"},
            scores={"cart-0": float(seed)},
            left_by_sites=[Change(seed - 695, "south", "actor", 0.8)],
            left_by_clients=[Change(6, "cart-0", "torso.0", 0.7)] if seed == 701 else [],
            returned=[],
            departed={"site south": ["actor"]},
            seconds=1.0,
        )
        for seed in (700, 701)
    ]
    (line,) = list(format_table(runs))[2:]
    _, sites, clients, back, returns = line.strip("| ").split(" | ")
    assert sites == "south `actor`: 2 of 2; 5 to 6"
    assert clients == "cart-0 `torso.0`: 1 of 2; 6 to 6"
    assert back == "0"
    assert returns.startswith("cart 700.5 [")
    assert returns.endswith("700 to 701")
