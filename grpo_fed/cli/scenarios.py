"""Commands that show something and train nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import (
    SEEDS,
    Debug,
    Overrides,
    ScenarioArgument,
    Seed,
    make_console,
    prepare_process,
    scenario_from,
    use_no_display,
)


@app.command()
def play(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that a run left.")],
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client; by default all.")] = None,
    episodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="By default as the run evaluated.")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="Sampled actions, not the likeliest.")] = False,
    gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw an episode of one client.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, max=SEEDS, help="Other episodes.")] = None,
    debug: Debug = False,
) -> None:
    """Play episodes with what a run learned, and say what they scored."""
    with report_errors(debug):
        prepare_process()
        use_no_display()
        from grpo_fed.reports.film import check_path, film
        from grpo_fed.runs.folder import read_client_names
        from grpo_fed.runs.policies import load_policy

        names = read_client_names(run) if client is None else [client]
        if gif is not None:
            if len(names) > 1:
                raise ValueError(f"--gif draws one client: say --client NAME, one of {', '.join(names)}")
            check_path(gif)
        policies = [load_policy(run, name) for name in names]
    with report_errors(debug, FAILED):
        from grpo_fed.reports.tables import number, table_of

        console = make_console()
        table = table_of("client", "mean", "std", "min", "max", "episodes", "steps each")
        with console.status("playing"):
            for policy in policies:
                done = policy.play(episodes, not sampled, seed)
                scores = [number(float(value)) for value in (done.score, done.scores.std(), done.scores.min())]
                cells = [
                    *scores,
                    number(float(done.scores.max())),
                    f"{len(done.scores)}",
                    f"{done.lengths.mean():,.1f}",
                ]
                table.add_row(done.client, *cells)
        console.print(table)
        if gif is not None:
            with console.status("drawing"):
                made = film(policies[0], gif, not sampled, seed)
            typer.echo(f"{gif}: {made.length:,} steps, return {number(made.score)}, {made.frames:,} pictures")


@app.command()
def check(scenario: ScenarioArgument, overrides: Overrides = None, seed: Seed = None, debug: Debug = False) -> None:
    """Show what a scenario comes to: clients, policies, blocks and groups. Trains nothing."""
    with report_errors(debug):
        prepare_process()
        settings = scenario_from(scenario, overrides, seed)
        from grpo_fed.aggregation.merge.rules import check_rule as check_merge
        from grpo_fed.federation.server_step import block_budgets
        from grpo_fed.federation.setup import FederationSetup
        from grpo_fed.reports.overview import scenario_overview
        from grpo_fed.rl.stacked_learner import StackedLearner

        setup = FederationSetup.of(settings)
        fleets, commons = [StackedLearner(tasks, settings) for tasks in setup.tasks_by_policy], setup.shared_blocks
        check_merge(settings.merge, commons)
        block_budgets(settings.proximity, commons)
        console = make_console()
        for part in scenario_overview(settings, fleets, commons):
            console.print(part)
        for fleet in fleets:
            fleet.close()


@app.command()
def explain(scenario: ScenarioArgument, overrides: Overrides = None, seed: Seed = None, debug: Debug = False) -> None:
    """Say in plain words what a scenario will do. Trains nothing."""
    with report_errors(debug):
        prepare_process()
        settings = scenario_from(scenario, overrides, seed)
        from rich.text import Text

        from grpo_fed.reports.explain import explain_scenario as parts_of

        parts = parts_of(settings)
        console = make_console()
        console.print(Text(settings.name + (f": {settings.description}" if settings.description else ""), "bold cyan"))
        for part in parts:
            console.print(Text(part.title, style="bold"))
            for sentence in part.sentences:
                console.print(Text(f"  {sentence}"), soft_wrap=True)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of your own: not there yet, or empty.")],
    debug: Debug = False,
) -> None:
    """Make a folder with a scenario, a task and a policy to edit."""
    with report_errors(debug):
        from grpo_fed.scenario.template import create_project

        scenario, task, policy = create_project(folder)
        typer.echo(f"{scenario}: who learns what, and how")
        typer.echo(f"{task}: the task, a gymnasium environment")
        typer.echo(f"{policy}: the policy, a torch module")
        typer.echo(f"next: cd {shlex.quote(str(folder))} && grpo-fed run scenario.toml")


@app.command()
def config(
    section: Annotated[str | None, typer.Argument(metavar="SECTION", help="One of them, such as objective.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="All, as docs/configuration.md has it.")] = False,
) -> None:
    """Show every knob with its default, its limits and its meaning."""
    with report_errors():
        from grpo_fed.cli.knobs_table import knob_tables
        from grpo_fed.scenario.reference import knobs_markdown

        if as_markdown and section is not None:
            raise ValueError(f"--markdown shows all: leave out {section}")
        if as_markdown:
            typer.echo(knobs_markdown(), nl=False)
            return
        console = make_console()
        for part in knob_tables(section):
            console.print(part)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenarios, for editors."""
    with report_errors():
        from grpo_fed.scenario import reference as describe

        typer.echo(json.dumps(describe.json_schema(), indent=1))


@app.command(name="list")
def list_scenarios() -> None:
    """List the scenarios that ship."""
    with report_errors():
        from rich.text import Text

        from grpo_fed.scenario.shipped import shipped_scenarios

        console = make_console()
        for one in shipped_scenarios():
            console.print(Text(one.name, style="bold cyan"))
            console.print(Text(one.header), width=min(console.width, 100) - 2)
            console.print()
        console.print(Text("grpo-fed check NAME shows what one comes to, grpo-fed run NAME trains it.", style="dim"))
