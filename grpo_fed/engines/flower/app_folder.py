"""The Flower app that runs a federation, as a folder of its own.

Its two parts are `clients/` and `server/` of the repository; a wheel has them in `grpo_fed/_apps`, since top-level
packages of such names would get in everyone's way. A run carries these few lines and no more: the rest of grpo_fed is
what each machine has installed.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import tomli_w

from grpo_fed.scenario import shipped as gallery
from grpo_fed.scenario.scenario import Scenario

PARTS = ("clients", "server")
RUN_CONFIG = {"scenario": "", "out": "", "resume": False}
"""What a run may be given: a scenario as TOML, the run's folder on the server, whether to go on with what is there."""


def app_folder(into: Path) -> Path:
    """Make the app in `into`, a new folder."""
    into.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(_sources() / part, into / part, ignore=shutil.ignore_patterns("__pycache__"))
    app = {
        "publisher": "grpo-fed",
        "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
        "config": RUN_CONFIG,
    }
    project = {
        "name": "grpo-fed",
        "version": version("grpo-fed"),
        "description": "Federated multi-task reinforcement learning.",
        "license": "Apache-2.0",
        "dependencies": [],  # every machine has its own
    }
    (into / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    return into


def scenario_from_config(text: str) -> Scenario:
    """What a run is given, or else two of the quickstart's carts: Flower simulates two nodes unless it is told more."""
    if text:
        return Scenario.loads(text)
    whole = Scenario.load(gallery.find_scenario("quickstart"))
    carts = whole.clients[0].model_copy(update={"count": 2})
    return whole.model_copy(
        update={"name": "two-carts", "description": "Two carts learn together.", "clients": [carts]}
    )


def _sources() -> Path:
    package = Path(__file__).parents[2]
    installed = package / "_apps"
    return installed if installed.is_dir() else package.parent
