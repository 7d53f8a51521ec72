"""Gives flat observations the shapes in which their environment returns them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from gymnasium import Space, spaces
from gymnasium.spaces.utils import flatdim
from torch import Tensor

Shaped: TypeAlias = Tensor | dict[str, Any] | tuple[Any, ...]
"""A tensor, or tensors as a Dict or a Tuple has them."""


def unflatten_observations(space: Space[Any], flat: Tensor) -> Shaped:
    """Give flat observations [..., D] the shape of their space.

    A Box becomes [..., *shape], and so does a MultiBinary; a Dict or a Tuple becomes a dict or a tuple of its parts;
    choices stay vectors with a 1 at what was chosen.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return flat.reshape(*flat.shape[:-1], *space.shape)
    if isinstance(space, spaces.Dict):
        parts = flat.split([flatdim(part) for part in space.values()], -1)
        return {name: unflatten_observations(space[name], part) for name, part in zip(space, parts, strict=True)}
    if isinstance(space, spaces.Tuple):
        parts = flat.split([flatdim(part) for part in space.spaces], -1)
        return tuple(unflatten_observations(each, part) for each, part in zip(space.spaces, parts, strict=True))
    return flat


def clients_of(shaped: Shaped, clients: int) -> list[Any]:
    """Take apart observations of K clients, a tensor [K, ...] or a dict or tuple of some."""
    if isinstance(shaped, Tensor):
        return list(torch.unbind(shaped))
    if isinstance(shaped, dict):
        by_name = {name: clients_of(part, clients) for name, part in shaped.items()}
        return [{name: parts[client] for name, parts in by_name.items()} for client in range(clients)]
    by_index = [clients_of(part, clients) for part in shaped]
    return [tuple(parts[client] for parts in by_index) for client in range(clients)]
