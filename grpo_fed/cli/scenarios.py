"""The commands that show or make scenarios and train nothing: new, check, explain, list, config, schema."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import report_errors
from grpo_fed.cli.options import (
    Debug,
    Overrides,
    ScenarioArgument,
    Seed,
    load_scenario,
    make_console,
    prepare_process,
    read_given_keys,
)
from grpo_fed.runs.called_as import called_as


@app.command()
def check(scenario: ScenarioArgument, overrides: Overrides = None, seed: Seed = None, debug: Debug = False) -> None:
    """Show a scenario's clients, policies, blocks and groups, what a round sends, and keys without effect.

    Trains nothing.
    """
    with report_errors(debug):
        prepare_process()
        settings = load_scenario(scenario, overrides, seed)
        from rich.text import Text

        from grpo_fed.aggregation.merge.rules import check_rule
        from grpo_fed.callbacks.calls import CallbackList
        from grpo_fed.federation.server_step import block_budgets
        from grpo_fed.federation.setup import FederationSetup
        from grpo_fed.reports.overview import scenario_overview
        from grpo_fed.rl.make import make_learner
        from grpo_fed.scenario.sites import levels_of

        CallbackList(settings)
        setup = FederationSetup.of(settings)
        learners, shared = [make_learner(tasks, settings) for tasks in setup.tasks_by_policy], setup.shared_blocks
        for level in levels_of(settings):
            check_rule(level.merge, shared)
            block_budgets(level.proximity, shared)
        console = make_console()
        for part in scenario_overview(settings, learners, shared):
            console.print(part, soft_wrap=isinstance(part, Text) and not console.is_terminal)
        for line in read_given_keys(scenario, overrides, seed).unused_lines(settings, setup.task_facts):
            console.print(Text.assemble(("note: ", "bold"), line), soft_wrap=True)
        for learner in learners:
            learner.close()


@app.command()
def explain(scenario: ScenarioArgument, overrides: Overrides = None, seed: Seed = None, debug: Debug = False) -> None:
    """Explain in sentences what a scenario will do. Trains nothing."""
    with report_errors(debug):
        prepare_process()
        settings = load_scenario(scenario, overrides, seed)
        from rich.text import Text

        from grpo_fed.reports.explain import explain_scenario

        parts = explain_scenario(settings, read_given_keys(scenario, overrides, seed))
        console = make_console()
        console.print(Text(settings.name + (f": {settings.description}" if settings.description else ""), "bold cyan"))
        for part in parts:
            console.print(Text(part.title, style="bold"))
            for sentence in part.sentences:
                console.print(Text(f"  {sentence}"), soft_wrap=True)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet or is empty.")],
    debug: Debug = False,
) -> None:
    """Make a folder with a scenario, a task and a policy to edit."""
    with report_errors(debug):
        from grpo_fed.scenario.template import create_project

        scenario, task, policy = create_project(folder)
        typer.echo(f"{scenario}: the scenario: clients, objective, merge")
        typer.echo(f"{task}: the task, a gymnasium environment")
        typer.echo(f"{policy}: the policy, a torch module")
        typer.echo(f"next: cd {shlex.quote(str(folder))} && {called_as(anywhere=True)} run scenario.toml")


@app.command()
def config(
    section: Annotated[
        str | None, typer.Argument(metavar="SECTION", help="One section, such as objective; by default all.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print all sections as Markdown, as in docs/configuration.md.")
    ] = False,
) -> None:
    """Show every key of a scenario with its default, its limits and its meaning."""
    with report_errors():
        from grpo_fed.cli.knobs_table import knob_tables
        from grpo_fed.scenario.reference import knobs_markdown

        if as_markdown and section is not None:
            raise ValueError(f"--markdown prints all sections: leave out {section}")
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
        from grpo_fed.scenario.reference import json_schema

        typer.echo(json.dumps(json_schema(), indent=1))


@app.command(name="list")
def list_scenarios(
    long: Annotated[
        bool, typer.Option("--long", help="Print what each scenario shows and what to expect, as its file says.")
    ] = False,
) -> None:
    """List the scenarios that ship, one a line."""
    with report_errors():
        from rich.text import Text

        from grpo_fed.scenario.shipped import shipped_scenarios

        console, scenarios = make_console(), shipped_scenarios()
        width = max(len(scenario.name) for scenario in scenarios)
        for scenario in scenarios:
            name = Text(scenario.name.ljust(0 if long else width), style="bold cyan")
            if long:
                console.print(name)
                console.print(Text(scenario.header), soft_wrap=True)
                console.print()
                continue
            line = Text.assemble(name, "  ", scenario.description)
            if console.is_terminal:  # in a pipe nothing is cut
                line.truncate(console.width, overflow="ellipsis")
            console.print(line, soft_wrap=True)
        if console.is_terminal:
            program = called_as()
            more = "" if long else f"; {program} list --long tells more of each"
            console.print(Text(f"{program} check NAME shows one, {program} run NAME trains it{more}.", style="dim"))
