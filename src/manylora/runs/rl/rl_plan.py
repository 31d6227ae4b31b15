"""Reading its prompts shows what reinforcement learning would do."""

from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.config import AdapterEntry, RlSettings
from manylora.runs.course import CoursePlan
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.prompts import open_prompts
from manylora.runs.rl.rl_data import total_steps
from manylora.types import ManyloraError
from manylora.types.data import causal_datum

if TYPE_CHECKING:
    from manylora.models.vocabulary import Vocabulary


def plan_rl(entry: AdapterEntry, tokenizer: Any, vocabulary: "Vocabulary") -> CoursePlan:
    """Return the plan of an entry's course. Raises DataError, ConfigError, naming the adapter."""
    rl = RlSettings.of(entry)

    def read(source: str, max_tokens: int) -> Any:
        return open_prompts(source, tokenizer, vocabulary, entry, None, max_tokens)

    try:
        prompts = read(rl.prompts, rl.sampling.max_tokens)
        prompts.source.check_steps(rl.groups)
        held_out = () if rl.eval is None else read(rl.eval.prompts, 1).rows
    except ManyloraError as error:
        raise type(error)(f"adapter {entry.name}: {error}") from error
    steps, sequences = total_steps(rl, len(prompts)), rl.groups * rl.group_size
    lengths = sorted((len(row.tokens) for row in prompts.rows), reverse=True)
    longest = lengths[0] + rl.sampling.max_tokens
    # Whatever prompts come together: the longest ones, each answered to the end.
    heaviest = [
        causal_datum(np.ones(length + rl.sampling.max_tokens, np.int64), _ones(length, rl))
        for length in lengths[: rl.groups]
        for _ in range(rl.group_size)
    ]
    most = sum(map(len, heaviest))
    average = sum(lengths) / len(lengths) + rl.sampling.max_tokens
    passes = rl.loss.updates + Objective(rl).needs_proximal + Objective(rl).needs_reference
    return CoursePlan(
        num_examples=len(prompts),
        num_eval_examples=len(held_out),
        batch_size=sequences,
        steps=steps,
        num_tokens=int(steps * sequences * average * passes),
        longest=longest,
        heaviest=heaviest,
        details=_details(rl, sequences, most),
    )


def _ones(length: int, rl: RlSettings) -> Any:
    weights = np.zeros(length + rl.sampling.max_tokens, np.float32)
    weights[length:] = 1.0
    return weights


def _details(rl: RlSettings, sequences: int, most: int) -> tuple[str, ...]:
    off_policy = rl.off_policy
    if off_policy.lag is not None:
        kept = off_policy.lag + 1
        when = f"lag {off_policy.lag}: the same run file gives the same bits"
    else:
        kept = (off_policy.max_staleness or 0) + 2
        when = (
            f"max_staleness {off_policy.max_staleness}: not bit-reproducible, because what is "
            "trained on when depends on how long samples take"
        )
    start = rl.kl.coef > 0 and rl.kl.reference == "start"
    return (
        f"a step: {rl.groups} prompts × {rl.group_size} = {sequences} sequences, at most "
        f"{most:,} tokens",
        Objective(rl).formula(),
        f"{when}; versions kept: {kept + start}, so a server must hold {kept + start} adapters "
        "at once",
    )
