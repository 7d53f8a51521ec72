"""The files of a language model: a folder in Hugging Face's layout, or a GGUF file, read tensor by tensor."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo_fed.policy.language.shape import ModelShape, parse_config, shape_from_config, shape_from_gguf
from grpo_fed.scenario.extras import write_install_command
from grpo_fed.scenario.toml.text import short_toml

TINY = Path(__file__).parent / "tiny"
"""The folder of the model that ships with grpo_fed."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
"""What is downloaded of a model from the hub."""
GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of a layer in GGUF, with their names in Hugging Face's Llama."""


class ModelSource(ABC):
    """The files of a model, with the tensors that `ModelShape.tensor_shapes` names."""

    place: str
    """The file or folder, for errors."""
    shape: ModelShape
    files: tuple[Path, ...]
    """The files that the shape and the tensors are read from."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor, in the type of the file or dequantised."""

    @abstractmethod
    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return the type of a tensor in the file, and its bytes there, [n] uint8."""

    @abstractmethod
    def maps_as(self, dtype: torch.dtype) -> bool:
        """Return whether `read` maps the file's own memory pages, in this type, for every tensor."""


def locate_model(model: str) -> Path:
    """Return the folder or the `.gguf` file of `language.model`, downloaded from the hub if it is a hub's name.

    Raises a ValueError where there is none.
    """
    if model == "tiny":
        return TINY
    path = Path(model).expanduser()
    if path.exists():
        return path
    if HUB_NAME.fullmatch(model) and path.suffix != ".gguf":
        return _download(model)
    raise ValueError(
        f'language.model: there is no {model}; give "tiny", a folder with config.json, a .gguf file, or the name'
        ' "owner/name" of a model on the hub'
    )


def open_source(model: str) -> ModelSource:
    """Open the files of `language.model`.

    Raises a ValueError where files or tensors are missing, or the model is of a kind that is not supported.
    """
    path = locate_model(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _open_source(path, tuple(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=4)
def _open_source(path: Path, _times: tuple[int, ...]) -> ModelSource:
    """Open the files at a path. _times: of the files, so that changed ones are opened again."""
    return _FolderSource(path) if path.is_dir() else _GgufSource(path)


def import_extra(package: str, purpose: str) -> ModuleType:
    """Import a package of the extra "language", and raise a ValueError with the cure where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise ValueError(
            f"language.model: {purpose} needs the package {package}: {write_install_command('language')}"
        ) from None


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file by key."""
    return _fields(_open_gguf(path))


def _download(model: str) -> Path:
    hub = import_extra("huggingface_hub", f"the hub's model {model}")
    try:
        return Path(hub.snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"language.model: there is no folder {model}, and it could not be downloaded from the hub ({reason});"
            " check the name and the network, or give a folder"
        ) from None


@final
class _FolderSource(ModelSource):
    """A folder with config.json, and model.safetensors or the files that model.safetensors.index.json lists."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise ValueError(f"language.model: {folder} has no config.json; give a folder in Hugging Face's layout")
        self.shape = shape_from_config(parse_config(config.read_text(), str(config)), str(config))
        weights = _weight_files(folder)
        self.files = (config, *weights)
        self._file_of: dict[str, Any] = {}
        for path in weights:
            try:
                opened: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: it cannot be read as safetensors ({error})") from None
            self._file_of |= dict.fromkeys(opened.keys(), opened)
        _check_tensors(self.shape, {name: self._slice(name).get_shape() for name in self._file_of}, self.place)

    def _slice(self, name: str) -> Any:
        return self._file_of[name].get_slice(name)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        tensor = self.read(name)
        return str(tensor.dtype).removeprefix("torch."), tensor.reshape(-1).view(torch.uint8).numpy()

    def maps_as(self, dtype: torch.dtype) -> bool:
        wanted = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        return all(self._slice(name).get_dtype() == wanted for name in self.shape.tensor_shapes())


@final
class _GgufSource(ModelSource):
    """A GGUF file, whose tensors are dequantised. Its weights of queries and keys are in another order of rows."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self.files = (path,)
        reader = _open_gguf(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields = _fields(reader)
        shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.shape = shape_from_gguf(fields, shapes, self.place)
        if "rope_freqs.weight" in self._tensors:
            factors = self._dequantise("rope_freqs.weight").reshape(-1).tolist()
            self.shape = dataclasses.replace(self.shape, rope_factors=tuple(factors))
        self._permuted = fields["general.architecture"] == "llama"
        self._names = {_name_of_gguf(name): name for name in self._tensors}
        _check_tensors(self.shape, {name: shapes[source] for name, source in self._names.items()}, self.place)

    def read(self, name: str) -> Tensor:
        values = self._dequantise(self._names[name])
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.shape.heads if "q_proj" in name else self.shape.kv_heads
            halves = values.reshape(heads, self.shape.head_width // 2, 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(np.array(values))

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        tensor = self._tensors[self._names[name]]
        return tensor.tensor_type.name, np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)

    def maps_as(self, dtype: torch.dtype) -> bool:
        return False

    def _dequantise(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        quantisation = import_extra("gguf.quants", "a .gguf file")
        try:
            return np.asarray(quantisation.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise ValueError(
                f"{self.place}: {name} is of type {tensor.tensor_type.name}, which the package gguf cannot read; use"
                " another quantisation"
            ) from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"language.model: {folder} has no model.safetensors; convert the weights to safetensors")
    names = parse_config(index.read_text(), str(index)).get("weight_map", {})
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ValueError(f"{index}: the files {short_toml(missing)} are missing; download the model again")
    return files


def _check_tensors(shape: ModelShape, found: Mapping[str, Any], place: str) -> None:
    """Raise a ValueError where a tensor of the model is missing or of another shape."""
    wanted = shape.tensor_shapes()
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors are" if len(missing) > 1 else " is"
        raise ValueError(f"{place}: the tensor {missing[0]}{more} missing; is the model complete?")
    for name, size in wanted.items():
        if tuple(found[name]) != size:
            raise ValueError(f"{place}: {name} has shape {tuple(found[name])}, and the model's dimensions say {size}")


def _name_of_gguf(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor: `output_norm.weight` -> `model.norm.weight`."""
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    block, _, inner = module.rpartition(".")
    return f"model.layers.{block.removeprefix('blk.')}.{GGUF_NAMES.get(inner, inner)}.{kind}"


def _open_gguf(path: Path) -> Any:
    gguf = import_extra("gguf", "a .gguf file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"language.model: {path} cannot be read as a GGUF file ({error})") from None


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}
