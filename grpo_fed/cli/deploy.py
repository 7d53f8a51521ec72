"""The commands that put a federation on several machines: deploy init, rotate, enroll, server, client and status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import Debug

PORT = 9092
"""The port that clients connect to."""
DEPLOYMENT = Path("deployment")
"""The default folder of `deploy init`."""

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
        Path, typer.Argument(metavar="FOLDER", help="The folder to make; if it exists, clients are added to it.")
    ] = DEPLOYMENT,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="A name or address of the server; may be repeated."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a CA, the server's certificate and a key for each client, and say which files to copy where."""
    with report_errors(debug):
        from grpo_fed.engines.deploy import commands

        for line in commands.init(folder, hosts or [], clients):
            typer.echo(line)


@group.command()
def rotate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that `init` made.")] = DEPLOYMENT,
    clients: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="NAME", help="A client that gets another key; may be repeated."),
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Make the server another certificate and key, for the same hosts.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make new keys and certificates for old ones, and say which files to copy where."""
    with report_errors(debug):
        from grpo_fed.engines.deploy import commands

        for line in commands.rotate(folder, clients or [], server):
            typer.echo(line)


@group.command()
def enroll(
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The client of this machine, as the scenario names it.")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The client's folder; by default NAME.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a client's key on its own machine, and say what to do with its public half."""
    with report_errors(debug):
        from grpo_fed.engines.deploy import commands

        for line in commands.enroll(folder or Path(name), name):
            typer.echo(line)


@group.command()
def server(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="The server's folder; by default server or deployment/server."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port that clients connect to.")] = PORT,
    insecure: Insecure = False,
    debug: Debug = False,
) -> None:
    """Serve clients with Flower's SuperLink until it is stopped."""
    with report_errors(debug, FAILED):
        from grpo_fed.engines.deploy import commands

        if folder is None and not insecure:
            folder = _first_existing(Path("server"), DEPLOYMENT / "server")
        code = commands.server(folder, host=host, port=port, insecure=insecure, say=typer.echo)
    raise typer.Exit(code)


@group.command()
def client(
    names: Annotated[
        list[str],
        typer.Option(
            "--name", metavar="NAME", help="A client of this machine, as the scenario names it; may be repeated."
        ),
    ],
    superlink: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="The server's address.")],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="The client's folder, or one with the folders of several clients; by default NAME or"
            " deployment/clients.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="DIR", help="Where the clients' states are saved; by default in the user's data folder."
        ),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What a client computes on, such as cuda:1, instead of the scenario's device; once for all clients, or"
            " once for each --name in the same order.",
        ),
    ] = None,
    insecure: Insecure = False,
    debug: Debug = False,
) -> None:
    """Run the clients of this machine, in one process, until it is stopped."""
    with report_errors(debug, FAILED):
        from grpo_fed.engines.deploy import commands

        if folder is None and not insecure:
            folder = _first_existing(*map(Path, names[:1]), DEPLOYMENT / "clients")
            if len(names) > 1 and folder == Path(names[0]):
                folder = Path()
        code = commands.client(
            names, superlink, folder, state=state, devices=devices or [], insecure=insecure, say=typer.echo
        )
    raise typer.Exit(code)


@group.command()
def status(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="The server's folder; by default server or deployment/server."),
    ] = None,
    superlink: Annotated[
        str, typer.Option("--superlink", metavar="NAME", help="The server's name in Flower's configuration.")
    ] = "grpo-fed",
    debug: Debug = False,
) -> None:
    """Show the nodes, their clients and last signs of life, and the runs; on the server's machine."""
    with report_errors(debug, FAILED):
        from grpo_fed.engines.deploy import commands

        folder = folder or _first_existing(Path("server"), DEPLOYMENT / "server", Path("grpo-fed-server"))
        for line in commands.status(superlink, folder):
            typer.echo(line)


def _first_existing(*folders: Path) -> Path | None:
    """Return the first folder that exists; None if none does."""
    return next((folder for folder in folders if folder.is_dir()), None)
