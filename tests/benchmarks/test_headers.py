"""What the measurement of the scenarios' headers counts as leaving and coming back."""

from __future__ import annotations

from benchmarks.headers import (
    ROWS,
    Change,
    HeaderRun,
    Row,
    format_table,
    last_costs,
    list_changes,
    list_departures,
)
from grpo_fed.runs import ClientRecord, RoundRecord
from grpo_fed.runs.metrics import TRAINING_COST


def round_of(number: int, departed: tuple[str, ...] = (), **changes: dict[str, float]) -> RoundRecord:
    client = ClientRecord("cart-0", "cart", departed=departed, **changes)
    return RoundRecord(number, 4, 1.0, 0, [client])


RECORDS = [
    round_of(1),
    round_of(2, ("actor",), left={"actor": 0.8}),
    round_of(3, ("actor",)),
    round_of(4, returned={"actor": 0.8}),
    round_of(5, ("actor",), left={"actor": 0.7}),
]


def test_a_group_is_left_in_the_round_in_which_it_is_new_among_the_departed():
    assert list(list_departures(RECORDS)) == [Change(2, "cart-0", "actor", 0.8), Change(5, "cart-0", "actor", 0.7)]


def test_a_client_that_comes_back_is_listed_with_the_round():
    assert list(list_changes(RECORDS, "returned")) == [Change(4, "cart-0", "actor", 0.8)]


def test_every_row_is_a_scenario_that_loads_with_every_seed():
    given = [(row, seed) for row in ROWS for seed in row.seeds]
    assert all(row.load(seed).seed == seed for row, seed in given)
    assert len({row.settings(seed) for row, seed in given}) == len(given)


def test_the_table_gives_the_range_of_returns_and_counts_clients_over_seeds():
    row = Row("contrary")
    runs = [
        HeaderRun(
            scenario=row.scenario,
            overrides=row.overrides,
            seed=seed,
            settings=row.settings(seed),
            tasks={"cart-0": "cart", "cart-1": "cart"},
            scores={"cart-0": 500.0, "cart-1": float(seed)},
            left=[Change(seed - 195, "cart-0", "actor", 0.8)],
            returned=[Change(20, "cart-0", "actor", 0.8)] if seed == 201 else [],
            stayed=[],
            departed={"cart-0": [] if seed == 201 else ["actor"], "cart-1": []},
            clusters={},
            seconds=1.0,
        )
        for seed in (200, 201)
    ]
    (line,) = list(format_table([row], runs))[2:]
    cells = line.strip("| ").split(" | ")
    assert cells[:4] == ["contrary", "", "4 cart", "200 to 500"]
    assert cells[4].startswith("350.5 [")  # of 200, 201, 500 and 500 the middle two
    assert cells[5:] == ["actor: 2; 5 to 6", "actor: 1", "1"]


def test_the_cost_is_the_mean_over_the_last_five_rounds():
    """Rounds 1 to 6 cost 1 to 6: the last five cost 4 in the mean. A round in which no episode ended counts nothing."""
    points = [ClientRecord("point", "point", metrics={TRAINING_COST: float(number)}) for number in range(1, 7)]
    records = [RoundRecord(1, 7, 1.0, 0, [point]) for point in points]
    assert last_costs(records) == {"point": 4.0}
    assert last_costs([*records, RoundRecord(7, 7, 1.0, 0, [ClientRecord("point", "point")])]) == {"point": 4.5}
    assert last_costs(RECORDS) == {}
