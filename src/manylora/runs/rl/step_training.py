"""A batch is trained on: what the objective must know beforehand, then the optimizer steps."""

import time
from asyncio import wrap_future
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from manylora.config import RlSettings
from manylora.runs.evaluate import settle
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.step_batch import Minibatch, StepBatch
from manylora.runs.rl.step_figures import TrainedPass
from manylora.types import AdamParams, DeviceTime
from manylora.types.data import Array


@dataclass(slots=True)
class PhaseSeconds:
    """`PhaseSeconds` are the seconds of a step's phases, by the clock."""

    waiting: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(slots=True)
class Trained:
    """`Trained` is what the engine returned for a step.

    Attributes:
        proximal: p of each sequence, where it was computed before the step.
        reference: ref of each sequence, where the objective needs it.
        passes: every minibatch of every pass, with what the engine returned for it.
        losses: of all optimizer steps.
        grad_norms: of all optimizer steps.
        device: the device's time in forwards and backwards.
        update: the device's time in optimizer steps.
    """

    proximal: list[Array] | None = None
    reference: list[Array] | None = None
    passes: list[TrainedPass] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    device: DeviceTime = field(default_factory=DeviceTime)
    update: DeviceTime = field(default_factory=DeviceTime)

    @property
    def updates(self) -> int:
        """So many optimizer steps were made."""
        return len(self.grad_norms)

    def spend(self, device: DeviceTime) -> None:
        """Count a forward or a backward."""
        self.device = added(self.device, device)


async def train_batch(
    rl: RlSettings,
    adapter: Any,
    reference: Callable[..., Awaitable[Any]],
    adam: AdamParams,
    batch: StepBatch,
    seconds: PhaseSeconds,
) -> Trained:
    """Make the optimizer steps of one step.

    Args:
        adapter: the handle of the adapter.
        reference: `forward` of the reference policy.
        seconds: filled in.
    """
    objective, trained = Objective(rl), Trained()
    if not batch.sequences:
        return trained
    began = time.perf_counter()
    data = batch.forward_data()
    settings: dict[str, Any] = {"logprobs": "trained", "temperature": objective.temperature}
    if objective.needs_proximal:
        trained.proximal = await _logprobs(wrap_future(adapter.forward(data, **settings)), trained)
    if objective.needs_reference:
        trained.reference = await _logprobs(reference(data, **settings), trained)
    seconds.forward = time.perf_counter() - began
    minibatches = batch.minibatches(trained.proximal, trained.reference)
    for number in range(rl.loss.updates):
        await _pass(objective, adapter, adam, minibatches, trained, first=number == 0)
    seconds.backward = time.perf_counter() - began - seconds.forward
    return trained


async def _logprobs(result: Awaitable[Any], trained: Trained) -> list[Array]:
    found = await result
    trained.spend(found.device)
    return list(found.logprobs)


async def _pass(
    objective: Objective,
    adapter: Any,
    adam: AdamParams,
    minibatches: Sequence[Minibatch],
    trained: Trained,
    *,
    first: bool,
) -> None:
    """Submit every operation of a pass before the first is awaited."""
    submitted = [
        (
            minibatch,
            wrap_future(
                adapter.forward_backward(
                    minibatch.data,
                    objective.loss,
                    objective.config,
                    logprobs="trained",
                    temperature=objective.temperature,
                    entropy=first,
                )
            ),
            wrap_future(adapter.optim_step(adam)),
        )
        for minibatch in minibatches
        if minibatch.data
    ]
    try:
        for minibatch, loss, update in submitted:
            result, stepped = await loss, await update
            trained.spend(result.device)
            trained.update = added(trained.update, stepped.device)
            trained.losses.append(float(result.loss))
            trained.grad_norms.append(float(stepped.grad_norm))
            trained.passes.append(
                TrainedPass(minibatch, result.logprobs, result.positions, result.entropies)
            )
    except BaseException:
        await settle(future for _, *both in submitted for future in both)
        raise


def added(one: DeviceTime, other: DeviceTime) -> DeviceTime:
    """Return the sum of two times of the device."""
    return DeviceTime(one.batches + other.batches, one.share + other.share)
