"""Tokenizers: text to the numbers of its tokens and back, and messages to a prompt by the model's chat template."""

from __future__ import annotations

import datetime
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, final

from grpo_fed.policy.language.shape import parse_config
from grpo_fed.policy.language.source import import_extra, locate_model, read_gguf_fields
from grpo_fed.scenario.toml.text import short_toml

Message = Mapping[str, Any]
"""A message of a chat, `{"role": "user", "content": "What is 3 + 4?"}`."""

SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
"""How a text is cut into words before its bytes are merged, by `tokenizer.ggml.pre`; Qwen2's differs in its digits."""


class Tokenizer(ABC):
    """Maps text to tokens and back, and renders chats."""

    end: frozenset[int]
    """The tokens that end a completion."""
    pad: int
    """The token of padding; it may be one of the others, so a mask says where padding is."""
    template: str | None
    """The chat template, in Jinja's language; None where the model has none."""
    names: Mapping[str, str]
    """The texts of special tokens by their names in a chat template, `eos_token` and so on."""
    place: str
    """The folder or file, for errors."""

    @abstractmethod
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return a text's tokens.

        special: whether those that the model expects around a text are added, as its first token. A chat that
        `render_chat` returned has them already.

        Raises a ValueError where the text has a character that the tokenizer does not know.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the special ones."""

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the model's chat template makes of messages, up to where the answer begins.

        Raises a ValueError where the model has no chat template, or the template refuses the messages.
        """
        if self.template is None:
            raise ValueError(
                f"{self.place}: this model has no chat template, so its prompts cannot be messages; give them as texts,"
                " or use a model that was trained to chat"
            )
        return _render(self.template, messages, self.names, self.place)


def open_tokenizer(model: str) -> Tokenizer:
    """Open the tokenizer of `language.model`.

    Raises a ValueError where there is none, or it is of a kind that is not supported.
    """
    path = locate_model(model)
    if not path.is_dir():
        return _open_gguf_tokenizer(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"language.model: {path} has no tokenizer.json; save its tokenizer as a fast one")
    content = parse_config(file.read_text(encoding="utf-8"), str(file))
    if content.get("model", {}).get("type") == "WordLevel" and content.get("pre_tokenizer") == CHARACTERS:
        return CharacterTokenizer(content, _read_settings(path), str(path))
    tokenizers = import_extra("tokenizers", f"the tokenizer of {path}")
    return _LibraryTokenizer(tokenizers.Tokenizer.from_file(str(file)), _read_settings(path), str(path))


CHARACTERS = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
"""The pre-tokenizer of a tokenizer.json that makes a token of each character."""


@final
class CharacterTokenizer(Tokenizer):
    """Makes a token of each character; it reads a tokenizer.json with `WordLevel` and `CHARACTERS`."""

    def __init__(self, content: Mapping[str, Any], settings: Mapping[str, Any], place: str) -> None:
        """Read the contents of tokenizer.json, and the settings that `_read_settings` returns."""
        self.place = place
        self._token_of: dict[str, int] = content["model"]["vocab"]
        self._text_of = {token: text for text, token in self._token_of.items()}
        special = [token["content"] for token in content.get("added_tokens", ())]
        self._special = {self._token_of[text] for text in special}
        self._parts = re.compile("|".join([*map(re.escape, sorted(special, key=len, reverse=True)), r"[\s\S]"]))
        self.names, self.template = settings["names"], settings["template"]
        self.end = _end_tokens(settings, self._token_of.get, place)
        self.pad = self._token_of.get(self.names.get("pad_token", ""), min(self.end))

    def encode(self, text: str, special: bool = True) -> list[int]:
        parts = self._parts.findall(text)
        unknown = sorted({part for part in parts if part not in self._token_of})
        if unknown:
            known = "".join(sorted(part for part in self._token_of if len(part) == 1))
            raise ValueError(f"{self.place}: no token for {short_toml(unknown)}; the model knows {known}")
        return [self._token_of[part] for part in parts]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._text_of.get(token, "") for token in tokens if token not in self._special)


@final
class _LibraryTokenizer(Tokenizer):
    """A tokenizer of the package tokenizers."""

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any], place: str) -> None:
        self.place = place
        self._tokenizer = tokenizer
        self.names, self.template = settings["names"], settings["template"]
        self.end = _end_tokens(settings, tokenizer.token_to_id, place)
        pad = tokenizer.token_to_id(self.names.get("pad_token", ""))
        self.pad = min(self.end) if pad is None else pad

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's special tokens, the tokens that end a completion, and the chat template.

    It returns `names`, texts of special tokens; `ends`, numbers of tokens; and `template`, None where there is none.
    """
    contents: list[dict[str, Any]] = []
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        file = folder / name
        contents.append(parse_config(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {})
    tokenizer, *models = contents
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer.items()
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    ends: set[int] = set()
    for content in models:
        value = content.get("eos_token_id")
        ends |= set(value) if isinstance(value, list) else set() if value is None else {value}
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    return {"names": names, "ends": ends, "template": template}


def _end_tokens(settings: Mapping[str, Any], token_of: Any, place: str) -> frozenset[int]:
    """Return the tokens that end a completion: those of the model's configuration, and the tokenizer's own."""
    named = token_of(settings["names"].get("eos_token", ""))
    ends = frozenset(settings["ends"]) | (frozenset() if named is None else {named})
    if not ends:
        raise ValueError(f"{place}: no token ends a completion; set eos_token in tokenizer_config.json")
    return ends


# GGUF ----------------------------------------------------------------------------------------------------------------


def _open_gguf_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file from its tokens and merges."""
    fields = read_gguf_fields(path)
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model = {short_toml(str(kind))} is not supported; gpt2 is. Use the model's folder"
        )
    library = import_extra("tokenizers", f"the tokenizer of {path}")
    texts: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {text: token for token, text in enumerate(texts)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = _gguf_pre_tokenizer(library, cut, path)
    tokenizer.decoder = library.decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
    kinds = fields.get("tokenizer.ggml.token_type") or []
    special = [texts[token] for token, kind in enumerate(kinds) if kind in (_CONTROL, _OWN)]
    tokenizer.add_special_tokens([library.AddedToken(text, special=True, normalized=False) for text in special])
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_SPECIAL.items()}
    names = {name: texts[token] for name, token in ids.items() if token is not None}
    if fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in names:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{names['bos_token']} $A", special_tokens=[(names["bos_token"], ids["bos_token"])]
        )
    ends = {fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")} - {None}
    settings = {"names": names, "ends": ends, "template": fields.get("tokenizer.chat_template")}
    return _LibraryTokenizer(tokenizer, settings, str(path))


_CONTROL, _OWN = 3, 4
"""GGUF's types of tokens that are not text: of control, and defined by the model's makers."""
_GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens, with their names in GGUF."""


def _gguf_pre_tokenizer(library: Any, cut: str, path: Path) -> Any:
    """Return what cuts a text into words before its bytes are merged."""
    pre = library.pre_tokenizers
    whole = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut in SPLITS:
        return pre.Sequence([pre.Split(library.Regex(SPLITS[cut]), "isolated"), whole])
    if cut == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), words])
    if cut in ("gpt-2", "default"):
        return words
    known = [*SPLITS, "smollm", "gpt-2", "default"]
    raise ValueError(
        f"{path}: tokenizer.ggml.pre = {short_toml(cut)} is not supported; {', '.join(known)} are. Use the model's"
        " folder"
    )


# Chat templates ------------------------------------------------------------------------------------------------------


def _render(template: str, messages: Sequence[Message], names: Mapping[str, str], place: str) -> str:
    """Render a chat template with what Hugging Face's templates expect to find."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **names
        )
    except TemplateError as error:
        raise ValueError(f"{place}: the chat template refuses the messages ({error})") from None


def _raise_exception(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def write_character_tokenizer(folder: Path, characters: str, special: Iterable[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers reads, too.

    special: the texts of the tokens of padding and of the end, which get the first numbers.
    """
    pad, end = special
    vocabulary = {text: token for token, text in enumerate([pad, end, *characters])}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": text, **added} for token, text in enumerate((pad, end))],
        "normalizer": None,
        "pre_tokenizer": CHARACTERS,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": end}
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
