"""Environment wrappers that scenarios name: other physics, hostile rewards, seeding."""

from __future__ import annotations

from typing import Any, SupportsFloat, final

import gymnasium


@final
class NegatedReward(gymnasium.RewardWrapper[Any, Any]):
    """Whoever learns here learns to do as badly as can be."""

    def reward(self, reward: SupportsFloat) -> SupportsFloat:
        return -float(reward)


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


@final
class Seeded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Hands the seed of `reset` to the environment's own method `seed` first."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        if not callable(getattr(env.unwrapped, "seed", None)):
            raise ValueError(f"{env.unwrapped}: has no method seed(); its reset(seed=...) has to do")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.env.unwrapped.seed(seed)  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)
