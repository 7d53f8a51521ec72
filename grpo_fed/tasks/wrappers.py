"""Environment wrappers that a scenario names in `[[clients]] wrappers`: other physics, hostile rewards, seeding."""

from __future__ import annotations

from typing import Any, SupportsFloat, final

import gymnasium

from grpo_fed.tasks.gym_task import Env


@final
class NegatedReward(gymnasium.RewardWrapper[Any, Any]):
    """Negates every reward, so that a client learns to do as badly as possible: a hostile client."""

    def reward(self, reward: SupportsFloat) -> SupportsFloat:
        return -float(reward)


@final
class RandomAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Replaces every action by a random one, so that a client learns nothing of its task: a hostile client."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.action_space.seed(seed)
        return self.env.reset(seed=seed, options=options)

    def action(self, action: Any) -> Any:
        return self.action_space.sample()


@final
class Moon(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Divides the gravity of a MuJoCo environment by six."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        _mujoco_model(env).opt.gravity[:] /= 6


@final
class Heavy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Multiplies the masses and inertias of a MuJoCo environment by 1.5."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        model = _mujoco_model(env)
        model.body_mass[:] *= 1.5
        model.body_inertia[:] *= 1.5


@final
class Ice(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Divides the sliding friction of a MuJoCo environment by four."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        _mujoco_model(env).geom_friction[:, 0] /= 4


def _mujoco_model(env: Env) -> Any:
    model = getattr(env.unwrapped, "model", None)
    if model is None:
        raise ValueError(f"{env.unwrapped}: has no MuJoCo model to change")
    return model


@final
class Seeded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Passes the seed of `reset` to the environment's own method `seed` first, for one whose `reset` ignores it."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        if not callable(getattr(env.unwrapped, "seed", None)):
            raise ValueError(f"{env.unwrapped}: has no method seed(); leave out this wrapper and use reset(seed=...)")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.env.unwrapped.seed(seed)  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)
