"""Examples of what a client writes before and after training, for people."""

from __future__ import annotations

from torch import Tensor

from grpo_fed.rl.language.batches import write_completions
from grpo_fed.rl.language.model import LanguageModel
from grpo_fed.rl.language.texts import ClientTexts
from grpo_fed.rl.records import Example
from grpo_fed.rl.rng import Purpose
from grpo_fed.rl.start import first_parameters
from grpo_fed.scenario.scenario import Scenario

EXAMPLES_NUMBER = 2**32
"""Names the prompts of examples, which no evaluation of a run has."""


def make_examples(model: LanguageModel, texts: ClientTexts, scenario: Scenario, parameters: Tensor) -> list[Example]:
    """Make `language.show` prompts with the likeliest completions of the client's first policy and of this one [P]."""
    count = scenario.language.show
    if not count:
        return []
    first = first_parameters(model.policy, scenario, [texts.seed]).to(model.device)
    before, after = (
        write_completions(model, [texts], each, Purpose.EVALUATION, [EXAMPLES_NUMBER], count, 1, greedy=True)
        for each in (first, parameters[None])
    )
    written = [
        texts.write_out(each.rows.tokens[0].cpu().numpy(), each.rows.valid[0].cpu().numpy()) for each in (before, after)
    ]
    rewards = [each.rewards[0].nan_to_num(0.0).tolist() for each in (before, after)]
    return [
        Example(*each)
        for each in zip(before.prompts[0].texts, written[0], rewards[0], written[1], rewards[1], strict=True)
    ]
