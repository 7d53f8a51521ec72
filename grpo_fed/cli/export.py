"""The command that writes a policy for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import report_errors
from grpo_fed.cli.options import Debug, RunArgument, make_console, prepare_process

if TYPE_CHECKING:
    from grpo_fed.runs.adapters import LoadedAdapters

FormName = Literal["safetensors", "onnx", "torchscript", "torch-export", "sb3"]
"""The same as `Form` of `runs/export.py`, which is not imported before it is needed."""


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A folder that does not exist yet or is empty.")],
    client: Annotated[str | None, typer.Option(metavar="NAME", help="The client, if the run has several.")] = None,
    shared: Annotated[
        str | None,
        typer.Option("--shared", metavar="ENV", help="Write what is shared, as a client that was never there, in ENV."),
    ] = None,
    moments_of: Annotated[
        str | None,
        typer.Option("--moments-of", metavar="NAME", help="With --shared, the client whose moments normalise."),
    ] = None,
    form: Annotated[
        FormName | None, typer.Option("--to", help="The form of a network; by default safetensors, its parameters.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole language model, with the adapters added to its weights.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a client's policy for other programs: a network's graph or parameters, adapters, a whole language model."""
    with report_errors(debug):
        prepare_process()
        from grpo_fed.runs.adapters import LoadedAdapters
        from grpo_fed.runs.export import export_policy
        from grpo_fed.runs.policies import load_policy

        with make_console().status("exporting"):
            paths = export_policy(run, out, client, merge, form, shared, moments_of)
            policy = load_policy(run, client) if shared is None else None
        for path in paths:
            typer.echo(path)
        if isinstance(policy, LoadedAdapters):
            how = _open_language_model(policy, out, merge)
        else:
            how = _open_network(paths, form or "safetensors")
        typer.echo(f"open with: {how}")


def _open_language_model(policy: LoadedAdapters, out: Path, merge: bool) -> str:
    """Write the expression that opens adapters or a merged model."""
    if merge:
        return f'AutoModelForCausalLM.from_pretrained("{out}")'
    return f'PeftModel.from_pretrained(model, "{out}"), where model is {policy.scenario.language.model}'


def _open_network(paths: list[Path], form: FormName) -> str:
    """Write the expression that opens a network's files."""
    if form == "sb3":
        files = {path.name: path for path in paths}
        normaliser = files.get("vecnormalize.pkl")
        more = "" if normaliser is None else f' and VecNormalize.load("{normaliser}", env)'
        return f'PPO.load("{files["ppo.zip"]}"){more}'
    (path,) = [path for path in paths if path.suffix != ".json"]
    return {
        "onnx": f'onnxruntime.InferenceSession("{path}").run(None, {{"observation": observations}})',
        "torchscript": f'torch.jit.load("{path}")(observations)',
        "torch-export": f'torch.export.load("{path}").module()(observations)',
    }.get(form, f'safetensors.torch.load_file("{path}")')
