"""Finds the scenarios that ship: in `scenarios/` of the repository, or in `grpo_fed/_scenarios` of a wheel."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.scenario.toml.text import closest_match, did_you_mean


@dataclass(frozen=True)
class ShippedScenario:
    """A scenario that ships, as a file that is not read yet."""

    name: str
    """Name of its file without `.toml`, which is what a user types."""
    path: Path
    description: str
    """What it is, in a sentence."""
    header: str
    """The comment at the top of the file, in its lines: what the scenario shows and what to expect."""


def shipped_scenarios() -> list[ShippedScenario]:
    """List the scenarios that ship, in the order of their names."""
    return [_shipped(path) for path in sorted(_folder().glob("*.toml"))]


def _shipped(path: Path) -> ShippedScenario:
    """Read a file as far as a list of scenarios needs it."""
    text = path.read_text(encoding="utf-8")
    return ShippedScenario(path.stem, path, str(tomllib.loads(text).get("description", "")), _header(text))


def find_scenario(scenario: str) -> Path:
    """Find the file that a user means by a path or by the name of a scenario that ships.

    ScenarioError if there is none; a path to a file that does not exist is reported when the file is read.
    """
    path = Path(scenario)
    shipped = {known.name: known.path for known in shipped_scenarios()}
    if scenario in shipped:
        return shipped[scenario]
    if path.is_dir():
        inside = path / "scenario.toml"
        cure = f"did you mean {inside}?" if inside.is_file() else "name a file in it"
        raise ScenarioError(f"{scenario}: is a folder; {cure}")
    if path.is_file() or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    cure = did_you_mean(closest_match(scenario, shipped))
    cure = cure or "; a path ends in .toml, and `grpo-fed list` shows the scenarios that ship"
    raise ScenarioError(f"{scenario}: no scenario of this name ships{cure}")


def _folder() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "_scenarios"
    return installed if installed.is_dir() else package.parent / "scenarios"


def _header(text: str) -> str:
    """Return the first comment of a file, without the `#:` lines that are meant for editors."""
    lines = []
    for line in text.splitlines():
        if line.startswith("#:"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines)
