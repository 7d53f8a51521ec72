"""A run on the terminal: tables, lines and the outcome as a user reads them."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.reports.displays import LineDisplay, LiveDisplay, progress_bar
from grpo_fed.reports.outcome import missing_lines, next_command, print_outcome, result_line
from grpo_fed.reports.progress import RunHeader, RunProgress, server_line
from grpo_fed.reports.tables import ClientProgress, progress_table, results_table
from grpo_fed.runs.departures import Departure
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord
from grpo_fed.runs.results import ClientResult, Result
from grpo_fed.scenario.scenario import Scenario


def text_of(console: Console) -> str:
    """All that was printed."""
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def make_console(terminal: bool = False, width: int = 100) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=40, force_terminal=terminal, color_system=None, highlight=False
    )


def printed_words(part: object) -> list[list[str]]:
    """The words of each line that a part prints."""
    out = make_console()
    out.print(part)
    return [line.split() for line in text_of(out).splitlines()]


def header(clients: int = 2) -> RunHeader:
    text = f'name = "a"\nrounds = 3\n[[clients]]\nname = "cart"\nenv = "CartPole-v1"\ncount = {clients}\n'
    return RunHeader(Scenario.loads(text), "cpu", Path("runs/a"))


def round_record(round_: int, returns: dict[str, float | None], evaluated: bool = False) -> RoundRecord:
    losses = {"losses/approx_kl": 0.25, "losses/entropy": 0.5}
    clients = []
    for name, mean in returns.items():
        metrics = losses if mean is None else {"charts/episodic_return": mean, **losses}
        played = mean if evaluated or round_ == 0 else None
        clients.append(
            ClientRecord(name, "cart", 512, int(mean is not None), metrics, played)
            if round_
            else ClientRecord(name, "cart", score=mean)
        )
    return RoundRecord(round_, 3, 0.5, 1024 * round_, clients)


def make_result(returns: dict[str, float | None], status: str = "finished") -> Result:
    clients = {name: ClientResult("CartPole-v1", 10.0, score, score, 20.0, 7, 1536) for name, score in returns.items()}
    return Result("a", 0, "cpu", status, None, 3, 65.0, 3072, clients, Path("runs/a"))


def test_up_to_twenty_clients_have_a_row_each():
    clients = {f"c{i}": ClientProgress(1.0, [2.0, float(i)], 0.25, 0.5) for i in range(20)}
    rows = printed_words(progress_table(clients))
    assert [row[0] for row in rows if row and row[0].startswith("c")] == ["client", *clients]
    assert ["c3", "1.00", "3.00", "3.00", "0.2500", "0.5000", "▁█"] in rows


def test_above_twenty_clients_a_table_has_the_worst_five_and_quantiles():
    clients = {f"c{i}": ClientProgress(1.0, [float(i)], 0.25, None) for i in range(21)}
    clients["c20"].returns.clear()
    rows = [row for row in printed_words(progress_table(clients)) if row]
    assert [row[0] for row in rows if re.fullmatch(r"c\d+", row[0])] == ["c0", "c1", "c2", "c3", "c4"]
    assert " ".join(rows[0]).startswith("The 5 clients with the lowest returns of 20 that took part, of 21;")
    quantiles = {row[0]: row[-4] for row in rows if row[0] in ("highest", "75", "median", "25", "lowest")}
    # of the returns 0 to 19
    assert quantiles == {"highest": "19.0", "75": "14.2", "median": "9.50", "25": "4.75", "lowest": "0.00"}
    assert ["median", "1.00", "9.50", "9.50", "0.2500", "-"] in rows

    many_results = make_result({f"c{i}": float(i) for i in range(30)})
    rows = [row for row in printed_words(results_table(many_results)) if row]
    assert [row[0] for row in rows if re.fullmatch(r"c\d+", row[0])] == ["c0", "c1", "c2", "c3", "c4"]
    assert ["median", "10.0", "14.5", "14.5", "20.0"] in rows

    idle = {name: replace(client, env_steps=0) for name, client in many_results.clients.items() if name in ("c0", "c2")}
    rows = [
        row for row in printed_words(results_table(replace(many_results, clients=many_results.clients | idle))) if row
    ]
    assert [row[0] for row in rows if re.fullmatch(r"c\d+", row[0])] == ["c1", "c3", "c4", "c5", "c6"]


def test_each_round_is_printed_in_a_line():
    out = make_console()
    display = LineDisplay(out)
    display.begin(header())
    display.round(round_record(0, {"cart-0": 1.0, "cart-1": 2.0}))
    display.round(round_record(1, {"cart-0": 10.0, "cart-1": 30.0}))
    display.round(round_record(2, {"cart-0": None, "cart-1": None}))
    display.round(round_record(3, {"cart-0": 100.0, "cart-1": 300.0}, evaluated=True))
    display.end(make_result({"cart-0": 100.0, "cart-1": 300.0}))
    lines = text_of(out).splitlines()
    assert lines[:2] == ["a: 2 clients, 3 rounds of 2,048 steps, ppo, cpu, seed 0", "runs/a/"]
    assert lines[2] == (
        "round 1/3  return 20.0  worst cart-0 10.0  KL 0.2500  entropy 0.5000  0.50 s  2,048 steps/s  0.0 s left"
    )
    assert lines[3].startswith("round 2/3  return -  KL ")
    assert lines[4].startswith("round 3/3  return 200.0  worst cart-0 100.0  evaluated 200.0  KL 0.2500")
    assert lines[4].endswith("2,048 steps/s")
    assert lines[-2] == "a: return 200.0 (interquartile mean 200.0, worst 100.0), 3,072 steps in 1:05"
    assert lines[-1] == "next: grpo-fed play runs/a --client cart-0 --gif cart-0.gif"


@pytest.mark.parametrize("display", [LineDisplay, LiveDisplay])
def test_the_header_names_the_folder_and_mlflow(display: type[LineDisplay | LiveDisplay]):
    out = make_console(terminal=display is LiveDisplay)
    running = display(out)
    running.begin(replace(header(), tracked="grpo-fed ui runs/a"))
    running.stop()
    places = [line.strip("│ ") for line in text_of(out).splitlines() if "runs/a" in line]
    assert places == ["runs/a/", "MLflow: grpo-fed ui runs/a"]


def test_a_terminal_follows_the_run_and_shows_its_outcome():
    out = make_console(terminal=True)
    display = LiveDisplay(out)
    display.begin(header())
    display.live.refresh()
    assert "evaluating the untrained policies" in text_of(out)
    display.round(round_record(0, {"cart-0": 1.0, "cart-1": 2.0}))
    display.live.refresh()
    assert "round 0/3" in text_of(out)
    assert "training round 1" in text_of(out)
    display.round(round_record(1, {"cart-0": 10.0, "cart-1": 30.0}))
    display.live.refresh()
    assert re.search(r"round 1/3 .* 0\.50 s/round, 2,048 steps/s, .* left", text_of(out))
    assert re.search(r"cart-1 +2\.00 +30\.0 +30\.0 +0\.2500 +0\.5000 +▁", text_of(out))
    display.round(round_record(3, {"cart-0": 100.0, "cart-1": 300.0}, evaluated=True))
    display.live.refresh()
    assert "evaluating the trained policies" in text_of(out)
    display.stop()
    display.end(make_result({"cart-0": 100.0, "cart-1": 300.0}))
    assert re.search(r"cart-1 +10\.0 +300\.0 +300\.0 +20\.0 +7 +1,536", text_of(out))


def test_an_interrupted_run_has_a_status_and_no_return():
    stopped = make_result({"cart": None}, "interrupted")
    assert result_line(stopped) == "a: interrupted after 3 rounds, 3,072 steps in 1:05"
    assert next_command(stopped) == "grpo-fed play runs/a --gif cart.gif"


@pytest.mark.parametrize(("scores", "worst"), [({"x": 3.0, "y": 1.0}, "y"), ({"x": None, "y": 1.0}, "y")])
def test_the_next_command_films_the_client_with_the_lowest_return(scores: dict[str, float | None], worst: str):
    assert f"--client {worst} " in next_command(make_result(scores))


def test_the_next_command_of_a_run_whose_clients_keep_their_policies_writes_its_page(tmp_path: Path):
    deployed = replace(make_result({"cart": 1.0}), out=tmp_path)
    assert next_command(deployed) == f"grpo-fed report {tmp_path}"
    (tmp_path / "policies").mkdir()
    assert next_command(deployed).startswith(f"grpo-fed play {tmp_path} --gif cart.gif")


def test_the_next_command_of_an_environment_without_pictures_plays_it():
    drawn = make_result({"a": 1.0, "b": 2.0})
    blind = {name: replace(client, env="grpo_fed_tests/NoPictures-v0") for name, client in drawn.clients.items()}
    assert next_command(replace(drawn, clients=blind, out=Path("my runs/a"))) == (
        "grpo-fed play 'my runs/a' --client a"
    )


def server_record(alphas: dict[str, float], joint: float | None, budget: float) -> ServerRecord:
    blocks = tuple(AcceptedBlock(name, 0.1, 0.02, alpha, 0.01) for name, alpha in alphas.items())
    return ServerRecord(
        AcceptedStep(blocks, 0.2, budget, joint), {}, bytes_up=250_000, bytes_down=1_000_000, bytes_total=5_000_000
    )


def test_the_line_of_the_server_has_the_step_its_kl_and_bytes():
    assert (
        server_line(server_record({"torso.0": 1.0, "actor": 1.0}, 0.031, 0.05))
        == "whole step  shared KL 0.0310 of 0.05  1.25 MB"
    )
    short = server_record({"torso.0": 0.5, "actor": 1.0}, None, 0.05)
    assert server_line(short) == "step torso.0 50%  1.25 MB"
    assert server_line(server_record({"actor": 1.0}, 0.5, math.inf)) == "whole step  shared KL 0.5000  1.25 MB"
    assert server_line(ServerRecord(None, {}, 0, 0, 0)) == "0.00 MB"


def test_a_federation_shows_departed_groups_and_failures():
    clients = {
        "alike": ClientProgress(1.0, [2.0], departed=()),
        "contrary": ClientProgress(1.0, [2.0], departed=("torso.0", "actor")),
        "gone": ClientProgress(1.0, [2.0], departed=("actor",), failure="late"),
    }
    rows = {row[0]: row for row in printed_words(progress_table(clients)) if row}
    assert rows["alike"][-1] == "▁"
    assert rows["contrary"][-2:] == ["torso.0,", "actor"]
    assert rows["gone"][-1] == "late"
    assert printed_words(progress_table({"alone": ClientProgress(1.0, [2.0])}))[1][-2:] == ["by", "round"]


@pytest.mark.parametrize("name", ["a", "backwards-0", "a-rather-long-name"])
def test_departed_groups_fit_a_terminal_of_80_columns(name: str):
    out = make_console(terminal=True, width=80)
    display = LiveDisplay(out)
    display.begin(header())
    clients = [
        ClientRecord(name, "cart", 512, 1, {"charts/episodic_return": -1250.3}, departed=("actor",)),
        ClientRecord("lost", "cart", failure=Failure("late", "no answer")),
    ]
    for last in range(30):
        display.round(RoundRecord(last, 30, 0.5, 1024, clients, ServerRecord(None, {}, 1, 1, 2)))
    display.stop()
    rows = {line.split()[0]: line.split() for line in text_of(out).splitlines() if line.strip()}
    assert rows["client"][-1] == "departed"
    assert rows[name][-1] == "actor"
    assert rows["lost"][-1] == "late"
    assert "…" not in rows["lost"]


@pytest.mark.parametrize("name", ["backwards-0", "a-rather-long-name"])
def test_the_final_table_says_since_when_and_with_which_rho_a_client_left_in_80_columns(name: str):
    left = {
        "torso.0": Departure(4, 0.8123),
        "torso.1": Departure(4, 0.7),
        **{f"actor.weight:rows[{row}]": Departure(112, 0.93) for row in range(4)},
    }
    clients = {
        "alike": ClientResult("CartPole-v1", -1250.3, -1250.3, -1250.3, -1250.3, 7, 1536),
        name: ClientResult("CartPole-v1", 9.5, 500.0, 482.8, 500.0, 7, 1536, tuple(left), {}, left),
    }
    out = make_console(width=80)
    print_outcome(out, Result("a", 0, "cpu", "interrupted", None, 3, 65.0, 3072, clients, None))
    table, _, _ = text_of(out).partition("a: interrupted")
    lines = [line.rstrip() for line in table.splitlines()]
    assert max(len(line) for line in lines) <= 80
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["client"] == ["client", "before", "after", "sampled", "departed", "round", "rho"]
    assert rows["alike"] == ["alike", *["-1,250.3"] * 3]
    assert rows[name] == [name, "9.50", "500.0", "482.8", "torso.0,", "4", "≥0.70"]
    assert rows["torso.1"] == ["torso.1"]
    assert rows["4"] == ["4", "groups", "112", "≥0.93"]


def test_the_final_table_has_the_best_round_where_there_is_room():
    left = {"actor": Departure(4, 0.93)}
    clients = {"backwards-0": ClientResult("CartPole-v1", 9.5, 500.0, 482.8, 499.0, 7, 1536, tuple(left), {}, left)}
    out = make_console(width=80)
    print_outcome(out, Result("a", 0, "cpu", "interrupted", None, 3, 65.0, 3072, clients, None))
    rows = {line.split()[0]: line.split() for line in text_of(out).splitlines() if line.strip()}
    assert rows["client"][-4:] == ["best", "departed", "round", "rho"]
    assert rows["backwards-0"][-4:] == ["499.0", "actor", "4", "0.93"]


@pytest.mark.parametrize(
    ("columns", "times"),
    [
        (80, "0.50 s/round, 4,096 steps/s, 0.0 s left, 0.0 s so far"),
        (60, "0.50 s/round, 4,096 steps/s, 0.0 s left"),
        (44, "0.50 s/round, 0.0 s left"),
        (28, "0.0 s left"),
    ],
)
def test_times_beside_the_bar_are_whole_or_left_out(columns: int, times: str):
    out = make_console(terminal=True, width=columns)
    progress = RunProgress(rounds=30)
    progress.add(RoundRecord(0, 30, 0.0, 0, [ClientRecord("a", "a", score=1.0)]))
    progress.add(RoundRecord(1, 30, 0.5, 2048, [ClientRecord("a", "a", 2048, 1, {})]))
    progress.end_times = [-100.0, -100.0]  # so that the latest round took no time
    out.print(progress_bar(progress, 0.0, columns))
    (line,) = text_of(out).splitlines()
    assert line.startswith("round 1/30 ")
    assert line.rstrip().endswith(f" {times}")
    assert "…" not in line


def test_the_outcome_warns_of_missing_answers():
    failures = [(2, "raised", "RuntimeError: out of coal"), (5, "late", "no answer within 600 seconds")]
    some_missing = replace(make_result({"a": 1.0, "b": 2.0}), missing={"a": failures, "b": failures[:1]})
    assert missing_lines(some_missing) == [
        "a: no answer in rounds 2, 5; last failure: late, no answer within 600 seconds",
        "b: no answer in round 2; last failure: raised, RuntimeError: out of coal",
    ]
    out = make_console()
    print_outcome(out, some_missing)
    assert "last failure: raised, RuntimeError: out of coal" in " ".join(text_of(out).split())
    many_missing = replace(some_missing, missing={f"c{number}": failures for number in range(7)})
    assert missing_lines(many_missing)[-1] == "and 2 more clients: results.json names them"
    assert missing_lines(make_result({"a": 1.0})) == []


def test_a_client_that_learned_nothing_is_named_in_the_result():
    learned = make_result({"a": 3.0, "b": 1.0, "broken": None})
    clients = {**learned.clients, "broken": ClientResult("X-v0", None, None, None, None, 0, 0)}
    failures = [(number, "raised", "RuntimeError: it burns") for number in range(4)]
    partial = replace(learned, clients=clients, missing={"a": failures[:1], "broken": failures})
    assert result_line(partial).startswith(
        "a: return 2.00 (interquartile mean 2.00, worst 1.00) over 2 of 3 clients, broken learned nothing"
    )
    assert missing_lines(partial)[0] == (
        "broken learned nothing: no answer in rounds 0, 1, 2, 3; last failure: raised, RuntimeError: it burns"
    )
    assert next_command(partial) == "grpo-fed play runs/a --client b --gif b.gif"
    out = make_console()
    print_outcome(out, partial)
    assert "warning: broken learned nothing" in text_of(out)
