"""The names of the shared blocks and parameter groups, as a run's folder keeps them; reading them needs no torch.

And the names of the files with parameters in that folder, which another run may start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

POLICIES, CHECKPOINTS = "policies", "checkpoints"
"""The folders of a run with its clients' last policies, and with its checkpoints."""
SHARED_BLOCKS_FILE = "shared.safetensors"
"""The file of a checkpoint with the shared blocks."""
NORMALISER = "normaliser:"
"""In a policy's file, the prefix of the arrays of the observation normaliser; no parameter's name has a colon."""


@dataclass(frozen=True)
class SharedNames:
    """Names the shared blocks and their groups, and says which block each group lies in."""

    blocks: tuple[str, ...]
    """[B]: the names of the shared blocks, in the order of their columns."""
    block_of_group: Mapping[str, str]
    """[G]: by the name of each group, in the order of the groups' numbers, the name of its block."""

    @property
    def groups(self) -> tuple[str, ...]:
        """[G]: the names of the groups, in the order of their numbers."""
        return tuple(self.block_of_group)

    def to_json(self) -> dict[str, Any]:
        """Return the names as a JSON object."""
        return {"blocks": list(self.blocks), "block_of_group": dict(self.block_of_group)}

    @staticmethod
    def from_json(document: object) -> SharedNames:
        """Read what `to_json` returned; ValueError where it is something else."""
        match document:
            case {"blocks": [*blocks], "block_of_group": dict() as block_of_group}:
                names = [*blocks, *block_of_group, *block_of_group.values()]
                if all(isinstance(name, str) for name in names) and set(block_of_group.values()) <= set(blocks):
                    return SharedNames(tuple(blocks), dict(block_of_group))
        raise ValueError('not the names of shared blocks: {"blocks": [NAME, ...], "block_of_group": {GROUP: BLOCK}}')
