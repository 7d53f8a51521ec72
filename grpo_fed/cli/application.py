"""The application that the commands belong to."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from click import Context
from typer.core import TyperGroup

COMMANDS = [
    "run",
    "train",
    "compare",
    "play",
    "report",
    "ui",
    "new",
    "check",
    "explain",
    "list",
    "config",
    "schema",
    "deploy",
    "replay",
]
"""In the order in which the help names them."""


class InOrder(TyperGroup):
    """The help begins with what a user begins with, and has no boxes: they would take as long as all the rest of it."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "rich_markup_mode": None})

    def list_commands(self, ctx: Context) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)


app = typer.Typer(
    cls=InOrder,
    name="grpo-fed",
    help="Federated multi-task reinforcement learning: policies cut into blocks, shared where sharing pays.",
    epilog="Begin with: grpo-fed run quickstart",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does so itself
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def answer() -> None:
    """A call from a shell."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called us
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, as long as we live
        with suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")  # a terminal without such letters gets "?"
    app(prog_name="grpo-fed")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"grpo-fed {version('grpo-fed')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show it and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Options before any command."""
