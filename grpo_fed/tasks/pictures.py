"""Observations that are pictures: which spaces are, and where the channels of one lie."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from gymnasium import Space, spaces

PictureShape: TypeAlias = tuple[int, ...]
"""(H, W), (C, H, W) or (H, W, C) of a picture, as its environment gives it; () for an observation that is none."""


def picture_shape(space: Space[Any]) -> PictureShape:
    """Return the shape of a space's pictures: a box of uint8 with two or three axes; () for any other space."""
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3):
        return tuple(int(size) for size in space.shape)
    return ()


def has_channels_first(shape: PictureShape) -> bool:
    """Whether the first axis of a picture with three has the channels: it is shorter than the last one.

    Frames that `FrameStackObservation` stacks are channels in front, the colours of a picture are channels behind.
    """
    return len(shape) == 3 and shape[0] < shape[2]


def channels_height_width(shape: PictureShape) -> tuple[int, int, int]:
    """Return the sizes (C, H, W) of a picture."""
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    first, second, third = shape
    return (first, second, third) if has_channels_first(shape) else (third, first, second)
