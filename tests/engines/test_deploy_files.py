"""The files in `deploy/`: every command in them is one that the command line takes."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from grpo_fed.cli.application import app
from tests.test_layout import ROOT

DEPLOY = ROOT / "deploy"


def parse(words: list[str]) -> dict[str, Any]:
    """Parse a command of ours without running it, and return its options and arguments."""
    import grpo_fed.cli.deploy
    import grpo_fed.cli.run  # noqa: F401, commands register themselves

    command, context = typer.main.get_command(app), None
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=words[0])
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    return dict(command.make_context(command.name, words, parent=context).params)


def read_unit(name: str) -> tuple[list[str], dict[str, str]]:
    """Read the command and the settings of a unit's service."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    service = dict(unit["Service"])
    return shlex.split(service.pop("ExecStart")), service


def test_the_servers_unit_starts_the_server():
    (program, *words), service = read_unit("grpo-fed-server.service")
    assert Path(program).name == "grpo-fed"
    assert words[:2] == ["deploy", "server"]
    assert str(parse(words)["folder"]) == "/srv/grpo_fed/server"
    assert service["Restart"] == "always"


def test_the_clients_unit_starts_a_client_on_its_device():
    (program, *words), service = read_unit("grpo-fed-client@.service")
    assert Path(program).name == "grpo-fed"
    assert service["Environment"] == "DEVICE=auto", "without a file, the variable has a value"
    options = parse([word.replace("%i", "ant").replace("${DEVICE}", "cuda:1") for word in words])
    assert words[:2] == ["deploy", "client"]
    assert [*options["names"]] == ["ant"]
    assert [*options["devices"]] == ["cuda:1"]
    assert options["superlink"] == "fed.example.org:9092"


def test_the_services_of_the_compose_file_are_commands():
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = document["services"]
    assert str(parse(services["server"]["command"])["folder"]) == "/srv/grpo_fed/server"
    for client in ("ant", "bee"):
        options = parse(services[client]["command"])
        assert ([*options["names"]], options["superlink"]) == ([client], "server:9092")
        mounts = [mount.split(":")[1] for mount in services[client]["volumes"]]
        assert mounts == [str(options["folder"]), str(options["state"])]
    named = {mount.split(":")[0] for service in services.values() for mount in service["volumes"] if mount[0] != "."}
    assert named == {*document["volumes"]}


def test_mlflow_is_reached_under_the_name_that_runs_use():
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    command, service = document["services"]["mlflow"]["command"], document["services"]["mlflow"]
    options = dict(option.removeprefix("--").split("=", 1) for option in command[1:])
    assert command[0] == "server"
    assert "mlflow:*" in options["allowed-hosts"].split(",")
    (folder,) = (mount.split(":")[1] for mount in service["volumes"])
    assert options["backend-store-uri"] == f"sqlite:///{folder}/mlflow.db"
    assert options["artifacts-destination"].startswith(f"{folder}/")
    assert service["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"], "it has no password"


def test_the_image_holds_what_is_installed():
    steps = (DEPLOY / "Dockerfile").read_text()
    shown = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert 'ENTRYPOINT ["grpo-fed"]' in steps
    for name in ("grpo_fed", "scenarios", "clients", "server", "pyproject.toml", "constraints.txt", "README.md"):
        assert f"!{name}" in shown
        assert (ROOT / name).exists()


@pytest.mark.parametrize("name", ["compose.yaml", "Dockerfile", "grpo-fed-client@.service", "grpo-fed-server.service"])
def test_the_manual_names_each_file(name: str):
    assert re.search(rf"\(\.\./deploy/{re.escape(name)}\)", (ROOT / "docs" / "deploy.md").read_text())
