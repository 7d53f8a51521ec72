"""GGUF files, written by the package gguf, against transformers' models with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_fed.policy.language.base import open_base, read_base_facts
from grpo_fed.policy.language.source import GGUF_NAMES
from grpo_fed.policy.language.tokenizer import SPLITS, open_tokenizer
from tests.policy.language.test_tokenizer import MESSAGES, TEMPLATE, write_byte_tokenizer
from tests.support.language_models import open_model, write_model

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Q8_0 quantises rows in blocks of 32."""


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp wants them: the two halves of each head, which rotate together, in turn."""
    width = len(weight) // heads
    order = [
        head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(path: Path, folder: Path, kind: str, quantisation: str = "F16", **fields: object) -> None:
    """Write a folder's model as GGUF. fields: of the metadata."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(96)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    back = {theirs: ours for ours, theirs in GGUF_NAMES.items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values, (module, _, part) = tensor.numpy(), name.removeprefix("model.").rpartition(".")
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            values = permuted(values, 4 if module.endswith("q_proj") else 2)
        outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        if module in outer:
            target = outer[module]
        else:
            _, layer, inner = module.split(".", 2)
            target = f"blk.{layer}.{back[inner]}"
        if values.ndim == 1:
            writer.add_tensor(f"{target}.{part}", values)
        else:
            form = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(f"{target}.{part}", gguf.quants.quantize(values, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("kind", "quantisation"), [("llama", "F16"), ("llama", "Q8_0"), ("qwen2", "F16")])
def test_a_gguf_file_gives_the_logits_of_transformers_with_the_same_weights(
    tmp_path: Path, kind: str, quantisation: str
):
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path / "model", model_type=kind, **WIDE)
    form = gguf.GGMLQuantizationType[quantisation]
    rounded = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), form), form).copy())
        if tensor.ndim > 1
        else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    write_gguf(tmp_path / "model.gguf", folder, kind, quantisation)
    ours = open_model(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(14).reshape(1, 2, 7)
    logits = ours.logits(ours.hidden(None, tokens))
    expected = theirs(tokens[0]).logits.detach()
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    shape, digest = read_base_facts(str(tmp_path / "model.gguf"))
    assert shape == read_base_facts(str(folder))[0]
    assert digest == open_base(str(tmp_path / "model.gguf"), "bfloat16").digest


@pytest.mark.parametrize("cut", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_a_gguf_files_tokenizer_is_that_of_its_folder(tmp_path: Path, cut: str):
    folder = write_byte_tokenizer(write_model(tmp_path / "model", **WIDE))
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pre = tokenizers.pre_tokenizers
    if cut in SPLITS:
        split = pre.Split(tokenizers.Regex(SPLITS[cut]), "isolated")
        reference.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif cut == "smollm":
        reference.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    vocabulary = sorted(reference.get_vocab().items(), key=lambda entry: entry[1])
    merges = json.loads(reference.to_str())["model"]["merges"]
    write_gguf(
        tmp_path / "model.gguf",
        folder,
        "llama",
        tokenizer_model="gpt2",
        tokenizer_pre=cut,
        token_list=[text for text, _ in vocabulary],
        token_types=[3 if token < 2 else 1 for _, token in vocabulary],
        token_merges=[" ".join(pair) for pair in merges],
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=True,
        chat_template=TEMPLATE,
    )
    ours = open_tokenizer(str(tmp_path / "model.gguf"))
    for text in ("the answer is 1234, isn't it?", " näive \n\n text</s>", ""):
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text).ids)
    assert ours.end == {1}
    assert ours.render_chat(MESSAGES).startswith("<s>")


def test_gguf_files_of_another_kind_are_refused(tmp_path: Path):
    folder, path = write_model(tmp_path / "model", **WIDE), tmp_path / "model.gguf"
    write_gguf(path, folder, "gemma")
    with pytest.raises(
        ValueError, match=r'model.gguf: general.architecture = "gemma" is not supported; llama, qwen2 are'
    ):
        read_base_facts(str(path))
    write_gguf(path, folder, "llama", rope_scaling_type=gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match=r'llama.rope.scaling.type = "yarn" is not supported'):
        read_base_facts(str(path))
    write_gguf(path, folder, "llama", tokenizer_model="llama")
    with pytest.raises(ValueError, match=r'tokenizer.ggml.model = "llama" is not supported; gpt2 is'):
        open_tokenizer(str(path))
    write_gguf(
        path,
        folder,
        "llama",
        tokenizer_model="gpt2",
        tokenizer_pre="tekken",
        token_list=["a", "b", "ab"],
        token_merges=["a b"],
    )
    with pytest.raises(ValueError, match=r'tokenizer.ggml.pre = "tekken" is not supported; llama-bpe, qwen2'):
        open_tokenizer(str(path))
    path.write_bytes(b"nothing of this kind")
    with pytest.raises(ValueError, match=r"model.gguf cannot be read as a GGUF file"):
        read_base_facts(str(path))
