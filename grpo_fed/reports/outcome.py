"""The outcome of a run on the terminal: a table of clients, the result in a line, warnings, the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from grpo_fed.policy.shared_names import POLICIES
from grpo_fed.reports.formatting import format_count, format_duration, format_names, format_return
from grpo_fed.reports.score_text import scores_text
from grpo_fed.reports.tables import lowest_clients, results_table, sites_table, taking_part
from grpo_fed.runs.called_as import called_as
from grpo_fed.runs.equal_groups import equal_groups_line
from grpo_fed.runs.examples import read_examples
from grpo_fed.runs.results import ENDED, Result, mean_adaptation
from grpo_fed.runs.sharing_verdicts import verdicts_line

MAX_MISSING = 5
"""How many clients without an answer have a warning of their own."""
MAX_PROMPT = 40
"""Characters of a prompt in the next command."""
MAX_ROUNDS = 8
"""How many of the rounds that a client missed are named."""


def print_outcome(console: Console, result: Result) -> None:
    """Print tables of clients and sites, the result in a line, a warning for each missing client, the next command."""
    if any(client.latest is not None or client.before is not None for client in result.clients.values()):
        table = results_table(result)
        is_too_wide = console.measure(table, options=console.options.update(max_width=1000)).minimum > console.width
        console.print(results_table(result, narrow=True) if is_too_wide else table)
    if result.sites:
        console.print(sites_table(result))
    print_line(console, result_line(result), "bold")
    for line in missing_lines(result):
        console.print(Text.assemble(("warning: ", "bold red"), (line, "yellow")), soft_wrap=True)
    if line := equal_groups_line(result.equal):
        console.print(Text.assemble(("note: ", "bold"), (line, "yellow")), soft_wrap=True)
    if joined := [f"{name} in round {client.joined}" for name, client in result.clients.items() if client.joined]:
        console.print(Text.assemble(("joined: ", "bold"), format_names(joined)), soft_wrap=True)
    verdicts = {name: client.sharing for name, client in result.clients.items() if client.sharing is not None}
    if line := verdicts_line(verdicts):
        console.print(Text.assemble(("twins: ", "bold"), line), soft_wrap=True)
    if result.privacy is not None:
        console.print(Text.assemble(("privacy: ", "bold"), result.privacy.line), soft_wrap=True)
    if result.reason is not None:
        console.print(Text.assemble(("stopped: ", "bold"), result.reason), soft_wrap=True)
    if result.out is not None and result.status in ENDED:
        console.print(Text.assemble(("next: ", "dim"), (next_command(result), "cyan")), soft_wrap=True)


def result_line(result: Result) -> str:
    """Write the status, the returns, the steps and the duration in one line."""
    parts = [] if result.status == "finished" else [f"{result.status} after {format_count(result.rounds, 'round')}"]
    trained = [client for client in result.clients.values() if client.trains]
    document = result.to_json()
    if text := scores_text(document["eval"], is_single=len(trained) == 1):
        parts.append(text)
        if len(result.returns) < len(trained):
            parts[-1] += f" over {len(result.returns):,} of {format_count(len(trained), 'client')}"
    elif not parts:
        parts.append("no return is known")
    if costs := [*result.costs.values()]:
        parts.append(f"cost {format_return(sum(costs) / len(costs))}")
        parts[-1] += f" (worst {format_return(max(costs))})" if len(costs) > 1 else ""
    count, curve = mean_adaptation(document)
    if curve:
        who = "held-out client" if any(not client.trains for client in result.clients.values()) else "client"
        updates = format_count(len(curve) - 1, "local update")
        start, end = format_return(curve[0]), format_return(curve[-1])
        parts.append(f"{format_count(count, who)} adapted from {start} to {end} in {updates}")
    if result.idle:
        parts.append(f"{format_names(result.idle)} learned nothing")
    time = format_duration(result.seconds)
    return f"{result.scenario}: {', '.join(parts)}, {result.env_steps:,} {result.unit} in {time}"


def missing_lines(result: Result) -> list[str]:
    """Name the clients that failed to answer, in which rounds, and the last reason; idle clients come first."""
    lines, idle = [], result.idle
    by_importance = sorted(result.missing.items(), key=lambda item: item[0] not in idle)
    for name, failures in by_importance[:MAX_MISSING]:
        rounds = [str(round_) for round_ in dict.fromkeys(round_ for round_, _, _ in failures)]
        _, kind, reason = failures[-1]
        when = f"round{'' if len(rounds) == 1 else 's'} {format_names(rounds, MAX_ROUNDS)}"
        what = f"{name} learned nothing: no answer" if name in idle else f"{name}: no answer"
        lines.append(f"{what} in {when}; last failure: {kind}, {reason}")
    rest = len(result.missing) - MAX_MISSING
    return [*lines, f"and {format_count(rest, 'more client')}: results.json names them"] if rest > 0 else lines


def next_command(result: Result) -> str:
    """Write the command that shows the client with the lowest return: films it, plays it, or gives it a prompt.

    The clients of a deployment keep their policies, so of its run it is the command that writes the page.
    """
    if result.out is not None and result.out.is_dir() and not (result.out / POLICIES).is_dir():
        return f"{called_as()} report {shlex.quote(str(result.out))}"
    (name,) = lowest_clients({name: result.clients[name].rank for name in taking_part(result)}, 1)
    command = f"{called_as()} play {shlex.quote(str(result.out))}"
    command += f" --client {name}" if len(result.clients) > 1 else ""
    if result.clients[name].unit == "completions":
        return f"{command} --prompt {_first_prompt(result.out, name)}"
    from grpo_fed.tasks.gym import gives_pictures

    return f"{command} --gif {name}.gif" if gives_pictures(result.clients[name].env) else command


def _first_prompt(folder: Path | None, client: str) -> str:
    """Quote the prompt of a client's first example for a shell, or `"..."` if there is none or it is long."""
    examples = [] if folder is None else read_examples(folder, client)
    prompt = examples[0].prompt if examples else ""
    is_short = 0 < len(prompt) <= MAX_PROMPT and prompt.isprintable() and not prompt.startswith("-")
    return f'"{prompt}"' if is_short and not set(prompt) & set('"\\$`!') else '"..."'


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line that the terminal wraps, so that paths and commands in it can be copied."""
    console.print(Text(text, style=style), soft_wrap=True)
