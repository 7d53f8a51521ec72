"""Policies in forms that other programs open: peft, transformers, safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_fed import load_policy
from grpo_fed.engines.alone import train
from grpo_fed.policy.language.source import TINY
from grpo_fed.rl.records import Example
from grpo_fed.runs.adapters import LoadedAdapters
from grpo_fed.runs.examples import read_examples, write_examples
from grpo_fed.runs.export import export_policy
from tests.support.language_run import letters
from tests.support.small_federation import tiny

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 4, 3, 2, 11]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of clients that learned by themselves."""
    folder = tmp_path_factory.mktemp("run") / "letters"
    train(letters("objective.learning_rate=0.01"), folder)
    return folder


def logits_of(folder: Path, client: str) -> torch.Tensor:
    """Compute a client's logits with our own transformer, [B, T, V]."""
    loaded = load_policy(folder, client)
    assert isinstance(loaded, LoadedAdapters)
    model = loaded._model
    hidden = model.transformer.hidden(
        model.adapters(loaded.parameters), TOKENS[None], torch.ones_like(TOKENS[None]) > 0
    )
    logits: torch.Tensor = model.transformer.logits(hidden)[0].detach()
    return logits


def test_peft_opens_exported_adapters(trained: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    paths = export_policy(trained, tmp_path / "up", "up")
    assert [path.name for path in paths] == ["adapter_config.json", "adapter_model.safetensors"]
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        plain = base(TOKENS).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "up").eval()(TOKENS).logits
    torch.testing.assert_close(adapted, logits_of(trained, "up"), atol=2e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2


def test_transformers_opens_a_merged_model_alone(trained: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    export_policy(trained, tmp_path / "model", "up", merge=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits_of(trained, "up"), atol=2e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("s3142=")["input_ids"] == load_policy(trained, "up")._model.tokenizer.encode("s3142=")


def test_a_network_is_exported_by_its_parameters_names(tmp_path: Path):
    train(tiny(), tmp_path / "run")
    path, description = export_policy(tmp_path / "run", tmp_path / "out", "ant")
    loaded = load_policy(tmp_path / "run", "ant")
    assert (path.name, description.name) == ("ant.safetensors", "policy.json")
    assert set(load_file(path)) == {slot.name for slot in loaded.policy.layout.slots}
    with pytest.raises(ValueError, match="client ant: has a network and no adapters that could be merged"):
        export_policy(tmp_path / "run", tmp_path / "merged", "ant", merge=True)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="full: is not empty; name a folder that does not exist yet"):
        export_policy(trained, tmp_path / "full", "up")
    with pytest.raises(ValueError, match="has several clients, name one of them: up, flat"):
        export_policy(trained, tmp_path / "out")
    from grpo_fed.policy.language import merged_folder

    monkeypatch.setattr(merged_folder, "locate_model", lambda model: tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"needs its config.json and its tokenizer; export the adapters alone"):
        export_policy(trained, tmp_path / "out", "up", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_examples_are_read_as_they_were_written(tmp_path: Path):
    text = "a\u2028b\x85c\nd"
    examples = [Example(text, text, 0.0, "", 1.0)]
    write_examples(tmp_path, "up", examples)
    assert read_examples(tmp_path, "up") == examples
    assert len(json.loads((tmp_path / "examples" / "up.jsonl").read_text())) == 5
