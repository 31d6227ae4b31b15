"""The prompts of reinforcement learning go from an adapter's entry to its course."""

from typing import Any

from manylora.config import AdapterEntry, RlSettings
from manylora.runs.columns import CourseColumns
from manylora.runs.course import Progress, refuse_unwritable
from manylora.runs.encode import Between, nothing
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.runs.rl.hooks import load_hook
from manylora.runs.rl.play_client import PlaySettings
from manylora.runs.rl.players import Players
from manylora.runs.rl.prompt_rows import read_prompts
from manylora.runs.rl.prompts import Prompts, open_prompts
from manylora.runs.rl.rewards import RewardSet, part_names
from manylora.runs.rl.rl_course import RlCourse
from manylora.runs.rl.rl_evals import RlEvaluation
from manylora.runs.rl.step_figures import rl_columns
from manylora.runs.rl.user_threads import UserThreads
from manylora.runs.schedule import scheduled_lr
from manylora.types import AdamParams, DataError, SamplingParams, TextFormat


def columns_of(entry: AdapterEntry) -> CourseColumns:
    """Return the figures of an entry's steps and evaluations."""
    return rl_columns(part_names(RlSettings.of(entry).reward or ()))


def check_rl(entry: AdapterEntry) -> None:
    """Load an entry's reward or hook, and hold it against the columns of its prompts.

    Nothing of the base is needed. Prompts that cannot be read are their adapter's matter later.

    Raises:
        ConfigError: there is no such function, or it asks for a column that is not there.
    """
    rl = RlSettings.of(entry)
    if rl.rollout is not None:
        load_hook(rl.rollout, entry.name)
        return
    rewards = RewardSet(rl.reward or (), adapter=entry.name)
    for source in rl.sources().values():
        try:
            columns = read_prompts(source).columns
        except DataError:
            continue
        rewards.check(columns)


def prepare_rl(
    entry: AdapterEntry,
    client: Any,
    progress: Progress,
    read: Any = None,
    between: Between = nothing,
) -> RlCourse:
    """Read and tokenise the prompts, so that a bad row is found before the first step.

    Raises:
        DataError, DatumTooLong: a row is wrong, or too long; it is named with its file.
        Unsupported: the adapter's layers cannot be written as PEFT's files.
    """
    rl = RlSettings.of(entry)
    refuse_unwritable(entry, client.sites)
    progress("reading prompts", 0, 0)
    prompts = opened(entry, client, rl.prompts, rl.sampling.max_tokens, between)
    prompts.source.check_steps(rl.groups)
    longest = rl.sampling.max_tokens
    if rl.eval is not None:
        longest = rl.eval.max_tokens or longest
    held_out = None if rl.eval is None else opened(entry, client, rl.eval.prompts, longest, between)
    steps = total_steps(rl, len(prompts))
    text_format = TextFormat(
        prompts.text_format.stop if rl.sampling.stop is None else tuple(rl.sampling.stop),
        entry.chat_template,
    )
    sampler = EmbeddedSampler()
    settings = PlaySettings(
        sampler=sampler,
        encoder=prompts.encoder,
        tokenizer=client.tokenizer,
        params=SamplingParams(
            max_tokens=rl.sampling.max_tokens,
            temperature=rl.sampling.temperature,
            stop=text_format.stop,
            stop_strings=tuple(rl.sampling.stop_strings),
        ),
        seed=entry.seed,
        context_length=client.context_length,
    )

    def adam(step: int) -> AdamParams:
        return entry.optimizer.adam_params(scheduled_lr(entry.optimizer, step - 1, steps))

    def players(paths: Any, renew: Any) -> Players:
        threads = UserThreads(entry.name, None if paths is None else paths.user_log)
        rows = () if held_out is None else held_out.rows
        return Players(rl, settings, prompts.rows, rows, threads, renew)

    return RlCourse(
        rl=rl,
        parts=part_names(rl.reward or ()),
        steps=steps,
        sampler=sampler,
        players=players,
        order=PromptOrder(len(prompts), entry.seed),
        adam=adam,
        base_forward=client.forward,
        evals=RlEvaluation(
            rl.eval, () if held_out is None else held_out.rows, _eval_params(rl, settings)
        ),
        eval_every=0 if rl.eval is None else rl.eval.every,
        text_format=text_format,
    )


def opened(
    entry: AdapterEntry, client: Any, source: str, max_tokens: int, between: Between = nothing
) -> Prompts:
    """Return an entry's prompts, tokenised for a client's base, with the columns that rewards need.

    Raises:
        DataError, DatumTooLong: a row is wrong, or too long; it is named with its file.
    """
    rl = RlSettings.of(entry)
    prompts = open_prompts(
        source,
        client.tokenizer,
        client.vocabulary,
        entry,
        client.context_length,
        max_tokens,
        between=between,
    )
    if rl.reward is not None:
        rewards = RewardSet(rl.reward, adapter=entry.name)
        prompts.source.require(rewards.required, f"a reward of adapter {entry.name}")
    return prompts


def total_steps(rl: RlSettings, prompts: int) -> int:
    """Return the steps of a whole run."""
    return rl.known_steps or -(-(rl.epochs or 1) * prompts // rl.groups)


def _eval_params(rl: RlSettings, settings: PlaySettings) -> SamplingParams:
    if rl.eval is None:
        return settings.params
    return SamplingParams(
        max_tokens=rl.eval.max_tokens or rl.sampling.max_tokens,
        temperature=rl.eval.temperature,
        top_p=rl.eval.top_p,
        top_k=rl.eval.top_k,
        stop=settings.params.stop,
        stop_strings=settings.params.stop_strings,
    )
