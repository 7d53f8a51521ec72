"""The text on a run's page in MLflow, the result first, in Markdown.

begin: the content of the spool's first record. line: a line of `rounds.jsonl`. document: the content of `results.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fed.runs.departures import Departure, by_round
from grpo_fed.runs.equal_groups import equal_groups_line, equal_groups_note, has_equal_groups_alone
from grpo_fed.runs.examples import read_examples
from grpo_fed.runs.markdown import escape_markdown, plain
from grpo_fed.runs.metrics import NORMALISED_IQM, NORMALISED_TRAINING, SCORE_IQM, TRAINING_RETURN
from grpo_fed.runs.records import list_differences
from grpo_fed.runs.results import idle_clients, mean_adaptation
from grpo_fed.runs.sharing_verdicts import SharingVerdict, verdicts_line

if TYPE_CHECKING:
    from grpo_fed.rl.records import Example

ROWS = 24
"""Clients in the table: the worst, if there are more."""
MOST_EXAMPLES = 500
"""Rows in the table of examples."""
MOST_GROUPS = 8
"""Groups that are named of those that a client left in the same round."""
LONGEST = 8000
"""Characters that a tag may have."""


def page_while_running(begin: Mapping[str, Any], line: Mapping[str, Any] | None) -> str:
    """Describe a run that goes on; line: its latest round, None before the first."""
    rounds = begin["params"]["rounds"]
    if line is None:
        return f"**Has begun**: {_describe_run(begin)}."
    names = {
        SCORE_IQM: "return",
        NORMALISED_IQM: "normalised score",
        TRAINING_RETURN: "return in training",
        NORMALISED_TRAINING: "normalised score in training",
    }
    known = [f", {name} **{_cell(line[key])}**" for key, name in names.items() if line.get(key) is not None]
    result = known[0] if known else ""
    text = f"**Round {line['round']} of {rounds}**{result}: {_describe_run(begin)}."
    note = equal_groups_note([name for name, part in line["clients"].items() if has_equal_groups_alone(part)])
    return f"{text}\n\nIn this round {note}." if note else text


def page_if_killed(begin: Mapping[str, Any], line: Mapping[str, Any] | None) -> str:
    """Describe a run that was killed; line: its latest round, None if it was killed before the first."""
    after = 0 if line is None else line["round"]
    return f"**Killed after round {after} of {begin['params']['rounds']}**: {_describe_run(begin)}."


def page_at_end(begin: Mapping[str, Any], document: Mapping[str, Any] | None, status: str) -> str:
    """Describe a run that has ended; document: None if it left no results."""
    if document is None:
        return f"**{status.capitalize()}**: {_describe_run(begin)}."
    scores = document["eval"]
    trained = [client for client in document["clients"].values() if client.get("trains", True)]
    evaluated = [client for client in trained if client["return"] is not None]
    has_held_out = len(trained) < len(document["clients"])
    lines = []
    if status != "finished":
        why = document.get("error") or document.get("reason")
        reason = f": {_foreign(why)}" if why else ""
        lines.append(
            f"**{status.capitalize()} after {document['rounds']} of {begin['params']['rounds']} rounds**{reason}."
        )
    if scores["score_iqm"] is not None:
        before = [client["return_before"] for client in evaluated if client["return_before"] is not None]
        start = f"from {_cell(sum(before) / len(before))} " if before else ""
        lines.append(
            f"**Return {_cell(scores['score_iqm'])}** (interquartile mean of {len(evaluated)} clients; mean {start}to"
            f" {_cell(scores['score_mean'])}, worst client {_cell(scores['score_min'])})."
        )
    lines += _mixed_scores(scores, len(evaluated))
    for last, what in ((True, "The last"), (False, "The first")):
        count, curve = mean_adaptation(document, last)
        if curve:
            who = f"{count} {'held-out ' if has_held_out else ''}client{'s' * (count != 1)}"
            updates = f"{_cell(curve[-1])} in {len(curve) - 1} local updates"
            lines.append(f"**{what} policies adapted** to {updates}, {_cell(curve[0])} before (mean of {who}).")
    for name in (idle := idle_clients(document))[:ROWS]:
        round, kind, reason = document["missing"][name][-1]
        lines.append(
            f"**{name} learned nothing**: it gave no valid answer, in round {round} {kind}: {_foreign(reason)}"
        )
    if len(idle) > ROWS:
        lines.append(f"**{len(idle) - ROWS} more clients learned nothing.**")
    lines += _remarks(document)
    megabytes = (document.get("bytes_up", 0) + document.get("bytes_down", 0)) / 1e6
    clients = document["clients"].values()
    unit = "completions" if all(client.get("unit") == "completions" for client in clients) else "steps"
    traffic = f", {megabytes:.1f} MB sent" if megabytes else ""
    lines.append(f"{_describe_run(begin)}: {document['env_steps']:,} {unit} in {document['seconds']:.0f} s{traffic}.")
    lines.append(_table(document["clients"]))
    if begin["description"]:
        lines.append(_foreign(begin["description"]))
    return "\n\n".join(lines)[:LONGEST]


def client_page(client: Mapping[str, Any]) -> str:
    """Describe a client when the run has ended. client: its part of `results.json`."""
    if client["return"] is None:
        return f"{client['episodes']} episodes in training, no evaluation after it."
    kind = "In another cluster than most" if client.get("clusters") else "Personal groups"
    names = "; ".join(_differences(client, "`")) or "none"
    curve = client.get("adapted_last")
    adapted = f" After {len(curve) - 1} local updates: {_cell(curve[-1])}." if curve else ""
    cost = f" Its episodes cost {_cell(client['cost'])}." if client.get("cost") is not None else ""
    held_out = "" if client.get("trains", True) else " It takes no part in training."
    before = f"**Return {_cell(client['return'])}**, {_cell(client['return_before'])} before."
    twin = "".join(f" Sharing {verdict.describe()}." for verdict in _verdicts({"": client}).values())
    return f"{before}{adapted}{cost}{held_out} {kind}: {names}.{twin}"


def make_tables(
    folder: Path, begin: Mapping[str, Any], document: Mapping[str, Any] | None
) -> dict[str, Mapping[str, Any]]:
    """Make a run's tables by the names of their files, in the form that MLflow shows.

    folder: the run's folder, whose examples are in a table. document: None if the clients have runs of their own.
    """
    tables: dict[str, Mapping[str, Any]] = {}
    if document is not None:
        tables["clients.json"] = clients_table(document)
    if table := examples_table({name: read_examples(folder, name) for name in begin["clients"]}):
        tables["examples.json"] = table
    return tables


def clients_table(document: Mapping[str, Any]) -> dict[str, Any]:
    """Make a table of all clients, in the form that MLflow shows; for federations whose clients have no runs."""
    columns = ["env", "return", "return_before", "return_best", "episodes", "env_steps"]
    adapted = ["return_adapted"] if any(client.get("adapted_last") for client in document["clients"].values()) else []
    columns += ["cost"] if any(client.get("cost") is not None for client in document["clients"].values()) else []
    rows = [
        [
            name,
            *(client.get(column) for column in columns),
            *(_adapted(client) for _ in adapted),
            "; ".join(_differences(client)),
        ]
        for name, client in document["clients"].items()
    ]
    kind = "clusters" if any(client.get("clusters") for client in document["clients"].values()) else "personal_groups"
    return {"columns": ["client", *columns, *adapted, kind], "data": rows}


def examples_table(examples: Mapping[str, Sequence[Example]]) -> dict[str, Any] | None:
    """Make a table of what clients wrote before and after training, in the form that MLflow shows; None without any.

    What the browser could take for more than text is replaced.
    """
    rows = [
        [
            client,
            *map(_plain, (example.prompt, example.before)),
            example.before_reward,
            _plain(example.after),
            example.after_reward,
        ]
        for client, kept in examples.items()
        for example in kept
    ]
    columns = ["client", "prompt", "before", "reward before", "after", "reward after"]
    return {"columns": columns, "data": rows[:MOST_EXAMPLES]} if rows else None


def _plain(text: str) -> str:
    """Make the ends of lines visible, and replace control characters."""
    shown = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in shown)


def _describe_run(begin: Mapping[str, Any]) -> str:
    """Name the scenario, the method, the number of clients and the seed."""
    params = begin["params"]
    count = len(begin["clients"])
    return (
        f"{begin['scenario']}, {_foreign(params['method'])}, {count} client{'s' * (count != 1)}, seed {params['seed']}"
    )


def _table(clients: Mapping[str, Any]) -> str:
    """Make a table of the clients in Markdown."""
    worst = sorted(clients.items(), key=lambda item: -1e300 if item[1]["return"] is None else item[1]["return"])
    chosen = list(clients.items()) if len(clients) <= ROWS else worst[:ROWS]
    kind = "clusters" if any(client.get("clusters") for client in clients.values()) else "personal groups"
    is_adapted = any(client.get("adapted_last") for client in clients.values())
    cost = "cost"
    has_costs = any(client.get(cost) is not None for client in clients.values())
    head = f"| client | before | after |{' adapted |' * is_adapted}{' cost |' * has_costs} {kind} |"
    head += f"\n| --- | ---: | ---: |{' ---: |' * (is_adapted + has_costs)} --- |"
    rows = [
        f"| {name} | {_cell(client['return_before'])} | {_cell(client['return'])} |"
        f"{f' {_cell(_adapted(client))} |' if is_adapted else ''}"
        f"{f' {_cell(client.get(cost))} |' if has_costs else ''}"
        f" {'; '.join(_differences(client)) or '-'} |"
        for name, client in chosen
    ]
    more = [] if len(chosen) == len(clients) else [f"\nThe {ROWS} worst of {len(clients)}; all are in `clients.json`."]
    return "\n".join([head, *rows, *more])


def _mixed_scores(scores: Mapping[str, Any], clients: int) -> Iterator[str]:
    """Describe the scores of clients with unlike environments. scores: `eval` of `results.json`."""
    if scores.get("normalised_iqm") is not None:
        yield (
            f"**Normalised score {scores['normalised_iqm']:.2f}** (interquartile mean of {clients} clients; mean"
            f" {scores['normalised_mean']:.2f}, worst client {scores['normalised_min']:.2f}; 0 is random, 1 the"
            " reference)."
        )
    if means := [f"{_foreign(name)} {_cell(part['mean'])}" for name, part in scores.get("by_environment", {}).items()]:
        yield f"Mean return by environment: {'; '.join(means)}."


def _remarks(document: Mapping[str, Any]) -> Iterator[str]:
    """Say for whom sharing pays, and which clients could learn nothing. document: the content of `results.json`."""
    if line := verdicts_line(_verdicts(document["clients"])):
        yield f"**{line.capitalize()}**, as their twins tell, which learn alone."
    if line := equal_groups_line(document.get("equal", {})):
        yield f"**Note**: {line}."


def _verdicts(clients: Mapping[str, Mapping[str, Any]]) -> dict[str, SharingVerdict]:
    """Read what the clients' twins say. clients: their parts of `results.json`."""
    return {name: SharingVerdict(**client["sharing"]) for name, client in clients.items() if client.get("sharing")}


def _adapted(client: Mapping[str, Any]) -> float | None:
    """Return what a client reached in its local updates from the last policy; None if it made none."""
    curve = client.get("adapted_last")
    return float(curve[-1]) if curve else None


def describe_departures(client: Mapping[str, Any], quote: str = "") -> list[str]:
    """Name the groups that a client has left, by the round in which it did: `actor since round 4, rho 0.93`.

    With a merge rule that has no rounds of departures they are only named. quote: is put around each name.
    """
    departures = {
        group: Departure(departure["round"], departure["rho"])
        for group, departure in client.get("departures", {}).items()
    }
    parts = []
    for departed in by_round(client.get("personal_groups", ()), departures):
        names = [f"{quote}{name}{quote}" for name in departed.groups]
        more = f" and {len(names) - MOST_GROUPS} more" if len(names) > MOST_GROUPS else ""
        parts.append(f"{', '.join(names[:MOST_GROUPS])}{more} {departed.since}".strip())
    return parts


def _differences(client: Mapping[str, Any], quote: str = "") -> list[str]:
    """Name what a client does not share with most others. client: its part of `results.json`."""
    if client.get("departures"):
        return describe_departures(client, quote)
    names = list_differences(client.get("personal_groups", ()), client.get("clusters", {}))
    return [", ".join(f"{quote}{name}{quote}" for name in names)] if names else []


def _foreign(text: str) -> str:
    """Write words of a client or of a scenario, so that they are no more than words."""
    return escape_markdown(plain(text))


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"  # rewards of completions are often between 0 and 1
