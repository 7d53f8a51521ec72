"""The command that plays episodes with a run's policies, or gives them prompts: play."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import MAX_SEED, Debug, RunArgument, make_console, prepare_process, use_no_display

if TYPE_CHECKING:
    from rich.console import Console

    from grpo_fed.runs.adapters import LoadedAdapters
    from grpo_fed.runs.played_levels import PlayedLevels
    from grpo_fed.runs.policies import LoadedPolicy

MOST_EXAMPLES = 2
"""Examples of each client below the table of returns."""


@app.command()
def play(
    run: RunArgument,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client; by default all.")] = None,
    shared: Annotated[
        str | None,
        typer.Option("--shared", metavar="ENV", help="Play what is shared, as a client that was never there, in ENV."),
    ] = None,
    moments_of: Annotated[
        str | None,
        typer.Option("--moments-of", metavar="NAME", help="With --shared, the client whose moments normalise."),
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Episodes of each client; by default as in the scenario.")
    ] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Sample actions or tokens instead of taking the likeliest.")
    ] = False,
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Play at this level, or at `all`; by default at those that a client with a curriculum has reached.",
        ),
    ] = None,
    gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Film an episode of one client.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Print what a language model writes after this; may be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='The same for the column "prompt" of a .jsonl file.')
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Play other episodes than the run evaluated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Play episodes with the policies of a run and print their returns, or print what they answer to prompts."""
    with report_errors(debug):
        prepare_process()
        use_no_display()
        from grpo_fed.runs.folder import read_client_names
        from grpo_fed.runs.policies import load_policy
        from grpo_fed.runs.shared_policy import NEWCOMER, load_shared_policy

        if shared is None and moments_of is not None:
            raise ValueError(f"--moments-of {moments_of}: is for --shared ENV")
        if shared is not None and client is not None:
            raise ValueError(f"--shared {shared}: plays as a client that was never there; leave out --client {client}")
        names = read_client_names(run) if client is None else [client]
        names = names if shared is None else [NEWCOMER]
        if gif is not None:
            from grpo_fed.reports.film import check_path

            if len(names) > 1:
                raise ValueError(f"--gif films one client: add --client NAME, one of {', '.join(names)}")
            check_path(gif)
        given = [*(prompt or []), *([] if prompts is None else read_prompts(prompts))]
        if given and (episodes is not None or gif is not None):
            raise ValueError("--prompt and --prompts play no episodes: leave out --episodes and --gif")
        if given and seed is not None and not sampled:
            raise ValueError("--seed names the stream that tokens are sampled from: add --sampled")
        policies: list[LoadedPolicy | LoadedAdapters]
        if shared is None:
            policies = [load_policy(run, name) for name in names]
        else:
            policies = [load_shared_policy(run, shared, moments_of=moments_of)]
        levels = _levels(run, policies, level)
        answering, filmed = _answering(policies, bool(given)), _filmed(policies, gif)
    with report_errors(debug, FAILED):
        console = make_console()
        if given:
            _print_completions(console, answering, given, sampled, seed or 0)
            return
        _print_returns(console, policies, episodes, sampled, seed, levels)
        _print_examples(console, run, names)
        if filmed is not None and gif is not None:
            from grpo_fed.reports.film import film
            from grpo_fed.reports.formatting import format_return
            from grpo_fed.runs.played_levels import describe_level

            with console.status("filming"):
                chosen = levels.get(filmed.task.client)
                shown = None if chosen is None else chosen.middle
                made = film(filmed, gif, not sampled, seed, level=shown)
            at = "" if shown is None else f" at {describe_level(shown)}"
            typer.echo(
                f"{gif}: {made.length:,} steps{at}, return {format_return(made.score)}, {made.frames:,} pictures"
            )


def read_prompts(path: Path) -> list[Any]:
    """Read the prompts of a .jsonl file: texts, or lists of chat messages; ValueError names the line that has none."""
    read = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
            raise ValueError(f'{path}:{number}: has no prompt; each line is a table such as {{"prompt": "1+1="}}')
        read.append(row["prompt"])
    if not read:
        raise ValueError(f"{path}: has no prompts")
    return read


def _levels(
    run: Path, policies: Sequence[LoadedPolicy | LoadedAdapters], given: Sequence[str] | None
) -> dict[str, PlayedLevels]:
    """Choose the levels that each client with a curriculum plays at; ValueError if those that are given fit none."""
    from grpo_fed.runs.history import read_history
    from grpo_fed.runs.played_levels import all_levels, choose_levels, parse_levels, reached_levels
    from grpo_fed.runs.policies import LoadedPolicy

    scenario = policies[0].scenario
    if not given and all(entry.curriculum is None for entry in scenario.clients):
        return {}
    chosen, lines = parse_levels(given or ()), read_history(run).lines
    levels: dict[str, PlayedLevels] = {}
    for name in [policy.task.client for policy in policies if isinstance(policy, LoadedPolicy)]:
        reached = reached_levels(scenario, name, lines[-1] if lines else None)
        if given and reached is None:
            raise ValueError(f"--level: the task of client {name} has no levels; name one with levels by --client")
        if reached is not None:
            levels[name] = all_levels(scenario, name) if chosen is None else choose_levels(reached, chosen, name)
    return levels


def _answering(policies: Sequence[LoadedPolicy | LoadedAdapters], wanted: bool) -> list[LoadedAdapters]:
    """Select the policies that answer prompts; ValueError if prompts were given to another."""
    from grpo_fed.runs.adapters import LoadedAdapters

    for policy in policies if wanted else ():
        if not isinstance(policy, LoadedAdapters):
            name = policy.task.client
            raise ValueError(
                f"client {name}: has an environment and answers no prompts; name another with --client, or leave out"
                " --prompt and --prompts to play episodes"
            )
    return [policy for policy in policies if isinstance(policy, LoadedAdapters)]


def _filmed(policies: Sequence[LoadedPolicy | LoadedAdapters], gif: Path | None) -> LoadedPolicy | None:
    """Return the policy to film; ValueError if it answers prompts."""
    from grpo_fed.runs.policies import LoadedPolicy

    if gif is None:
        return None
    if not isinstance(policies[0], LoadedPolicy):
        name = policies[0].task.client
        raise ValueError(
            f"client {name}: answers prompts, and there is nothing to film; leave out --gif, and give it a prompt with"
            " --prompt TEXT"
        )
    return policies[0]


def _print_completions(
    console: Console, policies: Sequence[LoadedAdapters], prompts: Sequence[Any], sampled: bool, seed: int
) -> None:
    """Print each prompt, and what each client writes after it."""
    from rich.text import Text

    from grpo_fed.reports.formatting import printable_text

    with console.status("answering"):
        completions = [policy.complete(prompts, sampled, seed) for policy in policies]
    for index, prompt in enumerate(prompts):
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        console.print(Text.assemble(("prompt: ", "dim"), printable_text(shown)), soft_wrap=True)
        for policy, written in zip(policies, completions, strict=True):
            name = Text(f"{policy.task.client}: ", "bold")
            console.print(Text.assemble(name, (printable_text(written[index]), "cyan")), soft_wrap=True)


def _print_returns(
    console: Console,
    policies: Sequence[LoadedPolicy | LoadedAdapters],
    episodes: int | None,
    sampled: bool,
    seed: int | None,
    levels: Mapping[str, PlayedLevels],
) -> None:
    """Play episodes with each policy, or let it answer prompts for evaluation, and print the returns as a table."""
    from rich.text import Text

    from grpo_fed.reports.formatting import format_names, format_return
    from grpo_fed.reports.tables import make_table
    from grpo_fed.runs.policies import LoadedPolicy

    words = ("episodes", "mean steps")
    if not any(isinstance(policy, LoadedPolicy) for policy in policies):
        words = ("completions", "mean tokens")
    with console.status("playing"):
        evaluations = [
            policy.play(episodes, not sampled, seed, levels.get(policy.task.client))
            if isinstance(policy, LoadedPolicy)
            else policy.play(episodes, not sampled, seed)
            for policy in policies
        ]
    has_costs = any(evaluation.cost is not None for evaluation in evaluations)
    table = make_table("client", "mean", "std", "min", "max", *(["cost"] if has_costs else []), *words)
    for evaluation in evaluations:
        scores = evaluation.scores
        numbers = [evaluation.score, float(scores.std()), float(scores.min()), float(scores.max())]
        cells = [format_return(value) for value in (*numbers, *([evaluation.cost] if has_costs else []))]
        table.add_row(evaluation.client, *cells, f"{len(scores)}", f"{evaluation.lengths.mean():,.1f}")
    console.print(table)
    for text, clients in _by_words(levels).items():
        console.print(Text(f"levels of {format_names(clients)}: {text}"), soft_wrap=True)


def _by_words(levels: Mapping[str, PlayedLevels]) -> dict[str, list[str]]:
    """Collect the clients that play at the same levels."""
    clients: dict[str, list[str]] = {}
    for client, played in levels.items():
        clients.setdefault(str(played), []).append(client)
    return clients


def _print_examples(console: Console, run: Path, clients: Sequence[str]) -> None:
    """Print examples of clients with prompts, as the run's folder has them."""
    from rich.text import Text

    from grpo_fed.reports.formatting import format_return, visible_text
    from grpo_fed.reports.tables import make_table
    from grpo_fed.runs.examples import read_examples

    table = make_table("client")
    for name in ("prompt", "before"):
        table.add_column(name, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("after", overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    for client in clients:
        for example in read_examples(run, client)[:MOST_EXAMPLES]:
            before, after = format_return(example.before_reward), format_return(example.after_reward)
            texts = [Text(visible_text(text)) for text in (example.prompt, example.before, example.after)]
            table.add_row(client, texts[0], texts[1], before, texts[2], after)
    if table.row_count:
        console.print("Examples from the run's folder, before and after training:")
        console.print(table)
