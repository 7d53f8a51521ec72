"""An app's arrays are cut into blocks by patterns of their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_fed.flower.array_blocks import cut_array_blocks, fill_arrays, join_arrays
from tests.support.goal_app import ARRAYS, BLOCKS


def test_arrays_are_in_the_blocks_of_their_patterns_and_others_in_none():
    shared = cut_array_blocks(ARRAYS, BLOCKS)
    assert shared.blocks == ("torso", "actor")
    assert {name: (part.start, part.stop) for name, part in shared.slices.items()} == {
        "torso": (0, 63),
        "actor": (63, 123),
    }
    assert shared.groups.names == ("torso", "actor")


def test_without_blocks_each_module_is_one_and_counters_are_in_none():
    assert cut_array_blocks(ARRAYS).blocks == ("torso", "actor", "critic")


def test_rows_of_an_array_can_be_groups():
    shared = cut_array_blocks({"actor.weight": np.zeros((2, 3), np.float32)}, groups="row")
    assert shared.groups.names == ("actor.weight:rows[0]", "actor.weight:rows[1]")
    assert shared.groups.ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_blocks_of_a_chain_are_in_one_and_others_in_their_own():
    blocks = {**BLOCKS, "critic": ["critic.*"]}
    assert cut_array_blocks(ARRAYS, blocks, [["torso", "actor"]]).groups.chains == ("torso", "torso", "critic")


def test_arrays_become_a_vector_and_the_vector_arrays_of_the_same_types():
    arrays = {"a.weight": np.array([[1, 2]], np.float16), "n": np.array(7), "b.weight": np.array([3], np.float32)}
    shared = cut_array_blocks(arrays)
    point = join_arrays(shared.layout, arrays)
    assert point.tolist() == [1, 2, 3]
    filled = fill_arrays(shared.layout, arrays, point + torch.tensor([1.0, 2.0, 3.0]))
    assert {name: (array.dtype.name, array.tolist()) for name, array in filled.items()} == {
        "a.weight": ("float16", [[2, 4]]),
        "n": ("int64", 7),
        "b.weight": ("float32", [6]),
    }


@pytest.mark.parametrize(
    ("blocks", "chains", "text"),
    [
        ({"head": ["actr.*"]}, (), 'blocks.head: "actr.*" matches no array'),
        ({"a": ["torso.*"], "b": ["*.bias"]}, (), 'blocks: "a" and "b" both match "torso.bias"; narrow one'),
        ({"a": ["steps"]}, (), "blocks.a: none of its arrays is of float32, so none can be merged"),
        ({"a": "torso.*"}, (), r"blocks: \"a\" has one text; write a list of patterns, \['torso"),
        ({}, (), "blocks: is empty, so that nothing is shared; leave it out to share all arrays"),
        (BLOCKS, [["torso", "actr"]], 'chains: there is no block "actr"; did you mean "actor"'),
        (BLOCKS, [["actor", "torso"]], "is not the order of blocks"),
        (BLOCKS, [["torso"], ["torso", "actor"]], 'chains: "torso" is in two chains'),
    ],
)
def test_what_does_not_fit_is_named(blocks: dict[str, list[str]], chains: list[list[str]], text: str):
    with pytest.raises(ValueError, match=text.replace("*", r"\*")):
        cut_array_blocks(ARRAYS, blocks, chains)


def test_a_model_of_float64_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"a is float64, and merges are made in float32; convert the model"):
        cut_array_blocks({"a": np.zeros(2)})


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"a.weight": np.zeros(2, np.float32)}, 'no array "b.weight"'),
        ({"a.weight": np.zeros(3, np.float32)}, r"a.weight has shape \(3,\); the server's has \(2,\)"),
        ({"a.weight": np.full(2, np.nan, np.float32), "b.weight": np.zeros(1, np.float32)}, "an array is not finite"),
    ],
)
def test_arrays_that_do_not_fit_the_blocks_are_refused(arrays: dict[str, np.ndarray], text: str):
    shared = cut_array_blocks({"a.weight": np.zeros(2, np.float32), "b.weight": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=text):
        join_arrays(shared.layout, arrays)
