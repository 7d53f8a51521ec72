"""Adapters as a policy: their blocks, their first values, and distances and means of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_fed.policy.groups import cut_groups
from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.shape import ModelShape
from grpo_fed.scenario.settings import LanguageSettings, PolicySettings

SHAPE = ModelShape(width=24, layers=2, heads=4, kv_heads=2, head_width=6, inner=40)


def adapters(policy: PolicySettings | None = None, **language: object) -> AdapterPolicy:
    settings = LanguageSettings.model_validate({"rank": 3, **language})
    return AdapterPolicy(SHAPE, settings, policy or PolicySettings())


def test_a_layer_is_a_block_and_a_map_a_group():
    policy = adapters()
    assert [block.name for block in policy.layout.blocks] == ["layers.0", "layers.1"]
    assert all(block.shared for block in policy.layout.blocks)
    groups = cut_groups(policy.layout, {"layers.*": "tensor"})
    assert groups.names[:2] == ("layers.0.q_proj.B", "layers.0.k_proj.B")
    assert len(groups.names) == 14
    assert {policy.chain_of(slot.name) for slot in policy.layout.slots} == {"layers"}


def test_a_layer_is_two_blocks_where_both_factors_learn():
    policy = adapters(learn="AB")
    assert [block.name for block in policy.layout.blocks] == ["layers.0.A", "layers.0.B", "layers.1.A", "layers.1.B"]


def test_a_scenario_can_share_one_factor_alone_and_name_blocks_of_its_own():
    policy = adapters(PolicySettings(shared=["*.A"]), learn="AB")
    assert [block.name for block in policy.layout.shared] == ["layers.0.A", "layers.1.A"]
    policy = adapters(PolicySettings(blocks={"values": ["layers.*.v_proj.B"]}, shared=["values"]))
    assert [slot.name for block in policy.layout.shared for slot in block.slots] == [
        "layers.0.v_proj.B",
        "layers.1.v_proj.B",
    ]


def test_shapes_need_no_weights():
    policy = adapters()
    other = AdapterPolicy(ModelShape.from_sizes(SHAPE.to_sizes()), LanguageSettings(rank=3), PolicySettings())
    assert policy.layout == other.layout
    sizes = {slot.name.split(".")[2]: slot.shape for slot in policy.layout.slots}
    assert sizes == {
        "q_proj": (24, 3),
        "k_proj": (12, 3),
        "v_proj": (12, 3),
        "o_proj": (24, 3),
        "gate_proj": (40, 3),
        "up_proj": (40, 3),
        "down_proj": (24, 3),
    }


def test_initial_adapters_add_nothing():
    assert not adapters().initial(0).any()
    policy = adapters(learn="AB")
    values = policy.layout.views(policy.initial(0))
    assert not any(value.any() for name, value in values.items() if name.endswith(".B"))
    factor = values["layers.0.q_proj.A"]
    torch.testing.assert_close(factor @ factor.T, torch.eye(3), atol=1e-6, rtol=0)


def test_frozen_factors_depend_on_seed_name_and_shape_alone():
    few, all_maps = adapters(maps=["v_proj"]).frozen_factors(5), adapters().frozen_factors(5)
    assert set(few) == {"layers.0.v_proj.A", "layers.1.v_proj.A"}
    for name, factor in few.items():
        assert torch.equal(factor, all_maps[name])
        assert not torch.allclose(factor, adapters().frozen_factors(6)[name])
    assert not torch.allclose(*few.values())
    assert adapters(learn="AB").frozen_factors(5) == {}


def test_distances_of_learned_factors_are_distances_of_weights():
    policy = adapters()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, policy.layout.size, generator=generator)
    one, two = policy.layout.views(first), policy.layout.views(second)
    for name, factor in policy.frozen_factors(0).items():
        own = name.removesuffix("A") + "B"
        difference = one[own] - two[own]
        assert float((difference @ factor).norm()) == pytest.approx(float(difference.norm()), rel=1e-5)


def test_the_mean_of_adapters_is_the_adapter_of_the_mean_only_where_one_factor_is_frozen():
    # Rank 1 and scalars: clients with A = 1, B = 2 and A = 3, B = 4. The mean of the products is (2 + 12) / 2 = 7, and
    # the product of the means is 2 * 3 = 6. With A = 1 for both it is (2 + 4) / 2 = 3 and 1 * 3 = 3.
    a, b = np.array([1.0, 3.0]), np.array([2.0, 4.0])
    assert (a * b).mean() == 7
    assert a.mean() * b.mean() == 6
    policy = adapters()
    stack = torch.randn(5, policy.layout.size, generator=torch.Generator().manual_seed(0))
    views, mean = policy.layout.views(stack), policy.layout.views(stack.mean(0))
    for name, factor in policy.frozen_factors(0).items():
        own = name.removesuffix("A") + "B"
        torch.testing.assert_close((views[own] @ factor).mean(0), mean[own] @ factor, atol=1e-5, rtol=1e-5)


def test_alpha_scales_the_product():
    assert adapters().scale == 1
    assert adapters(alpha=6.0).scale == 2


def test_ranks_and_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"language.rank: 25 orthonormal rows do not fit into the 24 inputs of q_proj"):
        adapters(rank=25)
    assert adapters(rank=25, maps=["down_proj"]).rank == 25
    with pytest.raises(ValueError, match=r'language.maps: "q_prj" matches no linear map; did you mean .q_proj'):
        adapters(maps=["q_prj"])
