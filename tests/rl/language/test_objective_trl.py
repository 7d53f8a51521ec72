"""The loss of completions compared with TRL's own, and its gradient by peft's adapters, on a batch made by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fed.rl.advantages import Average
from grpo_fed.rl.language.objective import CompletionPart, completion_loss, token_weights
from grpo_fed.rl.objective import Coefficients
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

VOCABULARY, PROMPT, LENGTH, COUNT = 16, 3, 7, 6
LONGEST = 9
"""The most tokens of a completion: more than the longest of the batch has."""
LOSSES: dict[str, tuple[str, str, Average, str]] = {
    "grpo": ("grpo", "token", "episode", "step"),
    "bnpo": ("bnpo", "token", "step", "step"),
    "dapo": ("dapo", "token", "step", "step"),
    "dr_grpo": ("dr_grpo", "token", "total", "step"),
    "gspo": ("grpo", "sequence", "episode", "episode"),
}
"""TRL's loss type and level of the ratio, and the values of `objective.average` and `objective.ratio` for it."""
KLS = {"none": (0.0, False), "k3": (0.04, False), "weighted": (0.04, True)}
"""TRL's weight of the KL, and whether it is multiplied by the ratio."""


@dataclass(frozen=True)
class Peer:
    """TRL's trainer with a batch."""

    trainer: Any
    batch: dict[str, Tensor]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """Make the trainer of a tiny model with moved adapters, and completions that an older policy has sampled."""
    # here, since they take six seconds, and every process of the tests imports this module
    trl, peft, datasets, tokenizers, transformers = map(
        pytest.importorskip, ("trl", "peft", "datasets", "tokenizers", "transformers")
    )
    torch.manual_seed(0)
    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {
        "<pad>": VOCABULARY - 2,
        "</s>": VOCABULARY - 1,
    }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    folder: Path = tmp_path_factory.mktemp("trl")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            per_device_train_batch_size=COUNT,
            num_generations=COUNT,
            max_completion_length=LONGEST,
            epsilon=0.2,
            epsilon_high=0.28,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w0"}] * COUNT),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    trainer.model.train()
    mask = torch.arange(LENGTH) < torch.tensor([[7], [1], [4], [6], [3], [7]])
    batch = {
        "prompt_ids": torch.randint(VOCABULARY - 2, (COUNT, PROMPT)),
        "prompt_mask": torch.ones(COUNT, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(VOCABULARY, (COUNT, LENGTH)),
        "completion_mask": mask.long(),
        "advantages": torch.randn(COUNT),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        log_probs = log_probs_of(trainer.model, batch)
    batch["old_per_token_logps"] = log_probs + 0.4 * torch.randn_like(log_probs)
    batch["ref_per_token_logps"] = log_probs + 0.4 * torch.randn_like(log_probs)
    return Peer(trainer, batch)


def log_probs_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the completions' tokens, [B, C]."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT - 1 : -1]
    found: Tensor = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    return found


def by_adapters(loss: Tensor, model: Any) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_trl(peer: Peer, name: str, kl: str) -> None:
    kind, level, average, ratio = LOSSES[name]
    beta, weighted = KLS[kl]
    trainer, batch = peer.trainer, peer.batch
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = kind, level, beta
    trainer.args.use_bias_correction_kl = weighted
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer._compute_loss(trainer.model, batch)

    settings = ObjectiveSettings(surrogate="clip", ratio=ratio, average=average)  # type: ignore[arg-type]
    estimate = "weighted" if weighted else "sampled"
    trust = TrustSettings(region="penalty" if beta else "none", direction="new-old", estimate=estimate)
    weights = token_weights(batch["completion_mask"].bool()[None], average, LONGEST)
    log_probs = log_probs_of(trainer.model, batch)[None]
    parts = []
    for some in (slice(2), slice(2, COUNT)):
        part = CompletionPart(
            batch["old_per_token_logps"][None, some],
            batch["advantages"][None, some],
            weights[:, some],
            batch["ref_per_token_logps"][None, some],
        )
        parts.append(completion_loss(log_probs[:, some], part, settings, trust, Coefficients(0.2, 0.28, kl=beta))[0])
    found = torch.stack(parts).sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        by_adapters(found, trainer.model), by_adapters(expected, trainer.model), rtol=1e-4, atol=2e-6
    )
    moves = (log_probs - batch["old_per_token_logps"])[:, batch["completion_mask"].bool()].exp() - 1
    assert (moves > 0.28).any()
    assert (moves < -0.2).any()
