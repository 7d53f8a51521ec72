"""An episode of a saved policy as a GIF."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grpo_fed.rl.rng import Purpose, client_seed, env_seeds, generator
from grpo_fed.runs.played_levels import describe_level
from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.tasks.envs import episode_seed
from grpo_fed.tasks.gym import gives_pictures, make_env
from grpo_fed.tasks.gym_task import Env

MIN_WIDTH = 240
"""Pixels; smaller pictures are enlarged."""
CAPTION_HEIGHT = 24
"""Pixels of the strip below the picture."""
MARGIN = 8
"""Pixels beside the caption."""
COLOURS = 64
LAST_PICTURE_MS = 2000
"""Milliseconds that the last picture is shown."""


@dataclass(frozen=True)
class FilmStyle:
    """How much of an episode is drawn. The episode is always played to its end, and the last picture shows the end."""

    max_rate: int = 25
    """Pictures per second; of a faster environment steps are left out. Few viewers show a GIF faster than 50."""
    max_pictures: int = 1500
    """At 25 pictures per second this is one minute."""
    max_width: int = 480
    """Pixels of the longer side; larger pictures are shrunk."""
    max_seconds: float = float("inf")
    """Seconds of drawing after which only the last picture is added."""
    palette: Image.Quantize = Image.Quantize.MEDIANCUT
    """How colours are chosen: the median cut is exact for few colours; an octree is close, and ten times as fast."""


LONG = FilmStyle()
"""Whole episodes."""
SHORT = FilmStyle(max_rate=10, max_pictures=80, max_width=300, max_seconds=2.0, palette=Image.Quantize.FASTOCTREE)
"""Films that are quick enough to be made after every run."""


@dataclass(frozen=True)
class Film:
    """A film that was written."""

    score: float
    """Return of the episode."""
    length: int
    """Steps of the episode."""
    frames: int
    """Pictures in the file."""


def film(
    policy: LoadedPolicy,
    path: Path,
    deterministic: bool = True,
    seed: int | None = None,
    style: FilmStyle = LONG,
    level: Mapping[str, float] | None = None,
) -> Film:
    """Play the first episode of `LoadedPolicy.play` and write it to a `.gif`.

    seed: the scenario's by default. level: values of the environment's arguments, which the caption has. ValueError if
    the file cannot be written or the environment cannot be drawn.
    """
    check_path(path)
    task, scenario = policy.task, policy.scenario
    if gives_pictures(task.env) is False:
        cure = 'its metadata must name the render mode "rgb_array"'
        raise ValueError(f"client {task.client}: {task.env} cannot be drawn: {cure}")
    env = make_env(replace(task, kwargs={**task.kwargs, **(level or {})}), render_mode="rgb_array")
    caption = f"{task.client}, {describe_level(level)}" if level else task.client
    task_seed = client_seed(scenario.seed if seed is None else seed, task.client)
    rate = float(env.metadata.get("render_fps") or 30)
    stride = max(1, round(rate / style.max_rate))
    limit = min(scenario.rollout.episode_limit or scenario.evaluate.step_limit, scenario.evaluate.step_limit)
    actions = generator(task_seed, Purpose.ACTIONS, 2**32)
    pictures: list[Image.Image] = []
    score, step, done = 0.0, 0, False
    deadline = time.monotonic() + style.max_seconds
    try:
        env_seed = env_seeds(task_seed, Purpose.EVALUATION, scenario.rollout.num_envs)[0]
        observation, _ = env.reset(seed=episode_seed(int(env_seed), 0))
        policy.forget()
        while True:
            done = done or step >= limit
            due = step % stride == 0 and len(pictures) < style.max_pictures
            if done or (due and (not pictures or time.monotonic() < deadline)):
                pictures.append(_picture(policy, env, step, score, style, caption))
            if done:
                break
            action = policy.predict(observation, deterministic, actions)
            observation, reward, terminated, truncated, _ = env.step(action)
            score, step, done = score + float(reward), step + 1, bool(terminated or truncated)
    finally:
        env.close()
    duration = [round(1000 * stride / rate)] * (len(pictures) - 1) + [LAST_PICTURE_MS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return Film(score, step, len(pictures))


def check_path(path: Path) -> None:
    """Raise a ValueError if no film can be written to a path."""
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: must end in .gif")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def _picture(policy: LoadedPolicy, env: Env, step: int, score: float, style: FilmStyle, caption: str) -> Image.Image:
    """Draw the environment in a size between the limits, with a caption below."""
    picture = Image.fromarray(_render(policy, env))
    width, height = picture.size
    factor = -(-max(width, height) // style.max_width)
    if factor > 1 and max(width, height) == factor * style.max_width:
        picture = picture.reduce(factor)  # exact, and twelve times as fast as other resampling
        width, height = picture.size
    scale = min(1.0, style.max_width / max(width, height))
    if width < MIN_WIDTH:
        scale = float(-(-MIN_WIDTH // width))  # a whole number, so that the pixels of a small grid stay square
    if scale != 1.0:
        resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        picture = picture.resize((round(width * scale), round(height * scale)), resampling)
    page = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "#eeeeee")
    page.paste(picture)
    font = ImageFont.load_default(13)
    draw = ImageDraw.Draw(page)
    middle, numbers = picture.height + CAPTION_HEIGHT // 2, f"step {step}   return {score:.1f}"
    room = page.width - 3 * MARGIN - draw.textlength(numbers, font)
    name = caption
    while draw.textlength(name, font) > room:
        name = name[:-1]
    draw.text((MARGIN, middle), name, fill="black", font=font, anchor="lm")
    draw.text((page.width - MARGIN, middle), numbers, fill="black", font=font, anchor="rm")
    return page.quantize(COLOURS, method=style.palette, dither=Image.Dither.NONE)


def _render(policy: LoadedPolicy, env: Env) -> np.ndarray:
    """Render the environment, [height, width, 3] uint8; ValueError if it cannot be drawn."""
    message = f"client {policy.task.client}: {policy.task.env} cannot be drawn"
    try:
        rendered: Any = env.render()
    except Exception as error:
        raise ValueError(f"{message}: {type(error).__name__}: {error}") from error
    array = np.asarray(rendered)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f'{message}: with render_mode = "rgb_array" it must give [height, width, 3] of uint8')
    return array
