"""The summary of a run: the result first, then its sections."""

from __future__ import annotations

import json
import re
from pathlib import Path

from grpo_fed.reports.summary import headline, summary_markdown, write_summary
from grpo_fed.runs.history import read_history
from grpo_fed.runs.provenance import Provenance, write_provenance
from grpo_fed.runs.records import Failure
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run


def summary_of(folder: Path) -> str:
    return summary_markdown(read_history(folder))


def section(text: str, title: str) -> str:
    """A section of a summary."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_result_comes_first(tmp_path: Path):
    # 100 to 103 at the end, 1 before: the interquartile mean of four is that of 101 and 102.
    text = write_summary(write_run(tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))).read_text()
    first, _, second, *_ = text.splitlines()
    assert first == "# made: return 101.5 (interquartile mean of 4 clients), 1.00 before, worst client 100.0"
    assert second.startswith("Method `grpo` with `ppo`, 4 clients, 3 of 3 rounds, 1,200 environment steps, ")


def test_the_return_of_one_client_is_no_mean(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario([("cart", 1, "CartPole-v1")], "rounds = 3"))
    assert headline(read_history(folder)) == "return 100.0, 1.00 before"


def test_returns_of_different_environments_are_not_averaged(tmp_path: Path):
    of = sample_scenario([("cart", 1, "CartPole-v1"), ("pendulum", 1, "Pendulum-v1")], "rounds = 2")
    text = headline(read_history(write_run(tmp_path, of, SampleRun(scores=lambda client: (500.0, -200.0)[client]))))
    # (500 - 24.09) / (475 - 24.09) = 1.0554 and (-200 + 1239.56) / (-152.25 + 1239.56) = 0.9561
    score, returns = text.split("; return ")
    assert score == "normalised score 1.01 (interquartile mean 1.01, worst 0.96; 0 is random, 1 the reference)"
    assert returns == "by environment: CartPole-v1 500.0, 1.00 before; Pendulum-v1 -200.0, 1.00 before"


def test_the_headline_says_that_a_run_is_unfinished(tmp_path: Path):
    of = sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 30")
    folder = write_run(tmp_path, of, SampleRun(rounds=2, finished=False))
    # In round 2 the clients have 20, 21, 22 and 23.
    mean = "21.5 (interquartile mean of 4 clients)"
    expected = f"unfinished after 2 rounds; in training episodes, return {mean}, worst client 20.0"
    assert headline(read_history(folder)) == expected


def test_every_client_has_a_row(tmp_path: Path):
    made = SampleRun(
        departed=lambda number, client: ("actor",) if client == 2 else (),
        failure=lambda number, client: Failure("died", "its process ended") if (number, client) == (2, 0) else None,
    )
    text = summary_of(write_run(tmp_path, sample_scenario(more="rounds = 3"), made))
    head, _, *clients = rows(section(text, "Clients"))
    assert head == ["client", "before", "after", "training", "by round", "departed groups", "rounds missed"]
    assert clients[0] == ["cart-0", "1.00", "100.0", "30.0", "▁█", "none", "1"]
    assert clients[2] == ["cart-2", "1.00", "102.0", "32.0", "▁▅█", "`actor`", "none"]


def test_a_table_of_many_clients_has_both_ends_and_quantiles(tmp_path: Path):
    of = sample_scenario([("cart", 101, "CartPole-v1")], "rounds = 1")
    text = section(summary_of(write_run(tmp_path, of)), "Clients")
    names = [row[0] for row in rows(text)]
    assert names[2:12] == ["cart-0", "cart-1", "cart-2", "cart-3", "cart-4", *(f"cart-{k}" for k in range(96, 101))]
    assert ["median", "1.00", "150.0", "60.0"] in rows(text)


def test_departures_are_named_with_their_first_round(tmp_path: Path):
    made = SampleRun(departed=lambda number, client: ("actor",) if client and number > 3 + client else ())
    text = section(summary_of(write_run(tmp_path, sample_scenario(more="rounds = 9"), made)), "Shared blocks")
    assert "Shared: `torso.0`, `torso.1`, `actor`. All other blocks are private to each client." in text
    assert "- `torso.1`: shared by all." in text
    assert "- `actor`: `cart-1`, `cart-2` have departed (all since round 6)." in text


def test_departures_by_persistence_have_their_rho(tmp_path: Path):
    def left(number: int, client: int) -> dict[str, float]:
        return {(2, 1): {"actor": 0.934}, (3, 2): {"actor": 0.71, "torso.1": 0.6}}.get((number, client), {})

    made = SampleRun(
        left=left,
        departed=lambda number, client: tuple(
            group for group in ("torso.1", "actor") for at in range(1, number + 1) if group in left(at, client)
        ),
    )
    text = summary_of(write_run(tmp_path, sample_scenario(more="rounds = 4"), made))
    cells = {row[0]: row[5] for row in rows(section(text, "Clients"))}
    assert cells["cart-0"] == "none"
    assert cells["cart-1"] == "`actor` since round 2, rho 0.93"
    assert cells["cart-2"] == "`torso.1`, `actor` since round 3, rho 0.60 to 0.71"
    shared = section(text, "Shared blocks")
    assert "- `torso.1`: `cart-2` has departed (since round 3, rho 0.60)." in shared
    assert "- `actor`: `cart-1`, `cart-2` have departed (all since round 3, rho 0.71 to 0.93)." in shared


def test_a_return_is_named_with_its_round(tmp_path: Path):
    made = SampleRun(
        departed=lambda number, client: ("actor",) if client == 1 and number == 2 else (),
        left=lambda number, client: {"actor": 0.9} if (number, client) == (2, 1) else {},
        returned=lambda number, client: {"actor": 3.0} if (number, client) == (3, 1) else {},
    )
    text = section(summary_of(write_run(tmp_path, sample_scenario(more="rounds = 4"), made)), "Shared blocks")
    assert "At the end no client has departed from any of their groups." in text
    assert "- `cart-1` returned to `actor` in round 3." in text


def test_a_client_that_came_back_has_not_departed(tmp_path: Path):
    made = SampleRun(departed=lambda number, client: ("actor",) if number == 2 else ())
    text = section(summary_of(write_run(tmp_path, sample_scenario(more="rounds = 4"), made)), "Shared blocks")
    assert "At the end no client has departed from any of their groups." in text


def test_many_departed_clients_are_counted_by_entry(tmp_path: Path):
    of = sample_scenario([("cart", 12, "CartPole-v1"), ("swapped", 9, "CartPole-v1")], "rounds = 2")
    made = SampleRun(departed=lambda number, client: ("actor",) if client > 10 else ())
    text = section(summary_of(write_run(tmp_path, of, made)), "Shared blocks")
    assert "10 clients (1 of `cart`, 9 of `swapped`) have departed (all since round 1)." in text


def test_missing_answers_have_rounds_and_reasons(tmp_path: Path):
    def failure(number: int, client: int) -> Failure | None:
        if client == 1 and number in (2, 3, 4):
            return Failure("late", "no answer within 5 s.")
        return Failure("died", "its process ended") if (number, client) == (6, 1) else None

    text = summary_of(write_run(tmp_path, sample_scenario(more="rounds = 7"), SampleRun(failure=failure)))
    missing = section(text, "Missing answers")
    assert "1 client failed to answer at least once" in missing
    assert "- `cart-1`: rounds 2 to 4 late (no answer within 5 s), round 6 died (its process ended)." in missing


def test_the_headline_names_clients_that_learned_nothing(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario(more="rounds = 2"))
    results = json.loads((folder / "results.json").read_text())
    results["clients"]["cart-1"]["env_steps"] = 0
    results["missing"] = {"cart-1": [[1, "raised", "it burns"], [2, "raised", "it burns"]]}
    (folder / "results.json").write_text(json.dumps(results))
    assert summary_of(folder).splitlines()[0].endswith("; cart-1 learned nothing")


def test_a_summary_has_no_section_without_something_to_say(tmp_path: Path):
    text = summary_of(write_run(tmp_path, sample_scenario(more="rounds = 2")))
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Clients",
        "Shared blocks",
        "Steps of the server",
        "Time and traffic",
        "How to reproduce",
    ]


def test_the_summary_says_how_to_make_the_run_again(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario(more="rounds = 2"))
    again = "`grpo-fed run scenario.toml`, with the file of this folder, repeats it"
    assert again in section(summary_of(folder), "How to reproduce")
    write_provenance(folder, Provenance("grpo-fed run made --seed 3", "0123abc", {"torch": "2.13.0"}))
    text = section(summary_of(folder), "How to reproduce")
    assert "Made by `grpo-fed run made --seed 3` with commit 0123abc, torch 2.13.0." in text
    assert again in text


def test_the_table_of_steps_has_their_budgets(tmp_path: Path):
    made = SampleRun(kl=lambda number: 0.001 * number, alpha=0.5)
    text = section(summary_of(write_run(tmp_path, sample_scenario(more="rounds = 4"), made)), "Steps of the server")
    assert ["`actor`", "0.0040", "0.0200", "0.50", "4"] in rows(text)
    assert "| all blocks | 0.0080 | 0.0500 |  |  |" in text


def test_the_summary_of_a_local_run_has_no_federation(tmp_path: Path):
    of = sample_scenario(more='method = "local"\nrounds = 2')
    text = summary_of(write_run(tmp_path, of, SampleRun(federated=False)))
    assert "`grpo-fed train scenario.toml`" in text
    assert not re.search("missing|missed|server|MB", text)


def test_a_run_without_rounds_has_a_headline_only(tmp_path: Path):
    write_run(tmp_path, sample_scenario(more="rounds = 2"), SampleRun(finished=False))
    (tmp_path / "rounds.jsonl").write_text("")
    assert summary_of(tmp_path).startswith("# made: unfinished after 0 rounds; no return is known\n")
