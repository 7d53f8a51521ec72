"""What is wrong with clients with prompts is found before a run begins where it can be, and always by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo_fed.engines.alone import train
from grpo_fed.engines.start import run
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.tasks.task import MissingPackageError, TaskError
from tests.support.language_models import write_model
from tests.support.small_language import words

HERE = "tests.support.small_language"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("language.rank=97", r"client up: language\.rank: 97 orthonormal rows do not fit into the 96 inputs of q_proj"),
        ("language.maps=['k_prj']", r'client up: language\.maps: "k_prj" matches no linear map; did you mean "k_proj"'),
        ("language.length=256", r"client up: language\.length: 256 leaves no room for a prompt in the 256 tokens"),
        (
            "clients.back.prompts=grpo_fed.tasks.letters:upwards",
            r"client back: prompts: grpo_fed\.tasks\.letters:upwards: .* no attribute 'upwards'",
        ),
        ("clients.back.prompts=nowhere:f", r"client back: prompts: nowhere:f: cannot be imported: .* is it installed"),
        ("clients.up.prompts=none.jsonl", r"client up: prompts: none\.jsonl: there is no file /"),
        (
            "clients.back.rewards=[]",
            r"client back: rewards: none, .*; give some, such as \[\{ function",
        ),
        (
            "policy.shared=['layer.*']",
            r'client up: policy\.shared: "layer\.\*" matches no block; did you mean "layers\.',
        ),
        ("language.model=/no/such", r"^client up: language\.model: there is no /no/such; give .tiny., a folder"),
    ],
)
def test_a_mistake_is_found_before_the_run_begins(override: str, reason: str, tmp_path: Path):
    given = words(override)
    with pytest.raises(ValueError, match=reason):
        FederationSetup.of(given)
    for start in (run, train):
        with pytest.raises(ValueError, match=reason):
            start(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_completions_have_tokens():
    with pytest.raises(ScenarioError, match=r"language\.length=0: must be greater than 0"):
        words("language.length=0")


def test_a_model_of_the_hub_is_missing_where_there_is_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MissingPackageError, match=r"^client up: language\.model: there is no folder nobody/nothing, .* check the"
    ):
        FederationSetup.of(words("language.model=nobody/nothing"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model has no tokenizer\.json; save its tokenizer as a fast one"):
        train(words(f"language.model={model}"))


@pytest.mark.parametrize(
    ("override", "error", "reason"),
    [
        (
            f"clients.down.rewards=[{{ function = '{HERE}:fails' }}]",
            TaskError,
            f"^client down: rewards: {HERE}:fails: RuntimeError: the judge is ill .prompt 1 of 6: 's",
        ),
        (
            f"clients.down.rewards=[{{ function = '{HERE}:too_few' }}]",
            TaskError,
            f"^client down: rewards: {HERE}:too_few: returned 5 rewards for 6 completions",
        ),
        (
            f"clients.down.prompts={HERE}:endless",
            ValueError,
            "^client down: prompts: a prompt has 502 tokens, and the model reads 256 with the 6 of language.length: 's",
        ),
        (
            f"clients.down.prompts={HERE}:chats",
            ValueError,
            "^client down: prompts: .* this model has no chat template, .* give them as texts",
        ),
        (
            f"clients.down.prompts={HERE}:unknown_letters",
            ValueError,
            '^client down: prompts: .* no token for .*"ß".*; the model knows',
        ),
    ],
    ids=["reward fails", "too few rewards", "long prompt", "chat", "unknown letters"],
)
def test_what_shows_in_the_first_evaluation_names_client_and_key(
    override: str, error: type[Exception], reason: str, tmp_path: Path
):
    """Alone the run ends with it; in a federation the others go on without that client."""
    given = words(override, "rounds=1", "language.show=0")
    with pytest.raises(error, match=reason):
        train(given)
    result = run(given, tmp_path, workers=0)
    assert result.status == "finished"
    assert result.missing.keys() == {"down"}
    (first, *_) = result.missing["down"]
    assert first[:2] == (0, "raised")
    assert re.search(reason.removeprefix("^"), first[2])
