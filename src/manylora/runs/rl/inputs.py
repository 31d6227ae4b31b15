"""What an adapter's run needs of users is read and checked without its base, so before it opens."""

from dataclasses import dataclass
from typing import Any

from manylora.config import AdapterEntry
from manylora.config.rl import RlSettings
from manylora.runs.encode import Between, nothing
from manylora.runs.rl.hooks import load_hook
from manylora.runs.rl.prompt_rows import PromptRows, read_prompts
from manylora.runs.rl.rewards import RewardSet
from manylora.runs.rl.user_code import shown_name
from manylora.runs.rl.user_threads import UserThreads


@dataclass(frozen=True, slots=True)
class RlInputs:
    """`RlInputs` are an entry's prompts and what scores its answers: rewards or a hook.

    Attributes:
        eval_rows: held-out prompts; None = there are none.
        rewards: None where a hook plays.
        hook: None where rewards score.
        shown: what messages call the hook.
    """

    rows: PromptRows
    eval_rows: PromptRows | None
    rewards: RewardSet | None
    hook: Any | None
    shown: str


def read_inputs(
    entry: AdapterEntry, threads: UserThreads | None = None, between: Between = nothing
) -> RlInputs:
    """Load an entry's code, read its prompts, and check that they fit each other.

    Args:
        threads: what its functions will run in; nothing runs in them yet.
        between: called every few rows.

    Raises:
        ConfigError: a file or a symbol is missing, or asks for a column that there is not.
        DataError: a row is wrong or lacks a column that a reward needs, or there are fewer prompts
            than groups in a step.
    """
    rl = RlSettings.of(entry)
    hook = rewards = None
    if rl.rollout is not None:
        hook = load_hook(rl.rollout, entry.name)
    else:
        rewards = RewardSet(rl.reward or (), adapter=entry.name, threads=threads)
    rows = read_prompts(rl.prompts, between=between)
    eval_rows = None if rl.eval is None else read_prompts(rl.eval.prompts, between=between)
    if rewards is not None:
        rewards.check(rows.columns)
        whose = f"rl.reward of adapter {entry.name!r}"
        for some in (rows, eval_rows):
            if some is not None:
                some.require(rewards.required, whose)
    rows.check_steps(rl.groups)
    return RlInputs(rows, eval_rows, rewards, hook, shown_name(rl.rollout or ""))
