"""`grpo-fed play` and `grpo-fed export` for clients with prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_fed import load_policy
from grpo_fed.cli import app
from grpo_fed.engines.alone import train
from tests.support.language_run import letters
from tests.support.small_federation import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of clients that learned by themselves."""
    folder = tmp_path_factory.mktemp("run") / "letters"
    train(letters(), folder)
    return folder


def call(*words: object, fails: bool = False) -> str:
    """Call a command and return what it prints; errors in one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split()) if fails else result.output


def test_play_prints_what_a_client_writes(trained: Path):
    answers = load_policy(trained, "up").complete(["s3142=", "s9876="])
    lines = call("play", trained, "--client", "up", "--prompt", "s3142=", "--prompt", "s9876=").splitlines()
    assert lines == ["prompt: s3142=", f"up: {answers[0]}", "prompt: s9876=", f"up: {answers[1]}"]


def test_play_asks_all_clients_if_none_is_named(trained: Path):
    lines = call("play", trained, "--prompt", "s3142=").splitlines()
    assert [line.split(":")[0] for line in lines] == ["prompt", "up", "flat"]


def test_play_samples_from_the_stream_of_the_seed(trained: Path):
    words = ("play", trained, "--client", "up", "--prompt", "s3142=", "--sampled", "--seed")
    outputs = {seed: call(*words, seed) for seed in range(6)}
    assert outputs == {seed: call(*words, seed) for seed in outputs}
    assert len(set(outputs.values())) > 1


def test_play_reads_a_file_of_prompts(trained: Path, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "s3142=", "answer": "1234"}\n\n{"prompt": "s1111="}\n')
    assert call("play", trained, "--client", "up", "--prompts", file).count("prompt: s") == 2
    file.write_text('{"prompt": "s3142="}\n{"question": "s1111="}\n')
    assert "prompts.jsonl:2: has no prompt" in call("play", trained, "--prompts", file, fails=True)
    file.write_text("s3142=\n")
    assert "prompts.jsonl:1: is no JSON" in call("play", trained, "--prompts", file, fails=True)
    file.write_text("")
    assert "prompts.jsonl: has no prompts" in call("play", trained, "--prompts", file, fails=True)


def test_play_without_prompts_has_returns_and_examples(trained: Path):
    text = call("play", trained, "--episodes", "4")
    head, *_ = (line for line in text.splitlines() if "mean" in line)
    assert head.split() == ["client", "mean", "std", "min", "max", "completions", "mean", "tokens"]
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("up", "flat"))]
    assert [row[0] for row in rows] == ["up", "flat", "up", "up", "flat", "flat"]
    assert [row[5] for row in rows[:2]] == ["4", "4"]


def test_wrong_calls_of_play_are_refused_with_the_cure(trained: Path, tmp_path: Path):
    up = ("play", trained, "--client", "up")
    assert "client up: answers prompts, and there is nothing to film; leave out --gif, and give it a prompt" in call(
        *up, "--gif", tmp_path / "up.gif", fails=True
    )
    assert "leave out --episodes and --gif" in call(*up, "--prompt", "s1=", "--episodes", 2, fails=True)
    assert "add --sampled" in call(*up, "--prompt", "s1=", "--seed", 2, fails=True)
    train(tiny(), tmp_path / "carts")
    assert "client ant: has an environment and answers no prompts" in call(
        "play", tmp_path / "carts", "--prompt", "s1=", fails=True
    )


def test_export_says_how_to_open_what_it_wrote(trained: Path, tmp_path: Path):
    out = tmp_path / "up"
    assert call("export", trained, "--client", "up", "--out", out).splitlines() == [
        f"{out}/adapter_config.json",
        f"{out}/adapter_model.safetensors",
        f'open with: PeftModel.from_pretrained(model, "{out}"), where model is tiny',
    ]
    merged = call("export", trained, "--client", "up", "--out", tmp_path / "model", "--merge").splitlines()
    assert merged[-1] == f'open with: AutoModelForCausalLM.from_pretrained("{tmp_path / "model"}")'
    assert "is not empty" in call("export", trained, "--client", "up", "--out", out, fails=True)
