"""LanguageLearner against a plain implementation with transformers, one client and one completion at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from grpo_fed.rl.language.batches import CompletionBatch
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.language.objective import completion_targets
from grpo_fed.rl.language.update import update_adapters
from grpo_fed.rl.rng import Purpose
from grpo_fed.rl.trust_region import adapt_coefficient
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_language import (
    CLIENTS,
    PlainCompletion,
    completions_of,
    make_learner,
    move,
    plain_distribution,
    words,
)

ONE = ("down",)

# A second implementation ---------------------------------------------------------------------------------------------


class PlainUpdate:
    """One client's update from one batch, written down as the papers have it, with torch's Adam."""

    def __init__(self, learner: LanguageLearner, start: Tensor, anchor: Tensor) -> None:
        """Begin with adapters `start` [P]; `anchor` [P] is the shared policy."""
        self.given, self.policy, self.seed = learner.scenario, learner.policy, learner.seeds[0]
        self.factors = self.policy.frozen_factors(self.given.seed)
        self.flat = start.clone().requires_grad_()
        self.old, self.anchor = start, anchor
        self.losses: list[float] = []
        """The mean KL to the reference at each step."""

    def distribution(self, flat: Tensor | None, each: PlainCompletion) -> Tensor:
        temperature = self.given.language.temperature
        return plain_distribution(self.policy, self.factors, flat, each.prompt, each.tokens, temperature)

    def run(self, batch: CompletionBatch) -> Tensor:
        settings, size = self.given.objective, self.given.group.size
        completions = completions_of(batch, 0)
        advantages = [
            advantage
            for begin in range(0, len(completions), size)
            for advantage in self.advantages([each.reward for each in completions[begin : begin + size]])
        ]
        adam = torch.optim.Adam([self.flat], lr=settings.learning_rate, eps=settings.adam_epsilon)
        shuffle = np.random.default_rng([self.seed, 3, 0])
        learned = [each.ended or not self.given.language.mask_cut for each in completions]
        for _ in range(settings.epochs):
            order = np.arange(len(completions)) if settings.minibatches == 1 else shuffle.permutation(len(completions))
            for chosen in np.array_split(order, settings.minibatches):
                adam.zero_grad()
                total, kl, weights = torch.zeros(()), torch.zeros(()), 0.0
                for n in chosen.tolist():
                    if learned[n]:
                        weight = settings.minibatches * self.weight(completions, learned, n)
                        loss, of_kl = self.loss(completions[n], advantages[n])
                        total, kl = total + weight * loss, kl + weight * of_kl.detach()
                        weights += weight * len(completions[n].tokens)
                total = total + 0.5 * self.given.penalty.squared * (self.flat - self.anchor).square().sum()
                total.backward()
                torch.nn.utils.clip_grad_norm_([self.flat], settings.max_grad_norm or math.inf)
                self.losses.append(float(kl) / weights)
                adam.step()
        return self.flat.detach()

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        centred = [reward - float(np.mean(rewards)) for reward in rewards]
        if max(rewards) == min(rewards):
            return [0.0] * len(rewards)
        spread = float(np.std(rewards, ddof=1)) if self.given.group.score == "zscore" else 1.0
        return [each / spread for each in centred]

    def weight(self, completions: Sequence[PlainCompletion], learned: Sequence[bool], number: int) -> float:
        """The weight of each token of a completion."""
        count = sum(learned)
        match self.given.objective.average:
            case "episode":
                return 1 / (count * len(completions[number].tokens))
            case "total":
                return 1 / (count * self.given.language.length)
            case "step":
                return 1 / sum(
                    len(each.tokens) for each, is_learned in zip(completions, learned, strict=True) if is_learned
                )

    def loss(self, each: PlainCompletion, advantage: float) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of one completion: the loss, and the KL to the reference."""
        settings, region = self.given.objective, self.given.trust
        now = self.distribution(self.flat, each)
        tokens = torch.tensor(each.tokens)
        log_probs = now.gather(1, tokens[:, None])[:, 0]
        ratio = (log_probs - each.old).exp()
        if settings.ratio == "episode":
            ratio = (log_probs - each.old).mean().exp().expand(len(tokens))
        high = settings.clip if settings.clip_high is None else settings.clip_high
        gains = torch.minimum(ratio * advantage, ratio.clamp(1 - settings.clip, 1 + high) * advantage)
        loss = -(gains + settings.entropy * Categorical(logits=now).entropy()).sum()
        if region.region == "none":
            return loss, torch.zeros(())
        with torch.no_grad():
            reference = {"old": self.old, "shared": self.anchor, "start": None}[region.reference]
            then = self.distribution(reference, each)
        if region.estimate == "exact":
            pair = [Categorical(logits=then), Categorical(logits=now)]
            kl = kl_divergence(*(pair if region.direction == "old-new" else pair[::-1]))
        else:
            r = (then.gather(1, tokens[:, None])[:, 0] - log_probs).exp()
            kl = r - 1 - r.log()
            if region.estimate == "weighted":
                kl = kl * ratio
        return loss + region.coefficient * kl.sum(), kl.sum()


NEW_OLD = ("trust.direction=new-old",)
KL = ("trust.region=penalty", "trust.coefficient=0.5")
TWICE = ("objective.epochs=2",)
CASES = {
    "one pass": (),
    "grpo": ("objective.preset=grpo", "trust.region=none", *TWICE, "objective.minibatches=2", "objective.clip=0.05"),
    "dapo": ("objective.preset=dapo", "group.equal=keep", *TWICE, "objective.clip=0.01", "objective.clip_high=0.03"),
    "gspo": ("objective.preset=gspo", *TWICE, "objective.clip=0.01", "objective.clip_high=0.02"),
    "temperature": ("language.temperature=0.7", *TWICE),
    "both factors": ("language.learn=AB", *TWICE),
    "alpha": ("language.alpha=6.0",),
    "entropy": ("objective.entropy=0.1", *TWICE),
    "a pull": ("penalty.squared=0.3",),
    "no clipping of gradients": ("objective.max_grad_norm=inf",),
    "cut off": ("language.length=5", "language.temperature=1.6", "language.mask_cut=true", "objective.average=step"),
    "exact to the old policy": (*KL, *TWICE, "trust.direction=old-new"),
    "exact to the shared policy": (*KL, "trust.reference=shared", *NEW_OLD),
    "exact to the base": (*KL, "trust.reference=start"),
    "sampled to the old policy": (*KL, *TWICE, "trust.estimate=sampled", *NEW_OLD),
    "sampled to the shared policy": (
        *KL,
        "trust.reference=shared",
        "trust.estimate=sampled",
        "trust.direction=new-old",
    ),
    "weighted to the base": (
        *KL,
        *TWICE,
        "trust.reference=start",
        "trust.estimate=weighted",
        "trust.direction=new-old",
    ),
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_an_update_equals_one_in_transformers_without_stack_or_padding(overrides: tuple[str, ...]):
    given = words(*overrides, clients=ONE)
    writer, learner = make_learner(given), make_learner(given)
    start, anchor = move(writer), 0.5 * move(learner, seed=8)
    move(learner)
    batch, _ = writer.collect()
    if given.language.mask_cut:
        assert 0 < int(batch.ended.sum()) < 8  # otherwise nothing or all is left out
    (report,) = learner.train(8, anchor=anchor)
    plain = PlainUpdate(learner, start[0], anchor[0])
    expected = plain.run(batch)
    moved = float((expected - start[0]).abs().max())
    assert moved > 0.01
    torch.testing.assert_close(learner.parameters[0], expected, rtol=0, atol=2e-3 * moved)
    if given.trust.region == "penalty":
        assert report.losses["kl_reference"] == pytest.approx(plain.losses[-1], rel=1e-3)
        assert report.losses["kl_reference"] > 1e-5


# Parts of a batch, and clients of a stack ----------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), (*KL, "objective.entropy=0.1")], ids=["tokens alone", "vocabulary"])
def test_the_gradient_in_many_parts_equals_that_in_one(overrides: tuple[str, ...]):
    gradients, losses = [], []
    for tokens in (16_384, 1):
        given = words(*overrides, f"language.tokens={tokens}")
        learner = make_learner(given)
        move(learner)
        batch, _ = learner.collect()
        assert len(list(learner.model.parts(batch.rows))) == (1 if tokens > 1 else 8)
        (losses_,) = [learner.train(8)]
        gradients.append(learner.stack.gradient.clone())
        losses.append([report.losses for report in losses_])
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)


STACKED = {
    "dr-grpo": (),
    "minibatches": ("objective.epochs=2", "objective.minibatches=2", "objective.normalise_advantages=minibatch"),
    "adaptive": ("trust.region=adaptive", "trust.target=0.001", "objective.epochs=2"),
    "budgets": ("trust.blocks={ 'layers.*' = 1e-4 }",),
    "stop": ("trust.stop=0.002", "objective.epochs=4"),
    "redraw": ("group.equal=redraw",),
    "one alone draws again": (
        "group.equal=redraw",
        "clients.back.rewards=[{ function = 'tests.support.small_language:always' }]",
    ),
    "both factors": ("language.learn=AB",),
}


@pytest.mark.parametrize("overrides", STACKED.values(), ids=STACKED)
def test_what_a_client_learns_does_not_depend_on_the_others(overrides: tuple[str, ...]):
    given = words(*overrides, "clients.back.learning_rate=0.01", "clients.up.entropy=0.02")
    together = make_learner(given)
    reports = together.train(16)
    for row, name in enumerate(CLIENTS):
        alone = make_learner(given, [name])
        (report,) = alone.train(16)
        torch.testing.assert_close(alone.parameters[0], together.parameters[row], rtol=0, atol=2e-5)
        assert [each.score for each in report.episodes] == [each.score for each in reports[row].episodes]
        assert report.losses == pytest.approx(reports[row].losses, rel=1e-3, abs=1e-5, nan_ok=True)


# States --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("group.equal=redraw", "trust.region=adaptive", "objective.minibatches=2", "objective.epochs=2"),
        ("language.learn=AB", "personal.first=0.5", "objective.epochs=2", "policy.shared=['*.B']"),
    ],
    ids=["plain", "redraw", "heads first"],
)
def test_a_learner_goes_on_from_anothers_state_bit_for_bit(overrides: tuple[str, ...]):
    """Three rounds in one learner; then one round, the states as arrays, and two more in a new learner."""
    given = words(*overrides, "rollout.num_envs=12", "steps=16")
    whole, first, second = make_learner(given), make_learner(given), make_learner(given)
    for _ in range(3):
        expected = whole.train(16)
    first.train(16)
    second.load([first.state(row) for row in range(3)])
    for _ in range(2):
        found = second.train(16)
    assert torch.equal(second.parameters, whole.parameters)
    assert [report.steps for report in found] == [12] * 3  # 24 of 16, 36 of 32, 48 of 48
    assert str(found) == str(expected)
    for row in range(3):
        states = second.state(row), whole.state(row)
        assert states[0].keys() == states[1].keys()
        assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_state_of_a_client_that_has_not_learned_can_be_loaded_beside_others():
    given = words()
    first, second, fresh = make_learner(given), make_learner(given), make_learner(given, ["back"])
    first.train(8)
    second.load([first.state(0), fresh.state(0), first.state(2)])
    second.skip_to(8)
    second.train(8)
    expected = fresh.train(8)
    torch.testing.assert_close(second.parameters[1], fresh.parameters[0], rtol=0, atol=2e-5)
    assert expected[0].steps == 8
    assert second.updates_done.tolist() == [2, 1, 2]


def test_clients_that_missed_rounds_need_as_many_batches_as_the_others():
    # batches of 12: after 16 steps 24 are done, after 32 it is 36, after 48 it is 48
    given = words("rollout.num_envs=12", "steps=16")
    learner = make_learner(given, ["up"])
    for steps, batches in ((16, 1), (32, 1), (40, 1), (48, 0)):
        learner.skip_to(steps)
        (report,) = learner.train(16 if batches else 12)
        assert report.steps == 12 * (1 if steps == 48 else math.ceil((steps + 16) / 12) - math.ceil(steps / 12))


# The loss and what surrounds it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["old-new", "new-old"])
def test_the_kl_weight_adapts_by_the_kl_of_the_update(direction: str):
    """The KL is torch's on single completions."""
    settings = ("trust.region=adaptive", "trust.target=0.01", f"trust.direction={direction}")
    for rate, weight in ((0.1, 2.0), (1e-4, 0.5)):
        given = words(*settings, f"objective.learning_rate={rate}", clients=ONE)
        learner, writer = make_learner(given), make_learner(given)
        batch, _ = writer.collect()
        (report,) = learner.train(8)
        kl = mean_kl(learner, batch, writer.parameters, learner.parameters, direction)
        assert report.losses["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert learner.stack.kl_coefficient.tolist() == [weight]
        expected = adapt_coefficient(torch.ones(1), torch.tensor([kl]), 0.01)
        assert expected.tolist() == [weight]


def mean_kl(
    learner: LanguageLearner, batch: CompletionBatch, old: Tensor, new: Tensor, direction: str = "old-new"
) -> float:
    """The mean over the tokens of the first client's completions of the KL, one completion at a time."""
    factors = learner.policy.frozen_factors(learner.scenario.seed)
    divergences = []
    for each in completions_of(batch, 0):
        with torch.no_grad():
            pair = [
                Categorical(logits=plain_distribution(learner.policy, factors, flat[0], each.prompt, each.tokens))
                for flat in (old, new)
            ]
        divergences.append(kl_divergence(*(pair if direction == "old-new" else pair[::-1])))
    return float(torch.cat(divergences).mean())


@pytest.mark.parametrize("direction", ["old-new", "new-old"])
def test_each_block_alone_stays_within_its_budget(direction: str):
    budgets = {"layers.0": 2e-3, "layers.1": 1e-3, "layers.2": 10.0}
    written = ", ".join(f"'{name}' = {budget}" for name, budget in budgets.items())
    given = words(
        f"trust.blocks={{ {written} }}", f"trust.direction={direction}", "objective.learning_rate=0.2", clients=ONE
    )
    without = given.model_copy(update={"trust": words().trust})
    free, learner, writer = make_learner(without), make_learner(given), make_learner(given)
    batch, _ = writer.collect()
    free.train(8)
    learner.train(8)
    shortened = 0
    for block in learner.policy.layout.blocks:
        columns = slice(block.start, block.stop)
        whole, kept = writer.parameters.clone(), writer.parameters.clone()
        whole[:, columns], kept[:, columns] = free.parameters[:, columns], learner.parameters[:, columns]
        kl = mean_kl(learner, batch, writer.parameters, kept, direction)
        assert kl <= budgets[block.name] * (1 + 1e-3)
        assert kl > 0
        if mean_kl(learner, batch, writer.parameters, whole, direction) > budgets[block.name]:
            shortened += 1
        else:
            assert torch.equal(whole, kept)
    assert shortened == 2


def test_passes_end_once_the_kl_is_too_large():
    """Each client by itself: one that stopped has the parameters of as many passes as it made."""
    settings = ("objective.learning_rate=0.05",)
    by_passes = []
    for epochs in (1, 2, 3, 4):
        learner = make_learner(words(*settings, f"objective.epochs={epochs}"))
        reports = learner.train(8)
        by_passes.append((learner.parameters.clone(), [report.losses["approx_kl"] for report in reports]))
    kls = torch.tensor([kl for _, kl in by_passes])  # [passes, K]; the first is 0
    limit = float(kls[1].median())
    learner = make_learner(words(*settings, "objective.epochs=4", f"trust.stop={limit}"))
    learner.train(8)
    made = set()
    for client in range(3):
        over = (kls[:, client] > limit).nonzero()
        passes = int(over[0]) if len(over) else 4
        made.add(passes)
        torch.testing.assert_close(learner.parameters[client], by_passes[passes - 1][0][client], rtol=0, atol=1e-5)
    assert len(made) > 1


def test_a_heavy_penalty_towards_zero_gives_exact_zeros_and_the_base():
    learner = make_learner(words("penalty.weight=1e6", "penalty.toward=zero"))
    moved = move(learner)
    batch, _ = learner.collect()
    learner.train(8)
    assert not learner.parameters.any()
    base = learner.model.all_log_probs(None, batch.rows)
    assert torch.equal(learner.model.all_log_probs(learner.parameters, batch.rows), base)
    assert not torch.equal(learner.model.all_log_probs(moved, batch.rows), base)


# Rewards and groups --------------------------------------------------------------------------------------------------


def rewarded_by(name: str, *overrides: str) -> Scenario:
    rewards = f"clients.down.rewards=[{{ function = 'tests.support.small_language:{name}' }}]"
    return words(rewards, *overrides, clients=ONE)


@pytest.mark.parametrize("name", ["never", "always"])
@pytest.mark.parametrize("equal", ["keep", "skip", "redraw"])
def test_completions_without_rewards_or_with_equal_ones_teach_nothing(name: str, equal: str):
    learner = make_learner(rewarded_by(name, f"group.equal={equal}"))
    (report,) = learner.train(16)
    assert not learner.parameters.any()
    assert not learner.stack.gradient.any()
    assert report.more["charts/equal_groups"] == 1.0
    assert len(report.episodes) == (0 if name == "never" else 16)
    assert report.steps == 16
    assert report.losses["policy_loss"] == 0


def test_a_completion_without_a_reward_is_left_out():
    """Every second one has a reward: the update is that of these alone, which are then groups of two."""
    given = rewarded_by("of_odd", "objective.average=episode")
    writer, learner = make_learner(given), make_learner(given)
    batch, _ = writer.collect()
    (report,) = learner.train(8)
    rewards = batch.rewards[0].tolist()
    assert [math.isnan(reward) for reward in rewards] == [True, False] * 4
    assert [episode.score for episode in report.episodes] == rewards[1::2]
    assert report.more["reward/of_odd"] == pytest.approx(np.mean(rewards[1::2]))
    centred = [reward - np.mean(group) for group in (rewards[1:4:2], rewards[5::2]) for reward in group]
    total = torch.zeros(())
    flat = torch.zeros(learner.policy.layout.size, requires_grad=True)
    factors = learner.policy.frozen_factors(given.seed)
    for each, advantage in zip(completions_of(batch, 0)[1::2], centred, strict=True):
        now = plain_distribution(learner.policy, factors, flat, each.prompt, each.tokens)
        log_probs = now.gather(1, torch.tensor(each.tokens)[:, None])[:, 0]
        total = total - advantage * (log_probs - each.old).exp().mean() / 4
    total.backward()
    gradient = flat.grad
    assert gradient is not None
    gradient *= min(1.0, 0.5 / float(gradient.norm()))
    torch.testing.assert_close(learner.stack.gradient[0], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_groups_by_task_compare_all_completions_of_a_client():
    given = words("group.by=task", clients=ONE)
    learner = make_learner(given)
    batch, _ = learner.collect()
    assert len(set(batch.prompts[0].texts)) == 8  # each has a prompt of its own
    groups = torch.zeros(1, 8, dtype=torch.int64)
    targets = completion_targets(batch.rewards, groups, batch.rows.valid, ~batch.ended, given)
    rewards = batch.rewards[0]
    torch.testing.assert_close(targets.advantages[0], rewards - rewards.mean())
    again = make_learner(given)
    again.train(8)
    stack = learner.stack
    update_adapters(stack, learner.model, batch, targets, np.zeros(1, int), np.zeros(1))
    assert torch.equal(stack.parameters, again.parameters)


EASY = (
    "clients.down.prompts=tests.support.small_language:often_equal",
    "clients.down.rewards=[{ function = 'tests.support.small_language:easy_or_first' }]",
    "group.size=2",
)


def test_equal_groups_are_replaced_by_prompts_that_are_drawn_again():
    plain = make_learner(words(*EASY, clients=ONE))
    draws = [plain.collect()[0] for _ in range(4)]
    learner = make_learner(words(*EASY, "group.equal=redraw", "group.redraws=3", clients=ONE))
    batch, drawn = learner.collect()

    def groups(batch: CompletionBatch) -> list[list[PlainCompletion]]:
        single = completions_of(batch, 0)
        return [single[begin : begin + 2] for begin in range(0, 8, 2)]

    def differs(group: list[PlainCompletion]) -> bool:
        return group[0].reward != group[1].reward

    expected = groups(draws[0])
    assert drawn.equal.tolist() == [1 - np.mean([differs(group) for group in expected])]
    used = 0
    for other in draws[1:]:
        if all(differs(group) for group in expected):
            break
        used += 1
        fresh = iter([group for group in groups(other) if differs(group)])
        expected = [group if differs(group) else next(fresh, group) for group in expected]
    assert used == int(learner.draws_done[0]) - 1 > 0
    assert drawn.completions.tolist() == [8 * (1 + used)]
    tokens = [len(each.tokens) for one in draws[: 1 + used] for each in completions_of(one, 0)]
    assert drawn.tokens.tolist() == [sum(tokens)]
    for group, wanted in zip(groups(batch), expected, strict=True):
        for one, other in zip(group, wanted, strict=True):
            assert (one.prompt, one.tokens, one.reward, one.ended) == (
                other.prompt,
                other.tokens,
                other.reward,
                other.ended,
            )
            assert torch.equal(one.old, other.old)


# Reports and evaluations ---------------------------------------------------------------------------------------------


def test_a_report_says_what_the_completions_were():
    given = words("language.temperature=1.6")
    writer, learner = make_learner(given), make_learner(given)
    batch, _ = writer.collect()
    reports = learner.train(8)
    for client, report in enumerate(reports):
        completions = completions_of(batch, client)
        prompts, texts = batch.prompts[client], writer.texts[client]
        written = [texts.tokenizer.decode(each.tokens) for each in completions]
        answers = [row["answer"] for row in prompts.rows for _ in range(4)]
        near = [
            sum(a == b for a, b in zip(text, right, strict=False)) / max(len(text), len(right))
            for text, right in zip(written, answers, strict=True)
        ]
        exact = [float(text == right) for text, right in zip(written, answers, strict=True)]
        scores = [n + 0.5 * e for n, e in zip(near, exact, strict=True)] if client == 2 else near
        assert [episode.score for episode in report.episodes] == pytest.approx(scores)
        assert report.mean_return == pytest.approx(np.mean(scores))
        assert [episode.length for episode in report.episodes] == [len(each.tokens) for each in completions]
        assert report.tokens == sum(len(each.tokens) for each in completions)
        assert report.floor == pytest.approx(min(scores))
        assert report.more["reward/near"] == pytest.approx(np.mean(near))
        if client == 2:
            assert report.more["reward/exact"] == pytest.approx(np.mean(exact))
        cut = [each.tokens[-1] not in texts.tokenizer.end for each in completions]
        assert report.more["charts/cut"] == pytest.approx(np.mean(cut))
        equal = [len(set(np.round(scores[begin : begin + 4], 6))) == 1 for begin in (0, 4)]
        assert report.more["charts/equal_groups"] == pytest.approx(np.mean(equal))


def test_an_evaluation_is_named_by_its_number():
    learner = make_learner(words())
    first, again, other = (learner.evaluate(12, number=number) for number in (0, 0, 1))
    scores = [[each.scores.tolist() for each in evaluations] for evaluations in (first, again, other)]
    assert scores[0] == scores[1] != scores[2]
    sampled = [learner.evaluate(12, deterministic=False, number=0)[0].scores.tolist() for _ in range(2)]
    assert sampled[0] == sampled[1] != scores[0][0]
    alone = make_learner(words(), ["down"])
    assert alone.evaluate(12)[0].scores.tolist() == scores[0][2]


def test_training_and_evaluation_draw_other_prompts():
    learner = make_learner(words(), ["up"])
    (texts,) = learner.texts
    batch, _ = learner.collect()
    assert set(batch.prompts[0].texts).isdisjoint(texts.draw(Purpose.EVALUATION, 0, 200).texts)
