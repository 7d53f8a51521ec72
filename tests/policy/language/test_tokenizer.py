"""Tokenizers and chat templates, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_fed.policy.language.source import TINY
from grpo_fed.policy.language.tokenizer import CharacterTokenizer, open_tokenizer
from tests.support.language_models import write_model

TEXTS = ["s3142=", "", "r00=<end>", "<pad>m9=9 ", "1+2-3.,?", "<end><pad>12<end><end>3"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
<|{{ message['role'] }}|>{{ message['content'] | tojson }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
{{ strftime_now('%Y') | length }}"""
MESSAGES = [{"role": "system", "content": "Be <brief> & näive."}, {"role": "user", "content": "What is 3 + 4?"}]


def write_byte_tokenizer(folder: Path, **settings: object) -> Path:
    """Write a byte-level BPE with some merges and special tokens of its own."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is the same as the other answer 1234"] * 5, trainer)
    tokenizer.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def test_the_tiny_models_tokenizer_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    ours, theirs = open_tokenizer("tiny"), transformers.AutoTokenizer.from_pretrained(TINY)
    assert isinstance(ours, CharacterTokenizer)
    for text in TEXTS:
        tokens = ours.encode(text)
        assert tokens == theirs(text)["input_ids"]
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.end == {theirs.eos_token_id} == {1}
    assert ours.pad == theirs.pad_token_id == 0


def test_a_character_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r'no token for \["Q", "é"\]; the model knows  \+,-\.0123456789=\?mrs'):
        open_tokenizer("tiny").encode("Q1é1Q")


def test_a_folders_tokenizer_agrees_with_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    folder = write_byte_tokenizer(write_model(tmp_path, eos_token_id=[1, 7]))
    ours, theirs = open_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the answer is 1234", " näive \n\n text</s>", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        tokens = ours.encode(text)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.encode("a")[0] == 0
    assert ours.end == {1, 7}
    assert ours.pad == 1


@pytest.mark.parametrize("place", ["file", "settings", "named"])
def test_chats_are_rendered_as_transformers_does(tmp_path: Path, place: str):
    transformers = pytest.importorskip("transformers")
    named = [{"name": "default", "template": TEMPLATE}, {"name": "other", "template": "no"}]
    settings = {"file": {}, "settings": {"chat_template": TEMPLATE}, "named": {"chat_template": named}}[place]
    folder = write_byte_tokenizer(tmp_path, **settings)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = open_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(MESSAGES) == expected
    assert "<|user|>" in expected
    with pytest.raises(ValueError, match=r"the chat template refuses the messages \(no tools\)"):
        ours.render_chat([{"role": "tool", "content": ""}])


def test_a_template_may_not_reach_into_the_program(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path, chat_template="{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(ValueError, match=r"the chat template refuses"):
        open_tokenizer(str(folder)).render_chat(MESSAGES)


def test_a_model_without_a_template_refuses_messages():
    with pytest.raises(ValueError, match=r"tiny: this model has no chat template, so its prompts cannot be messages"):
        open_tokenizer("tiny").render_chat(MESSAGES)


def test_folders_without_a_tokenizer_or_an_end_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        open_tokenizer(str(tmp_path))
    write_byte_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match=r"no token ends a completion; set eos_token"):
        open_tokenizer(str(tmp_path))
