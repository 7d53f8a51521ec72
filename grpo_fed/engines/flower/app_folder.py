"""The Flower app that runs a federation, as a folder that `flwr run` takes.

The app's two parts are `clients/` and `server/` of the repository. A wheel has them in `grpo_fed/_apps`, since
top-level packages of such names could clash with others. Flower copies these few lines to every machine, no more: each
has grpo_fed itself installed.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import tomli_w

from grpo_fed.engines.wire.flower_private import ALL_CLIENTS, OWN_CLIENT
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

PARTS = ("clients", "server")
RUN_CONFIG = {"scenario": "", "out": "", "resume": False, "replace": False, OWN_CLIENT: ALL_CLIENTS}
"""The app's settings: a scenario as TOML, the run's folder on the server, whether to go on with the run in it. A node
with a key finds there which client its scenario was made for."""


def make_app_folder(folder: Path) -> Path:
    """Write the app into a new folder, and return it."""
    folder.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(_sources() / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
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
        "dependencies": [],  # grpo_fed is installed on every machine
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    return folder


def scenario_from_config(text: str) -> Scenario:
    """Read the run's scenario; without one it is two carts of the quickstart, since Flower simulates two nodes."""
    if text:
        return Scenario.loads(text)
    quickstart = Scenario.load(find_scenario("quickstart"))
    carts = quickstart.clients[0].model_copy(update={"count": 2})
    return quickstart.model_copy(
        update={"name": "two-carts", "description": "Two carts learn together.", "clients": [carts]}
    )


def _sources() -> Path:
    """Find the folder with the app's parts: in a wheel, or in the repository."""
    package = Path(__file__).parents[2]
    installed = package / "_apps"
    return installed if installed.is_dir() else package.parent
