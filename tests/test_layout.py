"""The layout of the package: imports go down its rooms, names and files are in order, a wheel is clean."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_fed"

ROOMS = ["scenario", "tasks", "policy", "rl", "aggregation", "runs", "callbacks", "federation"]
ROOMS += ["flower", "adapters", "engines", "reports", "cli"]
"""A module may import from its own room and from those before it."""
APART = {("rl", "aggregation"), ("aggregation", "rl")}
APART |= {(room, inside) for room in ("engines", "reports", "cli") for inside in ("flower", "adapters")}
"""Rooms that do not import from each other."""
LIBRARIES = {
    "flwr": {"flower", "adapters", "engines", "cli"},
    "stable_baselines3": {"adapters.sb3", "runs.sb3_export"},
    "tensordict": {"adapters.torchrl"},
    "mlflow": {"runs.tracking"},
    "matplotlib": {"reports"},
}
"""Which rooms may import a library."""


def module_name(path: Path) -> str:
    """Name a module: `grpo_fed/tasks/gym.py` -> `tasks.gym`, a package's `__init__.py` -> the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path: Path) -> set[str]:
    """List the dotted names that a file imports, but for types alone; `from a import b` gives `a.b`."""
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
    """List the package's modules that a file imports, named as in `SOURCES`."""
    modules = set()
    for name in imported_names(path):
        package, *rest = name.split(".")
        if package == "grpo_fed":
            while rest and ".".join(rest) not in SOURCES:
                rest.pop()
            modules.add(".".join(rest) or "__init__")
    return modules


def room_of(module: str) -> str:
    """Return the first part of a module's name."""
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


def test_imports_have_no_circle():
    graph = {name: imported_modules(path) - {name} for name, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("library", "allowed"), LIBRARIES.items())
def test_a_library_is_imported_by_its_rooms_alone(library: str, allowed: set[str]):
    users = {
        name
        for name, path in SOURCES.items()
        if library in {imported.split(".")[0] for imported in imported_names(path)}
    }
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
    modules = {module.name for module in path.parent.glob("*.py")} - {"__init__.py"}
    modules |= {f"{module.parent.name}/" for module in path.parent.glob("*/__init__.py")}
    assert not {name for name in modules if name not in documentation}


# Files and names -----------------------------------------------------------------------------------------------------

MOST_LINES = {PACKAGE: 400, ROOT / "tests": 600}
"""Lines that a file of the package, or of the tests, may have."""
ALIKE = {
    "main": "the entry of a process, called by `python -m` alone",
    "compare": "the command that calls the function of this name",
    "init": "the command that calls the function of this name",
    "rotate": "the command that calls the function of this name",
    "enroll": "the command that calls the function of this name",
    "server": "the command that calls the function of this name",
    "client": "the command that calls the function of this name",
    "sweep": "the command that calls the function of this name",
    "status": "the command that calls the function of this name",
    "run": "the command that calls the function of this name",
    "train": "the command that calls the function of this name",
    "replay": "the command that calls the function of this name",
    "serve": "a fork server serves its parent, MLflow's pages a browser; each is used with its module's name",
    "check_finite": "the arrays of a message, and the values of an environment: the errors name other things",
    "Section": "the sections of a scenario, and those of a summary",
}
"""Public names that two rooms have, with the reason."""


def public_definitions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """List the public functions and classes at the level of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds) and node.name[0] != "_"]


@pytest.mark.parametrize("folder", MOST_LINES, ids=lambda folder: folder.name)
def test_a_long_file_gives_its_reason_in_its_docstring(folder: Path):
    limit = MOST_LINES[folder]
    for path in folder.rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > limit:
            documentation = ast.get_docstring(ast.parse(text)) or ""
            assert re.search(rf"^Over {limit} lines: \w", documentation, re.MULTILINE), path.relative_to(ROOT)


@pytest.mark.parametrize("module", SOURCES)
def test_every_public_function_and_class_has_a_docstring(module: str):
    definitions = [node for node in public_definitions(SOURCES[module]) if not is_overload(node)]
    assert not [node.name for node in definitions if ast.get_docstring(node) is None]


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a function is one of the signatures of another, which has the docstring."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)


def test_rooms_have_no_public_names_alike_without_a_reason():
    rooms = defaultdict(set)
    for module, path in SOURCES.items():
        for node in public_definitions(path):
            rooms[node.name].add(room_of(module))
    assert {name for name, users in rooms.items() if len(users) > 1} == set(ALIKE)


# Imports at run time -------------------------------------------------------------------------------------------------

LIGHT = [name for name in SOURCES if name.split(".")[-1] in {"records", "messages", "folder"} or room_of(name) == "cli"]


def test_records_messages_and_the_command_line_need_no_torch():
    light = [f"grpo_fed.{name}" for name in LIGHT if not name.startswith(("rl.", "aggregation."))]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {light}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_library():
    heavy = "{'torch', 'numpy', 'pydantic', 'gymnasium', 'flwr', 'mlflow'}"
    code = f"import sys, grpo_fed; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_defined_in_its_listed_module():
    import grpo_fed

    for name in grpo_fed.__all__:
        public = getattr(grpo_fed, name)
        assert (public.__name__, public.__module__) == (name, grpo_fed.MODULES[name])


def test_no_public_name_is_also_a_module():
    # `grpo_fed.train` would become the module as soon as anyone imports it.
    import grpo_fed

    assert not set(grpo_fed.__all__) & set(SOURCES)


# Dependencies and files ----------------------------------------------------------------------------------------------


def test_every_dependency_has_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert not [entry for entry in required if not ("==" in entry or (">=" in entry and "<" in entry))]


def test_every_dependency_is_locked_but_those_of_metaworld():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.pop("metaworld"), "it pins another mujoco than the locked one"
    required = [*project["dependencies"], *itertools.chain(*extras.values())]
    locked = set(re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.match(r"[\w-]+", entry).group() for entry in required}  # type: ignore[union-attr]
    assert names <= locked


def test_a_wheel_holds_the_package_its_scenarios_and_apps(tmp_path: Path):
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"grpo_fed"}
    assert "grpo_fed/py.typed" in files
    tiny = {f"grpo_fed/{path.relative_to(PACKAGE)}" for path in (PACKAGE / "policy/language/tiny").iterdir()}
    assert tiny
    assert tiny <= set(files)
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
    """List the text files of the tree, without what tools and runs leave behind."""
    tree = (path for path in ROOT.rglob("*") if not LEFT_BEHIND & set(path.relative_to(ROOT).parts))
    return sorted(path for path in tree if path.is_file() and path.suffix not in BINARY)


def test_no_file_names_a_registry_or_a_machine():
    lines = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if REGISTRIES.search(line) or MACHINE_PATHS.search(line):
                lines.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not lines
