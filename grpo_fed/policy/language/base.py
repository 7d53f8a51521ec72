"""FrozenBase: the weights of a language model, mapped into memory, so that all processes of a machine share one copy.

Weights of the wanted type are mapped from where they lie. All others are converted once, into a file of the cache
folder, and mapped from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from grpo_fed.policy.language.shape import ModelShape
from grpo_fed.policy.language.source import ModelSource, open_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The types of `language.dtype`."""
LARGE = 1 << 26
"""Bytes of a model from which its digest is kept in the cache folder."""
_DIGESTS: dict[str, str] = {}
"""Digests of this process, by the stamps of their files."""


@dataclass(frozen=True, eq=False)
class FrozenBase:
    """The weights of a language model, which never change."""

    shape: ModelShape
    digest: str
    """A hash of the shape and of the weights as their files have them; equal for equal models, whatever `dtype` is."""
    tensors: Mapping[str, Tensor]
    """The weights by their names in Hugging Face's Llama, `ModelShape.tensor_shapes`."""
    dtype: torch.dtype


def open_base(model: str, dtype: Literal["float32", "bfloat16"]) -> FrozenBase:
    """Map the weights of `language.model` into memory.

    Raises a ValueError where files or tensors are missing, or the model is of a kind that is not supported.
    """
    source = open_source(model)
    wanted = DTYPES[dtype]
    names = source.shape.tensor_shapes()
    if source.maps_as(wanted):
        tensors = {name: source.read(name) for name in names}
    else:
        with safe_open(_converted(source, dtype), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in names}
    return FrozenBase(source.shape, _digest_of(source), tensors, wanted)


def read_base_facts(model: str) -> tuple[ModelShape, str]:
    """Read the shape and the digest of `language.model`, without its weights.

    Raises a ValueError as `open_base` does.
    """
    source = open_source(model)
    return source.shape, _digest_of(source)


def cache_folder() -> Path:
    """Return the folder of converted models: `GRPO_FED_CACHE`, or `~/.cache/grpo_fed`, and in it `models`."""
    root = os.environ.get("GRPO_FED_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "grpo_fed") / "models"


def _digest_of(source: ModelSource) -> str:
    """Return a model's digest, computed once for a process, and for large models once for a machine."""
    stamp = _stamp(source)
    if stamp not in _DIGESTS:
        if sum(path.stat().st_size for path in source.files) < LARGE:
            _DIGESTS[stamp] = _digest(source)
        else:
            kept = cache_folder() / f"{stamp}.digest"
            if not kept.is_file():
                _write_cached(kept, lambda file: file.write(_digest(source).encode()))
            _DIGESTS[stamp] = kept.read_text()
    return _DIGESTS[stamp]


def _digest(source: ModelSource) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(source.shape), sort_keys=True).encode())
    for name in sorted(source.shape.tensor_shapes()):
        kind, data = source.raw(name)
        digest.update(f"{name} {kind} {data.size} ".encode())
        digest.update(data.data)
    return digest.hexdigest()


def _stamp(source: ModelSource) -> str:
    """Return a hash of the paths, sizes and times of a model's files."""
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _converted(source: ModelSource, dtype: str) -> Path:
    """Return the file of the cache folder that holds a model in this type, and make it if it is not there."""
    path = cache_folder() / f"{_stamp(source)}-{dtype}.safetensors"
    if not path.is_file():
        _write_cached(path, lambda file: write_tensors(file, source.shape.tensor_shapes(), DTYPES[dtype], source.read))
    return path


def write_tensors(
    file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Write tensors as safetensors, one after the other, so that the model is never in memory as a whole.

    shapes: by name. read: returns the tensor of a name, which is converted to `dtype`.
    """
    header: dict[str, dict[str, object]] = {}
    start = 0
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    for name, shape in shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the weights begin at a multiple of 64 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name in header:
        tensor = read(name).to(dtype).contiguous()
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _write_cached(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file of the cache folder under another name and rename it, so that it is never there in part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                write(file)
                file.flush()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ValueError(
            f"language.model: {path.parent} cannot be written ({error}); set GRPO_FED_CACHE to a folder that can"
        ) from None
