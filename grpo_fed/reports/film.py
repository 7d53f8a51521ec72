"""An episode of a saved policy as a GIF."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grpo_fed.rl.rng import Purpose, client_seed, env_seeds, generator
from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.tasks.envs import episode_seed
from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.gym_task import Env

NARROWEST = 240
CAPTION = 24
"""Height of the strip below the picture."""
MARGIN = 8
COLOURS = 64
HOLD = 2000
"""Milliseconds that the last picture stays."""


@dataclass(frozen=True)
class FilmStyle:
    """How much of an episode is drawn; it is played to its end in any case, and its last picture shows that."""

    fastest: int = 25
    """Pictures a second: above that, steps are left out. Few viewers show a GIF faster than 50."""
    longest: int = 1500
    """Pictures: one minute."""
    widest: int = 480
    patience: float = float("inf")
    """Seconds after which no more pictures are taken."""
    colours: Image.Quantize = Image.Quantize.MEDIANCUT
    """How they are picked: the median cut is exact for few, an octree is near, in a tenth of the time."""


WHOLE = FilmStyle()
BRIEF = FilmStyle(fastest=10, longest=80, widest=300, patience=2.0, colours=Image.Quantize.FASTOCTREE)
"""Cheap enough to be made after every run."""


@dataclass(frozen=True)
class Film:
    """What was written."""

    score: float
    """Of the episode."""
    length: int
    """Its steps."""
    frames: int
    """Pictures in the file."""


def film(
    policy: LoadedPolicy, path: Path, deterministic: bool = True, seed: int | None = None, look: FilmStyle = WHOLE
) -> Film:
    """Play one episode, the first that `LoadedPolicy.play` plays too, and write it to a `.gif`."""
    check_path(path)
    task, scenario = policy.task, policy.scenario
    env = make_env(task, render_mode="rgb_array")
    own = client_seed(scenario.seed if seed is None else seed, task.client)
    rate = float(env.metadata.get("render_fps") or 30)
    stride = max(1, round(rate / look.fastest))
    limit = min(scenario.rollout.episode_limit or scenario.evaluate.step_limit, scenario.evaluate.step_limit)
    draws = generator(own, Purpose.ACTIONS, 2**32)
    pictures: list[Image.Image] = []
    score, step, over = 0.0, 0, False
    until = time.monotonic() + look.patience
    try:
        stream = env_seeds(own, Purpose.EVALUATION, scenario.rollout.num_envs)[0]
        seen, _ = env.reset(seed=episode_seed(int(stream), 0))
        while True:
            over = over or step >= limit
            due = step % stride == 0 and len(pictures) < look.longest
            if over or (due and (not pictures or time.monotonic() < until)):
                pictures.append(_picture(policy, env, step, score, look))
            if over:
                break
            seen, reward, terminated, truncated, _ = env.step(policy.predict(seen, deterministic, draws))
            score, step, over = score + float(reward), step + 1, bool(terminated or truncated)
    finally:
        env.close()
    duration = [round(1000 * stride / rate)] * (len(pictures) - 1) + [HOLD]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return Film(score, step, len(pictures))


def check_path(path: Path) -> None:
    """ValueError for a file that cannot be written."""
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: must end in .gif")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def _picture(policy: LoadedPolicy, env: Env, step: int, score: float, look: FilmStyle) -> Image.Image:
    """What there is to see, of bearable size, with a caption below it."""
    shown = Image.fromarray(_rendered(policy, env))
    width, height = shown.size
    smaller = -(-max(width, height) // look.widest)
    if smaller > 1 and max(width, height) == smaller * look.widest:
        shown = shown.reduce(smaller)  # exact, and twelve times as fast as any other way
        width, height = shown.size
    scale = min(1.0, look.widest / max(width, height))
    if width < NARROWEST:
        scale = float(-(-NARROWEST // width))  # a whole number, so that the pixels of a small grid stay square
    if scale != 1.0:
        way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        shown = shown.resize((round(width * scale), round(height * scale)), way)
    page = Image.new("RGB", (shown.width, shown.height + CAPTION), "#eeeeee")
    page.paste(shown)
    font = ImageFont.load_default(13)
    draw = ImageDraw.Draw(page)
    middle, told = shown.height + CAPTION // 2, f"step {step}   return {score:.1f}"
    room = page.width - 3 * MARGIN - draw.textlength(told, font)
    name = policy.task.client
    while draw.textlength(name, font) > room:
        name = name[:-1]
    draw.text((MARGIN, middle), name, fill="black", font=font, anchor="lm")
    draw.text((page.width - MARGIN, middle), told, fill="black", font=font, anchor="rm")
    return page.quantize(COLOURS, method=look.colours, dither=Image.Dither.NONE)


def _rendered(policy: LoadedPolicy, env: Env) -> np.ndarray:
    """[height, width, 3] uint8; ValueError if the environment cannot be drawn."""
    where = f"client {policy.task.client}: {policy.task.env} cannot be drawn"
    try:
        shown: Any = env.render()
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    array = np.asarray(shown)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f'{where}: with render_mode = "rgb_array" it must give [height, width, 3] of uint8')
    return array
