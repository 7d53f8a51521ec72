from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from grpo_fed.engines.wire import Hello, InvalidMessageError, read_hello, write_hello
from grpo_fed.tasks.task import TaskShape


def test_a_nodes_client_and_task_shape_survive_encoding():
    pictures = TaskShape(60, "categorical", (2,), 500, picture=(4, 5, 3))
    for shape in (None, TaskShape(4, "categorical", (2,), 500), TaskShape(1, "multi-categorical", (2, 3), 0), pictures):
        assert read_hello(write_hello(Hello("cart-1", shape))) == Hello("cart-1", shape)
    with pytest.raises(InvalidMessageError, match=r"hello\.client is 1; it has to be a str"):
        read_hello(RecordDict({"hello": ConfigRecord({"client": 1})}))
    with pytest.raises(InvalidMessageError, match="the records are "):
        read_hello(RecordDict())


FIELDS = {"observation_size": 4, "kind": "categorical", "sizes": [2], "episode_limit": 500}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"observation_size": 0}, r"hello\.observation_size is 0; it has to be from 1 to 262144"),
        ({"observation_size": 2**18 + 1}, r"hello\.observation_size is 262145"),
        ({"observation_size": 4.0}, r"hello\.observation_size is 4\.0; it has to be a int"),
        ({"kind": "any"}, r"hello\.kind is 'any'; there are categorical, multi-categorical, gaussian"),
        ({"sizes": [2, 2]}, r"hello\.sizes is \[2, 2\]; they have to be the sizes of a categorical action"),
        ({"sizes": [0]}, r"hello\.sizes is \[0\]"),
        ({"sizes": []}, r"hello\.sizes is \[\]"),
        ({"sizes": [2**18 + 1]}, r"hello\.sizes is \[262145\]"),
        ({"sizes": [2.0]}, r"hello\.sizes is \[2\.0\]"),
        ({"episode_limit": -1}, r"hello\.episode_limit is -1"),
        ({"picture": [2, 3]}, r"hello\.picture is \[2, 3\]; it has to be two or three sizes whose product is 4"),
        ({"picture": [4]}, r"hello\.picture is \[4\]"),
        ({"picture": [2.0, 2.0]}, r"hello\.picture is \[2\.0, 2\.0\]"),
        ({"more": 1}, r"hello has \['more'\], which is not part of this message"),
    ],
)
def test_an_impossible_task_shape_is_refused(change: dict[str, Any], reason: str):
    assert read_hello(RecordDict({"hello": ConfigRecord({"client": "cart", **FIELDS})})).shape is not None
    with pytest.raises(InvalidMessageError, match=reason):
        read_hello(RecordDict({"hello": ConfigRecord({"client": "cart", **FIELDS, **change})}))
