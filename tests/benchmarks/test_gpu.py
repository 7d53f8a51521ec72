"""The GPU benchmark at its smallest size on the CPU, without the packages that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]

ISOLATED = """
import runpy, sys

absent = ("flwr", "mlflow", "sklearn", "ray", "cryptography", "Box2D", "mujoco", "sb3_contrib")
sys.modules.update(dict.fromkeys(absent))  # importing a module that is None fails
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_the_smallest_size_measures_every_part_without_flower_or_mlflow(tmp_path: Path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-c", ISOLATED, "--size", "smallest", "--device", "cpu", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["part"] for line in lines if "expected" in line] == list(gpu.PARTS)
    assert not [line for line in lines if "error" in line]

    compared = [line for line in lines if line.get("name") == "cpu without TF32"]
    assert [(line["round"], line["max_abs"], line["same_clients"]) for line in compared] == [(1, 0.0, 4), (2, 0.0, 4)]
    nudged = [line for line in lines if line.get("name") == "cpu from an ulp away"]
    assert all(0.0 < line["max_abs"] < 1e-5 for line in nudged)

    for line in (line for line in lines if "spent" in line):
        assert sum(line["spent"].values()) == pytest.approx(line["watched"])
        assert min(line["spent"].values()) >= 0.0
    assert [line["steps"] for line in lines if "mean_return" in line] == [256, 512]
    assert {line["what"] for line in lines if "what" in line} == {"minibatch", "rollout step"}


def test_a_failing_part_is_reported_and_the_next_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "PARTS", {"numbers": fail, "speed": lambda *_: None})
    report = gpu.Report(tmp_path / "gpu.jsonl", limit=60.0)
    assert gpu.run_parts(["numbers", "speed"], report, gpu.EXTENTS["smallest"], gpu.resolve_device("cpu")) == [
        "numbers"
    ]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["machine", "numbers", "numbers", "speed"]
    assert lines[2]["error"] == "RuntimeError: no kernel image"
    assert "no kernel image" in capsys.readouterr().out


def test_no_part_begins_after_the_limit(tmp_path: Path):
    report = gpu.Report(tmp_path / "gpu.jsonl", limit=-1.0)
    assert gpu.run_parts(["numbers"], report, gpu.EXTENTS["smallest"], gpu.resolve_device("cpu")) == []
    assert json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[-1])["left_out"] is True
