"""The summary: the result first, and nothing that the run does not say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from grpo_fed.reports.summary import headline, markdown, write_summary
from grpo_fed.runs.history import read_history
from grpo_fed.runs.records import Failure
from tests.support.sample_run_folder import Made, scenario, write_run


def part(text: str, title: str) -> str:
    """A section of a summary."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_result_comes_first(tmp_path: Path):
    # 100 to 103 at the end, 1 before: the middle half of four is 101 and 102.
    text = write_summary(write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))).read_text()
    first, _, second, *_ = text.splitlines()
    assert first == "# made: return 101.5 in the middle half of 4 clients, 1.00 before, the worst 100.0"
    assert second.startswith("Method `grpo` with `ppo`, 4 clients, 3 of 3 rounds, 1,200 environment steps, ")


def test_one_client_is_no_statistic(tmp_path: Path):
    folder = write_run(tmp_path, scenario([("cart", 1, "CartPole-v1")], "rounds = 3"))
    assert headline(read_history(folder)) == "return 100.0, 1.00 before"


def test_unlike_environments_are_not_averaged(tmp_path: Path):
    of = scenario([("cart", 1, "CartPole-v1"), ("pendulum", 1, "Pendulum-v1")], "rounds = 2")
    found = headline(read_history(write_run(tmp_path, of, Made(scores=lambda client: (500.0, -200.0)[client]))))
    assert found == "return by environment: CartPole-v1 500.0, 1.00 before; Pendulum-v1 -200.0, 1.00 before"


def test_a_run_that_stopped_says_so(tmp_path: Path):
    of = scenario([("cart", 4, "CartPole-v1")], "rounds = 30")
    folder = write_run(tmp_path, of, Made(rounds=2, finished=False))
    # In round 2 the clients have 20, 21, 22 and 23.
    expected = (
        "unfinished after 2 rounds; in training episodes, return 21.5 in the middle half of 4 clients, the worst 20.0"
    )
    assert headline(read_history(folder)) == expected


def test_every_client_has_a_row(tmp_path: Path):
    made = Made(
        left=lambda number, client: ("actor",) if client == 2 else (),
        failure=lambda number, client: Failure("died", "its process ended") if (number, client) == (2, 0) else None,
    )
    text = markdown(read_history(write_run(tmp_path, scenario(more="rounds = 3"), made)))
    head, _, *clients = rows(part(text, "Clients"))
    assert head == ["client", "before", "after", "training", "by round", "personal groups", "rounds missed"]
    assert clients[0] == ["cart-0", "1.00", "100.0", "30.0", "▁█", "none", "1"]
    assert clients[2] == ["cart-2", "1.00", "102.0", "32.0", "▁▅█", "`actor`", "none"]


def test_of_many_clients_the_ends_and_quantiles_are_told(tmp_path: Path):
    of = scenario([("cart", 101, "CartPole-v1")], "rounds = 1")
    text = part(markdown(read_history(write_run(tmp_path, of))), "Clients")
    names = [row[0] for row in rows(text)]
    assert names[2:12] == ["cart-0", "cart-1", "cart-2", "cart-3", "cart-4", *(f"cart-{k}" for k in range(96, 101))]
    assert ["median", "1.00", "150.0", "60.0"] in rows(text)


def test_it_says_what_is_shared_and_who_left_since_when(tmp_path: Path):
    made = Made(left=lambda number, client: ("actor",) if client and number > 3 + client else ())
    text = part(markdown(read_history(write_run(tmp_path, scenario(more="rounds = 9"), made))), "Shared and personal")
    assert "Shared blocks: `torso.0`, `torso.1`, `actor`; all else is private to each client." in text
    assert "- `torso.1`: shared by all." in text
    assert "- `actor`: left by `cart-1`, `cart-2`, all since round 6." in text


def test_who_came_back_is_not_said_to_have_left(tmp_path: Path):
    made = Made(left=lambda number, client: ("actor",) if number == 2 else ())
    text = part(markdown(read_history(write_run(tmp_path, scenario(more="rounds = 4"), made))), "Shared and personal")
    assert "No client has left any group of them for good." in text


def test_many_who_left_are_counted_by_entry(tmp_path: Path):
    of = scenario([("cart", 12, "CartPole-v1"), ("swapped", 9, "CartPole-v1")], "rounds = 2")
    made = Made(left=lambda number, client: ("actor",) if client > 10 else ())
    text = part(markdown(read_history(write_run(tmp_path, of, made))), "Shared and personal")
    assert "left by 10 clients (1 of `cart`, 9 of `swapped`), all since round 1." in text


def test_it_says_who_was_missing_when_and_why(tmp_path: Path):
    def failure(number: int, client: int) -> Failure | None:
        if client == 1 and number in (2, 3, 4):
            return Failure("late", "no answer within 5 s.")
        return Failure("died", "its process ended") if (number, client) == (6, 1) else None

    text = markdown(read_history(write_run(tmp_path, scenario(more="rounds = 7"), Made(failure=failure))))
    missing = part(text, "Who was missing")
    assert "1 client had no answer at least once" in missing
    assert "- `cart-1`: rounds 2 to 4 late (no answer within 5 s), round 6 died (its process ended)." in missing


def test_who_learned_nothing_is_in_the_headline(tmp_path: Path):
    folder = write_run(tmp_path, scenario(more="rounds = 2"))
    results = json.loads((folder / "results.json").read_text())
    results["clients"]["cart-1"]["env_steps"] = 0
    results["missing"] = {"cart-1": [[1, "raised", "it burns"], [2, "raised", "it burns"]]}
    (folder / "results.json").write_text(json.dumps(results))
    assert markdown(read_history(folder)).splitlines()[0].endswith("; cart-1 learned nothing")


def test_nobody_missing_is_said_too(tmp_path: Path):
    text = markdown(read_history(write_run(tmp_path, scenario(more="rounds = 2"))))
    assert "Nobody: every client that was asked had an answer." in part(text, "Who was missing")


def test_the_steps_stand_beside_their_budgets(tmp_path: Path):
    made = Made(kl=lambda number: 0.001 * number, alpha=0.5)
    text = part(markdown(read_history(write_run(tmp_path, scenario(more="rounds = 4"), made))), "The server's steps")
    assert ["`actor`", "0.0040", "0.0200", "0.50", "4"] in rows(text)
    assert "| all together | 0.0080 | 0.0500 |  |  |" in text


def test_a_run_without_federation_speaks_of_none(tmp_path: Path):
    of = scenario(more='method = "local"\nrounds = 2')
    text = markdown(read_history(write_run(tmp_path, of, Made(federated=False))))
    assert "Nothing is shared: every client learned on its own." in text
    assert not re.search("missing|missed|server|MB", text)


def test_before_the_first_round_there_is_little_to_say(tmp_path: Path):
    write_run(tmp_path, scenario(more="rounds = 2"), Made(finished=False))
    (tmp_path / "rounds.jsonl").write_text("")
    assert markdown(read_history(tmp_path)).startswith("# made: unfinished after 0 rounds; no return is known\n")
