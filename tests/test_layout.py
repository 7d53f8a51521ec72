"""What the house promises: imports go down its floors, Flower and MLflow stay where they belong, a wheel is clean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_fed"

# A module may import from its own floor and from those below. A package stands on one floor with all that is in it.
FLOORS = [
    """describe files gallery given hostile idle imported kinds memory locate messages methods palette physics presets
    read records rows scenario seeding settings starter words""",
    """activations adam advantages blocks commons distributions families groups judge lanes merge normalise objective
    past penalty policy post proximity sample statistics streams tasks""",
    """batch checkpoint fisher fleet history home journal ledger members merging natural notes participation play
    position rollout saved standings stepping totals tracking training trust ui update wire""",
    "comparison deploy engines rounds showing",
    "cli reference __init__ __main__",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

ROOFS = {"flwr": {"wire", "engines", "cli"}, "matplotlib": {"showing"}, "mlflow": {"tracking"}}
"""Who may import what."""


def module_name(path: Path) -> str:
    """`grpo_fed/tasks/families/cartpole.py` -> `families.cartpole`, a package's `__init__.py` -> the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, anywhere in it; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, named as in `SOURCES`."""
    modules = set()
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "grpo_fed":
            while rest and ".".join(rest) not in SOURCES:
                rest.pop()
            modules.add(".".join(rest) or "__init__")
    return modules


def floor(module: str) -> int:
    """Of a module, or of the package it is in."""
    return FLOOR[module.split(".")[0]]


def test_every_module_has_a_floor():
    homeless = {name for name in SOURCES if name.split(".")[0] not in FLOOR}
    assert not homeless, f"say in FLOORS on which floor these stand: {sorted(homeless)}"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str):
    upwards = {name for name in own_imports(SOURCES[module]) if floor(name) > floor(module)}
    assert not upwards, f"{module} stands on floor {floor(module)}, below {sorted(upwards)}"


def test_no_import_goes_round_in_a_circle():
    graph = {name: own_imports(path) - {name} for name, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("library", "allowed"), ROOFS.items())
def test_flower_and_mlflow_stay_where_they_belong(library: str, allowed: set[str]):
    users = {m.split(".")[0] for m, p in SOURCES.items() if library in {name.split(".")[0] for name in imported(p)}}
    assert users <= allowed


def test_importing_the_package_is_free():
    heavy = "{'torch', 'numpy', 'pydantic', 'gymnasium', 'flwr', 'mlflow'}"
    code = f"import sys, grpo_fed; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_found_where_the_package_says():
    import grpo_fed

    for name in grpo_fed.__all__:
        found = getattr(grpo_fed, name)
        assert (found.__name__, found.__module__) == (name, grpo_fed.HOMES[name])


def test_a_public_name_is_not_a_module_too():
    # `grpo_fed.train` would become the module as soon as anyone imports it.
    import grpo_fed

    assert not set(grpo_fed.__all__) & set(SOURCES)


def test_every_dependency_has_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *(one for many in project["optional-dependencies"].values() for one in many)]
    loose = [one for one in required if not ("==" in one or (">=" in one and "<" in one))]
    assert not loose


def test_every_dependency_is_locked_but_those_of_an_environment_of_their_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.pop("metaworld"), "it pins another mujoco than the locked one"
    required = [*project["dependencies"], *(one for many in extras.values() for one in many)]
    locked = set(re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.match(r"[\w-]+", one).group() for one in required}  # type: ignore[union-attr]
    assert names <= locked


def test_a_wheel_holds_the_package_and_its_scenarios_and_nothing_else(tmp_path: Path):
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"grpo_fed"}
    assert "grpo_fed/py.typed" in files
    scenarios = {f"grpo_fed/_scenarios/{path.name}" for path in (ROOT / "scenarios").glob("*.toml")}
    assert scenarios
    assert scenarios <= set(files)
    from grpo_fed.engines.flower.app_folder import PARTS

    apps = {f"grpo_fed/_apps/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).glob("*.py")}
    assert apps
    assert apps <= set(files)


# Spelt so that this file may be read like the others.
REGISTRIES = re.compile(r"py[p]i[.]org|python[h]osted[.]org|py[t]orch[.]org/whl|ana[c]onda[.]org|hugging[f]ace[.]co")
MACHINE_PATHS = re.compile(r"(?<![\w./$}-])/(?:work|root|home|Users|opt)/\w")
LEFT_BEHIND = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".hypothesis"}
LEFT_BEHIND |= {".mypy_cache", ".pytest_cache", ".ruff_cache"}
BINARY = {".gif", ".npy", ".npz", ".png", ".safetensors", ".zip"}


def text_files() -> list[Path]:
    """All that a commit could hold, without what tools and runs leave behind."""
    tree = (path for path in ROOT.rglob("*") if not LEFT_BEHIND & set(path.relative_to(ROOT).parts))
    return sorted(path for path in tree if path.is_file() and path.suffix not in BINARY)


def test_no_file_names_a_registry_or_a_machine():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if REGISTRIES.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
