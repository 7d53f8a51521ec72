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

ROOMS = ["scenario", "tasks", "policy", "rl", "aggregation", "runs", "federation", "engines", "reports", "cli"]
"""A module may import from its own room and from those before it."""
APART = {("rl", "aggregation"), ("aggregation", "rl")}
"""Rooms that do not know each other."""
LIBRARIES = {"flwr": {"engines", "cli"}, "mlflow": {"runs.tracking"}, "matplotlib": {"reports"}}
"""Which rooms may import a library."""


def module_name(path: Path) -> str:
    """`grpo_fed/tasks/gym.py` -> `tasks.gym`, a package's `__init__.py` -> the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a file imports, anywhere in it but for types alone; `from a import b` gives `a.b`."""
    names, todo = set(), list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo.extend(ast.iter_child_nodes(node))
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports, named as in `SOURCES`."""
    modules = set()
    for name in imported_names(path):
        package, *rest = name.split(".")
        if package == "grpo_fed":
            while rest and ".".join(rest) not in SOURCES:
                rest.pop()
            modules.add(".".join(rest) or "__init__")
    return modules


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room():
    flat = {name for name in SOURCES if room_of(name) not in ROOMS}
    assert flat <= {"__init__", "__main__", "_lazy"}
    assert {room_of(name) for name in SOURCES} >= set(ROOMS)


@pytest.mark.parametrize("module", [name for name in SOURCES if room_of(name) in ROOMS])
def test_no_room_imports_upwards(module: str):
    room = room_of(module)
    below = {*ROOMS[: ROOMS.index(room) + 1], "_lazy"}
    rooms = {room_of(name) for name in imported_modules(SOURCES[module])}
    assert rooms <= below, f"{module} imports from rooms that come after {room}"
    assert not {(room, other) for other in rooms} & APART


def test_no_import_goes_round_in_a_circle():
    graph = {name: imported_modules(path) - {name} for name, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("library", "allowed"), LIBRARIES.items())
def test_a_library_is_known_to_its_rooms_alone(library: str, allowed: set[str]):
    users = {name for name, path in SOURCES.items() if library in {one.split(".")[0] for one in imported_names(path)}}
    outside = {name for name in users if not any(f"{name}.".startswith(f"{room}.") for room in allowed)}
    assert not outside


@pytest.mark.parametrize(
    "package", [name for name, path in SOURCES.items() if path.name == "__init__.py" and "." in f"{name}."]
)
def test_a_package_names_each_of_its_modules_in_its_docstring(package: str):
    path = SOURCES[package]
    if package == "__init__":
        return
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    modules = {one.name for one in path.parent.glob("*.py")} - {"__init__.py"}
    modules |= {f"{one.parent.name}/" for one in path.parent.glob("*/__init__.py")}
    assert not {name for name in modules if name not in documentation}


LIGHT = [name for name in SOURCES if name.split(".")[-1] in {"records", "messages", "folder"} or room_of(name) == "cli"]


def test_records_messages_and_the_command_line_need_no_torch():
    light = [f"grpo_fed.{name}" for name in LIGHT if not name.startswith(("rl.", "aggregation."))]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {light}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
