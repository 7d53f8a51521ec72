"""Parameters as blocks: any module can be cut, and nothing is lost on any way between its forms."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grpo_fed.policy.blocks import Layout
from grpo_fed.scenario.settings import PolicySettings

SHAPES = {
    "torso.0.weight": (3, 2),
    "torso.0.bias": (3,),
    "actor.weight": (2, 3),
    "actor.bias": (2,),
    "actor.log_std": (2,),
    "critic.0.weight": (3, 2),
    "critic.head.bias": (1,),
    "adapter.weight": (2, 5),
}


def cut(shapes: dict[str, tuple[int, ...]] | nn.Module = SHAPES, **knobs: object) -> Layout:
    return Layout.from_shapes(shapes if isinstance(shapes, nn.Module) else shapes.items(), PolicySettings(**knobs))  # type: ignore[arg-type]


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32)


class Nested(nn.Module):
    """Modules within modules, a parameter of its own at the top, another one in between, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.left = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))})
        self.left.offset = nn.Parameter(torch.ones(4))
        self.memory = nn.GRU(2, 2)


def multilayer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(6.0).reshape(2, 3))


# Cutting


def test_a_parameter_belongs_to_the_block_of_its_module_and_critic_and_adapter_are_one_block_each() -> None:
    layout = cut()
    assert [(block.name, block.start, block.stop) for block in layout.blocks] == [
        ("torso.0", 0, 9),
        ("actor", 9, 19),
        ("critic", 19, 26),
        ("adapter", 26, 36),
    ]
    assert [slot.name for slot in layout.blocks[1].slots] == ["actor.weight", "actor.bias", "actor.log_std"]
    assert [block.name for block in layout.shared] == ["torso.0", "actor"]
    assert layout.size == 36


def test_slots_and_blocks_follow_each_other_without_gaps() -> None:
    layout = cut(blocks={"heads": ["actor", "critic.head.*"]})
    for parts in (layout.slots, layout.blocks):
        assert [part.stop for part in parts] == [part.start for part in parts[1:]] + [layout.size]
        assert parts[0].start == 0
    for block in layout.blocks:
        assert (block.slots[0].start, block.slots[-1].stop) == (block.start, block.stop)
        assert {slot.block for slot in block.slots} == {block.name}


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (multilayer, ["0", "2"]),
        (convolutional, ["0", "3", "4"]),
        (Nested, ["gain", "left", "left.deep.0", "left.deep.2", "memory"]),
        (Bare, ["table"]),
    ],
)
def test_any_module_can_be_cut_and_goes_through_the_flat_tensor_unchanged(build: type, blocks: list[str]) -> None:
    modules = [build() for _ in range(3)]
    layout = cut(modules[0], shared=["*"])
    assert sorted(block.name for block in layout.blocks) == blocks
    assert layout.size == sum(parameter.numel() for parameter in modules[0].parameters())
    flat = layout.stack([module.state_dict() for module in modules])
    for client, (module, state) in enumerate(zip(modules, layout.unstack(flat), strict=True)):
        for name, parameter in module.named_parameters():
            assert torch.equal(layout.views(flat)[name][client], parameter)
        other = build()
        other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_a_module_computes_on_views_what_it_computes_itself() -> None:
    module = convolutional()
    layout = cut(module)
    flat = layout.stack([module.state_dict()])
    images = torch.randn(5, 1, 3, 3)
    views = {name: view[0] for name, view in layout.views(flat).items()}
    assert torch.equal(torch.func.functional_call(module, views, (images,)), module(images))


def test_own_blocks_take_parameters_and_whole_blocks_by_pattern() -> None:
    layout = cut(blocks={"first": ["torso.*", "adapter"], "spread": ["*.log_std"]}, shared=["first"])
    assert {block.name: [slot.name for slot in block.slots] for block in layout.blocks} == {
        "first": ["torso.0.weight", "torso.0.bias", "adapter.weight"],
        "actor": ["actor.weight", "actor.bias"],
        "spread": ["actor.log_std"],
        "critic": ["critic.0.weight", "critic.head.bias"],
    }
    assert [block.name for block in layout.shared] == ["first"]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        (
            {"blocks": {"trunk": ["torzo.*"]}},
            'policy.blocks.trunk: "torzo.*" matches no parameter; did you mean "torso.0"?',
        ),
        (
            {"blocks": {"trunk": ["zzz"]}},
            'policy.blocks.trunk: "zzz" matches no parameter; there are ["torso.0.weight", "torso.0.bias",',
        ),
        (
            {"blocks": {"trunk": ["torso.*"], "biases": ["*.bias"]}},
            'policy.blocks: "trunk" and "biases" both match "torso.0.bias"; narrow one of the patterns',
        ),
        (
            {"blocks": {"actor": ["torso.*"]}},
            "policy.blocks.actor: actor.weight is in a block of this name already; choose another name, or take all",
        ),
        ({"shared": ["actr"]}, 'policy.shared: "actr" matches no block; did you mean "actor"?'),
    ],
)
def test_a_mistake_is_told_with_its_knob_its_value_and_the_cure(knobs: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        cut(**knobs)


def test_what_cannot_be_cut_is_told() -> None:
    with pytest.raises(ValueError, match=r"policy.module: parameters \[\"a\"\] are named twice"):
        Layout.from_shapes([("a", (2,)), ("b", (1,)), ("a", (3,))], PolicySettings())
    with pytest.raises(ValueError, match="no parameters; there is nothing to learn"):
        cut(nn.Tanh())
    with pytest.raises(ValueError, match=r"0\.weight is float64; make it float32 by module\.float\(\)"):
        cut(nn.Sequential(nn.Linear(2, 2)).double())
    with pytest.raises(ValueError, match="weight has no shape yet; pass an input"):
        cut(nn.LazyLinear(3))


def test_nothing_shared_by_default_in_a_policy_without_a_torso_is_no_mistake() -> None:
    assert cut({"body.weight": (2, 2)}).shared == ()
    assert [block.name for block in cut({"actor.weight": (2, 2)}).shared] == ["actor"]


# Choosing


def test_select_takes_blocks_by_pattern_in_the_layouts_order_and_tells_what_takes_none() -> None:
    layout = cut()
    assert [block.name for block in layout.select(["critic", "torso.*", "t*"])] == ["torso.0", "critic"]
    assert layout.select([]) == ()
    with pytest.raises(ValueError, match=r'^penalty.blocks: "critik" matches no block; did you mean "critic"\?$'):
        layout.select(["*", "critik"], "penalty.blocks")


def test_mask_is_true_on_the_columns_of_the_blocks_alone() -> None:
    layout = cut()
    mask = layout.mask(layout.select(["actor", "adapter"]))
    assert mask.nonzero().flatten().tolist() == [*range(9, 19), *range(26, 36)]
    assert not layout.mask([]).any()


# Views


def test_views_are_the_same_memory_for_torch_and_numpy() -> None:
    layout = cut(blocks={"heads": ["actor", "critic.head.*"]})
    flat = torch.zeros(3, layout.size)
    tensors, arrays = layout.views(flat), layout.views(flat.numpy())
    for number, slot in enumerate(layout.slots, 1):
        tensors[slot.name].fill_(number)
        assert arrays[slot.name].shape == (3, *slot.shape)
        assert (arrays[slot.name] == number).all()
        arrays[slot.name] += 0.5
        assert (flat[:, slot.start : slot.stop] == number + 0.5).all()
        assert tensors[slot.name].data_ptr() == flat.data_ptr() + 4 * slot.start == arrays[slot.name].ctypes.data
    assert (flat != 0).all()


def test_views_of_a_part_of_the_clients_or_of_one_are_the_same_memory_too() -> None:
    layout = cut()
    flat = torch.zeros(4, layout.size)
    layout.views(flat[1:3])["actor.bias"].fill_(1.0)
    layout.views(flat[3])["actor.bias"].fill_(2.0)
    layout.views(flat.numpy()[0])["actor.bias"][:] = 3.0
    start = next(slot.start for slot in layout.slots if slot.name == "actor.bias")
    assert flat[:, start].tolist() == [3.0, 1.0, 1.0, 2.0]
    assert flat.sum() == 2 * (3 + 1 + 1 + 2)


def test_gradients_flow_through_views_to_the_flat_tensor() -> None:
    layout = cut()
    flat = torch.randn(2, layout.size, requires_grad=True)
    loss = sum((number * view).sum() for number, view in enumerate(layout.views(flat).values()))
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, flat)
    for number, slot in enumerate(layout.slots):
        assert (gradient[:, slot.start : slot.stop] == number).all()


def test_unstacked_states_own_their_memory() -> None:
    layout = cut()
    flat = torch.zeros(2, layout.size)
    state = layout.unstack(flat)[1]
    state["actor.bias"].fill_(1.0)
    assert not flat.any()
    assert state["actor.bias"].untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"actor.bia": torch.zeros(2)}, r'^actor.bia: not a parameter of this policy; did you mean "actor.bias"\?$'),
        ({"actor.bias": None}, r'^actor.bias: missing; a policy needs all of \["torso.0.weight",'),
        (
            {"actor.bias": torch.zeros(3)},
            r"^actor.bias: float32 of shape \(3,\) where the policy has float32 of shape \(2,\)$",
        ),
        ({"actor.bias": torch.zeros(2, dtype=torch.float16)}, r"^actor.bias: float16 of shape \(2,\) where"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changed: dict[str, Tensor | None], says: str) -> None:
    layout = cut()
    state = {**layout.unstack(torch.zeros(1, layout.size))[0], **changed}
    with pytest.raises(ValueError, match=says):
        layout.stack([{name: value for name, value in state.items() if value is not None}])


def test_flatten_refuses_other_shapes() -> None:
    layout = cut()
    values = {**layout.views(torch.zeros(2, layout.size)), "actor.weight": torch.zeros(2, 3, 2)}
    with pytest.raises(ValueError, match=r"^actor.weight: shape \(2, 3, 2\) where the policy has \(2, 3\)$"):
        layout.flatten(values)


# Any layout

names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
layouts = st.tuples(
    st.dictionaries(names, shapes, min_size=1, max_size=8),
    st.sampled_from([{}, {"A": ["a*"]}, {"A": ["a", "a.*"], "B": ["*.b"]}, {"all": ["*"]}]),
)


def any_layout(drawn: tuple[dict[str, tuple[int, ...]], dict[str, list[str]]]) -> Layout:
    """The layout as drawn, or without own blocks where their patterns take nothing, or something twice."""
    given_shapes, blocks = drawn
    try:
        return cut(given_shapes, blocks=blocks)
    except ValueError:
        return cut(given_shapes)


@settings(deadline=None, max_examples=80)
@given(layouts, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_flat_views_states_and_stacked_are_the_same_bits(
    drawn: tuple[dict[str, tuple[int, ...]], dict[str, list[str]]], clients: int, seed: int
) -> None:
    layout = any_layout(drawn)
    assert {slot.name: slot.shape for slot in layout.slots} == drawn[0]
    anything = np.random.default_rng(seed).integers(0, 2**32, (clients, layout.size), np.uint32)  # with NaN and -0
    flat = torch.from_numpy(anything.view(np.float32))
    views, arrays = layout.views(flat), layout.views(flat.numpy())
    for slot in layout.slots:
        assert views[slot.name].shape == (clients, *slot.shape)
        assert np.shares_memory(arrays[slot.name], flat.numpy()) or not slot.size
        assert np.array_equal(arrays[slot.name].view(np.uint32), views[slot.name].numpy().view(np.uint32))
    assert torch.equal(bits(layout.flatten(views)), bits(flat))
    assert torch.equal(bits(layout.flatten(layout.views(flat[0]))), bits(flat[0]))
    states = layout.unstack(flat)
    assert len(states) == clients
    assert torch.equal(bits(layout.stack(states)), bits(flat))
    assert torch.equal(sum(layout.mask([block]).int() for block in layout.blocks), torch.ones(layout.size))  # type: ignore[arg-type]
