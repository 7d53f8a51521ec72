"""MuJoCo tasks under other laws: `wrappers = ["grpo_fed.tasks.physics:Moon"]`. A model is changed once, when it is made."""

from __future__ import annotations

from typing import Any, final

import gymnasium

Env = gymnasium.Env[Any, Any]


@final
class Moon(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A sixth of the gravity."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        _model(env).opt.gravity[:] /= 6


@final
class Heavy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Half as much mass again, in every part."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        _model(env).body_mass[:] *= 1.5
        _model(env).body_inertia[:] *= 1.5


@final
class Ice(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A quarter of the friction."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        _model(env).geom_friction[:, 0] /= 4


def _model(env: Env) -> Any:
    model = getattr(env.unwrapped, "model", None)
    if model is None:
        raise ValueError(f"{env.unwrapped}: has no MuJoCo model to change")
    return model
