"""Mutated scenarios, messages, checkpoints and run folders: whatever is wrong with one has to be an error of ours.

    python -m benchmarks.fuzz --minutes 10              all targets in turn, with other seeds each time
    python -m benchmarks.fuzz --target scenarios --minutes 60

Hypothesis draws the mutations and shrinks what fails; a failure is printed with the mutations that make it, for
`CORPUS` in tests/test_fuzz.py, which the tests run together with a few new examples. A mutation is a place in a tree of
TOML or JSON, what is done there, and a value; or bytes of a file or a message.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import hypothesis
import numpy as np
import tomli_w
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.engines.wire.flower_private import pack, unpack
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.reports.summary import summary_markdown
from grpo_fed.runs.history import read_history
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario, shipped_scenarios

PATIENCE = 20.0
"""Seconds after which an example counts as hanging."""
DEEDS = ("replace", "remove", "rename", "wrap", "copy")
VALUES: tuple[Any, ...] = (
    0,
    1,
    -1,
    10**6,
    2**63,
    -(2**70),
    0.0,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    "",
    "x",
)
VALUES += (
    "../../x",
    "*",
    "a" * 5000,
    "\0",
    "é\u202e",
    [],
    [[]],
    {},
    {"": 1},
    [1, "a", {}],
    [{}],
    {"name": {"name": []}},
)
Mutation: TypeAlias = tuple[int, str, int]
"""A place, counted over all keys; an entry of `DEEDS`; an index of `VALUES`."""
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 2000), st.sampled_from(DEEDS), st.integers(0, len(VALUES) - 1)), min_size=1, max_size=3
)
ByteChange: TypeAlias = tuple[int, int, int]
"""A place in bytes, by its part of a million; how many are replaced; by which byte, or 256 to remove them."""
BYTE_CHANGES = st.lists(
    st.tuples(st.integers(0, 999_999), st.integers(1, 64), st.integers(0, 256)), min_size=1, max_size=3
)
TINY = """
name = "fuzz"
rounds = 3
steps = 32
policy = { hidden = [4] }
rollout = { num_envs = 2, horizon = 16 }
objective = { epochs = 1, minibatches = 1 }
proximity = { mode = "quadratic" }
evaluate = { episodes = 1 }
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 2
"""


def mutate_tree(tree: Any, mutations: Sequence[Mutation]) -> Any:
    """Apply mutations to a copy of a tree of dictionaries and lists."""
    holder = {"": copy.deepcopy(tree)}
    for place, deed, value in mutations:
        places = list(_list_places(holder))
        parent, key = places[place % len(places)]
        given, here = copy.deepcopy(VALUES[value]), parent[key]
        if deed == "remove" and parent is not holder:
            del parent[key]
        elif deed == "rename" and isinstance(parent, dict) and parent is not holder:
            parent[f"{key}x"] = parent.pop(key)
        elif deed == "wrap":
            parent[key] = [here, here]
        elif deed == "copy":
            other, name = places[(place * 7 + value) % len(places)]
            parent[key] = copy.deepcopy(other[name])
        else:
            parent[key] = given
    return holder[""]


def _list_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _list_places(tree[key])


def change_bytes(content: bytes, changes: Sequence[ByteChange]) -> bytes:
    """Replace or remove parts of some bytes."""
    changed = bytearray(content)
    for place, count, value in changes:
        begin = place * len(changed) // 1_000_000
        changed[begin : begin + count] = b"" if value == 256 else bytes([value]) * len(changed[begin : begin + count])
    return bytes(changed)


# Targets: each raises what is no error of ours ------------------------------------------------------------------------


def read_mutated_scenario(name: str, mutations: Sequence[Mutation], changes: Sequence[ByteChange] = ()) -> None:
    """Read a scenario of the gallery after mutations; one that is valid is the same once it is written and read."""
    try:
        text = tomli_w.dumps(mutate_tree(_gallery()[name], mutations))
    except (TypeError, AttributeError, ValueError):
        return  # it cannot be written as TOML
    text = change_bytes(text.encode(), changes).decode(errors="replace") if changes else text
    try:
        scenario = Scenario.loads(text)
    except ValueError as error:
        _check_error(error)
    else:
        again = Scenario.loads(scenario.dumps())
        assert again == scenario or "nan" in scenario.dumps(), "a scenario is another one once it is written and read"


def read_mutated_message(which: str, changes: Sequence[ByteChange]) -> None:
    """Read an instruction or an answer after its bytes were changed."""
    codec, instruction, answer = _messages()
    content = pack(
        codec.write_instruction(instruction) if which == "instruction" else codec.write_answer(instruction, answer)
    )
    try:
        records = unpack(np.frombuffer(change_bytes(content.tobytes(), changes), np.uint8))
    except (DecodeError, ValueError, TypeError):
        return  # as the grids expect it
    try:
        if which == "instruction":
            codec.read_instruction("train", records)
        else:
            codec.read_answer(instruction, records)
    except InvalidMessageError as error:
        _check_error(error)


def resume_mutated_checkpoint(mutations: Sequence[Mutation], changes: Sequence[ByteChange], file: int) -> None:
    """Prepare to go on from a checkpoint whose state was mutated, or one of whose files, by somebody who sealed it."""
    with _copy_of_run() as folder:
        checkpoint = folder / "checkpoints" / "round-0002"
        shutil.rmtree(folder / "checkpoints" / "round-0001", ignore_errors=True)
        if mutations:
            state = checkpoint / "state.json"
            _write_new(state, json.dumps(mutate_tree(json.loads(state.read_text()), mutations)).encode())
        if changes:
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
            victim = files[file % len(files)]
            _write_new(victim, change_bytes(victim.read_bytes(), changes))
        lines = "".join(
            f"{sha256(path.read_bytes()).hexdigest()}  {path.relative_to(checkpoint).as_posix()}\n"
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name != "SHA256SUMS"
        )
        (checkpoint / "SHA256SUMS").write_text(lines)
        try:
            LocalEngine.resumed(folder).__exit__()
        except ValueError as error:
            _check_error(error)


def read_mutated_run(file: str, mutations: Sequence[Mutation], changes: Sequence[ByteChange]) -> None:
    """Read a finished run, and summarise it, after one of its files was mutated."""
    with _copy_of_run(finished=True) as folder:
        path = folder / file
        content = path.read_bytes()
        if mutations and file == "rounds.jsonl":
            lines = mutate_tree([json.loads(line) for line in content.decode().splitlines()], mutations)
            content = "".join(f"{json.dumps(line)}\n" for line in lines if isinstance(lines, list)).encode()
        elif mutations:
            content = json.dumps(mutate_tree(json.loads(content), mutations)).encode()
        _write_new(path, change_bytes(content, changes))
        try:
            summary_markdown(read_history(folder))
        except ValueError as error:
            _check_error(error)


TARGETS: Mapping[str, tuple[Callable[..., None], Mapping[str, st.SearchStrategy[Any]]]] = {
    "scenarios": (
        read_mutated_scenario,
        {
            "name": st.sampled_from([each.name for each in shipped_scenarios()]),
            "mutations": MUTATIONS,
            "changes": st.one_of(st.just([]), BYTE_CHANGES),
        },
    ),
    "messages": (read_mutated_message, {"which": st.sampled_from(["instruction", "answer"]), "changes": BYTE_CHANGES}),
    "checkpoints": (
        resume_mutated_checkpoint,
        {
            "mutations": st.one_of(st.just([]), MUTATIONS),
            "changes": st.one_of(st.just([]), BYTE_CHANGES),
            "file": st.integers(0, 9),
        },
    ),
    "runs": (
        read_mutated_run,
        {
            "file": st.sampled_from(["results.json", "rounds.jsonl", "shared.json"]),
            "mutations": st.one_of(st.just([]), MUTATIONS),
            "changes": st.one_of(st.just([]), BYTE_CHANGES),
        },
    ),
}
"""By name, what is called, and with which arguments."""


def _check_error(error: Exception) -> None:
    """An error of ours is one that a person can read."""
    assert str(error).strip(), "an error without a word"
    assert "should not happen" not in str(error), str(error)


def _write_new(path: Path, content: bytes) -> None:
    path.unlink()  # links to the same bytes keep them
    path.write_bytes(content)


@functools.cache
def _gallery() -> dict[str, dict[str, Any]]:
    return {
        name: tomllib.loads(find_scenario(name).read_text(encoding="utf-8"))
        for name in (each.name for each in shipped_scenarios())
    }


@functools.cache
def _messages() -> tuple[Codec, Train, Trained]:
    scenario = Scenario.loads(TINY)
    shared = resolve_shared_blocks(scenario)
    start = Start("run", 1, shared.initial.numpy())
    return Codec(shared, scenario), Train(start, 0.0, 0.3), Trained(start.shared + np.float32(0.5), 32, 1, 1.0, 0.5, {})


class _StoppedError(Exception):
    pass


@functools.cache
def _runs() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """Make a finished run and one that was stopped after two rounds."""
    holder = tempfile.TemporaryDirectory(prefix="fuzz-")
    folder = Path(holder.name)

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise _StoppedError

    with LocalEngine(Scenario.loads(TINY), folder / "finished", workers=0) as engine:
        engine.run()
    with suppress(_StoppedError), LocalEngine(Scenario.loads(TINY), folder / "stopped", workers=0) as engine:
        engine.run(stop)
    return holder, folder


class _copy_of_run:
    def __init__(self, finished: bool = False) -> None:
        self._source = _runs()[1] / ("finished" if finished else "stopped")

    def __enter__(self) -> Path:
        self._holder = tempfile.TemporaryDirectory(prefix="fuzz-")
        folder = Path(self._holder.name) / "run"
        shutil.copytree(self._source, folder, copy_function=_link)
        return folder

    def __exit__(self, *_: object) -> None:
        self._holder.cleanup()


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def check(target: str, examples: int, database: bool = False, seconds: float | None = None) -> int:
    """Try examples of a target, until the seconds are over; return how many were tried. Raises what is found."""
    call, arguments = TARGETS[target]
    count, until = 0, time.monotonic() + (seconds or 1e9)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not database,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(**arguments)
    def example(**given: Any) -> None:
        nonlocal count
        if time.monotonic() > until:
            return
        began, count = time.monotonic(), count + 1
        call(**given)
        assert time.monotonic() < began + PATIENCE, "it takes too long"

    example()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--target", choices=[*TARGETS], action="append")
    options = parser.parse_args()
    until, counts, found = time.monotonic() + 60 * options.minutes, dict.fromkeys(options.target or TARGETS, 0), 0
    while time.monotonic() < until:
        for target in counts:
            try:
                rest = until - time.monotonic()
                counts[target] += check(target, 500, database=True, seconds=max(1.0, min(60.0, rest)))
            except Exception:  # noqa: BLE001, whatever it is, it was found
                import traceback

                traceback.print_exc()
                found += 1
            print(", ".join(f"{name}: {count:,}" for name, count in counts.items()), f"failures: {found}", flush=True)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
