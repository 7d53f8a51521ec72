"""The parts of a run's summary as data, so that `summary.md` and the page say the same.

Clients, what they share, missing answers, the server's steps, notes, time and traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from grpo_fed.reports.figures.cost import run_traffic
from grpo_fed.reports.formatting import (
    draw_curve,
    format_count,
    format_megabytes,
    format_return,
    format_small,
    visible_text,
)
from grpo_fed.reports.privacy_section import privacy_section
from grpo_fed.reports.reproduction_section import reproduction_section
from grpo_fed.reports.section import Section, Table
from grpo_fed.reports.site_sections import describe_sites
from grpo_fed.reports.tables import LOWEST_ROWS, MAX_ROWS, QUANTILES
from grpo_fed.reports.twins_section import sharing_section
from grpo_fed.runs.departures import by_round
from grpo_fed.runs.equal_groups import describe_rounds, equal_groups_line
from grpo_fed.runs.examples import read_examples
from grpo_fed.runs.history import History, MissedRound, fill_forward
from grpo_fed.runs.markdown import plain
from grpo_fed.runs.metrics import EVALUATION_COST
from grpo_fed.runs.records import list_differences

MAX_NAMES = 8
"""How many clients, or spans of missed rounds, a sentence names; more clients are counted by entry."""
SHOWN_UPDATES = (0.1, 0.25, 0.5)
"""The parts of an adaptation after which a table has the return, beside its beginning and its end."""
CLIENT_FIGURES = ("learning", "costs")
"""The figures of what clients have reached."""
CURVE_WIDTH = 16
"""Characters of a client's curve."""


def make_sections(history: History) -> Iterator[Section]:
    """Make the sections that have something to say."""
    if not history.lines:
        return
    yield _clients(history)
    optional = (
        _adaptation(history),
        sharing_section(history),
        _examples(history),
        _sharing(history) if history.block_of_group else None,
        describe_sites(history) if history.sites else None,
        privacy_section(history),
        _missing_answers(history) if history.missing else None,
        _server_steps(history) if history.blocks and history.scenario.proximity.mode != "off" else None,
        _notes(history) if any("notes" in line for line in history.lines) else None,
    )
    yield from (section for section in optional if section)
    yield _cost(history)
    yield reproduction_section(history)


# Clients --------------------------------------------------------------------------------------------------------------


def _clients(history: History) -> Section:
    """Make a row for each client, or of many clients for the lowest and the highest, with quantiles of all."""
    clients = history.clients
    latest = np.where(np.isfinite(history.after), history.after, history.returns[-1])
    training = history.client_series("charts/episodic_return")
    shown, took_part = list(range(len(clients))), history.trained.any(axis=0)
    if len(clients) > MAX_ROWS:
        took_part = took_part if (took_part & np.isfinite(latest)).any() else np.ones(len(clients), bool)
        known = np.flatnonzero(took_part & np.isfinite(latest))
        order = known[np.argsort(latest[known], kind="stable")]
        shown = list(dict.fromkeys(int(k) for k in (*order[:LOWEST_ROWS], *order[-LOWEST_ROWS:])))
    differences_head = "clusters" if history.clustered else "departed groups"
    head = ["client", "before", "after", "training", "by round"]
    costs = fill_forward(history.client_series(EVALUATION_COST))
    has_costs = bool(np.isfinite(costs[-1:]).any())
    head += ["cost"] if has_costs else []
    head += [differences_head, "rounds missed"] if history.federated else []
    rows = []
    for k in shown:
        known = training[np.isfinite(training[:, k]), k]
        returns = (history.before[k], history.after[k], history.returns[-1, k])
        cells = [clients[k], *(format_return(value) for value in returns), draw_curve(known.tolist(), CURVE_WIDTH)]
        cells += [format_return(costs[-1, k])] if has_costs else []
        if history.federated:
            missed = len({failure.round for failure in history.missing.get(clients[k], ())})
            cells += [_describe_differences(history, k) or "none", f"{missed:,}" if missed else "none"]
        rows.append(tuple(cells))
    table = Table(tuple(head), tuple(rows), ("by round", differences_head))
    if len(shown) == len(clients):
        return Section("Clients", tables=(table,), figures=CLIENT_FIGURES)
    count = format_count(len(clients), "client")
    who = count if took_part.all() else f"{took_part.sum():,} that took part, of {count}"
    text = f"The {LOWEST_ROWS} lowest and the {LOWEST_ROWS} highest of {who}, and quantiles of all."
    return Section("Clients", (text,), tables=(table, _quantiles(history)), figures=CLIENT_FIGURES)


def _adaptation(history: History) -> Section | None:
    """Make a row for each client whose adaptation counts, and one of their mean; None if no client was adapted."""
    curves = history.adapted_last
    known = np.flatnonzero(history.adapts & np.isfinite(curves).all(axis=1))
    updates = history.scenario.evaluate.adapt
    if not updates or not known.size:
        return None
    columns = sorted({0, *(round(updates * part) for part in SHOWN_UPDATES), updates})
    head = ["client", *("before" if number == 0 else f"after {number}" for number in columns), "by local update"]
    shown = known[np.argsort(curves[known, -1], kind="stable")][:MAX_ROWS]
    parts = [(history.clients[k], curves[k]) for k in sorted(shown.tolist())]
    is_mixed = len({history.envs[k] for k in known}) > 1  # returns of unlike environments have no mean
    rows = [*parts, ("mean", curves[known].mean(axis=0))] if len(known) > 1 and not is_mixed else parts
    first = history.adapted_first[known]
    if np.isfinite(first).all() and not is_mixed:
        rows.append(("mean of the first policies", first.mean(axis=0)))
    table = Table(
        tuple(head),
        tuple(
            (name, *(format_return(curve[number]) for number in columns), draw_curve(curve.tolist(), CURVE_WIDTH))
            for name, curve in rows
        ),
        ("by local update",),
    )
    who = "Clients that took no part in training" if not history.trains.all() else "All clients"
    few = f"; shown are the {MAX_ROWS} lowest of {len(known):,}" if len(known) > MAX_ROWS else ""
    text = f"{who} adapt the last policy to their own tasks, on copies: returns before, and after local updates{few}."
    return Section("Adaptation", (text,), tables=(table,), figures=("adaptation",))


def _quantiles(history: History) -> Table:
    """Make a row for each quantile; every column is sorted by itself."""
    columns = [values[np.isfinite(values)] for values in (history.before, history.after, history.returns[-1])]
    rows = []
    for name, share in QUANTILES.items():
        quantiles = [float(np.quantile(values, share)) if values.size else None for values in columns]
        rows.append((name, *(format_return(value) for value in quantiles)))
    return Table(("quantile", "before", "after", "training"), tuple(rows))


def _describe_differences(history: History, client: int) -> str:
    """Name the groups that a client has departed from, since when and with which rho if that is known, or the blocks
    that it shares in a smaller cluster.
    """
    name = history.clients[client]
    if history.departures[name]:
        together = by_round(history.personal[name], history.departures[name])
        return "; ".join(f"{_short_names(departed.groups)} {departed.since}".strip() for departed in together)
    last = history.clusters[-1, client]
    known = np.flatnonzero(np.isfinite(last))
    clusters = {history.clustered[index]: int(last[index]) for index in known}
    return _short_names(list_differences(history.personal[name], clusters))


def _examples(history: History) -> Section | None:
    """Make a row for each prompt that is kept with its completions before and after training; None without any."""
    kept = {name: read_examples(history.folder, name) for name in history.clients}
    kept = {name: examples for name, examples in kept.items() if examples}
    if not kept:
        return None
    most = max(1, MAX_ROWS // len(kept))
    head = ("client", "prompt", "before", "reward", "after", "reward after")
    rows = [
        (
            name,
            visible_text(example.prompt),
            visible_text(example.before),
            format_return(example.before_reward),
            visible_text(example.after),
            format_return(example.after_reward),
        )
        for name, examples in list(kept.items())[:MAX_ROWS]
        for example in examples[:most]
    ]
    texts = ("prompt", "before", "after")
    more = " `examples/` has all of them." if len(rows) < sum(map(len, kept.values())) else ""
    text = f"The likeliest completions of the first and of the last policy.{more}"
    return Section(
        "Prompts and completions", (text,), tables=(Table(head, tuple(rows), texts, texts),), figures=("completions",)
    )


# What clients share ---------------------------------------------------------------------------------------------------


def _sharing(history: History) -> Section:
    """Name the shared blocks, and the clients that have departed from their groups or form clusters."""
    title, figures = "Shared blocks", ("groups", "evidence", "clusters", "penalty")
    blocks = list(dict.fromkeys(history.block_of_group.values()))
    text = f"Shared: {_code(blocks)}. All other blocks are private to each client."
    if history.clustered:
        text += " Clusters are those of the latest merge." if np.isnan(history.clusters[-1]).any() else ""
        return Section(title, (text,), tuple(_cluster_points(history)), figures=figures)
    if not history.departed[-1].any():
        end = "At the end no" if history.departed.any() else "No"
        texts = (text, f"{end} client has departed from any of their groups.")
        return Section(title, texts, tuple(_return_points(history)), figures=figures)
    points = (*_departure_points(history, blocks), *_return_points(history))
    return Section(title, (text,), points, figures=figures)


def _departure_points(history: History, blocks: Sequence[str]) -> Iterator[str]:
    """Say for each block which clients have departed from its groups at the end."""
    departed = history.departed[-1]
    for block in blocks:
        groups = [g for g, block_of_group in enumerate(history.block_of_group.values()) if block_of_group == block]
        clients = np.flatnonzero(departed[:, groups].any(axis=1)).tolist()
        if not clients:
            yield f"`{block}`: shared by all."
            continue
        who = f"{_describe_clients(history, clients)} {'has' if len(clients) == 1 else 'have'} departed"
        if len(groups) == 1:
            since = f"{'all ' if len(clients) > 1 else ''}since round {_first_round(history, clients, groups[0])}"
            yield f"`{block}`: {who} ({since}{_describe_rho(history, clients, groups)})."
        else:
            count = int(departed[:, groups].any(axis=0).sum())
            rho = _describe_rho(history, clients, groups)
            yield f"`{block}`: {who} from {count:,} of its {len(groups):,} groups{rho}."


def _describe_rho(history: History, clients: Sequence[int], groups: Sequence[int]) -> str:
    """Write `, rho 0.81 to 0.97` of these clients' departures from these groups; empty with other rules."""
    names = tuple(history.block_of_group)
    departures = [history.departures[history.clients[k]].get(names[group]) for k in clients for group in groups]
    rho = [departure.rho for departure in departures if departure is not None]
    if not rho:
        return ""
    low, high = f"{min(rho):.2f}", f"{max(rho):.2f}"
    return f", rho {low if low == high else f'{low} to {high}'}"


def _return_points(history: History) -> Iterator[str]:
    """Say which clients returned to groups that they had left by the rule `persistence`, and when."""
    returns: dict[tuple[int, int], list[str]] = {}
    for move in history.moves:
        if not move.left:
            returns.setdefault((move.round, move.client), []).append(move.group)
    for (round, client), groups in list(returns.items())[:MAX_ROWS]:
        yield f"`{history.clients[client]}` returned to {_short_names(groups)} in round {round}."


def _first_round(history: History, clients: Sequence[int], group: int) -> int:
    """Find the round since which all of these clients have been departed from a group."""
    inside = np.flatnonzero(~history.departed[:, list(clients)][..., group].all(axis=1))
    return int(history.rounds[int(inside[-1]) + 1 if inside.size else 0])


def _cluster_points(history: History) -> Iterator[str]:
    """Say for each block which clients share it with each other."""
    for index, block in enumerate(history.clustered):
        last = history.clusters[-1, :, index]
        numbers = np.unique(last[np.isfinite(last)])
        if len(numbers) < 2:
            yield f"`{block}`: shared by all{' clients of that merge' if np.isnan(last).any() else ''}."
            continue
        parts = [
            f"{_describe_clients(history, np.flatnonzero(last == number).tolist())} (#{number:.0f})"
            for number in numbers
        ]
        yield f"`{block}`: shared in {len(numbers)} clusters: {'; '.join(parts)}."


def _describe_clients(history: History, clients: Sequence[int]) -> str:
    """Name a few clients, or count many by entry."""
    names = [history.clients[k] for k in clients]
    if len(names) <= MAX_NAMES:
        return _code(names)
    entries = [history.entries[k] for k in clients]
    counts = [f"{entries.count(entry):,} of `{entry}`" for entry in dict.fromkeys(entries)]
    more = f" and {len(counts) - MAX_NAMES} more entries" if len(counts) > MAX_NAMES else ""
    return f"{format_count(len(names), 'client')} ({', '.join(counts[:MAX_NAMES])}{more})"


# Missing answers ------------------------------------------------------------------------------------------------------


def _missing_answers(history: History) -> Section:
    """Name the clients that failed to answer, with rounds and reasons; of many the ones that failed most often."""
    title = "Missing answers"
    most_first = sorted(history.missing.items(), key=lambda item: -len(item[1]))
    shown = most_first[: MAX_ROWS if len(most_first) <= MAX_ROWS else LOWEST_ROWS]
    points = [f"`{name}`: {_describe_failures(failures)}." for name, failures in shown]
    text = f"{format_count(len(most_first), 'client')} failed to answer at least once; the rounds went on without these"
    text += " answers."
    if len(most_first) > MAX_ROWS:
        kinds = [failure.kind for _, failures in most_first for failure in failures]
        counts = ", ".join(f"{kinds.count(kind):,} times {kind}" for kind in dict.fromkeys(kinds))
        text += f" In all {counts}; most often:"
    return Section(title, (text,), tuple(points))


def _describe_failures(failures: Sequence[MissedRound]) -> str:
    """Write `rounds 3 to 5 late (no answer within 600 s), round 9 died`."""
    spans: list[tuple[int, int, str, str]] = []  # first round, last round, kind, reason
    for failure in failures:
        if spans and spans[-1][1] + 1 >= failure.round and spans[-1][2] == failure.kind:
            first, _, kind, reason = spans.pop()
            spans.append((first, failure.round, kind, reason))
        else:
            spans.append((failure.round, failure.round, failure.kind, failure.reason))
    parts = []
    for first, last, kind, reason in spans[:MAX_NAMES]:
        rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
        reason = plain(reason).rstrip(".")
        parts.append(f"{rounds} {kind} ({reason})" if reason else f"{rounds} {kind}")
    more = f", and {len(spans) - MAX_NAMES} more times" if len(spans) > MAX_NAMES else ""
    return ", ".join(parts) + more


def _notes(history: History) -> Section:
    """List the notes of the rounds, each with the rounds that it is about, and the cure of equal rewards."""
    rounds_of: dict[str, list[int]] = {}
    for line in history.lines:
        for note in line.get("notes", ()):
            rounds_of.setdefault(str(note), []).append(int(line["round"]))
    points = []
    for note, rounds in list(rounds_of.items())[:MAX_ROWS]:
        points.append(f"{_capitalise(describe_rounds(rounds))}: {note}")
    if len(rounds_of) > MAX_ROWS:
        points.append(f"And {format_count(len(rounds_of) - MAX_ROWS, 'more note')}: `rounds.jsonl` has them.")
    equal = equal_groups_line(history.equal)
    return Section("Notes", (f"{_capitalise(equal)}.",) if equal else (), tuple(points))


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


# Steps and cost -------------------------------------------------------------------------------------------------------


def _server_steps(history: History) -> Section:
    """Make a table with KL, budget and alpha of each block."""
    title, mode = "Steps of the server", history.scenario.proximity.mode
    head = ("block", "highest KL", "budget", "mean alpha", "rounds shortened")
    rows = []
    for name in (*history.blocks, "joint"):
        kl, budget, alpha = (history.server_series(f"{key}/{name}") for key in ("kl", "budget", "alpha"))
        known = alpha[np.isfinite(alpha)]
        fractions = (f"{known.mean():.2f}", f"{int((known < 1).sum())}") if known.size else ("", "")
        label = "all blocks" if name == "joint" else f"`{name}`"
        rows.append((label, _highest(kl), _range(budget), *fractions))
    measured = "measured by the clients on their own states"
    source = "predicted from Fisher information" if mode == "quadratic" else measured
    text = f"KL of the accepted steps, {source}. Alpha is the fraction of the way to the merge."
    return Section(title, (text,), tables=(Table(head, tuple(rows)),), figures=("kl", "steps"))


def _highest(values: np.ndarray) -> str:
    return format_small(float(np.nanmax(values))) if np.isfinite(values).any() else "-"


def _range(budgets: np.ndarray) -> str:
    known = budgets[np.isfinite(budgets)]
    if not known.size:
        return "none"
    low, high = format_small(float(known.min())), format_small(float(known.max()))
    return low if low == high else f"{low} to {high}"


def _cost(history: History) -> Section:
    """Write the time of a round and the bytes of the run."""
    seconds, speed = history.server_series("time/round_s"), history.server_series("charts/SPS")
    unit = "environment steps" if history.scenario.unit == "steps" else history.scenario.unit
    text = f"Median round: {np.nanmedian(seconds):.2f} s, {np.nanmedian(speed):,.0f} {unit} per second."
    of_rounds = [float(np.nansum(history.server_series(f"comm/MB_{direction}"))) for direction in ("up", "down")]
    up, down = run_traffic(history) or of_rounds
    if up or down:
        text += f" The clients sent {format_megabytes(up)} to the server and received {format_megabytes(down)}."
    return Section("Time and traffic", (text,), figures=("bytes", "time"))


def _short_names(names: Sequence[str]) -> str:
    """Write names in a cell, of many the first two."""
    return _code(names) if len(names) <= 3 else f"{_code(names[:2])} and {len(names) - 2:,} more"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
