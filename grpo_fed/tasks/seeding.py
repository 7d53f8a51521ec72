"""Environments whose `reset` takes no heed of its seed: `wrappers = ["grpo_fed.tasks.seeding:Seeded"]`.

Episodes are named by their seeds: they are played again to compare policies, to go on with a run that was stopped, and
to judge episodes of one start against each other. Meta-World's 3.1 draw goals from a stream of their own, which only a
method `seed` of older days begins anew.
"""

from __future__ import annotations

from typing import Any, final

import gymnasium

Env = gymnasium.Env[Any, Any]


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
