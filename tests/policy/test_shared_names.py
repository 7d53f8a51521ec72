"""The names of shared blocks and groups, to JSON and back."""

from __future__ import annotations

import json

import pytest

from grpo_fed.policy.shared_names import SharedNames

NAMES = SharedNames(("torso.0", "actor"), {"torso.0.weight:rows[1]": "torso.0", "actor": "actor"})


def test_shared_names_survive_json_with_the_order_of_blocks_and_groups():
    document = json.loads(json.dumps(NAMES.to_json()))
    assert document == {
        "blocks": ["torso.0", "actor"],
        "block_of_group": {"torso.0.weight:rows[1]": "torso.0", "actor": "actor"},
    }
    read = SharedNames.from_json(document)
    assert read == NAMES
    assert read.groups == ("torso.0.weight:rows[1]", "actor")


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"blocks": ["actor"]},
        {"blocks": "actor", "block_of_group": {}},
        {"blocks": [1], "block_of_group": {}},
        {"blocks": ["actor"], "block_of_group": ["actor"]},
        {"blocks": ["actor"], "block_of_group": {"actor": "torso.0"}},
        {"blocks": ["actor"], "block_of_group": {"actor": None}},
    ],
)
def test_another_document_is_refused(document: object):
    with pytest.raises(ValueError, match="not the names of shared blocks"):
        SharedNames.from_json(document)
