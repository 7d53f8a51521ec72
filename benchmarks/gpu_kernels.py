"""Profile the kernels of an update and of a rollout step, and measure what CUDA graphs would save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_report import (
    BATCH,
    EPOCHS,
    HORIZON,
    MINIBATCHES,
    Extent,
    Report,
    free_memory,
    make_learner,
    mean_milliseconds,
    synchronize,
)
from grpo_fed.rl import objective
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.advantages import learning_targets
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.records import Minibatch
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.rl.update import ClientStack, adam_update, clip_gradient, current_coefficients


@dataclass(frozen=True)
class Prepared:
    """A learner with a collected batch, ready for an update."""

    learner: StackedLearner
    stack: ClientStack
    sample: PackedBatch
    progress: np.ndarray
    """[K]: zeros."""

    @classmethod
    def of(cls, clients: int, device: torch.device) -> Prepared:
        """Make a learner, update it once, and collect the next batch."""
        learner = make_learner(clients, device)
        learner.train(BATCH)
        (stack,) = learner.stacks
        actor = Actor(learner.policy, learner.parameters)
        trajectories = learner.collector.collect_steps(actor, HORIZON, learner.updates_done)
        batch = make_batch(learner.policy, stack.views, trajectories, stack.rows, critic=True)
        longest = torch.from_numpy(learner.max_episode_steps).to(device)
        targets = learning_targets(batch, None, longest, learner.scenario)
        return cls(learner, stack, PackedBatch.of(batch, targets, None), np.zeros(clients))

    def update(self) -> None:
        """Learn from the minibatches of one update, without preparing them."""
        adam_update(self.stack, self.sample, None, self.learner.updates_done, self.progress)


def measure_kernels(report: Report, extent: Extent, device: torch.device) -> None:
    """Count kernels and launches of one minibatch's update and of one rollout step with torch's profiler."""
    prepared = Prepared.of(extent.profiled, device)
    learner = prepared.learner
    actor, observations = Actor(learner.policy, learner.parameters), learner.collector.observations
    assert observations is not None
    profile_calls(report, "a minibatch's update", prepared.update, EPOCHS * MINIBATCHES, device)
    profile_calls(report, "a rollout step", lambda: actor(observations), 1, device)
    learner.close()


def profile_calls(
    report: Report, name: str, action: Callable[[], object], repeats: int, device: torch.device, most: int = 12
) -> None:
    """Report what takes longest in an action, divided by the number of repeats that the action has."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    action()
    synchronize(device)
    with profile(activities=activities) as profiler:
        action()
        synchronize(device)
    events = profiler.key_averages()
    launches = sum(event.count for event in events if event.key.startswith(("cudaLaunch", "cuLaunch")))
    copies = sum(event.count for event in events if event.key.startswith("cudaMemcpy"))
    waits = sum(event.count for event in events if event.key.endswith("Synchronize"))
    kernels = [event for event in events if not on_gpu or event.device_type.name == "CUDA"]
    rows = [(event.key, event.count, own_time(event, on_gpu)) for event in kernels]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(spent for _, _, spent in rows)
    text = (
        f"{name}: {launches / repeats:.1f} launches, {copies / repeats:.1f} copies, {waits / repeats:.1f} waits,"
        f" {total / repeats:,.0f} microseconds on {device}"
    )
    top = [
        {"kernel": key, "count": count / repeats, "microseconds": spent / repeats} for key, count, spent in rows[:most]
    ]
    lines = [f"{row['microseconds']:9.1f} us {row['count']:6.1f} x  {str(row['kernel'])[:90]}" for row in top]
    report.add(
        "profile",
        "\n      ".join([text, *lines]),
        name=name,
        launches=launches / repeats,
        copies=copies / repeats,
        waits=waits / repeats,
        microseconds=total / repeats,
        top=top,
    )


def own_time(event: Any, on_gpu: bool) -> float:
    """Return the microseconds of a profiler's event without those of the events inside it."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def measure_graphs(report: Report, extent: Extent, device: torch.device) -> None:
    """Time a minibatch's update and a rollout step as they are, and with their kernels launched as one CUDA graph."""
    for clients in extent.graphed:
        if not report.has_time(10):
            report.add("graphs", f"{clients} clients: left out, there is too little time", left_out=True)
            continue
        free_memory(device)
        prepared = Prepared.of(clients, device)
        time_minibatch(report, prepared, extent.repeats)
        time_rollout_step(report, prepared, extent.repeats)
        prepared.learner.close()


def time_minibatch(report: Report, prepared: Prepared, repeats: int) -> None:
    """Time the gradient as a graph; Adam's step, which takes numbers from the CPU, is launched after it."""
    stack, learner = prepared.stack, prepared.learner
    device, settings = learner.device, learner.scenario.objective
    coefficients = current_coefficients(stack, prepared.progress)
    assert coefficients.has_value  # cached properties of tensors must be computed before anything is captured
    assert not coefficients.has_entropy
    parts = prepared.sample.minibatches(stack.seeds, learner.updates_done, 1, MINIBATCHES)
    given = next(iter(parts))
    copies = {field.name: getattr(given, field.name) for field in fields(Minibatch)}
    held = replace(given, **{name: value.clone() for name, value in copies.items() if value is not None})

    def gradient() -> None:
        output, pullback = stack.policy.vjp(stack.views, held.observations)
        slopes, _ = objective.loss_gradients(
            output, held, stack.policy.distribution, settings, learner.scenario.trust, coefficients
        )
        pullback(slopes.distribution, slopes.values, stack.gradient_views)
        if settings.max_grad_norm is not None:
            clip_gradient(stack.gradient, settings.max_grad_norm)

    def step() -> None:
        stack.adam.step(stack.parameters, stack.gradient, 0 * stack.learning_rate)

    def eager() -> None:
        gradient()
        step()

    values: dict[str, Any] = {
        "gradient": mean_milliseconds(gradient, repeats, device),
        "adam": mean_milliseconds(step, repeats, device),
        "eager": mean_milliseconds(eager, repeats, device),
    }
    text = (
        f"{len(stack.parameters)} clients, a minibatch: {values['eager']:.3f} ms, alone its gradient"
        f" {values['gradient']:.3f} and Adam {values['adam']:.3f}"
    )
    if device.type == "cuda":
        gradient()
        expected = stack.gradient.clone()
        graph = capture(gradient)
        graph.replay()
        values["difference"] = float((stack.gradient - expected).abs().max())

        def replayed() -> None:
            for field in fields(Minibatch):
                getattr(held, field.name).copy_(getattr(given, field.name))
            graph.replay()
            step()

        values["graph"] = mean_milliseconds(replayed, repeats, device)
        text += (
            f"; with a graph {values['graph']:.3f} ms, {values['eager'] / values['graph']:.2f} times as fast;"
            f" gradients differ by {values['difference']:.1e}"
        )
    report.add("graphs", text, clients=len(stack.parameters), device=str(device), what="minibatch", **values)


def time_rollout_step(report: Report, prepared: Prepared, repeats: int) -> None:
    """Time the policy's forward pass in a rollout, from an array to an array."""
    learner, device = prepared.learner, prepared.learner.device
    observations = learner.collector.observations
    assert observations is not None
    array = observations.copy()
    actor, views = Actor(learner.policy, learner.parameters), learner.policy.layout.views(learner.parameters)
    values: dict[str, Any] = {"eager": mean_milliseconds(lambda: actor(array), repeats, device)}
    text = f"{len(array)} clients, a rollout step: {values['eager']:.3f} ms"
    if device.type == "cuda":
        seen = torch.from_numpy(array).to(device)
        forward: Callable[[], Tensor] = torch.no_grad()(lambda: learner.policy.act(views, seen))
        output = forward()
        values["transfers"] = mean_milliseconds(
            lambda: (torch.from_numpy(array).to(device), output.cpu().numpy()), repeats, device
        )
        values["forward"] = mean_milliseconds(forward, repeats, device)
        pinned_in = torch.from_numpy(array).pin_memory()
        pinned_out = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        out = torch.empty_like(output)
        graph = capture(lambda: out.copy_(forward()))

        def replayed() -> np.ndarray:
            pinned_in.numpy()[:] = array
            seen.copy_(pinned_in, non_blocking=True)
            graph.replay()
            pinned_out.copy_(out, non_blocking=True)
            torch.cuda.current_stream(device).synchronize()
            copied: np.ndarray = pinned_out.numpy().copy()
            return copied

        values["difference"] = float(np.abs(replayed() - actor(array)).max())
        values["graph"] = mean_milliseconds(replayed, repeats, device)
        text += (
            f", of which its two transfers take {values['transfers']:.3f} and its kernels {values['forward']:.3f}; with"
            f" a graph and pinned memory {values['graph']:.3f} ms; outputs differ by {values['difference']:.1e}"
        )
    report.add("graphs", text, clients=len(array), device=str(device), what="rollout step", **values)


def capture(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture the kernels that an action launches as one graph, after a few runs that initialise what it uses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph
