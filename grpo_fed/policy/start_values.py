"""Reads what policies begin with from files that `policy.start` and `clients.start` name.

A start is the folder of a run, the folder of one of its checkpoints, or a `.safetensors` file. Whatever it is, it gives
tensors by the names of a policy's parameters; parameters that it does not name begin as they would without a start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import Tensor

from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.shared_names import CHECKPOINTS, NORMALISER, POLICIES, SHARED_BLOCKS_FILE
from grpo_fed.scenario.scenario import Scenario

SUFFIX = ".safetensors"
SUMS = "SHA256SUMS"
"""The file of a checkpoint with the digests of all others."""


@dataclass(frozen=True, eq=False)
class StartValues:
    """Holds what a policy begins with."""

    source: str
    """Where it comes from, for errors: `policy.start = "runs/poles"`."""
    arrays: Mapping[str, np.ndarray]
    """Values of parameters, by name."""
    moments: Mapping[str, np.ndarray]
    """What observations were normalised with, by name; empty if they were not."""

    def place(self, layout: Layout, parameters: Tensor) -> Tensor:
        """Copy parameters [P] with these values in place.

        ValueError for a value of another shape, or if no value fits at all.
        """
        placed, found = parameters.clone(), False
        for slot in layout.slots:
            array = self.arrays.get(slot.name)
            if array is None:
                continue
            if array.shape != slot.shape or array.dtype != np.float32:
                raise ValueError(
                    f"{self.source}: {slot.name} is {array.dtype} of shape {array.shape}, and the policy here has"
                    f" float32 of shape {slot.shape}; use its [policy], or remove the tensor from the file"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{self.source}: {slot.name} is not finite; name another start")
            placed[slot.start : slot.stop] = torch.from_numpy(array.reshape(-1).copy())
            found = True
        if not found:
            names = ", ".join(slot.name for slot in layout.slots[:3])
            raise ValueError(f"{self.source}: has no parameter of this policy, such as {names}; name another start")
        return placed


def read_server_start(scenario: Scenario) -> StartValues | None:
    """Read what the shared blocks of a federation begin with; None without a start.

    ValueError if there is nothing to read.
    """
    if scenario.policy.start is None:
        return None
    source, path = _describe("policy.start", scenario.policy.start), Path(scenario.policy.start)
    file = path if path.is_file() else _shared_file(path, source)
    if file is None:
        raise ValueError(
            f"{source}: has no checkpoint with shared blocks; name the file of one policy,"
            f" {path / POLICIES / ('NAME' + SUFFIX)}, or set policy.shared = []"
        )
    return _split(source, _read(file, source))


def read_client_start(scenario: Scenario, client: str) -> StartValues | None:
    """Read what the policy of a client begins with; None without a start.

    ValueError if there is nothing to read.
    """
    (entry,) = (entry for entry in scenario.clients if client in entry.names)
    start = scenario.policy.start if entry.start is None else entry.start
    if start is None:
        return None
    key = "policy.start" if entry.start is None else f"clients.{entry.name}.start"
    source, path = _describe(key, start), Path(start)
    if path.is_file():
        return _split(source, _read(path, source))
    shared, own = _shared_file(path, source), path / POLICIES / f"{client}{SUFFIX}"
    arrays = {} if shared is None else dict(_read(shared, source))
    if own.is_file():
        arrays |= _read(own, source)
    if not arrays:
        raise ValueError(
            f"{source}: client {client}: has neither a checkpoint with shared blocks nor a policy of this client; name"
            f" the file of one policy, {path / POLICIES / ('NAME' + SUFFIX)}"
        )
    return _split(source, arrays)


def with_absolute_starts(scenario: Scenario) -> Scenario:
    """Return a scenario whose starts are absolute paths, for processes that work in other folders."""
    policy = scenario.policy
    if policy.start is not None:
        policy = policy.model_copy(update={"start": str(Path(policy.start).absolute())})
    clients = [
        entry if entry.start is None else entry.model_copy(update={"start": str(Path(entry.start).absolute())})
        for entry in scenario.clients
    ]
    return scenario.model_copy(update={"policy": policy, "clients": clients})


def _describe(key: str, start: str) -> str:
    return f'{key} = "{start}"'


def _shared_file(path: Path, source: str) -> Path | None:
    """Find the file with the shared blocks of a run's latest checkpoint, or of this checkpoint; None if there is none.

    ValueError if there is no such folder.
    """
    if not path.is_dir():
        raise ValueError(
            f"{source}: there is no such file or folder on this machine; name the folder of a run, that of one of its"
            f" checkpoints, or a {SUFFIX} file"
        )
    checkpoints = sorted((path / CHECKPOINTS).glob("round-*"), key=lambda folder: (len(folder.name), folder.name))
    folder = path if (path / SUMS).is_file() else next(reversed(checkpoints), None)
    if folder is None or not (folder / SHARED_BLOCKS_FILE).is_file():
        return None
    file = folder / SHARED_BLOCKS_FILE
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if f"{digest}  {SHARED_BLOCKS_FILE}" not in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        raise ValueError(f"{source}: {file} does not have the SHA-256 that is in {SUMS}; name another checkpoint")
    return file


def _read(path: Path, source: str) -> Mapping[str, np.ndarray]:
    """Read the arrays of a file; ValueError if it is damaged."""
    try:
        status = path.stat()
        return _load(path, status.st_mtime_ns, status.st_size)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{source}: {path} cannot be read as {SUFFIX}: {error}") from error


@lru_cache(maxsize=4)
def _load(path: Path, changed: int, size: int) -> Mapping[str, np.ndarray]:
    """Load a file, which several clients may begin with. changed, size: of the file as it is now."""
    return load(path.read_bytes())


def _split(source: str, arrays: Mapping[str, np.ndarray]) -> StartValues:
    """Take apart parameters and the state of a normaliser; no parameter's name has a colon."""
    return StartValues(
        source,
        {name: array for name, array in arrays.items() if ":" not in name},
        {name.removeprefix(NORMALISER): array for name, array in arrays.items() if name.startswith(NORMALISER)},
    )
