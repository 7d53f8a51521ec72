"""KL and Fisher diagonal on kept completions, against single rows in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from grpo_fed.rl.language import measurement
from grpo_fed.rl.language.batches import CompletionBatch
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.language.measurement import completion_fisher, completion_kl
from grpo_fed.rl.language.model import pack_rows, unpack_rows
from tests.support.small_language import PlainCompletion, completions_of, make_learner, move, plain_distribution, words

CHOSEN = (np.array([3, 0, 6]), np.array([7]), np.array([1, 2, 5, 4]))
"""The completions that each client keeps, in their order."""


@pytest.fixture(scope="module")
def learner() -> LanguageLearner:
    """Three clients with adapters of their own; the second one has shorter prompts."""
    learner = make_learner(words("language.temperature=1.3"))
    move(learner, 0.1)
    return learner


@pytest.fixture(scope="module")
def batch(learner: LanguageLearner) -> CompletionBatch:
    return learner.collect()[0]


@pytest.fixture(scope="module")
def packed(batch: CompletionBatch) -> list[dict[str, np.ndarray]]:
    return [pack_rows(batch.rows, client, chosen) for client, chosen in enumerate(CHOSEN)]


def kept(batch: CompletionBatch, client: int) -> list[PlainCompletion]:
    single = completions_of(batch, client)
    return [single[number] for number in CHOSEN[client]]


def plain(learner: LanguageLearner, flat: Tensor, each: PlainCompletion) -> Tensor:
    factors = learner.policy.frozen_factors(learner.scenario.seed)
    return plain_distribution(learner.policy, factors, flat, each.prompt, each.tokens, 1.3)


def test_rows_that_were_packed_are_unpacked_with_other_clients_padding(
    batch: CompletionBatch, packed: list[dict[str, np.ndarray]]
):
    rows, real = unpack_rows(packed, torch.device("cpu"))
    assert real.sum(1).tolist() == [3, 1, 4]
    for client in range(3):
        for row, each in enumerate(kept(batch, client)):
            assert rows.prompts[client, row][rows.prompt_valid[client, row]].tolist() == each.prompt
            assert rows.prompt_valid[client, row, -1]  # on the left
            assert rows.tokens[client, row][rows.valid[client, row]].tolist() == each.tokens
            assert rows.valid[client, row, 0]  # on the right
        assert not rows.valid[client, len(CHOSEN[client]) :].any()


def test_the_kl_is_the_mean_over_single_tokens(
    learner: LanguageLearner, batch: CompletionBatch, packed: list[dict[str, np.ndarray]]
):
    old = learner.parameters
    news = [0.3 * old, old + 0.01, old]
    found = completion_kl(learner.model, packed, old, iter(news))
    assert found.shape == (3, 3)
    for number, new in enumerate(news):
        for client in range(3):
            with torch.no_grad():
                of_tokens = [
                    kl_divergence(
                        Categorical(logits=plain(learner, old[client], each)),
                        Categorical(logits=plain(learner, new[client], each)),
                    )
                    for each in kept(batch, client)
                ]
            assert float(found[number, client]) == pytest.approx(float(torch.cat(of_tokens).mean()), rel=1e-3, abs=1e-6)
    assert float(found[0].min()) > 1e-4


def test_the_kl_in_many_parts_equals_that_in_one(learner: LanguageLearner, packed: list[dict[str, np.ndarray]]):
    old, new = learner.parameters, 0.3 * learner.parameters
    other = make_learner(words("language.temperature=1.3", "language.tokens=1"))
    assert len(list(other.model.parts(unpack_rows(packed, torch.device("cpu"))[0]))) == 4
    torch.testing.assert_close(
        completion_kl(other.model, packed, old, [new]), completion_kl(learner.model, packed, old, [new])
    )


@pytest.mark.parametrize("at_a_time", [1, 1 << 24])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_single_completions(
    learner: LanguageLearner,
    batch: CompletionBatch,
    packed: list[dict[str, np.ndarray]],
    at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(measurement, "NUMBERS", at_a_time)
    found = completion_fisher(learner.model, packed, learner.parameters)
    for client in range(3):
        flat = learner.parameters[client].clone().requires_grad_()
        squares = []
        for each in kept(batch, client):
            log_probs = plain(learner, flat, each).gather(1, torch.tensor(each.tokens)[:, None])
            (gradient,) = torch.autograd.grad(log_probs.sum(), flat)
            squares.append(gradient.square())
        expected = torch.stack(squares).mean(0)
        torch.testing.assert_close(found[client], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_client_keeps_completions_of_its_last_batch():
    """As many as `proximity.states`, all different; none where nothing measures steps."""
    writer, learner = make_learner(words("steps=16")), make_learner(words("steps=16"))
    writer.train(8)
    batch, _ = writer.collect()
    learner.train(16)
    for client in range(3):
        rows, _ = unpack_rows([learner.measurement_rows[client]], torch.device("cpu"))
        last = [(each.prompt, each.tokens) for each in completions_of(batch, client)]
        kept_rows = [
            (rows.prompts[0, row][rows.prompt_valid[0, row]].tolist(), rows.tokens[0, row][rows.valid[0, row]].tolist())
            for row in range(6)
        ]
        assert rows.tokens.shape[1] == 6
        assert all(kept_rows.count(row) <= last.count(row) for row in kept_rows)
    off = make_learner(words("proximity.mode=off", "merge.rule=mean"), ["up"])
    off.train(8)
    assert off.measurement_rows == [{}]
