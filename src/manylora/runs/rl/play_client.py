"""A hook plays with a `PlayClient`: it asks one version of one adapter, and reaches no other.

Every turn is remembered with its own ids. One whose prompt is what an earlier sequence holds, and
more, goes on in that sequence; any other opens one of its own.

N tokens of a segment.
"""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from manylora.runs.data_rows import Message, read_messages
from manylora.runs.encode import Encoder
from manylora.runs.rl.conversation import AnsweredTurn, Continuation, Dialogue
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.rollout import Rollout, RolloutSegment
from manylora.runs.rl.seeds import sample_seed
from manylora.servers import Generating, Policy
from manylora.types import DataError, DatumTooLong, RolloutFailed, SamplingParams

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """A `PlayedTurn` is one answer of the policy.

    Attributes:
        text: without the token that ended it; other special tokens, as of a call, are in it.
        token_ids: what was sampled, with that token.
        logprobs: of each of them when it was drawn.
        version: of the weights that drew the last of them.
        stop_reason: `stop`, `length` (it was cut) or `interrupted`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: int
    stop_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaySettings:
    """`PlaySettings` are what all rollouts of an adapter have in common.

    Attributes:
        params: how answers are drawn; `stop` names the tokens that end one.
        seed: the adapter's.
        context_length: tokens that the base can read; None or 0 = any number.
    """

    sampler: Generating
    encoder: Encoder
    tokenizer: Any
    params: SamplingParams
    seed: int
    context_length: int | None = None


@dataclass(eq=False, slots=True)
class _Drawn:
    """A `_Drawn` turn is what was asked, and what came of it, with the version of each token."""

    asked: Continuation
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    stop_reason: str = "stop"
    text: str = ""
    answered: bool = False


class PlayClient:
    """A `PlayClient` samples for one rollout; it is made anew for each.

    Attributes:
        step: that it is played for.
        deadline: on the clock of `time.monotonic`, when the rollout must be over.
        failure: what the sampler raised, if it did.
    """

    def __init__(
        self,
        settings: PlaySettings,
        policy: Policy,
        row: PromptRow,
        *,
        step: int,
        group: int,
        sample: int,
        deadline: float = math.inf,
        renew: Callable[[], Policy] | None = None,
    ):
        """Bind it; called on the run's event loop, on which it asks the sampler.

        Args:
            policy: every turn is sampled with it.
            group: its number in the step, over all waves.
            sample: its number in the group.
            renew: gives the policy with which an interrupted answer goes on; None = it ends there.
        """
        self._settings, self._policy, self._renew = settings, policy, renew
        self._place = (settings.seed, step, group, sample)
        self._loop = asyncio.get_running_loop()
        self._dialogue = Dialogue(settings.encoder, row.options)
        self._drawn: list[_Drawn] = []
        # What follows the newest answer: turns of a conversation, or ids.
        self._following: list[Message] = []
        self._behind: Continuation | None = None
        self._process, self._open = os.getpid(), True
        self.step, self.deadline = step, deadline
        self.failure: BaseException | None = None

    @property
    def seed(self) -> int:
        """This is for what a hook itself draws; it follows from the run file, as turns' do."""
        return sample_seed(*self._place)

    @property
    def num_turns(self) -> int:
        """The policy has answered so many times."""
        return sum(turn.answered for turn in self._drawn)

    async def sample(
        self,
        prompt: str | Sequence[Any],
        *,
        max_tokens: int | None = None,
        stop: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
    ) -> PlayedTurn:
        """Have the policy answer.

        Args:
            prompt: messages, a text, token ids, or what `extend` returned.
            max_tokens: longest answer; by default the run file's, and never beyond the context.
            stop: tokens that end it; by default the run file's.
            stop_strings: texts that end it; by default the run file's.

        Raises:
            DatumTooLong: the prompt fills the context.
            DataError: the chat template cannot render it.
        """
        self._check_open()
        asked = self._asked(prompt)
        room = self._room(len(asked))
        wanted = self._settings.params
        params = replace(
            wanted,
            max_tokens=min(room, wanted.max_tokens if max_tokens is None else max_tokens),
            stop=wanted.stop if stop is None else tuple(stop),
            stop_strings=wanted.stop_strings if stop_strings is None else tuple(stop_strings),
        )
        # Numbered when it is asked for, so that turns at the same time have seeds of their own.
        drawn = _Drawn(asked)
        self._drawn.append(drawn)
        number = len(self._drawn)
        self._following.clear()
        self._behind = None
        await self._on_run_loop(lambda: self._draw(drawn, params, number))
        self._check_open()
        ends = self._settings.encoder.answer_ends() if params.stop is None else params.stop
        ended = drawn.stop_reason == "stop" and drawn.tokens[-1:] and drawn.tokens[-1] in ends
        kept = drawn.tokens[:-1] if ended else drawn.tokens
        drawn.text = self._settings.tokenizer.decode(kept)
        drawn.answered = True
        return PlayedTurn(
            drawn.text,
            tuple(drawn.tokens),
            tuple(drawn.logprobs),
            drawn.versions[-1] if drawn.versions else self._policy.version,
            drawn.stop_reason,
        )

    def extend(
        self,
        text: str | Sequence[int] | None = None,
        *,
        role: str = "",
        content: str = "",
        **more: Any,
    ) -> Continuation:
        """Put something behind the newest answer that is read and not trained.

        Args:
            text: a text or token ids, as they stand; or else, in a conversation:
            role: `tool`, `user`, or whatever else the chat template knows.
            content: of the turn.
            more: what else the template knows of a turn, such as `name`.

        Returns:
            What to hand to `sample`, or to be extended further by the next call.

        Raises:
            DataError: there is no answer yet, or the conversation is a text.
        """
        self._check_open()
        turn = self._newest()
        if text is not None:
            before = self._behind if self._behind is not None else turn.ids
            self._behind = (
                self._dialogue.behind_text(before, text)
                if isinstance(text, str)
                else Continuation((*before, *_ids(text)))
            )
            return self._behind
        if turn.messages is None:
            raise DataError(
                "the rollout began with a text, which has no turns; extend it with a text, or "
                "begin with messages"
            )
        if self._behind is not None and not self._following:
            raise DataError("texts were put behind the answer; sample before turns follow")
        (message,) = read_messages(
            "extend", [{"role": role, "content": content, **more}], learned=False
        )
        self._following.append(message)
        self._behind = self._dialogue.behind(turn, tuple(self._following))
        return self._behind

    def plain(self, turn: PlayedTurn) -> str:
        """Return an answer's text without any special token, as evaluation and TRL see it."""
        text: str = self._settings.tokenizer.decode(turn.token_ids, skip_special_tokens=True)
        return text

    def rollout(self, reward: float, **others: Any) -> Rollout:
        """Return what was played so far, with its reward, and end it.

        Raises:
            RolloutFailed: nothing was sampled.
        """
        self._open = False
        done = [turn for turn in self._drawn if turn.answered and turn.tokens]
        if not done:
            raise RolloutFailed("no token was sampled, so there is nothing to train on")
        whole = done[0].text
        if len(done) > 1:
            first, last = done[0], done[-1]
            ids = [*last.asked, *last.tokens]
            same = tuple(ids[: len(first.asked)]) == tuple(first.asked)
            whole = self._settings.tokenizer.decode(ids[len(first.asked) * same :])
        return Rollout(
            segments=tuple(_segments(done)),
            reward=reward,
            text=whole,
            stop_reason=done[-1].stop_reason,
            turns=len(done),
            **others,
        )

    def end(self) -> None:
        """Answer nothing any more: the rollout is over."""
        self._open = False

    # -- inside -------------------------------------------------------------------------------

    def _asked(self, prompt: str | Sequence[Any]) -> Continuation:
        if isinstance(prompt, Continuation):
            return prompt
        turns = [_answered(turn) for turn in self._drawn if turn.answered]
        if isinstance(prompt, str):
            if not prompt:
                raise DataError("the prompt is empty")
            return self._dialogue.of_text(prompt, turns)
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            return self._dialogue.of_messages(read_messages("prompt", prompt, learned=False), turns)
        ids = _ids(prompt)
        if not ids:
            raise DataError("the prompt has no tokens")
        return Continuation(ids)

    def _room(self, size: int) -> int:
        limit = self._settings.context_length
        if not limit:
            return 1 << 30
        if size >= limit:
            raise DatumTooLong(f"the prompt has {size} tokens; the base's context holds {limit}")
        return limit - size

    def _newest(self) -> AnsweredTurn:
        if not any(turn.answered for turn in self._drawn):
            raise DataError("there is no answer yet that could be extended; call sample first")
        return _answered(next(turn for turn in reversed(self._drawn) if turn.answered))

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            os._exit(1)  # a child process has no sampler
        if not self._open:
            raise RolloutFailed("the rollout is over; its client answers no more")

    async def _on_run_loop(self, begin: Callable[[], Awaitable[Result]]) -> Result:
        if asyncio.get_running_loop() is self._loop:
            return await begin()

        async def run() -> Result:
            return await begin()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def _draw(self, drawn: _Drawn, params: SamplingParams, turn: int) -> None:
        policy, part = self._policy, 0
        while True:
            left = params.max_tokens - len(drawn.tokens)
            ids = (*drawn.asked, *drawn.tokens)
            seed = sample_seed(*self._place, turn, part)
            try:
                made = await self._settings.sampler.generate(
                    policy, ids, replace(params, max_tokens=left), seed
                )
            except Exception as error:
                self.failure = error
                raise
            drawn.tokens += made.tokens
            drawn.logprobs += made.logprobs
            drawn.versions += [made.version] * len(made.tokens)
            drawn.stop_reason = made.stop_reason
            if made.stop_reason != "interrupted" or self._renew is None:
                return
            if len(drawn.tokens) >= params.max_tokens:
                drawn.stop_reason = "length"
                return
            policy, part = self._renew(), part + 1


def time_left(deadline: float) -> float | None:
    """Return the seconds until a deadline; None if there is none."""
    return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())


def _ids(values: Sequence[Any]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in np.asarray(values, dtype=np.int64))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a prompt is a text, messages or token ids, not {values!r:.80}") from error


def _answered(turn: _Drawn) -> AnsweredTurn:
    return AnsweredTurn(
        tuple(turn.asked), tuple(turn.tokens), turn.text, turn.asked.messages, turn.asked.text
    )


def _segments(turns: Sequence[_Drawn]) -> list[RolloutSegment]:
    """Return the sequences that turns make, in the order in which they were asked for."""
    opened: list[tuple[list[int], list[_Piece]]] = []
    for turn in turns:
        asked = list(turn.asked)
        at = next(
            (
                n
                for n in range(len(opened) - 1, -1, -1)
                if asked[: len(opened[n][0])] == opened[n][0]
            ),
            None,
        )
        if at is None:
            at = len(opened)
            opened.append(([], []))
        ids, pieces = opened[at]
        pieces.append((len(asked), turn))
        ids[:] = [*asked, *turn.tokens]
    return [_segment(ids, pieces) for ids, pieces in opened]


# Where a turn begins in its segment.
_Piece = tuple[int, _Drawn]


def _segment(ids: Sequence[int], pieces: Sequence[_Piece]) -> RolloutSegment:
    size = len(ids)
    sampled_N = np.zeros(size, dtype=bool)
    logprobs_N, versions_N = np.zeros(size, np.float32), np.full(size, -1, np.int32)
    for start, turn in pieces:
        end = start + len(turn.tokens)
        sampled_N[start:end] = True
        logprobs_N[start:end] = turn.logprobs
        versions_N[start:end] = turn.versions
    return RolloutSegment(np.array(ids, dtype=np.int32), sampled_N, logprobs_N, versions_N)
