"""The frozen base: what is read from where, its digest, and that processes share it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_fed.policy.language.base import cache_folder, open_base, read_base_facts
from grpo_fed.policy.language.source import import_extra
from tests.support.language_models import LLAMA, write_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRPO_FED_CACHE", str(tmp_path / "cache"))


def mapped_files() -> str:
    return Path("/proc/self/smaps").read_text()


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mapped files")


@needs_proc
def test_weights_of_the_wanted_type_are_mapped_from_where_they_lie(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    base = open_base(str(folder), "float32")
    assert str(folder / "model.safetensors") in mapped_files()
    assert not cache_folder().exists()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(base.tensors[name], tensor)


@needs_proc
def test_weights_of_another_type_are_converted_once_and_mapped_from_the_cache(tmp_path: Path):
    folder = write_model(tmp_path / "model", dtype=torch.float16)
    base = open_base(str(folder), "bfloat16")
    (file,) = cache_folder().iterdir()
    assert str(file) in mapped_files()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(base.tensors[name], tensor.to(torch.bfloat16))
    written = file.stat().st_mtime_ns
    open_base(str(folder), "bfloat16")
    assert [path.stat().st_mtime_ns for path in cache_folder().iterdir()] == [written]


@needs_proc
def test_two_processes_share_the_pages_of_one_base(tmp_path: Path):
    folder = write_model(tmp_path / "model", vocab_size=40_000)  # 3.8 MB in an embedding, and again in the head
    code = (
        "import sys; from pathlib import Path; from grpo_fed.policy.language.base import open_base\n"
        f"base = open_base({str(folder)!r}, 'float32')\n"
        "total = sum(float(tensor.sum()) for tensor in base.tensors.values())\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "lines = Path('/proc/self/smaps').read_text().splitlines()\n"
        "start = next(i for i, line in enumerate(lines) if line.endswith('model.safetensors'))\n"
        "sizes = dict(line.split(':') for line in lines[start + 1 : start + 20] if 'kB' in line)\n"
        "print({key: int(sizes[key].split()[0]) for key in ('Rss', 'Pss', 'Private_Dirty', 'Private_Clean')})\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
        sizes = json.loads(process.stdout.readline().replace("'", '"'))
        assert sizes["Rss"] > 7000
        assert sizes["Private_Dirty"] < 100
    for process in processes:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def test_a_model_in_several_files_has_the_digest_of_the_same_in_one(tmp_path: Path):
    one, several = write_model(tmp_path / "one"), write_model(tmp_path / "several")
    tensors = load_file(several / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, several / file)
    (several / "model.safetensors").unlink()
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert read_base_facts(str(one)) == read_base_facts(str(several))
    (several / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r'index.json: the files \["model-1.safetensors"\] are missing'):
        read_base_facts(str(several))


def test_the_digest_is_that_of_shape_and_weights_whatever_the_type_wanted(tmp_path: Path):
    first, other = write_model(tmp_path / "first"), write_model(tmp_path / "other", seed=1)
    bent = write_model(tmp_path / "bent", rope_theta=20_000.0)
    digests = {read_base_facts(str(folder))[1] for folder in (first, other, bent)}
    assert len(digests) == 3
    assert open_base(str(first), "bfloat16").digest == read_base_facts(str(first))[1]
    shutil.copytree(first, tmp_path / "copy")
    assert read_base_facts(str(tmp_path / "copy"))[1] == read_base_facts(str(first))[1]


def test_the_digest_of_a_large_model_is_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo_fed.policy.language.base.LARGE", 1)
    folder = write_model(tmp_path / "model")
    digest = read_base_facts(str(folder))[1]
    (kept,) = cache_folder().iterdir()
    assert kept.read_text() == digest


def test_changed_files_are_read_anew(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    before = read_base_facts(str(folder))[1]
    write_model(folder, seed=2)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert read_base_facts(str(folder))[1] != before


REFUSED = {
    "gemma": ({"model_type": "gemma2"}, 'config.json: model_type = "gemma2" is not supported; llama, mistral, qwen2'),
    "window": ({"model_type": "mistral", "sliding_window": 16}, "attention with a sliding window is not supported"),
    "bias": ({"attention_bias": True}, "attention_bias = true is not supported"),
    "gelu": ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type = "yarn" is not supported'),
    "part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_of_another_kind_are_refused_by_name(tmp_path: Path, kind: str):
    changes, message = REFUSED[kind]
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(ValueError, match=message):
        read_base_facts(str(folder))


def test_folders_that_are_not_complete_are_refused(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"the tensor model.layers.2.input_layernorm.weight and 8 more tensors are missing"
    ):
        read_base_facts(str(folder))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 32}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(31, 24\), and .* say \(32, 24\)"):
        read_base_facts(str(folder))
    (folder / "config.json").write_text(json.dumps({key: LLAMA[key] for key in LLAMA if key != "hidden_size"}))
    with pytest.raises(ValueError, match=r"config.json: the key 'hidden_size' is missing"):
        read_base_facts(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        read_base_facts(str(folder))
    write_model(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"it cannot be read as safetensors"):
        read_base_facts(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; convert"):
        read_base_facts(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_base_facts(str(folder))


def test_models_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"language.model: there is no ./nothing; give"):
        read_base_facts("./nothing")
    with pytest.raises(ValueError, match=r"language.model: there is no some/model.gguf; give"):
        read_base_facts("some/model.gguf")
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no folder owner/name, and it could not be .* \(no route to the hub\)"):
        read_base_facts("owner/name")


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    with pytest.raises(ValueError, match=r"a .gguf file needs the package no_such: pip install 'gguf.*' 'hugg.*'"):
        import_extra("no_such", "a .gguf file")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRPO_FED_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .* set GRPO_FED_CACHE to a folder that can"):
        open_base(str(write_model(tmp_path / "model", dtype=torch.float16)), "float32")


def test_the_same_cache_serves_a_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GRPO_FED_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "grpo_fed" / "models"
