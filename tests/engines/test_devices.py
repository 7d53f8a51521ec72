"""What a node says of its client's device, and which device a client of a machine gets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower.node import NodeHandler
from grpo_fed.engines.resident import devices
from grpo_fed.engines.resident.devices import Gpu, describe_device, parse_gpus
from tests.support.small_federation import tiny

TWO = """0, GPU-1f2e3d4c-0000, NVIDIA H100 80GB HBM3, 81559
1, GPU-9a8b7c6d-0000, NVIDIA L4, 23034
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver's program be a script that names two GPUs."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices._list_gpus.cache_clear()
    assert shutil.which("nvidia-smi") == str(script)


@pytest.fixture(autouse=True)
def forget_gpus() -> Iterator[None]:
    yield
    devices._list_gpus.cache_clear()


def test_gpus_are_read_with_their_memory():
    assert parse_gpus(TWO) == [
        Gpu("0", "GPU-1f2e3d4c-0000", "NVIDIA H100 80GB HBM3", 81559),
        Gpu("1", "GPU-9a8b7c6d-0000", "NVIDIA L4", 23034),
    ]
    assert parse_gpus("NVIDIA-SMI has failed\n0, a, b, [N/A]\n") == []


@pytest.mark.usefixtures("two_gpus")
def test_a_device_is_named_with_its_memory_in_gibibytes():
    assert describe_device("cuda:1") == "cuda:1 NVIDIA L4, 22 GiB"  # 23034 / 1024 = 22.49
    assert describe_device("auto") == describe_device("cuda") == "cuda:0 NVIDIA H100 80GB HBM3, 80 GiB"
    assert describe_device("cpu") == "cpu"
    assert describe_device("cuda:2") == "cuda:2", "there is no third one to describe"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("shown", ["1,0", "1", "GPU-9a8b", " GPU-9a8b7c6d-0000 , 0"])
def test_devices_are_counted_as_programs_see_them(shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert describe_device("cuda:0") == "cuda:0 NVIDIA L4, 22 GiB"


@pytest.mark.usefixtures("two_gpus")
def test_an_unknown_entry_hides_all_after_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7,0")
    assert describe_device("cuda:0") == "cuda:0 NVIDIA L4, 22 GiB"
    assert describe_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert describe_device("auto") == "cpu"


def test_each_client_of_a_machine_has_its_device():
    match = deploy._match_devices
    assert match(["ant", "bee"], []) == {}
    assert match(["ant", "bee"], ["cuda:1"]) == {"ant": "cuda:1", "bee": "cuda:1"}
    assert match(["ant", "bee"], ["cuda:1", "cpu"]) == {"ant": "cuda:1", "bee": "cpu"}
    with pytest.raises(ValueError, match="--device is given 2 times for 3 clients: give one for each --name"):
        match(["ant", "bee", "cat"], ["cpu", "cpu"])
    with pytest.raises(ValueError, match="--device gpu:"):
        match(["ant"], ["gpu"])


def test_a_nodes_device_goes_before_the_scenarios(tmp_path: Path):
    handler = NodeHandler()
    try:
        _, on_meta = handler._load(tiny(), "ant", tmp_path, (), "cpu")
        assert str(on_meta.scenario.device) == "cpu"
        auto = tiny().model_copy(update={"device": "cuda:7"})
        _, on_cpu = handler._load(auto, "ant", tmp_path, (), "cpu")
        assert on_cpu.scenario.device == "cpu"
        with pytest.raises(ValueError, match=r"device = cuda:7"):
            handler._load(auto, "bee", tmp_path, (), None)
    finally:
        handler.close()
