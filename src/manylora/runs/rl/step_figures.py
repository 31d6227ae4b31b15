"""A step's groups and log-probabilities become the figures of its line in metrics.jsonl.

l is a token's log-probability while it is trained, p at the start of the step, q when it was drawn.

N tokens of a sequence, n sampled ones; nan where a number is not known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manylora.runs.columns import Column, CourseColumns
from manylora.runs.rl.objective import Objective
from manylora.runs.rl.step_batch import Minibatch, StepBatch
from manylora.types.data import Array

Figures = dict[str, Any]

_REWARD = (
    Column("reward", "reward", better="higher", total="ends", charted=True, watched="mean"),
    Column("reward_std", charted=True),
    Column("reward_min"),
    Column("reward_max"),
)
_REST = (
    Column("advantage_std"),
    Column("groups"),
    Column("zero_variance_groups"),
    Column("dropped_groups", total="sum"),
    Column("waves"),
    # Positions that the model read in training, passes before the step included.
    Column("tokens", total="sum"),
    Column("sampled_tokens", total="sum"),
    Column("trained_tokens", total="sum"),
    Column("length", "length", charted=True, watched="last"),
    Column("length_max"),
    Column("truncated_share", unit="share", charted=True),
    Column("turns"),
    Column("rollout_seconds_median"),
    Column("rollout_seconds_max"),
    Column("loss", "loss", charted=True, checked=True),
    Column("lr", charted=True),
    Column("grad_norm", "gradient norm", charted=True, checked=True),
    Column("entropy", "entropy", charted=True),
    Column("kl", "KL", charted=True, watched="last"),
    Column("ratio"),
    Column("ratio_max"),
    Column("clip_share_low", unit="share"),
    Column("clip_share_high", unit="share"),
    # Over all tokens, and over those that the weights at the step's start have drawn: with these,
    # sampler and trainer should agree but for rounding.
    Column("logprob_gap", charted=True),
    Column("logprob_gap_max"),
    Column("logprob_gap_current"),
    Column("logprob_gap_current_max"),
    Column("behavior_k1"),
    Column("behavior_k3"),
    Column("w"),
    Column("w_max"),
    Column("rejected_share", unit="share"),
    Column("staleness", charted=True),
    Column("staleness_max"),
    Column("version", "version", watched="last"),
    Column("sampling_seconds"),
    Column("reward_seconds"),
    Column("waiting_seconds"),
    Column("forward_seconds"),
    Column("backward_seconds"),
    Column("publish_seconds"),
)


def rl_columns(parts: Sequence[str] = ()) -> CourseColumns:
    """Return the figures of a run whose reward has these parts, each as `reward/PART`."""
    named = tuple(Column(f"reward/{part}") for part in parts)
    return CourseColumns(
        step=(*_REWARD, *named, *_REST),
        evaluation=(
            Column("reward", "eval reward", better="higher", counted_by="samples"),
            Column("samples", tracked=False),
        ),
    )


RL_COLUMNS = rl_columns()


@dataclass(frozen=True, slots=True)
class TrainedPass:
    """A `TrainedPass` is a minibatch with what its `forward_backward` has returned.

    Attributes:
        logprobs: l of each datum, at its `positions`.
        positions: None = all of them.
        entropies: of the same positions; None = not asked.
    """

    minibatch: Minibatch
    logprobs: Sequence[Array]
    positions: Sequence[Array] | None = None
    entropies: Sequence[Array] | None = None

    def sampled(self, batch: StepBatch, values: Sequence[Array]) -> list[Array]:
        """Return values by position as float64 [n] of each datum's sampled tokens."""
        found: list[Array] = []
        for number, index in enumerate(self.minibatch.sequences):
            all_N = np.full(len(self.minibatch.data[number]), np.nan)
            places = slice(None) if self.positions is None else self.positions[number]
            all_N[places] = values[number]
            found.append(all_N[batch.sequences[index].positions])
        return found


def step_figures(
    objective: Objective,
    batch: StepBatch,
    version: int,
    *,
    proximal: Sequence[Array] | None = None,
    reference: Sequence[Array] | None = None,
    passes: Sequence[TrainedPass] = (),
    parts: Sequence[str] = (),
) -> Figures:
    """Return a value for each of `rl_columns(parts)`; None where there is none, or others know it.

    Where no pass found p, it is the l of the first optimizer step, which began at the same weights.

    Args:
        version: of the weights at the step's start.
        proximal: what `forward` returned for the batch's `forward_data`; None = not asked.
        reference: the same of the reference.
        passes: the step's passes in their order, all updates; empty = the step was skipped.
        parts: those parts of the reward that are always told, besides those that were given.
    """
    given = (name for group in batch.groups for one in group.rollouts for name in one.parts)
    named = list(dict.fromkeys((*parts, *given)))
    figures: Figures = {column.name: None for column in rl_columns(named).step}
    figures |= _reward_figures(batch, named) | _sample_figures(batch, version)
    known = _proximal(batch, proximal, passes)
    figures |= _off_policy_figures(objective, batch, known, version)
    figures |= _policy_figures(objective, batch, passes)
    if reference is not None:
        distance = np.concatenate([*reference, np.zeros(0)]).astype(np.float64) - _joined(known)
        figures["kl"] = _mean(_k3(distance))
    forwards = (proximal is not None) + (reference is not None)
    read = forwards * sum(len(one.segment.tokens) - 1 for one in batch.sequences)
    trained = [datum for one in passes for datum in one.minibatch.data]
    return figures | {"version": version, "tokens": read + sum(map(len, trained))}


def _reward_figures(batch: StepBatch, parts: Sequence[str]) -> Figures:
    rewards, advantages = _joined(batch.rewards), _joined(batch.advantages)
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    figures: Figures = {
        "reward": _mean(rewards),
        "reward_std": _figure(rewards, _deviation),
        "reward_min": _figure(rewards, np.min),
        "reward_max": _figure(rewards, np.max),
        "advantage_std": _figure(advantages, _deviation),
        "groups": len(batch.groups),
        "zero_variance_groups": sum(not group_G.any() for group_G in batch.advantages),
    }
    for name in parts:
        values = (rollout.parts.get(name) for rollout in rollouts)
        figures[f"reward/{name}"] = _mean(np.array([one for one in values if one is not None]))
    return figures


def _sample_figures(batch: StepBatch, version: int) -> Figures:
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    lengths = np.array([rollout.num_sampled for rollout in rollouts])
    seconds = np.array([rollout.seconds for rollout in rollouts])
    segments = [segment for rollout in rollouts for segment in rollout.segments]
    ages = version - _joined([one.versions[one.sampled] for one in segments])
    return {
        "sampled_tokens": int(lengths.sum()),
        "length": _mean(lengths),
        "length_max": int(lengths.max()) if len(lengths) else None,
        "truncated_share": _mean(np.array([rollout.truncated for rollout in rollouts])),
        "turns": _mean(np.array([rollout.turns for rollout in rollouts])),
        "rollout_seconds_median": _figure(seconds, np.median),
        "rollout_seconds_max": _figure(seconds, np.max),
        "staleness": _mean(ages),
        "staleness_max": int(ages.max()) if len(ages) else None,
    }


def _proximal(
    batch: StepBatch, proximal: Sequence[Array] | None, passes: Sequence[TrainedPass]
) -> list[Array]:
    """Return p [n] of each sequence as far as it is known."""
    if proximal is not None:
        return [np.asarray(p_n, dtype=np.float64) for p_n in proximal]
    known = [np.full(len(one.positions), np.nan) for one in batch.sequences]
    # The next optimizer step of the same pass begins at other weights.
    for first in passes[:1]:
        for index, l_n in zip(
            first.minibatch.sequences, first.sampled(batch, first.logprobs), strict=True
        ):
            known[index] = l_n
    return known


def _off_policy_figures(
    objective: Objective, batch: StepBatch, known: Sequence[Array], version: int
) -> Figures:
    log_w = _joined(known) - _joined(batch.behavior)
    current = _joined(batch.versions) == version
    found = ~np.isnan(log_w)
    # Only a pass before the step rejects anything.
    asked = objective.needs_proximal and bool(found.all())
    rejected = _joined(batch.correction(known)[1]) if asked else np.zeros(len(log_w[found]))
    gap, log_w = np.abs(log_w), log_w[found]
    with np.errstate(over="ignore"):
        w = np.exp(log_w)
    return {
        "logprob_gap": _mean(gap),
        "logprob_gap_max": _figure(gap, np.max),
        "logprob_gap_current": _mean(gap[current]),
        "logprob_gap_current_max": _figure(gap[current], np.max),
        "behavior_k1": _mean(-log_w),
        "behavior_k3": _mean(_k3(log_w)),
        "w": _mean(w),
        "w_max": _figure(w, np.max),
        "rejected_share": _mean(rejected),
    }


def _policy_figures(
    objective: Objective, batch: StepBatch, passes: Sequence[TrainedPass]
) -> Figures:
    """Return what is of l: the ratio to p in all passes, how often a bound held it, the entropy."""
    ratios: list[Array] = []
    signs: list[Array] = []
    entropies: list[Array] = []
    for one in passes:
        for number, l_n in enumerate(one.sampled(batch, one.logprobs)):
            inputs = one.minibatch.data[number].loss_inputs
            own_n = batch.sequences[one.minibatch.sequences[number]].positions
            ratios.append(_ratio(objective, l_n, {k: v[own_n] for k, v in inputs.items()}))
            signs.append(np.sign(inputs["advantages"][own_n].astype(np.float64)))
        entropies += [] if one.entropies is None else one.sampled(batch, one.entropies)
    ratio, sign = _joined(ratios), _joined(signs)
    acting = (sign != 0) & ~np.isnan(ratio)
    low, high = _clipped(objective, ratio, sign)
    # Every update has the same minibatches.
    once = {id(one.minibatch): one.minibatch for one in passes}.values()
    return {
        "ratio": _mean(ratio),
        "ratio_max": _figure(ratio, np.max),
        "clip_share_low": None if low is None else _mean(low[acting]),
        "clip_share_high": None if high is None else _mean(high[acting]),
        "entropy": _mean(_joined(entropies)),
        "trained_tokens": sum(_trained(datum.loss_inputs) for m in once for datum in m.data),
    }


def _ratio(objective: Objective, l_n: Array, inputs: dict[str, Array]) -> Array:
    """Return the ratio that the loss looks at; where p is l itself, it is 1."""
    log_ratio_n = l_n - inputs["logprobs"].astype(np.float64)
    if objective.folded:
        return np.where(np.isnan(l_n), np.nan, 1.0)
    if objective.loss == "gspo":
        mean = _mean(log_ratio_n[inputs["sequence_ratio_mask"] != 0])
        log_ratio_n = np.where(np.isnan(l_n), np.nan, np.nan if mean is None else mean)
    with np.errstate(over="ignore"):
        return np.exp(log_ratio_n)


def _clipped(objective: Objective, ratio: Array, sign: Array) -> tuple[Array | None, Array | None]:
    """Return which tokens were held at the lower bound, and which at the upper one."""
    bounds = objective.rl.loss.thresholds
    if "clip_low_threshold" not in bounds:
        return None, None
    low, high = ratio < bounds["clip_low_threshold"], ratio > bounds["clip_high_threshold"]
    # Of ppo and gspo a bound holds only what would go further beyond it.
    both = objective.rl.loss.kind == "cispo"
    return low & (both | (sign < 0)), high & (both | (sign > 0))


def _trained(inputs: Any) -> int:
    acting = inputs["advantages"] != 0
    if "kl_weights" in inputs:
        acting = acting | (inputs["kl_weights"] != 0)
    return int(np.count_nonzero(acting))


def _k3(distance: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(distance) - distance - 1.0


def _deviation(values: Array) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _joined(arrays: Sequence[Array]) -> Array:
    return np.concatenate([np.zeros(0), *arrays])


def _mean(values: Array) -> float | None:
    return _figure(values, np.mean)


def _figure(values: Array, of: Callable[[Array], Any]) -> float | None:
    """Return a figure of the values that are known."""
    known = values[~np.isnan(values)]
    return float(of(known.astype(np.float64))) if len(known) else None
