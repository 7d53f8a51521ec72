"""The tables of the GPU's runs: what they take from the lines of a run, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_results

MACHINE = {
    "part": "machine",
    "device": "a GPU",
    "cores": 16,
    "cpu": "AVX2",
    "python": "3.12",
    "torch": "2.11",
    "numpy": "2.5",
}


def speed(device: str, clients: int, update: float, environments: float) -> dict[str, Any]:
    return {
        "part": "speed",
        "device": device,
        "threads": 1,
        "clients": clients,
        "steps_per_second": 1e5,
        "watched": update + environments,
        "spent": {"environments": environments, "policy": 0.0, "batch": 0.0, "update": update},
        "memory_mb": 2500.0 if device == "cuda" else None,
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_added_run_gets_the_next_number(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    assert [gpu_results.append_run([MACHINE, MACHINE], file) for _ in range(2)] == [1, 2]
    assert [line["run"] for line in gpu_results.read_lines(file)] == [1, 1, 2, 2]


def test_predictions_stand_beside_what_was_measured() -> None:
    lines = [
        MACHINE,
        {"part": "speed", "expected": "ten times as fast"},
        speed("cuda", 256, update=0.1, environments=0.3),
        speed("cpu", 256, update=2.0, environments=0.3),
        {"part": "graphs", "expected": "a half"},
        {"part": "graphs", "clients": 64, "left_out": True},
    ]
    text = "\n".join(gpu_results.format_tables([{"run": 3, **line} for line in lines]))
    assert text.startswith("## Run 3\n\na GPU, 16 CPU cores (AVX2)")
    # 2.0 / 0.1 = 20; of the round of 0.4 s on the device 0.3 s are environments.
    assert (
        "| speed | ten times as fast | 100 thousand steps/s on the device, 100 on the CPU; the CPU's update takes 20"
        " times as long; from 256 clients on 75 % of a round are on the CPU; 2.5 GB at 256 clients |"
    ) in text
    assert "| graphs | a half | no time was left |" in text
    assert "| 256 | cuda | 100,000 | 0.400 | 0.300 | 0.000 | 0.000 | 0.100 | 2,500 |" in text


def test_a_share_of_clients_that_did_not_solve_the_task_is_shown_as_such() -> None:
    lines = [
        MACHINE,
        {"part": "solve", "expected": "all after 70"},
        {"part": "solve", "steps": 2000, "seconds": 20.0, "learning": 15.0, "solved": 0.979, "mean_return": 471.0},
        {"part": "solve", "share": 0.5, "clients": 2048, "steps": 2000.0},
        {"part": "solve", "share": 1.0, "clients": 2048, "steps": None},
    ]
    text = "\n".join(gpu_results.format_tables([{"run": 1, **line} for line in lines]))
    assert (
        "50 % after 2 thousand steps, 100 % not reached; 97.9 % when the benchmark stopped after 20 s, 5 of them for"
        " evaluation"
    ) in text
    assert "| 2,000 | 20.0 | 15.0 | 97.9 % | 471.0 |" in text


def test_the_shipped_results_make_the_tables_of_every_run() -> None:
    results = gpu_results.read_lines(gpu_results.FILE)
    text = "\n".join(gpu_results.format_tables(results))
    assert all(f"## Run {number}\n" in text for number in {line["run"] for line in results})
