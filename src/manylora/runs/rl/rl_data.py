"""The prompts of reinforcement learning go from an adapter's entry to its course."""

from collections.abc import Sequence
from typing import Any

from manylora.config import AdapterEntry, RlSettings
from manylora.runs.columns import CourseColumns
from manylora.runs.course import Progress, refuse_unwritable
from manylora.runs.encode import Between, nothing
from manylora.runs.rl.collecting import PromptOrder
from manylora.runs.rl.embedded import EmbeddedSampler
from manylora.runs.rl.inputs import read_inputs
from manylora.runs.rl.play_client import PlaySettings
from manylora.runs.rl.players import Players
from manylora.runs.rl.prompt_rows import PromptRow
from manylora.runs.rl.prompts import Prompts, open_prompts
from manylora.runs.rl.rewards import RewardSet, part_names
from manylora.runs.rl.rl_course import Renew, RlCourse
from manylora.runs.rl.rl_evals import RlEvaluation
from manylora.runs.rl.step_figures import rl_columns
from manylora.runs.rl.user_threads import UserThreads
from manylora.runs.run_folder import AdapterPaths
from manylora.runs.schedule import scheduled_lr
from manylora.servers import Generating
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
    try:
        read_inputs(entry)
    except DataError:
        return


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
    held_out: Sequence[PromptRow] = ()
    if rl.eval is not None:
        longest = rl.eval.max_tokens or rl.sampling.max_tokens
        held_out = opened(entry, client, rl.eval.prompts, longest, between).rows
    steps = total_steps(rl, len(prompts))
    stop = prompts.text_format.stop if rl.sampling.stop is None else tuple(rl.sampling.stop)
    sampler = EmbeddedSampler()
    settings = _play_settings(entry, client, sampler, prompts, stop)

    def adam(step: int) -> AdamParams:
        return entry.optimizer.adam_params(scheduled_lr(entry.optimizer, step - 1, steps))

    def players(paths: AdapterPaths | None, renew: Renew | None) -> Players:
        threads = UserThreads(entry.name, None if paths is None else paths.user_log)
        return Players(rl, settings, prompts.rows, held_out, threads, renew)

    return RlCourse(
        rl=rl,
        parts=part_names(rl.reward or ()),
        steps=steps,
        sampler=sampler,
        players=players,
        order=PromptOrder(len(prompts), entry.seed),
        adam=adam,
        base_forward=client.forward,
        evals=RlEvaluation(rl.eval, held_out, _eval_params(rl, settings)),
        eval_every=0 if rl.eval is None else rl.eval.every,
        text_format=TextFormat(stop, entry.chat_template),
    )


def _play_settings(
    entry: AdapterEntry, client: Any, sampler: Generating, prompts: Prompts, stop: tuple[int, ...]
) -> PlaySettings:
    sampling = RlSettings.of(entry).sampling
    return PlaySettings(
        sampler=sampler,
        encoder=prompts.encoder,
        tokenizer=client.tokenizer,
        params=SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop=stop,
            stop_strings=tuple(sampling.stop_strings),
        ),
        seed=entry.seed,
        context_length=client.context_length,
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
