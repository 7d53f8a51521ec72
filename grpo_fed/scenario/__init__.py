"""The TOML file that defines a run: read strictly, completed with defaults, and checked.

    settings.py     every knob, with its default, limits and meaning
    scenario.py     Scenario: all sections together, from TOML and back
    presets.py      rows of values for what a client optimises: ppo, trpo, grpo, ...
    methods.py      rows of values for how clients share: fedavg, ditto, grpo, ...
    curricula.py    how the levels of a client's task are chosen, in a table
    tables.py       what such rows are, and how a user's own is found
    importing.py    objects that a scenario names by `module:Name`
    extras.py       how to install the packages that only some users need
    field_types.py  types of values that settings take
    checks.py       contradictions between keys
    curriculum_checks.py contradictions of levels, and of who moves them
    network_checks.py    contradictions between a network, its memory and how it learns
    constraint_checks.py contradictions of the constraints that a client keeps
    hostile_checks.py contradictions of hostile clients and of mixing
    privacy_checks.py what a private run may not compute from single clients
    score_checks.py contradictions of the returns that normalise scores
    sites.py        which clients a site has, and the settings that it merges them by
    site_checks.py  contradictions of sites
    newcomers.py    clients that join a running deployment, and where none can
    language_checks.py contradictions of clients with prompts
    unused.py       keys that were given and have no effect
    unused_rows.py  what a row of that table says
    unused_table.py the combinations in which a key has none
    unused_language.py the same for clients with prompts
    unused_constraints.py the same for the constraints that a client keeps
    unused_setups.py the same for what runs start from, and for scaled rewards
    toml/           the strict TOML reader, which knows nothing of scenarios: positions, errors with a cure, writing
    own_arguments.py the scenario as one client may read it
    shipped.py      the scenarios that ship
    template.py     a folder to start a project from
    knobs.py        every knob as a record
    reference.py    generated documentation of all knobs

Begin with settings.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.scenario.methods import AVERAGE, MERGE_RULES, METHODS, MergeRule, Method
    from grpo_fed.scenario.presets import PRESETS, Preset
    from grpo_fed.scenario.scenario import Scenario
    from grpo_fed.scenario.settings import (
        CheckpointSettings,
        ClientSettings,
        CurriculumSettings,
        EvaluateSettings,
        GroupSettings,
        MergeSettings,
        NewcomerSettings,
        NormaliseSettings,
        ObjectiveSettings,
        PenaltySettings,
        PersonalSettings,
        PolicySettings,
        PrivacySettings,
        ProximitySettings,
        RolloutSettings,
        RoundSettings,
        Section,
        SiteSettings,
        SteeringSettings,
        StopSettings,
        TrustSettings,
        WireSettings,
    )
    from grpo_fed.scenario.shipped import find_scenario, shipped_scenarios
    from grpo_fed.scenario.toml.source import ScenarioError

__all__ = [
    "AVERAGE",
    "MERGE_RULES",
    "METHODS",
    "PRESETS",
    "CheckpointSettings",
    "ClientSettings",
    "CurriculumSettings",
    "EvaluateSettings",
    "GroupSettings",
    "MergeRule",
    "MergeSettings",
    "Method",
    "NewcomerSettings",
    "NormaliseSettings",
    "ObjectiveSettings",
    "PenaltySettings",
    "PersonalSettings",
    "PolicySettings",
    "Preset",
    "PrivacySettings",
    "ProximitySettings",
    "RolloutSettings",
    "RoundSettings",
    "Scenario",
    "ScenarioError",
    "Section",
    "SiteSettings",
    "SteeringSettings",
    "StopSettings",
    "TrustSettings",
    "WireSettings",
    "find_scenario",
    "shipped_scenarios",
]

MODULES = {
    "AVERAGE": "grpo_fed.scenario.methods",
    "CheckpointSettings": "grpo_fed.scenario.settings",
    "ClientSettings": "grpo_fed.scenario.settings",
    "CurriculumSettings": "grpo_fed.scenario.settings",
    "EvaluateSettings": "grpo_fed.scenario.settings",
    "GroupSettings": "grpo_fed.scenario.settings",
    "MERGE_RULES": "grpo_fed.scenario.methods",
    "METHODS": "grpo_fed.scenario.methods",
    "MergeRule": "grpo_fed.scenario.methods",
    "MergeSettings": "grpo_fed.scenario.settings",
    "Method": "grpo_fed.scenario.methods",
    "NewcomerSettings": "grpo_fed.scenario.settings",
    "NormaliseSettings": "grpo_fed.scenario.settings",
    "ObjectiveSettings": "grpo_fed.scenario.settings",
    "PRESETS": "grpo_fed.scenario.presets",
    "PenaltySettings": "grpo_fed.scenario.settings",
    "PersonalSettings": "grpo_fed.scenario.settings",
    "PolicySettings": "grpo_fed.scenario.settings",
    "Preset": "grpo_fed.scenario.presets",
    "PrivacySettings": "grpo_fed.scenario.settings",
    "ProximitySettings": "grpo_fed.scenario.settings",
    "RolloutSettings": "grpo_fed.scenario.settings",
    "RoundSettings": "grpo_fed.scenario.settings",
    "Scenario": "grpo_fed.scenario.scenario",
    "ScenarioError": "grpo_fed.scenario.toml.source",
    "Section": "grpo_fed.scenario.settings",
    "SiteSettings": "grpo_fed.scenario.settings",
    "SteeringSettings": "grpo_fed.scenario.settings",
    "StopSettings": "grpo_fed.scenario.settings",
    "TrustSettings": "grpo_fed.scenario.settings",
    "WireSettings": "grpo_fed.scenario.settings",
    "find_scenario": "grpo_fed.scenario.shipped",
    "shipped_scenarios": "grpo_fed.scenario.shipped",
}

__getattr__ = lazy_getattr(__name__, MODULES)
