"""The knobs as records, and the pages and the JSON schema that are generated from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grpo_fed.aggregation.merge import RULES
from grpo_fed.aggregation.merge.rules import RULES_WITH_EVIDENCE
from grpo_fed.scenario.curricula import CURRICULA
from grpo_fed.scenario.knobs import Knob, list_knobs
from grpo_fed.scenario.methods import MERGE_RULES, METHODS
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.reference import json_schema, knobs_markdown, methods_markdown
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings
from grpo_fed.scenario.toml.keys import all_keys

ROOT = Path(__file__).parents[2]
BY_KEY = {f"{knob.section}.{knob.key}".lstrip("."): knob for knob in list_knobs()}


@pytest.mark.parametrize("knob", list_knobs(), ids=lambda knob: f"{knob.section}.{knob.key}")
def test_every_knob_has_a_sentence_as_its_doc_and_a_type(knob: Knob):
    assert len(knob.doc) > 8
    assert knob.doc.endswith((".", "..."))
    assert knob.type
    assert knob.type != "anything"


def test_every_knob_is_listed_once():
    assert len(BY_KEY) == len(list_knobs()) == len(list(all_keys(Scenario)))


def test_a_knob_has_its_type_default_and_limits():
    assert BY_KEY["objective.clip"] == Knob("objective", "clip", "number", "0.2", "> 0", BY_KEY["objective.clip"].doc)
    assert BY_KEY["seed"].limits == ">= 0, < 2147483648"
    assert BY_KEY["objective.max_grad_norm"].default == "0.5"
    assert BY_KEY["objective.value_clip"].default == "inf"
    assert (BY_KEY["objective.clip_high"].default, BY_KEY["objective.clip_high"].limits) == ("", "> 0")
    assert BY_KEY["policy.hidden"].type == "list of whole number"
    assert BY_KEY["policy.shared"].default == '["torso.*", "actor", "layers.*"]'
    assert BY_KEY["trust.reference"].type == '"old" | "shared" | "start"'
    assert BY_KEY["clients.env"].default == ""


def test_the_page_of_knobs_is_up_to_date():
    assert (ROOT / "docs" / "configuration.md").read_text() == knobs_markdown(), (
        "run: python -m grpo_fed.scenario.reference > docs/configuration.md"
    )


def test_the_json_schema_is_up_to_date():
    assert json.loads((ROOT / "scenarios" / "scenario.schema.json").read_text()) == json_schema(), (
        "run: python -m grpo_fed.scenario.reference --schema > scenarios/scenario.schema.json"
    )


def test_the_page_of_knobs_has_every_knob():
    text = knobs_markdown()
    assert all(f"| `{knob.key}` | " in text for knob in list_knobs())


def test_the_page_of_methods_is_up_to_date():
    assert (ROOT / "docs" / "methods.md").read_text() == methods_markdown(), (
        "run: python -m grpo_fed.scenario.reference --methods > docs/methods.md"
    )


def test_the_page_of_methods_has_every_row_with_values_and_paper():
    tables = methods_markdown().split("## Methods")[1].split("## Constraints")[0]
    for table, rows in zip(re.split("(?<!#)## ", tables), (METHODS, PRESETS, MERGE_RULES, CURRICULA), strict=True):
        lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
        for name, row in rows.items():
            assert row.when
            assert lines[name].startswith(f"| `{name}` | {row.name}. ")
            assert lines[name].endswith(f" | {row.when} |")
    assert '`merge.rule = "mean"`<br>`proximity.mode = "off"`<br>`penalty.squared = 0.01`' in tables
    assert "`trust.line_search = true`" in tables
    assert "[1602.05629](https://arxiv.org/abs/1602.05629): every block" in tables
    assert '`merge.confirm = "returns"`<br>`merge.rejoin = 5`<br>`merge.episodes = 16`' in tables


def test_the_page_of_methods_has_every_constraint_with_the_keys_that_it_reads():
    rows = [line.split(" | ") for line in methods_markdown().split("## Constraints")[1].splitlines() if "| `" in line]
    assert [row[0] for row in rows] == [
        "| `objective.cost.limit`",
        "| `objective.entropy_target`",
        "| `trust.rollback`",
    ]
    assert rows[2][2] == "`trust.rollback_episodes = 16`"
    assert {row[0].strip("| `") for row in rows} <= BY_KEY.keys()


def test_every_merge_rule_is_listed_with_the_keys_that_it_reads():
    assert [name for name in MERGE_RULES if name not in RULES_WITH_EVIDENCE] == list(RULES)
    assert set(RULES_WITH_EVIDENCE) <= MERGE_RULES.keys()
    named, _ = json_schema()["$defs"]["MergeSettings"]["properties"]["rule"]["oneOf"]
    assert set(named["enum"]) == set(MERGE_RULES)
    read_keys = {key for rule in MERGE_RULES.values() for key in rule.keys}
    of_all_rules = {"rule", "kwargs", "weights", "optimiser", "rate", "momentum", "epsilon", "correct_drift", "mix"}
    assert read_keys == set(MergeSettings.model_fields) - of_all_rules
    for name, rule in MERGE_RULES.items():
        for key in rule.keys:
            assert f'`rule = "{name}"`' in BY_KEY[f"merge.{key}"].doc


def test_the_json_schema_has_docs_limits_and_choices():
    sections = json_schema()["$defs"]
    clip = sections["ObjectiveSettings"]["properties"]["clip"]
    assert clip["exclusiveMinimum"] == 0
    assert clip["default"] == 0.2
    assert clip["description"].startswith("How far the probability ratio")
    assert sections["TrustSettings"]["properties"]["region"]["enum"] == ["none", "penalty", "adaptive", "hard"]
    assert sections["ObjectiveSettings"]["additionalProperties"] is False
    assert json_schema()["required"] == ["name", "clients"]
