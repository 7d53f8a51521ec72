"""A run in words and tables: the result first, then clients, what is shared, who was missing, how far steps went.

Sections are data, so that `summary.md` and the page of `report.py` say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo_fed.reports.figures import FIGURES, ORDER
from grpo_fed.reports.figures.cost import megabytes, whole_traffic
from grpo_fed.reports.tables import MANY, QUANTILES, WORST, curve, many, number, small, some, span
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, MissedRound, read_history
from grpo_fed.runs.records import list_differences
from grpo_fed.runs.results import idle_clients
from grpo_fed.runs.statistics import interquartile_mean

SUMMARY = "summary.md"
NAMES = 8
"""So many clients or groups are named in a sentence; of more it is said how many they are."""
ENVS = 4
"""So many environments are in the headline."""
SPARK = 16
"""Letters of a curve."""


@dataclass(frozen=True)
class Table:
    """Cells of text; all but the first column are numbers, unless they are among the words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    """Columns of words."""


@dataclass(frozen=True)
class Section:
    """A part of a summary; in its text, what stands in backticks is a name."""

    title: str
    text: tuple[str, ...] = ()
    """Paragraphs."""
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def write_summary(folder: str | Path) -> Path:
    """Write `summary.md` of a run folder, finished or not; ValueError if it is none."""
    folder = Path(folder)
    path = folder / SUMMARY
    write_atomic(path, markdown(read_history(folder)))
    return path


def markdown(history: History) -> str:
    """The whole summary."""
    parts = [f"# {history.scenario.name}: {headline(history)}", *([text] if (text := setting(history)) else [])]
    for section in sections(history):
        parts.append(f"## {section.title}")
        parts += section.text
        parts += ["\n".join(f"- {point}" for point in section.points)] if section.points else []
        parts += [_markdown_table(table) for table in section.tables]
    figures = [name for name in ORDER if (history.folder / FIGURES / f"{name}.png").is_file()]
    if figures:
        parts += ["## Figures", " ".join(f"![{name}]({FIGURES}/{name}.png)" for name in figures)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---" if place == 0 or name in table.words else "---:" for place, name in enumerate(table.head)]
    rows = [table.head, rule, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


# The result -----------------------------------------------------------------------------------------------------------


def headline(history: History) -> str:
    """The result in a sentence."""
    rounds = many(len(history.lines), "round")
    ended = {"finished": "", "unfinished": f"unfinished after {rounds}; "}
    before = ended.get(history.status, f"{history.status} after {rounds}; ")
    idle = () if history.results is None else idle_clients(history.results)
    but = f"; {some(idle)} learned nothing" if idle else ""
    known = np.isfinite(history.after)
    if known.any():
        return f"{before}{_result(history, history.after, history.before)}{but}"
    if not history.lines or not np.isfinite(history.returns[-1]).any():
        return f"{before}no return is known{but}"
    unknown = np.full(len(history.clients), np.nan)
    return f"{before}in training episodes, {_result(history, history.returns[-1], unknown)}{but}"


def _result(history: History, after: np.ndarray, before: np.ndarray) -> str:
    """Returns [K], and what they were; of unlike environments each on its own, since their scales have no mean."""
    envs = list(dict.fromkeys(history.envs))
    if len(envs) == 1:
        return f"return {_compared(after, before)}"
    told = []
    for env in envs[:ENVS]:
        mine = np.array(history.envs) == env
        if np.isfinite(after[mine]).any():
            told.append(f"{env} {_compared(after[mine], before[mine])}")
    more = f"; and {len(envs) - ENVS} environments more" if len(envs) > ENVS else ""
    return f"return by environment: {'; '.join(told)}{more}"


def _compared(after: np.ndarray, before: np.ndarray) -> str:
    """Returns [K], and what they were."""
    known, was = after[np.isfinite(after)], before[np.isfinite(before)]
    if len(after) == 1:
        return number(float(known[0])) + (f", {number(float(was[0]))} before" if was.size else "")
    where = "in the middle half of" if known.size > 3 else "on average over"
    text = f"{number(_iqm(known))} {where} {many(len(after), 'client')}"
    text += f", {number(_iqm(was))} before" if was.size else ""
    return f"{text}, the worst {number(float(known.min()))}"


def _iqm(known: np.ndarray) -> float:
    return float(interquartile_mean(known[:, None]))


def setting(history: History) -> str:
    """What was run, in a paragraph."""
    scenario, results = history.scenario, history.results
    steps = history.lines[-1]["global_step"] if history.lines else 0
    device = "" if results is None else f" on {results['device']}"
    method = "local" if results is not None and results["method"] == "local" else scenario.method
    text = [
        f"{scenario.description.rstrip('.')}." if scenario.description else "",
        f"Method `{method}` with `{scenario.objective.preset}`, {many(len(history.clients), 'client')},",
        f"{len(history.lines):,} of {many(scenario.rounds, 'round')}, {steps:,} environment steps,",
        f"{span(_seconds(history))}{device}, seed {scenario.seed}.",
        f"Stopped by: {results['error']}." if results is not None and "error" in results else "",
    ]
    return " ".join(part for part in text if part)


def _seconds(history: History) -> float:
    if history.results is not None:
        return float(history.results["seconds"])
    return float(np.nansum(history.server_series("time/round_s"))) if history.lines else 0.0


# Its parts ------------------------------------------------------------------------------------------------------------


def sections(history: History) -> Iterator[Section]:
    """All but the headline; what there is nothing to say of is left out."""
    if not history.lines:
        return
    yield _clients(history)
    yield _shared(history)
    if history.federated:
        yield _missing(history)
    if history.blocks:
        yield _steps(history)
    notes = [(int(line["round"]), str(note)) for line in history.lines for note in line.get("notes", ())]
    if notes:
        yield Section("What the server noted", points=tuple(f"Round {at}: {note}" for at, note in notes[:MANY]))
    yield _cost(history)


def _clients(history: History) -> Section:
    """A row for each client, or of many the lowest, the highest and quantiles."""
    clients = history.clients
    latest = np.where(np.isfinite(history.after), history.after, history.returns[-1])
    shown, text = list(range(len(clients))), ""
    if len(clients) > MANY:
        order = np.argsort(np.where(np.isfinite(latest), latest, -np.inf), kind="stable")
        shown = [int(k) for k in (*order[:WORST], *order[-WORST:])]
        text = f"The {WORST} lowest and the {WORST} highest of {many(len(clients), 'client')}, and all in quantiles."
    learned = history.client_series("charts/episodic_return")
    head = ["client", "before", "after", "training", "by round"]
    kind = "clusters" if history.clustered else "personal groups"
    head += [kind, "rounds missed"] if history.federated else []
    rows = []
    for k in shown:
        seen = learned[np.isfinite(learned[:, k]), k]
        cells = [clients[k], number(history.before[k]), number(history.after[k]), number(history.returns[-1, k])]
        cells.append(curve(seen.tolist(), SPARK))
        if history.federated:
            missed = len({miss.round for miss in history.missing.get(clients[k], ())})
            cells += [_named(_apart(history, k)) or "none", f"{missed:,}" if missed else "none"]
        rows.append(tuple(cells))
    tables = [Table(tuple(head), tuple(rows), ("by round", kind))]
    if text:
        tables.append(_quantiles(history))
    return Section("Clients", (text,) if text else (), tables=tuple(tables))


def _quantiles(history: History) -> Table:
    columns = [history.before, history.after, history.returns[-1]]
    rows = []
    for name, share in QUANTILES.items():
        known = [column[np.isfinite(column)] for column in columns]
        rows.append((name, *(number(float(np.quantile(one, share)) if one.size else None) for one in known)))
    return Table(("of all", "before", "after", "training"), tuple(rows))


def _shared(history: History) -> Section:
    """Blocks, and who has left which of their groups."""
    title = "Shared and personal"
    if not history.federated:
        return Section(title, ("Nothing is shared: every client learned on its own.",))
    if not history.block_of_group:
        return Section(title, (f"Nothing is shared by method `{history.scenario.method}`.",))
    blocks = list(dict.fromkeys(history.block_of_group.values()))
    text = f"Shared blocks: {_code(blocks)}; all else is private to each client."
    left = history.departed[-1]
    if history.clustered:
        text += " So it was in the latest merge." if np.isnan(history.clusters[-1]).any() else ""
        return Section(title, (text,), tuple(_clusters(history)))
    if not left.any():
        more = " for good" if history.departed.any() else ""
        return Section(title, (text, f"No client has left any group of them{more}."))
    points = []
    for block in blocks:
        inside = [g for g, home in enumerate(history.block_of_group.values()) if home == block]
        who = [k for k in range(len(history.clients)) if left[k, inside].any()]
        if not who:
            points.append(f"`{block}`: shared by all.")
        elif len(inside) == 1:
            points.append(f"`{block}`: left by {_who(history, who)}{_since(history, who, inside[0])}.")
        else:
            gone = int(left[:, inside].any(axis=0).sum())
            points.append(f"`{block}`: {gone:,} of its {len(inside):,} groups are left by {_who(history, who)}.")
    return Section(title, (text,), tuple(points))


def _apart(history: History, client: int) -> list[str]:
    """The groups that a client has left, and the blocks that it shares in another cluster than most."""
    last = history.clusters[-1, client]
    clusters = {block: int(own) for block, own in zip(history.clustered, last, strict=True) if np.isfinite(own)}
    return list_differences(history.personal[history.clients[client]], clusters)


def _clusters(history: History) -> Iterator[str]:
    """Who shares each block with whom."""
    for place, block in enumerate(history.clustered):
        last = history.clusters[-1, :, place]
        kinds = np.unique(last[np.isfinite(last)])
        if len(kinds) < 2:
            yield f"`{block}`: shared by all{' of its clients' if np.isnan(last).any() else ''}."
            continue
        parts = [f"{_who(history, np.flatnonzero(last == kind).tolist())} (#{kind:.0f})" for kind in kinds]
        yield f"`{block}`: shared in {len(kinds)} clusters: {'; '.join(parts)}."


def _who(history: History, who: Sequence[int]) -> str:
    """Clients in a sentence."""
    names = [history.clients[k] for k in who]
    if len(names) <= NAMES:
        return _code(names)
    entries = [history.entries[k] for k in who]
    counts = [f"{entries.count(entry):,} of `{entry}`" for entry in dict.fromkeys(entries)]
    more = f" and {len(counts) - NAMES} more entries" if len(counts) > NAMES else ""
    return f"{many(len(names), 'client')} ({', '.join(counts[:NAMES])}{more})"


def _since(history: History, who: Sequence[int], group: int) -> str:
    """The round from which on all of them are out."""
    inside = np.flatnonzero(~history.departed[:, list(who)][..., group].all(axis=1))
    first = int(inside[-1]) + 1 if inside.size else 0
    return f", {'all ' if len(who) > 1 else ''}since round {history.rounds[first]}"


def _missing(history: History) -> Section:
    """Who had no answer when."""
    title = "Who was missing"
    if not history.missing:
        return Section(title, ("Nobody: every client that was asked had an answer.",))
    absent = sorted(history.missing.items(), key=lambda one: -len(one[1]))
    points = [f"`{name}`: {_when(misses)}." for name, misses in absent[: MANY if len(absent) <= MANY else WORST]]
    text = f"{many(len(absent), 'client')} had no answer at least once; the round went on without them."
    if len(absent) > MANY:
        kinds = [miss.kind for _, misses in absent for miss in misses]
        counted = ", ".join(f"{kinds.count(kind):,} times {kind}" for kind in dict.fromkeys(kinds))
        text += f" In all {counted}; most often:"
    return Section(title, (text,), tuple(points))


def _when(misses: Sequence[MissedRound]) -> str:
    """`rounds 3 to 5 late (no answer within 600 s), round 9 died`."""
    spans: list[tuple[int, int, str, str]] = []
    for miss in misses:
        if spans and spans[-1][1] + 1 >= miss.round and spans[-1][2] == miss.kind:
            first, _, kind, reason = spans.pop()
            spans.append((first, miss.round, kind, reason))
        else:
            spans.append((miss.round, miss.round, miss.kind, miss.reason))
    told = []
    for first, last, kind, reason in spans[:NAMES]:
        at = f"round {first}" if first == last else f"rounds {first} to {last}"
        why = reason.rstrip(".")
        told.append(f"{at} {kind} ({why})" if why else f"{at} {kind}")
    more = f", and {len(spans) - NAMES} times more" if len(spans) > NAMES else ""
    return ", ".join(told) + more


def _steps(history: History) -> Section:
    """KL, budget and alpha of each block."""
    mode = history.scenario.proximity.mode
    if mode == "off":
        return Section("The server's steps", ("The whole step was made every round: `proximity.mode` is off.",))
    head = ("block", "KL at most", "budget", "alpha, mean", "rounds held back")
    rows = []
    for name in (*history.blocks, "joint"):
        found, budget, alpha = (history.server_series(f"{what}/{name}") for what in ("kl", "budget", "alpha"))
        seen = alpha[np.isfinite(alpha)]
        held = int((seen < 1).sum())
        made = (f"{seen.mean():.2f}", f"{held}") if seen.size else ("", "")
        rows.append(("all together" if name == "joint" else f"`{name}`", _most(found), _budget(budget), *made))
    how = "predicted by a Fisher diagonal" if mode == "quadratic" else "measured by the clients on states they keep"
    text = f"KL of the steps that were made, {how}."
    return Section("The server's steps", (text,), tables=(Table(head, tuple(rows)),))


def _most(values: np.ndarray) -> str:
    return small(float(np.nanmax(values))) if np.isfinite(values).any() else "-"


def _budget(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not known.size:
        return "none"
    low, high = small(float(known.min())), small(float(known.max()))
    return low if low == high else f"{low} to {high}"


def _cost(history: History) -> Section:
    """Time and bytes."""
    seconds, speed = history.server_series("time/round_s"), history.server_series("charts/SPS")
    text = f"{np.nanmedian(seconds):.2f} s a round and {np.nanmedian(speed):,.0f} environment steps a second, medians."
    rounds = (
        float(np.nansum(history.server_series("comm/MB_up"))),
        float(np.nansum(history.server_series("comm/MB_down"))),
    )
    up, down = whole_traffic(history) or rounds
    if up or down:
        text += f" {megabytes(up)} went from clients to the server, {megabytes(down)} back."
    return Section("What it cost", (text,))


def _named(names: Sequence[str]) -> str:
    """Groups in a cell."""
    return _code(names) if len(names) <= 3 else f"{_code(names[:2])} and {len(names) - 2:,} more"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
