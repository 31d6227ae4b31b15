"""Reinforcement learning is a course: a step samples, has the samples scored, and trains on them.

Step s begins with the weights after s - 1 steps. It publishes them as version s - 1, has the groups
made that may be sampled from it, and trains on its own groups, which earlier steps have begun.
"""

import asyncio
import time
from asyncio import wrap_future
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from manylora.config import RlSettings
from manylora.runs.course import Progress, StepFigures
from manylora.runs.rl.collecting import (
    Collected,
    Collector,
    LagCollector,
    PromptOrder,
    cancelled,
)
from manylora.runs.rl.free_running import FreeCollector
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.rl_evals import RlEvaluation
from manylora.runs.rl.rollout import SampleGroup
from manylora.runs.rl.rollout_record import RolloutRecord
from manylora.runs.rl.step_batch import StepBatch
from manylora.runs.rl.step_figures import step_figures
from manylora.runs.rl.step_training import PhaseSeconds, Trained, added, train_batch
from manylora.runs.rl.versions import Versions
from manylora.runs.run_folder import AdapterPaths
from manylora.runs.saved_states import saved_steps
from manylora.servers import Policy, Sampler
from manylora.types import AdamParams, Datum, DeviceTime, RolloutFailed, TextFormat

# Gives the policy with which an interrupted answer goes on.
Renew = Callable[[], Policy]
# Steps in a row without a difference between any rewards, after which an adapter fails.
MOST_SILENT_STEPS = 20
# Between two words about what a step waits for.
TELL_SECONDS = 2.0


class Playing(Protocol):
    """`Playing` plays and scores; see `players.py::Players`."""

    async def play(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        """Play and score one group; see `collecting.py::PlayGroup`."""

    def spent(self) -> DeviceTime:
        """Return the device's time in samples since this was asked last."""

    async def close(self) -> None:
        """End whatever is being played."""


@dataclass(slots=True)
class RlStep:
    """An `RlStep` is a step that is being made; `training` is set once its weights may change."""

    task: asyncio.Task[StepFigures]
    training: asyncio.Event

    def give_up(self) -> bool:
        """It can be left while its samples are in the making: they will be made again."""
        return not self.training.is_set()

    async def read(self) -> StepFigures:
        """Wait for the step."""
        return await self.task

    async def settle(self) -> None:
        """End the step, and wait for what of it is with the engine."""
        await cancelled((self.task,))


@dataclass(slots=True)
class RlCourse:
    """An `RlCourse` is what reading an adapter's prompts gives; see `runs/course.py::Course`.

    Attributes:
        parts: the names of the reward's parts.
        sampler: where the samples come from; the course does not know which one it is.
        players: make an adapter's players, given its files, and how an interrupted answer is to go
            on; called once it is open.
        order: of the prompts.
        adam: the optimizer's parameters of each step.
        base_forward: `forward` of the base without an adapter.
    """

    rl: RlSettings
    parts: Sequence[str]
    steps: int
    sampler: Sampler
    players: Callable[[AdapterPaths | None, Renew | None], Any]
    order: PromptOrder
    adam: Callable[[int], AdamParams]
    base_forward: Callable[..., Any]
    evals: RlEvaluation
    eval_every: int = 0
    text_format: TextFormat = field(default_factory=TextFormat)
    notes: Sequence[str] = ()
    ahead: int = 1
    # What is to be ended, as far as it has begun.
    _leaving: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)
    _adapter: Any = field(init=False, default=None)
    _paths: AdapterPaths | None = field(init=False, default=None)
    _playing: Playing = field(init=False)
    _versions: Versions = field(init=False)
    _record: RolloutRecord | None = field(init=False, default=None)
    _collector: Collector = field(init=False)
    _publishing: float = field(init=False, default=0.0)
    # Steps that were made, and those of them, the last ones, that had nothing to learn from.
    _made: int = field(init=False, default=0)
    _silent: int = field(init=False, default=0)
    _tell: Progress | None = field(init=False, default=None)
    # Groups by the step that they were asked for, as far as they are there.
    _arrived: Counter[int] = field(init=False, default_factory=Counter)

    def watch(self, tell: Progress) -> None:
        """See `runs/course.py::Course.watch`."""
        self._tell = tell

    async def begin(
        self, adapter: Any, paths: AdapterPaths | None, step: int, memory: Mapping[str, Any]
    ) -> None:
        """Publish what the next steps sample from; see `runs/course.py::Course.begin`."""
        self._adapter, self._paths, self._made = adapter, paths, step
        self._silent = memory.get("silent_steps", 0)
        folder = None if paths is None else paths.versions
        self._versions = Versions(self.sampler, adapter, folder)
        if paths is not None:
            keep = self.rl.keep_rollouts
            self._record = RolloutRecord(paths.rollouts, None if keep == "all" else keep, step)
            self._leaving.callback(self._close_record, self._record)
        self._leaving.push_async_callback(self._forget_versions)
        self._playing = self.players(paths, self._newest if self.rl.off_policy.interrupt else None)
        self._leaving.push_async_callback(self._playing.close)
        self.evals.players, self.evals.publish = self._playing, self.publish
        self._collector = self._make_collector()
        self._leaving.push_async_callback(self._collector.close)
        self._collector.begin(step + 1, memory)
        for version in self._needed(step):
            await self._versions.restore(version)
        await self._versions.publish(step)

    def start(self, adapter: Any, step: int) -> RlStep:
        """Begin a step; its groups may be there already."""
        training = asyncio.Event()
        return RlStep(asyncio.create_task(self._step(step, training)), training)

    def memory(self) -> dict[str, Any]:
        """Return where the prompts of the next step begin, and how long nothing was learned."""
        return {**self._collector.memory(self._made), "silent_steps": self._silent}

    async def keep(self) -> None:
        """Write the versions that the steps after this one sample from."""
        needed = self._needed(self._made)
        await self._versions.keep(needed)
        if self._paths is not None:
            kept = {v for step in saved_steps(self._paths.checkpoints) for v in self._needed(step)}
            self._versions.forget_kept(kept | set(needed))
        if self._record is not None:
            self._record.cover(self._covered())

    async def end(self) -> None:
        """Have what is in the making end, and forget what was published."""
        await self._leaving.aclose()

    async def _forget_versions(self) -> None:
        await self._versions.retire(below=self._made + 1)

    def _close_record(self, record: RolloutRecord) -> None:
        record.cover(self._covered())
        record.close()

    async def publish(self) -> Policy:
        """Publish the weights as they are, and return how requests name them."""
        await self._versions.publish(self._made)
        return self._versions.policy(self._made)

    def _newest(self) -> Policy:
        return self._versions.policy(self._versions.newest)

    def _make_collector(self) -> Collector:
        rl, play, teaches = self.rl, self._play, Objective(self.rl).teaches
        if rl.off_policy.lag is None:
            return FreeCollector(rl, play, teaches, self._versions, self._record, self.order)
        return LagCollector(rl, play, teaches, self._versions, self._record, self.order, self.steps)

    async def _play(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        group = await self._playing.play(step, number, row, policy)
        self._arrived[step] += 1
        return group

    async def _take(self, step: int) -> Collected:
        """Wait for a step's groups, and tell how many there are."""
        taking = asyncio.ensure_future(self._collector.take(step))
        try:
            while not (await asyncio.wait((taking,), timeout=TELL_SECONDS))[0]:
                if self._tell is not None:
                    # Free running, nobody knows which groups will be this step's.
                    total = 0 if self.rl.off_policy.lag is None else self.rl.groups
                    self._tell("samples", min(total, self._arrived[step]), total)
            return await taking
        finally:
            del self._arrived[step]
            await cancelled((taking,))

    def _needed(self, step: int) -> list[int]:
        """Return the versions, but for that of `step`, which the steps after it need."""
        start = [0] if self._start_is_needed and step > 0 else []
        return sorted({*start, *self._collector.needed(step)})

    @property
    def _start_is_needed(self) -> bool:
        return self.rl.kl.coef > 0 and self.rl.kl.reference == "start"

    def _covered(self) -> int:
        """Return the newest step of which a whole training state is on the disk."""
        steps = () if self._paths is None else saved_steps(self._paths.checkpoints)
        return max((step for step in steps if step <= self._made), default=0)

    async def _step(self, step: int, training: asyncio.Event) -> StepFigures:
        seconds = PhaseSeconds()
        await self._versions.publish(step - 1)
        if self.rl.off_policy.interrupt:
            await self.sampler.interrupt(self._adapter.name)
        self._collector.launch(step)
        began = time.perf_counter()
        collected = await self._take(step)
        seconds.waiting = time.perf_counter() - began
        _refuse_all_failed(collected)
        training.set()
        objective = Objective(self.rl)
        batch = objective.batch(collected.groups)
        trained = await train_batch(
            self.rl, self._adapter, self._reference, self.adam(step), batch, seconds
        )
        self._silent = 0 if trained.updates else self._silent + 1
        if self._silent == MOST_SILENT_STEPS:
            raise RolloutFailed(
                f"no learning signal: in {MOST_SILENT_STEPS} steps in a row all rewards of a group "
                "were the same; look at the rollouts, and at what the reward gives them"
            )
        figures = step_figures(
            objective,
            batch,
            step - 1,
            proximal=trained.proximal,
            reference=trained.reference,
            passes=trained.passes,
            parts=self.parts,
        )
        figures |= self._own_figures(step, collected, trained, seconds)
        figures["zero_variance_groups"] += len(collected.others) - collected.dropped
        if self._record is not None:
            rows = _rows(collected, batch)
            await asyncio.to_thread(self._record.write_step, step, rows)
        self._made = step
        start = 0 if self._start_is_needed else -1
        await self._versions.retire(below=self._collector.oldest(step), but=start)
        errors = [
            error for group in (*collected.groups, *collected.others) for error in group.errors
        ]
        warnings = [f"{len(errors)} samples were lost: {errors[0]}"] if errors else []
        passes = added(trained.device, self._playing.spent())
        return StepFigures(figures, passes, trained.update, warnings)

    def _own_figures(
        self, step: int, collected: Collected, trained: Trained, seconds: PhaseSeconds
    ) -> dict[str, Any]:
        """Return the figures that follow neither from the groups nor from log-probabilities."""
        rollouts = [one for group in collected.groups for one in group.rollouts]
        published = self._versions.seconds - self._publishing
        self._publishing = self._versions.seconds
        return {
            "loss": sum(trained.losses) / len(trained.losses) if trained.losses else None,
            "lr": self.adam(step).lr,
            "grad_norm": max(trained.grad_norms, default=None),
            "waves": collected.waves,
            "dropped_groups": collected.dropped,
            "sampling_seconds": sum(one.seconds - one.reward_seconds for one in rollouts),
            "reward_seconds": sum(one.reward_seconds for one in rollouts),
            "waiting_seconds": seconds.waiting,
            "forward_seconds": seconds.forward,
            "backward_seconds": seconds.backward,
            "publish_seconds": published,
        }

    async def _reference(self, data: Sequence[Datum], **settings: Any) -> Any:
        if self.rl.kl.reference == "base":
            return await wrap_future(self.base_forward(data, **settings))
        return await wrap_future(self._versions.frozen(0).forward(data, **settings))


def _refuse_all_failed(collected: Collected) -> None:
    """Raise what went wrong with a step's samples if it went wrong with all of them."""
    groups = (*collected.groups, *collected.others)
    errors = [error for group in groups for error in group.errors]
    if errors and not any(group.rollouts for group in groups):
        raise RolloutFailed(errors[0])


def _rows(collected: Collected, batch: StepBatch) -> list[dict[str, Any]]:
    """Return the groups of a step as its file holds them, those that were not trained on behind."""
    trained = [
        {**group.to_json(), "advantages": advantages_G.tolist()}
        for group, advantages_G in zip(batch.groups, batch.advantages, strict=True)
    ]
    return [*trained, *({**group.to_json(), "advantages": None} for group in collected.others)]
