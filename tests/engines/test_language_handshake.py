"""Clients with prompts on other machines: their task's shape, the digest of their model, and bases that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from grpo_fed.engines.wire import (
    Codec,
    Hello,
    InvalidMessageError,
    read_hello,
    read_shared_blocks,
    write_hello,
    write_shared_blocks,
)
from grpo_fed.federation.messages import Start, Train
from grpo_fed.policy.make import describe_shape, make_policy_from_shape
from grpo_fed.policy.shared import (
    SharedBlocks,
    resolve_client_shared_blocks,
    resolve_shared_blocks,
    resolve_shared_blocks_from_shapes,
)
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import TaskShape
from tests.support.language_models import write_model
from tests.support.small_language import CLIENTS, words


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two models that differ in their weights alone, and a copy of the first one."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "one"), write_model(folder / "other", seed=1), write_model(folder / "copy")


def shape_of(model: Path | str) -> TaskShape:
    return describe_shape(resolve_tasks(words(f"language.model={model}"))[0])


def blocks_of(model: Path | str, *overrides: str) -> SharedBlocks:
    return resolve_shared_blocks(words(f"language.model={model}", *overrides))


# Shapes --------------------------------------------------------------------------------------------------------------


def test_the_shape_of_a_task_has_the_dimensions_and_the_digest_of_its_model(models: tuple[Path, Path, Path]):
    one, other, copy = (shape_of(model) for model in models)
    assert (one.observation_size, one.kind, one.episode_limit) == (64, "tokens", 6)
    assert one.sizes == (24, 2, 4, 2, 6, 40)  # width, layers, heads, heads of keys, features of a head, inner features
    assert len(one.base) == 64
    assert one == copy
    assert one != other
    assert one.signature == other.signature


def test_a_language_models_shape_survives_a_nodes_greeting(models: tuple[Path, Path, Path]):
    for model in (*models, "tiny"):
        hello = Hello("up", shape_of(model))
        assert read_hello(write_hello(hello)) == hello


FIELDS = {
    "observation_size": 64,
    "kind": "tokens",
    "sizes": [24, 2, 4, 2, 6, 40],
    "episode_limit": 6,
    "base": "0a" * 32,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"observation_size": 0}, r"hello\.observation_size is 0"),
        ({"sizes": [24, 2, 4, 2, 6]}, r"hello\.sizes is \[24, 2, 4, 2, 6\]; they are no language model's"),
        ({"sizes": [24, 2, 4, 2, 6, 40, 1]}, r"they are no language model's"),
        ({"sizes": [24, 0, 4, 2, 6, 40]}, r"they are no language model's: sizes are whole numbers above 0"),
        ({"sizes": [24.0, 2.0, 4.0, 2.0, 6.0, 40.0]}, r"sizes are whole numbers above 0"),
        ({"sizes": [2**18, 2, 4, 2, 6, 40]}, r"sizes are whole numbers above 0, at most 262144 together"),
        ({"base": "0a" * 31}, r"hello\.base is '0a.*; it has to be a SHA-256 digest"),
        ({"base": "0A" * 32}, r"it has to be a SHA-256 digest"),
        ({"base": "0a" * 32 + "\n"}, r"it has to be a SHA-256 digest"),
        ({"base": 1}, r"hello\.base is 1; it has to be a str"),
        ({"episode_limit": 0}, r"hello\.episode_limit is 0"),
        ({"kind": "categorical"}, r"hello\.sizes is .* sizes of a categorical action"),
        ({"kind": "multi-categorical"}, r"hello has \['base'\], which is not part of this message"),
        ({"more": 1}, r"hello has \['more'\]"),
    ],
)
def test_an_impossible_language_model_is_refused(change: dict[str, Any], reason: str):
    assert read_hello(RecordDict({"hello": ConfigRecord({"client": "up", **FIELDS})})).shape is not None
    with pytest.raises(InvalidMessageError, match=reason):
        read_hello(RecordDict({"hello": ConfigRecord({"client": "up", **FIELDS, **change})}))


def test_a_greeting_without_the_digest_of_the_base_is_refused():
    fields = {name: value for name, value in FIELDS.items() if name != "base"}
    with pytest.raises(InvalidMessageError, match=r"base"):
        read_hello(RecordDict({"hello": ConfigRecord({"client": "up", **fields})}))


# Shared blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), ("language.learn=AB", "policy.groups={ '*' = 'tensor' }")])
def test_tasks_shapes_and_block_names_give_the_same_shared_blocks(
    models: tuple[Path, Path, Path], overrides: tuple[str, ...]
):
    given = words(f"language.model={models[0]}", *overrides)
    tasks, blocks = resolve_tasks(given), resolve_shared_blocks(given)
    shapes = {task.client: describe_shape(task) for task in tasks}
    from_shapes = resolve_shared_blocks_from_shapes(given, shapes)
    assert from_shapes.digest == blocks.digest
    assert from_shapes.base == blocks.base == shapes["up"].base
    assert from_shapes.max_episode_steps == blocks.max_episode_steps == 6
    assert torch.equal(from_shapes.initial, blocks.initial)
    policy = make_policy_from_shape(shapes["up"], given)
    assert policy.layout.size == blocks.size
    for task in tasks:
        assert resolve_client_shared_blocks(given, task, blocks.blocks).digest == blocks.digest


def test_a_client_whose_base_differs_is_named_with_both_digests(models: tuple[Path, Path, Path]):
    one, other, copy = (shape_of(model) for model in models)
    given = words(f"language.model={models[0]}")
    same = resolve_shared_blocks_from_shapes(given, dict(zip(CLIENTS, (one, copy, one), strict=True)))
    assert same.base == one.base
    reason = (
        f"client down has another base .sha256 {other.base[:12]}.* than client up .{one.base[:12]}.*"
        "give all clients the same files"
    )
    with pytest.raises(ValueError, match=reason):
        resolve_shared_blocks_from_shapes(given, dict(zip(CLIENTS, (one, copy, other), strict=True)))
    nothing = words(f"language.model={models[0]}", "policy.shared=[]")
    alone = resolve_shared_blocks_from_shapes(nothing, dict(zip(CLIENTS, (one, copy, other), strict=True)))
    assert (alone.size, alone.base) == (0, "")


def test_the_base_is_part_of_what_is_shared(models: tuple[Path, Path, Path]):
    one, other, copy = (blocks_of(model) for model in models)
    assert one.digest == copy.digest
    assert one.digest != other.digest
    assert blocks_of(models[0], "language.rank=1").digest != one.digest
    nothing = [blocks_of(model, "policy.shared=[]") for model in models[:2]]
    assert nothing[0].digest == nothing[1].digest


def test_a_client_with_another_base_refuses_instructions(models: tuple[Path, Path, Path]):
    server, other, copy = (blocks_of(model) for model in models)
    given = words(f"language.model={models[0]}")

    def codec(blocks: SharedBlocks) -> Codec:
        return Codec(blocks, given)

    train = Train(Start("run", 1, np.zeros(server.size, np.float32)), 0.0, 0.5)
    content = codec(server).write_instruction(train)
    content["shared_blocks"] = write_shared_blocks(server)
    assert read_shared_blocks(content) == ("layers.0", "layers.1")
    assert isinstance(codec(copy).read_instruction("train", content), Train)
    reason = f"this client's base has the digest '{other.base[:12]}.*', .* share adapters of '{server.base[:12]}"
    with pytest.raises(InvalidMessageError, match=reason):
        codec(other).read_instruction("train", content)
    del content["shared_blocks"]["base"]
    with pytest.raises(InvalidMessageError, match=r"language\.model: this client's base"):
        codec(copy).read_instruction("train", content)
