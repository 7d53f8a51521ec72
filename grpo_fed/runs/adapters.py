"""A client's adapters from a run's folder, with the language model that they adapt: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.peft_folder import read_peft_folder
from grpo_fed.policy.make import make_policy
from grpo_fed.rl.language.learner import evaluate_completions
from grpo_fed.rl.language.model import LanguageModel, open_language_model
from grpo_fed.rl.language.sampling import sample_completions
from grpo_fed.rl.language.texts import ClientTexts
from grpo_fed.rl.records import Evaluation
from grpo_fed.rl.rng import Purpose, client_seed
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.language_task import LanguageTask


@dataclass(frozen=True)
class LoadedAdapters:
    """Holds a client's adapters: it answers prompts."""

    scenario: Scenario
    """The run's scenario."""
    task: LanguageTask
    policy: AdapterPolicy
    parameters: Tensor
    """[1, P]."""

    def complete(self, prompts: Sequence[Any], sampled: bool = False, seed: int = 0) -> list[str]:
        """Write a completion for each prompt: a text, or a list of chat messages.

        sampled: whether tokens are sampled, from the stream that `seed` names, or are the likeliest ones.
        """
        if not prompts:
            return []
        texts = ClientTexts(self.task, self._model.tokenizer, self.policy.shape.context, seed)
        read = texts.read_rows([{"prompt": prompt} for prompt in prompts])
        written = sample_completions(
            self._model.transformer,
            self._model.adapters(self.parameters.to(self._model.device)),
            [read.tokens],
            1,
            texts.noise(Purpose.EVALUATION, 0, len(prompts))[None],
            self.scenario.language.temperature,
            self._model.tokenizer.end,
            greedy=not sampled,
            tokens_at_a_time=self.scenario.language.tokens,
        )
        return texts.write_out(written.tokens[0].cpu().numpy(), written.valid[0].cpu().numpy())

    def play(self, episodes: int | None = None, deterministic: bool = True, seed: int | None = None) -> Evaluation:
        """Answer prompts for evaluation; with the run's seed and number this repeats the run's first evaluation."""
        settings = self.scenario
        own_seed = client_seed(settings.seed if seed is None else seed, self.task.client)
        texts = ClientTexts(self.task, self._model.tokenizer, self.policy.shape.context, own_seed)
        count = settings.evaluate.episodes if episodes is None else episodes
        parameters = self.parameters.to(self._model.device)
        (evaluation,) = evaluate_completions(
            self._model, [texts], parameters, Purpose.EVALUATION, 0, count, deterministic
        )
        return evaluation

    @cached_property
    def _model(self) -> LanguageModel:
        return open_language_model(self.scenario)


def load_adapters_of(folder: Path, scenario: Scenario, task: LanguageTask) -> LoadedAdapters:
    """Load the adapters that `save_policy` wrote for a client below this folder; ValueError where they do not fit."""
    policy = make_policy(task, scenario.policy)
    parameters = read_peft_folder(folder / task.client, policy, policy.frozen_factors(scenario.seed))
    if not bool(parameters.isfinite().all()):
        raise ValueError(f"{folder / task.client}: some parameters are not finite")
    return LoadedAdapters(scenario, task, policy, parameters[None])
