"""The command that writes a policy for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import report_errors
from grpo_fed.cli.options import Debug, RunArgument, make_console, prepare_process


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A folder that does not exist yet or is empty.")],
    client: Annotated[str | None, typer.Option(metavar="NAME", help="The client, if the run has several.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole language model, with the adapters added to its weights.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a client's policy for other programs: adapters for peft, a whole language model, or a network's file."""
    with report_errors(debug):
        prepare_process()
        from grpo_fed.runs.adapters import LoadedAdapters
        from grpo_fed.runs.export import export_policy
        from grpo_fed.runs.policies import load_policy

        with make_console().status("exporting"):
            paths = export_policy(run, out, client, merge)
            policy = load_policy(run, client)
        for path in paths:
            typer.echo(path)
        if isinstance(policy, LoadedAdapters) and merge:
            typer.echo(f'open with: AutoModelForCausalLM.from_pretrained("{out}")')
        elif isinstance(policy, LoadedAdapters):
            base = policy.scenario.language.model
            typer.echo(f'open with: PeftModel.from_pretrained(model, "{out}"), where model is {base}')
        else:
            typer.echo(f'open with: safetensors.torch.load_file("{paths[0]}")')
