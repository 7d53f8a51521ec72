"""The scenario: all of a run.

A scenario is frozen data, and complete as soon as it exists: what its preset says is filled in, and what contradicts
itself is refused. `Scenario.load` reads one from TOML (read.py) and lists all that is wrong with it.

What merely rests (the KL's weight where there is no KL) may be set; what contradicts (a hard region without the natural
step) may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Lt, MinLen
from pydantic import Field, model_validator

from grpo_fed.scenario import methods, presets
from grpo_fed.scenario import tables as rows
from grpo_fed.scenario.checks import contradictions
from grpo_fed.scenario.defaults import default_merge_threshold, is_complete
from grpo_fed.scenario.field_types import NAMED_OR_OWN, Count, Device, Name, Named, OwnPath
from grpo_fed.scenario.settings import (
    CheckpointSettings,
    ClientSettings,
    EvaluateSettings,
    GroupSettings,
    MergeSettings,
    NormaliseSettings,
    ObjectiveSettings,
    PenaltySettings,
    PersonalSettings,
    PolicySettings,
    ProximitySettings,
    RolloutSettings,
    RoundSettings,
    Section,
    StopSettings,
    TrustSettings,
)
from grpo_fed.scenario.toml import reading as read


class Scenario(Section):
    """All of a run."""

    name: Annotated[Name, Field(examples=["poles"])]
    """In folders, metrics and titles."""
    description: str = ""
    """What it shows."""
    method: Annotated[
        Annotated[
            Literal[
                "grpo", "local", "fedavg", "fedprox", "fedper", "fedrep", "lg", "ditto", "fedkl", "fisher", "clusters"
            ],
            Named,
        ]
        | OwnPath,
        NAMED_OR_OWN,
    ] = "grpo"
    """A row of the table in `methods.py`, or `module:NAME` for one of your own: what keys not given here take."""
    rounds: Count = 30
    """How often the clients train."""
    steps: Count = 2048
    """Environment steps for each client and round."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Everything random comes from here; a client's draws depend on it and on the client's name alone."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where there is one."""
    policy: PolicySettings = PolicySettings()
    rollout: RolloutSettings = RolloutSettings()
    normalise: NormaliseSettings = NormaliseSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    group: GroupSettings = GroupSettings()
    trust: TrustSettings = TrustSettings()
    penalty: PenaltySettings = PenaltySettings()
    personal: PersonalSettings = PersonalSettings()
    merge: MergeSettings = MergeSettings()
    proximity: ProximitySettings = ProximitySettings()
    round: RoundSettings = RoundSettings()
    stop: StopSettings = StopSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    clients: Annotated[list[ClientSettings], MinLen(1), Field(examples=[[{"name": "cart", "env": "CartPole-v1"}]])]
    """Who learns."""

    @classmethod
    def load(cls, path: str | FilePath, overrides: Sequence[str] = ()) -> Self:
        """From a TOML file, with `overrides` such as "objective.clip=0.3"; `read.ScenarioError` lists all mistakes."""
        return read.load(cls, path, overrides, methods.clear_replaced_method)

    @classmethod
    def loads(cls, text: str, name: str = "scenario", overrides: Sequence[str] = ()) -> Self:
        """From a TOML text; `name` stands for the file in errors."""
        return read.loads(cls, text, name, overrides, methods.clear_replaced_method)

    def dumps(self) -> str:
        """Every value as TOML, the preset's too; `loads` makes an equal scenario of it."""
        return read.dumps(self)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        tables = {key: _as_given(value) for key, value in data.items()}
        if is_complete(cls, {key: value for key, value in tables.items() if isinstance(value, Mapping)}):
            return tables

        def is_sound(values: rows.Values) -> bool:
            return not any(read.section_errors(cls, values))

        return default_merge_threshold(
            cls, presets.fill_from_preset(methods.fill_from_method(tables, is_sound), is_sound)
        )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        read.raise_mistakes(contradictions(self))
        return self


def _as_given(value: Any) -> Any:
    """A section built in Python as the table of what was given for it, so that a preset fills in only the rest."""
    return {key: getattr(value, key) for key in value.model_fields_set} if isinstance(value, Section) else value
