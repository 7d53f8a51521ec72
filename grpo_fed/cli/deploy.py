"""Commands that put a federation on several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import Debug

PORT = 9092
MADE = Path("deployment")
"""What `deploy init` makes where it is not told."""

group = typer.Typer(
    name="deploy",
    help="Put a federation on several machines: keys and certificates, the server, the clients.",
    no_args_is_help=True,
)
app.add_typer(group)

Insecure = Annotated[bool, typer.Option("--insecure", help="No encryption and no keys: for a closed network only.")]


@group.command()
def init(
    clients: Annotated[
        list[str], typer.Option("--client", metavar="NAME", help="A client as the scenario names it; may be repeated.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What to make; called again, it adds clients.")
    ] = MADE,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="A name or address of the server; may be repeated."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a CA, the server's certificate and a key for each client, and say what to copy where."""
    with report_errors(debug):
        from grpo_fed.engines.deploy import commands as deploy

        for line in deploy.init(folder, hosts or [], clients):
            typer.echo(line)


@group.command()
def server(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The server's, from deploy init; found where that made it.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="For clients.")] = PORT,
    insecure: Insecure = False,
    debug: Debug = False,
) -> None:
    """Serve clients with Flower's SuperLink until told to stop."""
    with report_errors(debug, FAILED):
        from grpo_fed.engines.deploy import commands as deploy

        if folder is None and not insecure:
            folder = _found(Path("server"), MADE / "server")
        code = deploy.server(folder, host=host, port=port, insecure=insecure, say=typer.echo)
    raise typer.Exit(code)


@group.command()
def client(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The client, as the scenario names it.")],
    superlink: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="Where the server is.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The client's, from deploy init; found where that made it.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="What it remembers; by default in the user's own.")
    ] = None,
    insecure: Insecure = False,
    debug: Debug = False,
) -> None:
    """Be a client, with Flower's SuperNode, until told to stop."""
    with report_errors(debug, FAILED):
        from grpo_fed.engines.deploy import commands as deploy

        if folder is None and not insecure:
            folder = _found(Path(name), MADE / "clients" / name)
        code = deploy.client(name, superlink, folder, state=state, insecure=insecure, say=typer.echo)
    raise typer.Exit(code)


def _found(*places: Path) -> Path | None:
    """The first that is there."""
    return next((place for place in places if place.is_dir()), None)
