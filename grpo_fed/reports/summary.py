"""A run in words: the result in a sentence, what was run in a paragraph, and sections.py's parts, as `summary.md`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from grpo_fed.reports.figures.write import FIGURES, ORDER
from grpo_fed.reports.formatting import format_count, format_duration, format_names, format_return, short_task
from grpo_fed.reports.score_text import scores_text
from grpo_fed.reports.section import Table
from grpo_fed.reports.sections import make_sections
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.markdown import escape_markdown, plain
from grpo_fed.runs.results import idle_clients, mean_adaptation
from grpo_fed.runs.statistics import interquartile_mean

SUMMARY = "summary.md"
"""The summary's name in a run's folder."""
MAX_ENVS = 4
"""How many environments the headline names."""


def write_summary(folder: str | Path) -> Path:
    """Write `summary.md` of a run's folder, whether the run has finished or not; ValueError if it holds no run."""
    folder = Path(folder)
    path = folder / SUMMARY
    write_atomic(path, summary_markdown(read_history(folder)))
    return path


def summary_markdown(history: History) -> str:
    """Write the whole summary as Markdown."""
    parts = [f"# {history.scenario.name}: {escape_markdown(headline(history))}", escape_markdown(describe_run(history))]
    for section in make_sections(history):
        parts.append(f"## {section.title}")
        parts += map(escape_markdown, section.paragraphs)
        parts += ["\n".join(f"- {escape_markdown(point)}" for point in section.points)] if section.points else []
        parts += [_table_markdown(table) for table in section.tables]
    figures = [name for name in ORDER if (history.folder / FIGURES / f"{name}.png").is_file()]
    if figures:
        parts += ["## Figures", " ".join(f"![{name}]({FIGURES}/{name}.png)" for name in figures)]
    return "\n\n".join(parts) + "\n"


def _table_markdown(table: Table) -> str:
    is_text = [index == 0 or name in table.text_columns for index, name in enumerate(table.head)]
    literal = [name in table.literal_columns for name in table.head]
    cells = [
        [_code_span(cell) if code else escape_markdown(cell) for code, cell in zip(literal, row, strict=True)]
        for row in table.rows
    ]
    escaped = [[cell.replace("|", chr(92) + "|") for cell in row] for row in cells]
    rows = [table.head, ["---" if text else "---:" for text in is_text], *escaped]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code_span(text: str) -> str:
    """Quote a text so that Markdown takes none of it as markup: in more backticks than it has in a row."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def headline(history: History) -> str:
    """Write the result in a sentence."""
    rounds = format_count(len(history.lines), "round")
    status = "" if history.status == "finished" else f"{history.status} after {rounds}; "
    idle = () if history.results is None else idle_clients(history.results)
    warning = f"; {format_names(idle)} learned nothing" if idle else ""
    if np.isfinite(history.after[history.trains]).any():
        adapted = describe_adaptation(history)
        returns = _describe_returns(history, history.after, history.before)
        scores = {} if history.results is None else history.results["eval"]
        if scores.get("normalised_mean") is not None:
            returns = f"{scores_text(scores, is_single=False)}; {returns}"
        return f"{status}{returns}{f'; {adapted}' if adapted else ''}{warning}"
    if not history.lines or not np.isfinite(history.returns[-1]).any():
        return f"{status}no return is known{warning}"
    unknown = np.full(len(history.clients), np.nan)
    return f"{status}in training episodes, {_describe_returns(history, history.returns[-1], unknown)}{warning}"


def _describe_returns(history: History, after: np.ndarray, before: np.ndarray) -> str:
    """Describe returns [K] of the clients that train, and those before.

    Each environment is described by itself, since different scales have no mean.
    """
    after, before, env_of_client = after[history.trains], before[history.trains], np.array(history.envs)[history.trains]
    envs = list(dict.fromkeys(env_of_client.tolist()))
    if len(envs) == 1:
        return f"return {_compare_returns(after, before)}"
    parts = []
    for env in envs[:MAX_ENVS]:
        selected = env_of_client == env
        if np.isfinite(after[selected]).any():
            parts.append(f"{plain(short_task(env))} {_compare_returns(after[selected], before[selected])}")
    what = "environment" if history.scenario.unit == "steps" else "task"
    more = f"; and {len(envs) - MAX_ENVS} more {what}s" if len(envs) > MAX_ENVS else ""
    return f"return by {what}: {'; '.join(parts)}{more}"


def describe_adaptation(history: History) -> str:
    """Describe how the clients whose adaptation counts adapt to their tasks; an empty text if none was adapted."""
    count, curve = (0, ()) if history.results is None else mean_adaptation(history.results)
    if not curve:
        return ""
    who = format_count(count, "held-out client") if not history.trains.all() else format_count(count, "client")
    start, end = format_return(curve[0]), format_return(curve[-1])
    return f"{who} adapted from {start} to {end} in {format_count(len(curve) - 1, 'local update')}"


def _compare_returns(after: np.ndarray, before: np.ndarray) -> str:
    """Describe returns [k] of one environment, and those before."""
    known, known_before = after[np.isfinite(after)], before[np.isfinite(before)]
    if len(after) == 1:
        text = format_return(float(known[0]))
        return f"{text}, {format_return(float(known_before[0]))} before" if known_before.size else text
    mean = "interquartile mean" if known.size > 3 else "mean"
    text = f"{format_return(_iqm(known))} ({mean} of {format_count(len(after), 'client')})"
    text += f", {format_return(_iqm(known_before))} before" if known_before.size else ""
    return f"{text}, worst client {format_return(float(known.min()))}"


def _iqm(returns: np.ndarray) -> float:
    """Compute the interquartile mean of [k]."""
    return float(interquartile_mean(returns[:, None]))


def describe_run(history: History) -> str:
    """Write what was run in a paragraph: description, method, clients, rounds, steps, time, seed."""
    scenario, results = history.scenario, history.results
    steps = (history.lines[-1].get("global_step") or 0) if history.lines else 0
    unit = "environment steps" if scenario.unit == "steps" else scenario.unit
    device = "" if results is None else f" on {plain(results['device'])}"
    method = "local" if results is not None and results["method"] == "local" else scenario.method
    clients = format_count(len(history.clients), "client")
    rounds = f"{len(history.lines):,} of {format_count(scenario.rounds, 'round')}"
    done = f"{steps:,} {unit}"
    sentences = [
        f"{plain(scenario.description).rstrip('.')}." if scenario.description else "",
        f"Method `{plain(method)}` with `{plain(str(scenario.objective.preset))}`, {clients}, {rounds}, {done},",
        f"{format_duration(_seconds(history))}{device}, seed {scenario.seed}.",
        f"Stopped by: {plain(results['error'])}." if results is not None and "error" in results else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _seconds(history: History) -> float:
    """Read the run's duration; of an unfinished run the sum over its rounds."""
    if history.results is not None:
        return float(history.results["seconds"])
    return float(np.nansum(history.server_series("time/round_s"))) if history.lines else 0.0
