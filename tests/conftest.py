"""Settings for all tests."""

import os
import sys
import tempfile
from pathlib import Path

# Before torch and numpy load: one thread a process, whoever starts pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["MLFLOW_TRACKING_URI"] = "off"  # the tests of tracking name a store
os.environ["GRPO_FED_CACHE"] = str(Path(tempfile.gettempdir()) / "grpo_fed_tests")  # not the user's own

import hypothesis
import pytest

# While tests are collected, compiled modules are kept beside them even if PYTHONDONTWRITEBYTECODE is set: the tests
# start more than a hundred processes, each of which would compile the package again, for most of a second.
KEEPS_NOTHING, sys.dont_write_bytecode = sys.dont_write_bytecode, False

# An example's time says more about the machine than about the code, and a test fails for a change, not by chance.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


LONGEST = (
    "test_deployment",
    "test_mixed_nodes",
    "test_resident_node",
    "test_flower",
    "test_deploy_commands",
    "test_tracking",
    "test_browser",
    "test_stacked_learner",
    "test_local_runs",
    "test_command_line",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process waits for one of them at the end.

    From here on, what tests write and import is not kept if the user wants it so.
    """
    sys.dont_write_bytecode = KEEPS_NOTHING
    rank = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
