"""Departures by the round in which they happened."""

from __future__ import annotations

from grpo_fed.runs.departures import DepartedGroups, Departure, by_round, note_departures


def test_a_departure_is_noted_until_the_client_returns():
    departures: dict[str, Departure] = {}
    note_departures(departures, 4, {"actor": 0.9, "torso.0": 0.6}, ())
    note_departures(departures, 9, {"torso.1": 0.8}, ["actor", "unknown"])
    assert departures == {"torso.0": Departure(4, 0.6), "torso.1": Departure(9, 0.8)}
    note_departures(departures, 12, {"actor": 0.7}, ())
    assert departures["actor"] == Departure(12, 0.7)


def test_groups_are_collected_by_the_round_in_which_they_were_left():
    departures = {"a": Departure(9, 0.5), "b": Departure(4, 0.93), "c": Departure(4, 0.81)}
    together = by_round(["a", "b", "c", "d"], departures)
    assert together == [
        DepartedGroups(("b", "c"), 4, 0.81, 0.93),
        DepartedGroups(("a",), 9, 0.5, 0.5),
        DepartedGroups(("d",)),
    ]
    assert [groups.since for groups in together] == ["since round 4, rho 0.81 to 0.93", "since round 9, rho 0.50", ""]
    assert by_round([], departures) == []
