"""The players of an adapter play its prompts and have what comes of it scored."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from manylora.config import RlSettings
from manylora.runs.rl.hooks import load_hook, play_rollout
from manylora.runs.rl.play_client import PlayClient, PlayedTurn, PlaySettings
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.rewards import RewardSet
from manylora.runs.rl.rollout import Rollout, SampleGroup
from manylora.runs.rl.single_turn import as_scored, play_answer, rewarded
from manylora.runs.rl.step_training import added
from manylora.runs.rl.user_code import shown_name
from manylora.runs.rl.user_threads import UserThreads
from manylora.servers import Generating, Policy, Turn
from manylora.types import DeviceTime, RewardError, RolloutFailed, SamplingParams


class Players:
    """`Players` are one adapter's; in their threads somebody's functions run."""

    def __init__(
        self,
        rl: RlSettings,
        settings: PlaySettings,
        rows: Sequence[PromptRow],
        held_out: Sequence[PromptRow],
        threads: UserThreads,
        renew: Callable[[], Policy] | None,
    ):
        """Load what the run file names.

        Args:
            settings: of the rollouts in training.
            rows: the prompts of training.
            held_out: those of evaluations.
            threads: closed with these players.
            renew: gives the policy with which an interrupted answer goes on; None = it ends there.

        Raises:
            ConfigError: there is no such reward or hook.
        """
        self._rl, self._rows, self._held_out = rl, rows, held_out
        # Samples of steps to come are in the making while answers are asked for.
        self._sampler, self._answering = _Metered(settings.sampler), _Metered(settings.sampler)
        self._settings = replace(settings, sampler=self._sampler)
        self._threads, self._renew = threads, renew
        adapter = threads.adapter
        self._hook = None if rl.rollout is None else load_hook(rl.rollout, adapter)
        uses = rl.reward or ()
        self._rewards = RewardSet(uses, adapter=adapter, threads=threads) if uses else None
        if self._rewards is not None and rows:
            self._rewards.check(tuple(dict.fromkeys(c for row in rows for c in row.columns)))

    async def play(self, step: int, number: int, row: int, policy: Policy) -> SampleGroup:
        """Play and score one group; see `collecting.py::PlayGroup`."""
        samples = range(self._rl.group_size)
        prompt = self._rows[row]
        if self._rewards is not None:
            found = await self._rewarded(self._rewards, prompt, step, number, samples, policy)
        else:
            found = await asyncio.gather(
                *(self._hooked(prompt, step, number, sample, policy) for sample in samples)
            )
        return SampleGroup(
            step=step,
            number=number,
            row=row,
            version=policy.version,
            rollouts=tuple(one for one in found if isinstance(one, Rollout)),
            errors=tuple(one for one in found if isinstance(one, str)),
        )

    async def answer(
        self, row: int, sample: int, policy: Policy, params: SamplingParams
    ) -> Rollout | str:
        """Answer an evaluation's prompt, and score the answer; return why it could not be."""
        prompt = self._held_out[row]
        settings = replace(self._settings, sampler=self._answering, params=params)
        client = self._client(settings, policy, prompt, 0, row, sample)
        if self._rewards is None:
            return await self._played(prompt, client)
        begun = time.monotonic()
        try:
            turn = await self._in_time(play_answer(client, prompt), client)
            (parts,) = await self._rewards.score(
                prompt, [as_scored(client, turn)], timeout=_left(client)
            )
            return rewarded(client, self._rewards, parts, begun=begun)
        except (RewardError, RolloutFailed) as error:
            return str(error)

    def spent(self) -> DeviceTime:
        """Return the device's time in samples of training since this was asked last."""
        return self._sampler.spent()

    def spent_on_answers(self) -> DeviceTime:
        """Return the device's time in answers of evaluations since this was asked last."""
        return self._answering.spent()

    async def close(self) -> None:
        """Let go of whatever somebody's functions still do."""
        await self._threads.close()

    async def _rewarded(
        self,
        rewards: RewardSet,
        row: PromptRow,
        step: int,
        number: int,
        samples: Sequence[int],
        policy: Policy,
    ) -> list[Rollout | str]:
        """Sample a group's answers, then have the rewards look at all that came to an end."""
        begun = time.monotonic()
        clients = [self._client(self._settings, policy, row, step, number, n) for n in samples]
        turns = await asyncio.gather(*(self._answered(client, row) for client in clients))
        whole = [
            (client, turn)
            for client, turn in zip(clients, turns, strict=True)
            if isinstance(turn, PlayedTurn)
        ]
        scoring = time.monotonic()
        scored = await rewards.score_each(
            row, [as_scored(*one) for one in whole], timeout=_left(clients[0])
        )
        seconds = time.monotonic() - scoring
        found: list[Rollout | str] = [turn for turn in turns if isinstance(turn, str)]
        for (client, _), parts in zip(whole, scored, strict=True):
            try:
                if isinstance(parts, RewardError):
                    raise parts
                found.append(rewarded(client, rewards, parts, begun=begun, reward_seconds=seconds))
            except RewardError as error:
                found.append(str(error))
        return found

    async def _answered(self, client: PlayClient, row: PromptRow) -> PlayedTurn | str:
        try:
            return await self._in_time(play_answer(client, row), client)
        except RolloutFailed as error:
            return str(error)

    async def _in_time(
        self, work: Coroutine[Any, Any, PlayedTurn], client: PlayClient
    ) -> PlayedTurn:
        try:
            return await asyncio.wait_for(work, _left(client))
        except TimeoutError:
            raise RolloutFailed(
                f"adapter {self._threads.adapter}: an answer took longer than timeout_seconds: "
                f"{self._rl.timeout_seconds:g}"
            ) from None

    async def _hooked(
        self, row: PromptRow, step: int, number: int, sample: int, policy: Policy
    ) -> Rollout | str:
        client = self._client(self._settings, policy, row, step, number, sample)
        return await self._played(row, client)

    async def _played(self, row: PromptRow, client: PlayClient) -> Rollout | str:
        try:
            return await play_rollout(
                self._hook,
                client,
                row,
                threads=self._threads,
                shown=shown_name(self._rl.rollout or ""),
            )
        except RolloutFailed as error:
            return str(error)

    def _client(
        self,
        settings: PlaySettings,
        policy: Policy,
        row: PromptRow,
        step: int,
        number: int,
        sample: int,
    ) -> PlayClient:
        return PlayClient(
            settings,
            policy,
            row,
            step=step,
            group=number,
            sample=sample,
            deadline=time.monotonic() + self._rl.timeout_seconds,
            renew=self._renew,
        )


class _Metered:
    """A `_Metered` sampler adds up what its answers cost."""

    def __init__(self, sampler: Generating):
        self._sampler, self._spent = sampler, DeviceTime()

    def spent(self) -> DeviceTime:
        spent, self._spent = self._spent, DeviceTime()
        return spent

    async def generate(
        self, policy: Policy, ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Turn:
        turn = await self._sampler.generate(policy, ids, params, seed)
        # Answers decode together, so of the batches' time each has its share alone.
        share = turn.device.share
        self._spent = added(self._spent, DeviceTime(share, share))
        return turn


def _left(client: PlayClient) -> float:
    return max(0.0, client.deadline - time.monotonic())
