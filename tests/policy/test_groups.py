"""Parameter groups: how blocks are cut into them, and which errors are refused."""

import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.groups import GroupKind, Groups, IndexSets, cut_groups
from grpo_fed.rl.penalty import group_norms
from grpo_fed.scenario.settings import PolicySettings

SHAPES = {
    "torso.0.weight": (3, 2),
    "torso.0.bias": (3,),
    "actor.weight": (2, 3),
    "actor.bias": (2,),
    "actor.log_std": (2,),
    "critic.weight": (1, 3),
    "critic.bias": (1,),
}
"""Columns 0 to 8 torso.0, 9 to 18 actor, 19 to 22 critic."""


def cut(shapes: Mapping[str, tuple[int, ...]] | nn.Module = SHAPES, **knobs: object) -> Layout:
    named = shapes if isinstance(shapes, nn.Module) else shapes.items()
    return Layout.from_shapes(named, PolicySettings(**knobs))  # type: ignore[arg-type]


def columns_by_name(groups: Groups) -> dict[str, list[int]]:
    """Return the columns of each group by its name, and check that sizes and blocks agree with them."""
    columns_of = {name: (groups.ids == number).nonzero().flatten().tolist() for number, name in enumerate(groups.names)}
    assert groups.ids.dtype == torch.int64
    assert groups.sizes.tolist() == [len(columns) for columns in columns_of.values()]
    assert len(groups.blocks) == len(groups.names)
    return columns_of


# Kinds


def test_a_block_is_one_group_by_default() -> None:
    groups = cut_groups(cut(), {})
    assert columns_by_name(groups) == {"torso.0": [*range(9)], "actor": [*range(9, 19)], "critic": [*range(19, 23)]}
    assert groups.blocks == groups.names


def test_each_tensor_is_a_group() -> None:
    groups = cut_groups(cut(), {"actor": "tensor"})
    assert columns_by_name(groups) == {
        "torso.0": [*range(9)],
        "actor.weight": [9, 10, 11, 12, 13, 14],
        "actor.bias": [15, 16],
        "actor.log_std": [17, 18],
        "critic": [*range(19, 23)],
    }
    assert groups.blocks == ("torso.0", "actor", "actor", "actor", "critic")


def test_a_row_is_an_output_with_bias_and_log_std() -> None:
    assert columns_by_name(cut_groups(cut(), {}, default="row")) == {
        "torso.0.weight:rows[0]": [0, 1, 6],
        "torso.0.weight:rows[1]": [2, 3, 7],
        "torso.0.weight:rows[2]": [4, 5, 8],
        "actor.weight:rows[0]": [9, 10, 11, 15, 17],
        "actor.weight:rows[1]": [12, 13, 14, 16, 18],
        "critic.weight:rows[0]": [19, 20, 21, 22],
    }


def test_a_column_is_an_input_and_other_tensors_are_groups() -> None:
    assert columns_by_name(cut_groups(cut(), {"*": "column"})) == {
        "torso.0.weight:columns[0]": [0, 2, 4],
        "torso.0.weight:columns[1]": [1, 3, 5],
        "torso.0.bias": [6, 7, 8],
        "actor.weight:columns[0]": [9, 12],
        "actor.weight:columns[1]": [10, 13],
        "actor.weight:columns[2]": [11, 14],
        "actor.bias": [15, 16],
        "actor.log_std": [17, 18],
        "critic.weight:columns[0]": [19],
        "critic.weight:columns[1]": [20],
        "critic.weight:columns[2]": [21],
        "critic.bias": [22],
    }


def test_learned_blocks_are_cut_into_rows_or_columns_whichever_are_fewer() -> None:
    groups = cut_groups(cut(), {"torso.*": "learned", "actor": "learned"})
    assert columns_by_name(groups) == {
        "torso.0.weight:columns[0]": [0, 2, 4],
        "torso.0.weight:columns[1]": [1, 3, 5],
        "torso.0.bias": [6, 7, 8],
        "actor.weight:rows[0]": [9, 10, 11, 15, 17],
        "actor.weight:rows[1]": [12, 13, 14, 16, 18],
        "critic": [*range(19, 23)],
    }
    assert groups.learned == {"torso.0", "actor"}
    assert groups.to("cpu").learned == groups.learned
    assert groups.as_blocks.learned == frozenset()
    assert list(columns_by_name(cut_groups(cut({"w": (2, 2)}), {"*": "learned"}))) == ["w:rows[0]", "w:rows[1]"]


def test_vectors_without_a_single_weight_are_groups_of_their_own() -> None:
    shapes = {"norm.weight": (2,), "norm.bias": (2,), "gru.ih": (2, 1), "gru.hh": (2, 2), "gru.b": (2,), "gain": ()}
    assert columns_by_name(cut_groups(cut(shapes), {}, default="row")) == {
        "norm.weight": [0, 1],
        "norm.bias": [2, 3],
        "gru.ih:rows[0]": [4],
        "gru.ih:rows[1]": [5],
        "gru.hh:rows[0]": [6, 7],
        "gru.hh:rows[1]": [8, 9],
        "gru.b": [10, 11],
        "gain": [12],
    }


def test_a_row_holds_no_bias_of_another_block_or_length() -> None:
    layout = cut({"a.weight": (2, 1), "a.bias": (2,), "a.scale": (3,)}, blocks={"biases": ["a.bias"]})
    assert columns_by_name(cut_groups(layout, {}, default="row")) == {
        "a.weight:rows[0]": [0],
        "a.weight:rows[1]": [1],
        "a.scale": [2, 3, 4],
        "a.bias": [5, 6],
    }


def test_rows_and_columns_of_a_convolution_are_its_channels() -> None:
    layout = cut(nn.Sequential(nn.Conv2d(2, 3, 2)))
    weight = np.arange(24).reshape(3, 2, 2, 2)
    rows, columns = (columns_by_name(cut_groups(layout, {"0": kind})) for kind in ("row", "column"))
    assert rows == {f"0.weight:rows[{i}]": [*weight[i].ravel(), 24 + i] for i in range(3)}
    assert columns == {f"0.weight:columns[{i}]": sorted(weight[:, i].ravel()) for i in range(2)} | {
        "0.bias": [24, 25, 26]
    }


def test_patterns_choose_the_kind_and_only_chosen_blocks_are_cut() -> None:
    layout = cut()
    groups = cut_groups(layout, {"torso.*": "tensor", "actor": "row"}, only=layout.select(["actor", "critic"]))
    assert list(columns_by_name(groups)) == ["actor.weight:rows[0]", "actor.weight:rows[1]", "critic"]
    assert groups.blocks == ("actor", "actor", "critic")
    assert groups.ids[:9].tolist() == [-1] * 9
    assert cut_groups(layout, {}, only=()).names == ()


def test_a_tensor_without_entries_has_no_group() -> None:
    assert columns_by_name(cut_groups(cut({"a.weight": (0, 2), "a.bias": (3,)}), {}, default="tensor")) == {
        "a.bias": [0, 1, 2]
    }
    assert columns_by_name(cut_groups(cut({"a.weight": (2, 0), "a.bias": (2,)}), {}, default="row")) == {
        "a.weight:rows[0]": [0],
        "a.weight:rows[1]": [1],
    }


# Index sets


def test_index_sets_and_the_rest_of_each_tensor_are_groups() -> None:
    sets = {
        "lidar": {"torso.0.weight:columns": [1]},
        "first": {"torso.0.weight:entries": [0], "torso.0.bias:rows": [2, 0]},
    }
    assert columns_by_name(cut_groups(cut(), {"torso.*": sets})) == {
        "lidar": [1, 3, 5],
        "first": [0, 6, 8],
        "torso.0.weight:rest": [2, 4],
        "torso.0.bias:rest": [7],
        "actor": [*range(9, 19)],
        "critic": [*range(19, 23)],
    }


def test_a_set_may_hold_tensors_and_crossing_rows_and_columns() -> None:
    sets = {"cross": {"actor.weight:rows": [0], "actor.weight:columns": [0]}, "noise": {"actor.log_std:rows": [0, 1]}}
    groups = cut_groups(cut(), {"actor": sets}, only=cut().select(["actor"]))
    assert columns_by_name(groups) == {
        "cross": [9, 10, 11, 12],
        "noise": [17, 18],
        "actor.weight:rest": [13, 14],
        "actor.bias": [15, 16],
    }


def test_sets_of_one_pattern_belong_to_their_parameters_blocks() -> None:
    sets = {"unit": {"torso.0.bias:rows": [0]}, "action": {"actor.bias:rows": [1]}}
    groups = cut_groups(cut(), {"[ta]*": sets})
    assert dict(zip(groups.names, groups.blocks, strict=True)) == {
        "unit": "torso.0",
        "torso.0.weight": "torso.0",
        "torso.0.bias:rest": "torso.0",
        "action": "actor",
        "actor.weight": "actor",
        "actor.bias:rest": "actor",
        "actor.log_std": "actor",
        "critic": "critic",
    }


@pytest.mark.parametrize(
    ("given_groups", "message"),
    [
        ({"torzo.*": "row"}, 'policy.groups: "torzo.*" matches no block; did you mean "torso.0"?'),
        (
            {"*": "row", "actor": "block"},
            'policy.groups: "*" and "actor" both match "actor"; narrow one of the patterns',
        ),
        (
            {"torso.0": {"lidar": {"torso.0.wieght:columns": [0]}}},
            (
                'policy.groups."torso.0".lidar."torso.0.wieght:columns": no parameter "torso.0.wieght";'
                ' did you mean "torso.0.weight"?'
            ),
        ),
        (
            {"torso.0": {"lidar": {"actor.bias:rows": [0]}}},
            'policy.groups."torso.0".lidar."actor.bias:rows": actor.bias is in block "actor"; write the set there',
        ),
        (
            {"actor": {"left": {"actor.weight:columns": [0, 3, 7]}}},
            'policy.groups.actor.left."actor.weight:columns": [3, 7] is out of range; actor.weight has columns 0 to 2',
        ),
        (
            {"actor": {"left": {"actor.weight:rows": [-1]}}},
            'policy.groups.actor.left."actor.weight:rows": [-1] is out of range; actor.weight has rows 0 to 1',
        ),
        (
            {"actor": {"left": {"actor.bias:columns": [0]}}},
            (
                'policy.groups.actor.left."actor.bias:columns": actor.bias has shape (2,) and no columns;'
                " write actor.bias:entries"
            ),
        ),
        (
            {"actor": {"left": {"actor.weight:columns": [0]}, "up": {"actor.weight:rows": [1]}}},
            (
                'policy.groups.actor.up: actor.weight[1, 0] is in the set "left" too; a parameter belongs to one group:'
                " take it out of one of them"
            ),
        ),
        (
            {"actor": {"left": {}}},
            "policy.groups.actor.left: the set is empty; name some indices, or leave it out",
        ),
        (
            {"*": {"both": {"torso.0.bias:rows": [0], "actor.bias:rows": [0]}}},
            (
                'policy.groups."*".both: the set reaches over the blocks ["torso.0", "actor"]; give each block a set of'
                " its own, or make one block of them in policy.blocks"
            ),
        ),
        (
            {"actor": {"critic": {"actor.bias:rows": [0]}}},
            'policy.groups: two groups are called "critic"; rename the index set',
        ),
    ],
)
def test_an_error_names_the_key_the_value_and_the_cure(
    given_groups: Mapping[str, GroupKind | IndexSets], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cut_groups(cut(), given_groups)


def test_errors_are_reported_for_blocks_that_are_not_chosen_too() -> None:
    layout = cut()
    with pytest.raises(ValueError, match="out of range"):
        cut_groups(layout, {"actor": {"left": {"actor.bias:rows": [2]}}}, only=layout.select(["critic"]))


# Blocks and norms


def test_groups_are_combined_by_block() -> None:
    layout = cut()
    groups = cut_groups(layout, {"*": "column"}, only=layout.select(["torso.*", "critic"]))
    assert columns_by_name(groups.as_blocks) == {"torso.0": [*range(9)], "critic": [*range(19, 23)]}
    assert groups.as_blocks.blocks == ("torso.0", "critic")
    assert groups.block_of_group.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert cut_groups(layout, {}, only=()).as_blocks.names == ()


def test_group_norms_by_hand() -> None:
    groups = cut_groups(cut({"a.weight": (2, 2), "b.weight": (1, 1)}), {"a": "row"})
    x = torch.tensor([[3.0, 4.0, 0.0, -2.0, 7.0], [0.0, 0.0, 5.0, 12.0, -1.0]])
    assert group_norms(x, groups).tolist() == [[5.0, 2.0, 7.0], [0.0, 13.0, 1.0]]


def test_group_norms_neither_overflow_nor_vanish_in_float32() -> None:
    groups = cut_groups(cut({"a.weight": (2, 2)}), {"a": "row"})
    x = torch.tensor([[3e30, 4e30, 3e-30, 4e-30]])
    assert torch.equal(group_norms(x, groups), torch.tensor([[5e30, 5e-30]]))


any_shapes = st.dictionaries(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=80)
@given(any_shapes, st.sampled_from(["block", "tensor", "row", "column", "learned"]), st.data())
def test_groups_partition_the_chosen_blocks_of_any_layout(
    shapes: dict[str, tuple[int, ...]], kind: GroupKind, data: st.DataObject
) -> None:
    layout = cut(shapes)
    only = data.draw(st.lists(st.sampled_from(layout.blocks), unique=True))
    groups = cut_groups(layout, {}, default=kind, only=only)
    columns_of = columns_by_name(groups)
    assert torch.equal(groups.ids >= 0, layout.mask(only))
    assert all(columns_of.values())
    spans = {block.name: range(block.start, block.stop) for block in only}
    for block, columns in zip(groups.blocks, columns_of.values(), strict=True):
        assert all(column in spans[block] for column in columns)
    x = torch.randn(2, layout.size, dtype=torch.float64)
    by_hand = [torch.linalg.vector_norm(x[:, columns], dim=1) for columns in columns_of.values()]
    torch.testing.assert_close(group_norms(x, groups), torch.stack(by_hand, 1) if by_hand else x[:, :0])


def test_groups_by_size_have_every_grouped_column_once() -> None:
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (1, 9), "c.weight": (1, 2)}
    layout = Layout.from_shapes(shapes.items(), PolicySettings())
    sets = {"first": {"b.weight:columns": [0]}, "some": {"b.weight:columns": [4, 5, 6]}}
    groups = cut_groups(layout, {"a": "row", "b": sets}, only=layout.select(["a", "b"]))
    found = {
        groups.names[int(group)]: [int(column) for column in row if column < layout.size]
        for members, columns in groups.by_size
        for group, row in zip(members, columns, strict=True)
    }
    assert found == {
        name: (groups.ids == group).nonzero().squeeze(1).tolist() for group, name in enumerate(groups.names)
    }
    assert all(len(groups.sizes[members].log2().floor().unique()) == 1 for members, _ in groups.by_size)
