"""Sampling of completions, against a loop without a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fed.policy.language.transformer import Adapters, Transformer
from grpo_fed.rl.language.sampling import Completions, pad_prompts, sample_completions
from tests.support.language_models import open_model, random_adapters, write_model

STOP = {1, 2, 3, 4}
PROMPTS = [[[5, 6, 7], [8, 9]], [[10], [11, 12, 13, 14]], [[15, 16], [17, 18, 19]]]
"""Of three clients, two each."""
GROUP, LENGTH, TEMPERATURE = 3, 6, 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return open_model(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapters(model: Transformer) -> torch.Tensor:
    return random_adapters(model.policy, 3)


def noise() -> np.ndarray:
    return np.random.default_rng(3).random((3, 2 * GROUP, LENGTH))


def sample(model: Transformer, flat: torch.Tensor, clients: slice = slice(None), **changes: object) -> Completions:
    arguments = {"temperature": TEMPERATURE, "stop": STOP, **changes}
    views = model.policy.layout.views(flat[clients])
    return sample_completions(model, views, PROMPTS[clients], GROUP, noise()[clients], **arguments)


def sample_one_by_one(model: Transformer, adapters: Adapters, prompt: list[int], draws: np.ndarray):
    """Sample one completion of one client, with the whole sequence computed again for each token."""
    tokens, log_probs = list(prompt), []
    for draw in draws:
        scores = model.logits(model.hidden(adapters, torch.tensor([[tokens]])))[0, 0, -1] / TEMPERATURE
        chances = torch.softmax(scores.double(), -1).numpy()
        token = int(np.argmax(np.cumsum(chances) > draw))
        tokens.append(token)
        log_probs.append(np.log(chances[token]))
        if token in STOP:
            break
    return tokens[len(prompt) :], log_probs


def test_sampling_with_a_cache_gives_the_same_as_a_loop_without(model: Transformer, adapters: torch.Tensor):
    done = sample(model, adapters)
    for client, prompts in enumerate(PROMPTS):
        views = model.policy.layout.views(adapters[client : client + 1])
        for row in range(2 * GROUP):
            draws = noise()[client, row]
            tokens, log_probs = sample_one_by_one(model, views, prompts[row // GROUP], draws)
            valid = done.valid[client, row]
            assert done.tokens[client, row][valid].tolist() == tokens
            np.testing.assert_allclose(done.log_probs[client, row][valid], log_probs, atol=2e-5)
            assert bool(done.ended[client, row]) == (tokens[-1] in STOP)
    assert done.ended.any()
    assert not done.ended.all()


def test_after_its_end_a_completion_has_no_tokens(model: Transformer, adapters: torch.Tensor):
    done = sample(model, adapters)
    assert torch.equal(done.valid, done.valid.cummin(-1).values)
    assert not done.tokens[~done.valid].any()
    assert not done.log_probs[~done.valid].any()


def test_prompts_are_padded_on_the_left(model: Transformer, adapters: torch.Tensor):
    done = sample(model, adapters)
    assert done.prompts[1].tolist() == [[0, 0, 0, 10], [11, 12, 13, 14]]
    assert done.prompt_valid[1].tolist() == [[False, False, False, True], [True] * 4]


@pytest.mark.parametrize("greedy", [False, True])
def test_completions_depend_neither_on_other_clients_nor_on_chunks(
    model: Transformer, adapters: torch.Tensor, greedy: bool
):
    together = sample(model, adapters, greedy=greedy)
    alone = sample(model, adapters, slice(2, 3), greedy=greedy)
    in_parts = sample(model, adapters, greedy=greedy, tokens_at_a_time=1)
    for other, same in ((alone, together.tokens[2:]), (in_parts, together.tokens)):
        assert torch.equal(other.tokens, same)
    torch.testing.assert_close(alone.log_probs, together.log_probs[2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(in_parts.log_probs, together.log_probs, atol=1e-5, rtol=0)


def test_greedy_completions_take_the_likeliest_tokens(model: Transformer, adapters: torch.Tensor):
    done = sample(model, adapters, greedy=True)
    views = model.policy.layout.views(adapters)
    tokens, valid = pad_prompts(PROMPTS, 4, torch.device("cpu"))
    likeliest = model.logits(model.hidden(views, tokens, valid))[:, :, -1].argmax(-1)
    assert torch.equal(done.tokens[:, ::GROUP, 0], likeliest)


def test_tokens_are_as_frequent_as_their_probabilities_say(model: Transformer):
    draws = np.random.default_rng(0).random((1, 4000, 1))
    done = sample_completions(model, None, [[[5, 6]]], 4000, draws, 2.0, STOP)
    chances = (model.logits(model.hidden(None, torch.tensor([[[5, 6]]])))[0, 0, -1] / 2.0).softmax(-1)
    counts = torch.bincount(done.tokens.flatten(), minlength=31) / 4000
    torch.testing.assert_close(counts, chances, atol=0.025, rtol=0)


def test_a_draw_of_almost_one_takes_a_token_that_is_possible(model: Transformer):
    draws = np.full((1, 1, 1), np.nextafter(1.0, 0.0))
    done = sample_completions(model, None, [[[5, 6]]], 1, draws, 0.05, STOP)
    assert done.log_probs.item() > -20


def test_prompts_that_do_not_fit_are_refused(model: Transformer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"a prompt has no tokens"):
        sample_completions(model, None, [[[]]], 1, np.zeros((1, 1, 2)), 1.0, STOP)
    with pytest.raises(ValueError, match=r"60 tokens and a completion of 5 are longer than the model's context of 64"):
        sample_completions(model, None, [[[5] * 60]], 1, np.zeros((1, 1, 5)), 1.0, STOP)
