"""The scenario: everything that defines a run.

A scenario is frozen data and complete once it exists: the values of its method and preset are filled in, and
contradictions are refused. `Scenario.load` reads one from TOML (toml/reading.py) and lists all mistakes in it.

A key that has no effect may be given (the weight of the KL where there is no KL); unused.py finds it. Keys that
contradict each other (a hard trust region without the natural step) may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Lt, MinLen
from pydantic import Field, ValidationInfo, model_validator

from grpo_fed.scenario.checks import contradictions
from grpo_fed.scenario.field_types import NAMED_OR_OWN, CallbackEntry, Count, Device, Name, Named, OwnPath
from grpo_fed.scenario.methods import clear_replaced_method, fill_from_method, fill_from_rule
from grpo_fed.scenario.presets import fill_from_preset
from grpo_fed.scenario.settings import (
    CheckpointSettings,
    ClientSettings,
    EvaluateSettings,
    GroupSettings,
    LanguageSettings,
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
from grpo_fed.scenario.tables import Values, is_complete
from grpo_fed.scenario.toml.mistakes import section_errors
from grpo_fed.scenario.toml.reading import CONTRADICTIONS_LATER, dumps, load, loads


class Scenario(Section):
    """Everything that defines a run."""

    name: Annotated[Name, Field(examples=["poles"])]
    """Name of the scenario in folders, metrics and titles."""
    description: str = ""
    """What the scenario shows, in a sentence."""
    method: Annotated[
        Annotated[
            Literal[
                "grpo",
                "local",
                "fedavg",
                "fedprox",
                "fedadam",
                "scaffold",
                "reptile",
                "perfedavg",
                "fedper",
                "fedrep",
                "lg",
                "ditto",
                "fedkl",
                "fisher",
                "clusters",
                "fedit",
                "fedsa",
            ],
            Named,
        ]
        | OwnPath,
        NAMED_OR_OWN,
    ] = "grpo"
    """How clients share: a row of the table of methods, or `module:NAME` for a row of your own. It gives values to keys
    that the scenario does not give."""
    rounds: Count = 30
    """Number of rounds."""
    steps: Count = 2048
    """Environment steps of each client in a round; completions of a client with `prompts`."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Seed of all random numbers; those of a client depend on the seed and its name alone."""
    device: Device = "auto"
    """Device of the computation: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where it is available."""
    callbacks: Annotated[list[CallbackEntry], Field(default_factory=list)]
    """Code of your own that the server calls while the run goes on: import paths `module:Class`, or tables such as
    `{ path = "my_module:Early", kwargs = { patience = 5 } }`, whose `kwargs` the class is made with."""
    policy: PolicySettings = PolicySettings()
    language: LanguageSettings = LanguageSettings()
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
    wire: WireSettings = WireSettings()
    privacy: PrivacySettings = PrivacySettings()
    curriculum: SteeringSettings = SteeringSettings()
    stop: StopSettings = StopSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    newcomers: NewcomerSettings = NewcomerSettings()
    sites: Annotated[list[SiteSettings], Field(default_factory=list)]
    """Servers between the server and the clients, a table for each; without any the server merges all clients."""
    clients: Annotated[list[ClientSettings], MinLen(1), Field(examples=[[{"name": "cart", "env": "CartPole-v1"}]])]
    """The clients, a table for each kind."""

    @property
    def unit(self) -> str:
        """What a step is: `completions` if all clients have prompts, else `steps`."""
        return "completions" if all(client.prompts is not None for client in self.clients) else "steps"

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file, with overrides such as `objective.clip=0.3`; ScenarioError lists all mistakes."""
        return load(cls, path, overrides, clear_replaced_method, contradictions)

    @classmethod
    def loads(cls, text: str, name: str = "scenario", overrides: Sequence[str] = ()) -> Self:
        """Read a TOML text; ScenarioError lists all mistakes.

        name: stands for the file in errors.
        """
        return loads(cls, text, name, overrides, clear_replaced_method, contradictions)

    def dumps(self) -> str:
        """Write every value as TOML, those of method and preset included; `loads` makes an equal scenario of it."""
        return dumps(self)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Fill in the values of method and preset, unless every key is given. `contradictions` reports invalid rows."""
        if not isinstance(data, Mapping):
            return data
        tables = {key: _given_values(value) for key, value in data.items()}
        if is_complete(cls, {key: value for key, value in tables.items() if isinstance(value, Mapping)}):
            return tables

        def is_valid(values: Values) -> bool:
            return not any(section_errors(cls, values))

        return fill_from_preset(fill_from_rule(fill_from_method(tables, is_valid)), is_valid)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        """Refuse contradictions, unless the reader looks for them itself, to report each with its line in the file."""
        if info.context is not CONTRADICTIONS_LATER:
            mistakes = [f"{'.'.join(map(str, mistake.keys[0]))}: {mistake.text}" for mistake in contradictions(self)]
            if mistakes:
                raise ValueError("; ".join(mistakes))
        return self


def _given_values(value: Any) -> Any:
    """Turn a section that was made in Python into a table of what was given, so that only the rest is filled in."""
    return {key: getattr(value, key) for key in value.model_fields_set} if isinstance(value, Section) else value
