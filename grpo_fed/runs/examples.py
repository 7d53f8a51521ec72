"""Examples of what clients with prompts wrote before and after training: `examples/<client>.jsonl` in a run's folder.

They are written where the client trains. In a deployment that is the client's own machine, which keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from grpo_fed.rl.records import Example
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import EXAMPLES


def write_examples(folder: Path, client: str, examples: Sequence[Example]) -> None:
    """Write a client's examples, one in each line; nothing where there is none."""
    if examples:
        (folder / EXAMPLES).mkdir(exist_ok=True)
        lines = (json.dumps(asdict(example), ensure_ascii=False) for example in examples)
        write_atomic(folder / EXAMPLES / f"{client}.jsonl", "".join(f"{line}\n" for line in lines))


def read_examples(folder: Path, client: str) -> list[Example]:
    """Read a client's examples; an empty list where there are none."""
    path = folder / EXAMPLES / f"{client}.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at characters in texts
    return [Example(**json.loads(line)) for line in lines if line]
