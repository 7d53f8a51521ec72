"""What a run looks like: numbers, curves, tables and lines as a user reads them."""

from __future__ import annotations

import io
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.reports.progress import (
    LineDisplay,
    LiveDisplay,
    RunHeader,
    RunProgress,
    _bar,
    missing_lines,
    next_command,
    result_line,
    server_line,
    show_result,
)
from grpo_fed.reports.tables import (
    ClientProgress,
    curve,
    many,
    number,
    results_table,
    small,
    some,
    span,
    standings_table,
)
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord
from grpo_fed.runs.results import ClientResult, Result
from grpo_fed.scenario.scenario import Scenario


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def console(terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=100, height=40, force_terminal=terminal, color_system=None, highlight=False
    )


def shown(part: object) -> list[list[str]]:
    """The words of each line."""
    out = console()
    out.print(part)
    return [line.split() for line in text_of(out).splitlines()]


def opening(clients: int = 2) -> RunHeader:
    text = f'name = "a"\nrounds = 3\n[[clients]]\nname = "cart"\nenv = "CartPole-v1"\ncount = {clients}\n'
    return RunHeader(Scenario.loads(text), "cpu", Path("runs/a"))


def note(number: int, returns: dict[str, float | None], evaluated: bool = False) -> RoundRecord:
    losses = {"losses/approx_kl": 0.25, "losses/entropy": 0.5}
    clients = []
    for name, mean in returns.items():
        metrics = losses if mean is None else {"charts/episodic_return": mean, **losses}
        played = mean if evaluated or number == 0 else None
        clients.append(
            ClientRecord(name, "cart", 512, int(mean is not None), metrics, played)
            if number
            else ClientRecord(name, "cart", score=mean)
        )
    return RoundRecord(number, 3, 0.5, 1024 * number, clients)


def result(returns: dict[str, float | None], status: str = "finished") -> Result:
    clients = {name: ClientResult("CartPole-v1", 10.0, score, score, 20.0, 7, 1536) for name, score in returns.items()}
    return Result("a", 0, "cpu", status, None, 3, 65.0, 3072, clients, Path("runs/a"))


def test_numbers_are_as_long_as_they_need_to_be():
    assert [number(x) for x in (None, np.nan, 0.0, -1.234, 21.25, 1234.5, 123456.7)] == [
        *("-", "-", "0.00", "-1.23", "21.2", "1,234.5", "123,457"),
    ]
    assert [small(x) for x in (None, 0.01234, 1.5, -0.5)] == ["-", "0.0123", "1.50", "-0.5000"]
    assert [span(x) for x in (0.04, 9.96, 12.3, 59.6, 185, 3723)] == [
        "0.0 s",
        "10.0 s",
        "12 s",
        "1:00",
        "3:05",
        "1:02:03",
    ]
    assert [many(1, "client"), many(1200, "client")] == ["1 client", "1,200 clients"]


def test_a_curve_goes_from_the_lowest_to_the_highest():
    assert curve([]) == ""
    assert curve([3.0, 3.0]) == "▁▁"
    assert curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert curve([-10, -1, -10]) == "▁█▁"
    assert curve([0, 0, 7, 7], width=2) == "▁█"  # means of two each


def test_up_to_twenty_clients_have_a_row_each():
    clients = {f"c{i}": ClientProgress(1.0, [2.0, float(i)], 0.25, 0.5) for i in range(20)}
    rows = shown(standings_table(clients))
    assert [row[0] for row in rows if row and row[0].startswith("c")] == ["client", *clients]
    assert ["c3", "1.00", "3.00", "3.00", "0.2500", "0.5000", "▁█"] in rows


def test_above_twenty_the_worst_five_and_quantiles_stand_for_all():
    clients = {f"c{i}": ClientProgress(1.0, [float(i)], 0.25, None) for i in range(21)}
    clients["c20"].returns.clear()
    rows = [row for row in shown(standings_table(clients)) if row]
    assert [row[0] for row in rows if re.fullmatch(r"c\d+", row[0])] == ["c20", "c0", "c1", "c2", "c3"]
    quantiles = {row[0]: row[-4] for row in rows if row[0] in ("highest", "75", "median", "25", "lowest")}
    # of the returns 0 to 19
    assert quantiles == {"highest": "19.0", "75": "14.2", "median": "9.50", "25": "4.75", "lowest": "0.00"}
    assert ["median", "1.00", "9.50", "9.50", "0.2500", "-"] in rows

    many_results = result({f"c{i}": float(i) for i in range(30)})
    rows = [row for row in shown(results_table(many_results)) if row]
    assert [row[0] for row in rows if re.fullmatch(r"c\d+", row[0])] == ["c0", "c1", "c2", "c3", "c4"]
    assert ["median", "10.0", "14.5", "14.5", "20.0"] in rows


def test_a_line_tells_a_round():
    out = console()
    display = LineDisplay(out)
    display.begin(opening())
    display.round(note(0, {"cart-0": 1.0, "cart-1": 2.0}))
    display.round(note(1, {"cart-0": 10.0, "cart-1": 30.0}))
    display.round(note(2, {"cart-0": None, "cart-1": None}))
    display.round(note(3, {"cart-0": 100.0, "cart-1": 300.0}, evaluated=True))
    display.end(result({"cart-0": 100.0, "cart-1": 300.0}))
    lines = text_of(out).splitlines()
    assert lines[:2] == ["a: 2 clients, 3 rounds of 2,048 steps, ppo, cpu, seed 0", "runs/a/"]
    assert lines[2] == (
        "round 1/3  return 20.0  worst cart-0 10.0  KL 0.2500  entropy 0.5000  0.50 s  2,048 steps/s  0.0 s left"
    )
    assert lines[3].startswith("round 2/3  return -  KL ")
    assert lines[4].startswith("round 3/3  return 200.0  worst cart-0 100.0  evaluated 200.0  KL 0.2500")
    assert lines[4].endswith("2,048 steps/s")
    assert lines[-2] == "a: return 200.0 (middle half 200.0, worst 100.0), 3,072 steps in 1:05"
    assert lines[-1] == "next: grpo-fed play runs/a --client cart-0 --gif cart-0.gif"


@pytest.mark.parametrize("display", [LineDisplay, LiveDisplay])
def test_the_header_says_where_the_run_can_be_looked_at(display: type[LineDisplay | LiveDisplay]):
    out = console(terminal=display is LiveDisplay)
    shown = display(out)
    shown.begin(replace(opening(), tracked="grpo-fed ui runs/a"))
    shown.stop()
    places = [line.strip("│ ") for line in text_of(out).splitlines() if "runs/a" in line]
    assert places == ["runs/a/", "MLflow: grpo-fed ui runs/a"]


def test_a_terminal_shows_where_the_run_is_and_in_the_end_what_became_of_it():
    out = console(terminal=True)
    display = LiveDisplay(out)
    display.begin(opening())
    display.live.refresh()
    assert "untrained policies play" in text_of(out)
    display.round(note(0, {"cart-0": 1.0, "cart-1": 2.0}))
    display.live.refresh()
    assert "round 0/3" in text_of(out)
    assert "round 1 trains" in text_of(out)
    display.round(note(1, {"cart-0": 10.0, "cart-1": 30.0}))
    display.live.refresh()
    assert re.search(r"round 1/3 .* 0\.50 s/round, 2,048 steps/s, .* left", text_of(out))
    assert re.search(r"cart-1 +2\.00 +30\.0 +30\.0 +0\.2500 +0\.5000 +▁", text_of(out))
    display.round(note(3, {"cart-0": 100.0, "cart-1": 300.0}, evaluated=True))
    display.live.refresh()
    assert "trained policies play" in text_of(out)
    display.stop()
    display.end(result({"cart-0": 100.0, "cart-1": 300.0}))
    assert re.search(r"cart-1 +10\.0 +300\.0 +300\.0 +20\.0 +7 +1,536", text_of(out))


def test_a_run_that_was_stopped_says_so_and_has_no_score():
    stopped = result({"cart": None}, "interrupted")
    assert result_line(stopped) == "a: interrupted after 3 rounds, 3,072 steps in 1:05"
    assert next_command(stopped) == "grpo-fed play runs/a --gif cart.gif"


@pytest.mark.parametrize(("scores", "worst"), [({"x": 3.0, "y": 1.0}, "y"), ({"x": None, "y": 1.0}, "y")])
def test_the_next_command_shows_the_client_with_the_lowest_return(scores: dict[str, float | None], worst: str):
    assert f"--client {worst} " in next_command(result(scores))


def dealings(alphas: dict[str, float], joint: float | None, budget: float) -> ServerRecord:
    blocks = tuple(AcceptedBlock(name, 0.1, 0.02, alpha, 0.01) for name, alpha in alphas.items())
    return ServerRecord(
        AcceptedStep(blocks, 0.2, budget, joint), {}, bytes_up=250_000, bytes_down=1_000_000, bytes_total=5_000_000
    )


def test_a_server_says_how_far_it_went_and_within_what():
    assert (
        server_line(dealings({"torso.0": 1.0, "actor": 1.0}, 0.031, 0.05))
        == "whole step  shared KL 0.0310 of 0.05  1.25 MB"
    )
    short = dealings({"torso.0": 0.5, "actor": 1.0}, None, 0.05)
    assert server_line(short) == "step torso.0 50%  1.25 MB"
    assert server_line(dealings({"actor": 1.0}, 0.5, math.inf)) == "whole step  shared KL 0.5000  1.25 MB"
    assert server_line(ServerRecord(None, {}, 0, 0, 0)) == "0.00 MB"


def test_a_federation_shows_what_each_client_keeps_and_who_is_missing():
    clients = {
        "alike": ClientProgress(1.0, [2.0], personal=()),
        "contrary": ClientProgress(1.0, [2.0], personal=("torso.0", "actor")),
        "gone": ClientProgress(1.0, [2.0], personal=("actor",), state="late"),
    }
    rows = {row[0]: row for row in shown(standings_table(clients)) if row}
    assert rows["alike"][-1] == "▁"
    assert rows["contrary"][-2:] == ["torso.0,", "actor"]
    assert rows["gone"][-1] == "late"
    assert shown(standings_table({"alone": ClientProgress(1.0, [2.0])}))[1][-2:] == ["by", "round"]
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize("name", ["a", "backwards-0", "a-rather-long-name"])
def test_what_a_client_keeps_is_seen_on_a_terminal_of_80_columns(name: str):
    out = console(terminal=True)
    out.width = 80
    display = LiveDisplay(out)
    display.begin(opening())
    clients = [
        ClientRecord(name, "cart", 512, 1, {"charts/episodic_return": -1250.3}, departed=("actor",)),
        ClientRecord("lost", "cart", failure=Failure("late", "no answer")),
    ]
    for last in range(30):
        display.round(RoundRecord(last, 30, 0.5, 1024, clients, ServerRecord(None, {}, 1, 1, 2)))
    display.stop()
    rows = {line.split()[0]: line.split() for line in text_of(out).splitlines() if line.strip()}
    assert rows["client"][-1] == "keeps"
    assert rows[name][-1] == "actor"
    assert rows["lost"][-1] == "late"
    assert "…" not in rows["lost"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (80, "0.50 s/round, 4,096 steps/s, 0.0 s left, 0.0 s so far"),
        (60, "0.50 s/round, 4,096 steps/s, 0.0 s left"),
        (44, "0.50 s/round, 0.0 s left"),
        (28, "0.0 s left"),
    ],
)
def test_what_stands_beside_the_bar_is_whole_or_not_there(columns: int, told: str):
    out = console(terminal=True)
    out.width = columns
    course = RunProgress(rounds=30)
    course.add(RoundRecord(0, 30, 0.0, 0, [ClientRecord("a", "a", score=1.0)]))
    course.add(RoundRecord(1, 30, 0.5, 2048, [ClientRecord("a", "a", 2048, 1, {})]))
    course.clock = [-100.0, -100.0]  # so that the round before the last took no time
    out.print(_bar(course, time.monotonic(), columns))
    (line,) = text_of(out).splitlines()
    assert line.startswith("round 1/30 ")
    assert line.rstrip().endswith(f" {told}")
    assert "…" not in line


def test_who_was_missing_when_is_said_at_the_end():
    one = [(2, "raised", "RuntimeError: out of coal"), (5, "late", "no answer within 600 seconds")]
    some_missing = replace(result({"a": 1.0, "b": 2.0}), missing={"a": one, "b": one[:1]})
    assert missing_lines(some_missing) == [
        "a had no answer in rounds 2, 5, the last time late: no answer within 600 seconds",
        "b had no answer in round 2, the last time raised: RuntimeError: out of coal",
    ]
    out = console()
    show_result(out, some_missing)
    assert "the last time raised: RuntimeError: out of coal" in " ".join(text_of(out).split())
    many_missing = replace(some_missing, missing={f"c{number}": one for number in range(7)})
    assert missing_lines(many_missing)[-1] == "and 2 more clients: results.json names them"
    assert missing_lines(result({"a": 1.0})) == []


def test_a_client_that_never_had_an_answer_is_named_in_the_result_itself():
    learned = result({"a": 3.0, "b": 1.0, "broken": None})
    clients = {**learned.clients, "broken": ClientResult("X-v0", None, None, None, None, 0, 0)}
    every = [(number, "raised", "RuntimeError: it burns") for number in range(4)]
    found = replace(learned, clients=clients, missing={"a": every[:1], "broken": every})
    assert result_line(found).startswith(
        "a: return 2.00 (middle half 2.00, worst 1.00) of 2 of 3 clients, broken learned"
    )
    assert missing_lines(found)[0] == (
        "broken learned nothing: no answer in rounds 0, 1, 2, 3, the last time raised: RuntimeError: it burns"
    )
    assert next_command(found) == "grpo-fed play runs/a --client b --gif b.gif"
    out = console()
    show_result(out, found)
    assert "warning: broken learned nothing" in text_of(out)
