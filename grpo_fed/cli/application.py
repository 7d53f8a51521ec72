"""The application that all commands belong to."""

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
    "join",
    "compare",
    "sweep",
    "attack-board",
    "play",
    "export",
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
    "replay-order",
]
"""All commands in the order of the help, which begins with what a new user needs."""


class OrderedGroup(TyperGroup):
    """Lists commands in the order of `COMMANDS`, without boxes: drawing these would double the time of `--help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})

    def list_commands(self, ctx: Context) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)


app = typer.Typer(
    cls=OrderedGroup,
    name="grpo-fed",
    help="Federated multi-task reinforcement learning: policies cut into blocks, shared where sharing pays.",
    epilog="Begin with: grpo-fed run quickstart",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click suggests commands itself
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def prepare_streams() -> None:
    """Replace a closed stdout or stderr by the null device, and print "?" for characters that a terminal lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, open until the process ends
        with suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"grpo-fed {version('grpo-fed')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that come before any command."""
