"""A step's samples become the data of its optimizer steps.

What is a mean, a correction or an advantage is worked out here in float64 for all tokens of the
step at once; a datum holds the result in single precision, as the engine reads it.

l is a token's log-probability while it is trained, p at the start of the step (proximal), q when it
was drawn (behavior), ref that of the reference; all of them at the sampling temperature.

N tokens of a segment, G samples of a group, T sampled tokens of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manylora.config import RlSettings
from manylora.runs.rl.advantages import advantages, all_equal, token_factors
from manylora.runs.rl.corrections import corrected, masks
from manylora.runs.rl.rollout import RolloutSegment, SampleGroup
from manylora.types import DataError, Datum
from manylora.types.data import Array, causal_datum


@dataclass(frozen=True, slots=True)
class StepSequence:
    """A `StepSequence` is a segment as a step trains it.

    Attributes:
        group: its group's place in the step.
        sample: its sample's number, counted over all groups of the step.
        segment: the tokens.
        positions: int64 [n], those of the datum's N - 1 positions that predict a sampled token.
    """

    group: int
    sample: int
    segment: RolloutSegment
    positions: Array

    def column(self, values_n: Array) -> Array:
        """Return float32 [N - 1]: the values of the sampled tokens, and 0 elsewhere."""
        column = np.zeros(len(self.segment.tokens) - 1, np.float32)
        column[self.positions] = values_n
        return column


@dataclass(frozen=True, slots=True)
class Minibatch:
    """A `Minibatch` is what one optimizer step trains on; there may be nothing in it.

    Attributes:
        data: as the objective's loss takes them.
        sequences: which of the step's sequences each datum is.
    """

    data: list[Datum]
    sequences: list[int]


class StepBatch:
    """A `StepBatch` has the sequences that a step trains, in the order of group, sample, segment.

    Attributes:
        groups: all of the step's.
        rewards: float64 [G] of each group, penalties for length included.
        advantages: float64 [G] of each group.
        sequences: those whose log-probabilities the step needs. Samples that were cut are not among
            them if they are masked. Nor is a group whose rewards are all equal, unless it is pulled
            all the same (to a reference, or by dro to the start), or its rejected tokens must be
            known to be left out of a mean.
    """

    def __init__(
        self, rl: RlSettings, folded: bool, groups: Sequence[SampleGroup], rewards: Sequence[Array]
    ) -> None:
        """Take the groups and what each of their samples has earned.

        Args:
            folded: p is not known, and not needed; see `objective.py::Objective`.
        """
        self._rl, self._folded = rl, folded
        self.groups, self.rewards = tuple(groups), list(rewards)
        self.advantages = advantages(self.rewards, rl.advantage)
        needed = [self._needs(rewards_G) for rewards_G in self.rewards]
        counted = self._counted()
        self.sequences = [one for one in counted if needed[one.group]]
        # Tokens that only count in a mean stand behind those that are trained.
        self._order = [*self.sequences, *(one for one in counted if not needed[one.group])]
        sizes = [len(one.positions) for one in self._order]
        self._bounds = np.cumsum([0, *sizes])
        self._num_trained = int(self._bounds[len(self.sequences)])
        self._sample_T = np.repeat([one.sample for one in self._order], sizes).astype(np.int64)
        self._group_T = np.repeat([one.group for one in self._order], sizes).astype(np.int64)
        drawn = [one.segment.logprobs[1:][one.positions] for one in self._order]
        self._behavior_T = np.concatenate([np.zeros(0), *drawn])

    @property
    def pulled(self) -> bool:
        """A term of the objective acts on every token, whether or not its group teaches."""
        return self._rl.kl.coef > 0 or self._rl.loss.kind == "dro"

    @property
    def behavior(self) -> list[Array]:
        """Return q of each sequence's sampled tokens, float64."""
        return self._split(self._behavior_T)

    @property
    def versions(self) -> list[Array]:
        """Return the version of the weights that drew each sequence's sampled tokens."""
        return [one.segment.versions[1:][one.positions] for one in self.sequences]

    def forward_data(self) -> list[Datum]:
        """Return what a `forward` with cross-entropy takes to find p, or that of the reference.

        Only sampled tokens have a weight, so `logprobs="trained"` returns what is needed.
        """
        return [causal_datum(one.segment.tokens, one.segment.sampled) for one in self.sequences]

    def minibatches(
        self, proximal: Sequence[Array] | None = None, reference: Sequence[Array] | None = None
    ) -> list[Minibatch]:
        """Return the data of the optimizer steps of a pass; every pass of the step has the same.

        A minibatch is a run of consecutive groups. A datum in which nothing is trained is left out.

        Args:
            proximal: p of the sampled tokens of each datum of `forward_data`; None where the
                objective does not need it.
            reference: the same of the reference.

        Raises:
            DataError: an array is missing or of another length.
        """
        rl = self._rl
        p_T = self._proximal(proximal)
        weights_T, rejected_T = self._corrected(p_T)
        kept_T = ~rejected_T
        sample_advantages = np.concatenate([np.zeros(0), *self.advantages])
        advantages_T = sample_advantages[self._sample_T]
        ref_T = self._joined(reference, "reference") if rl.kl.coef > 0 else np.zeros(0)
        if rl.kl.coef > 0 and rl.kl.where == "reward":
            advantages_T -= rl.kl.coef * _centred(p_T - ref_T, kept_T)
        factors_T = np.zeros(len(p_T))
        split = np.array_split(np.arange(len(self.groups)), rl.loss.minibatches)
        for numbers in split:
            own_T = np.isin(self._group_T, numbers)
            factors_T[own_T] = token_factors(
                self._sample_T[own_T],
                kept_T[own_T],
                rl.loss.aggregate,
                rl.sampling.max_tokens,
            )
        columns_T = {"logprobs": p_T, "advantages": advantages_T * weights_T * factors_T}
        if rl.loss.kind == "gspo":
            columns_T["sequence_ratio_mask"] = kept_T
        if rl.loss.kind == "dro":
            # Its pull, ½·beta·(l - p)², is k2 to the start of the step, for sampled tokens only.
            pull = float(rl.loss.beta or 0.0)
            columns_T |= {"reference_logprobs": p_T, "kl_weights": pull * factors_T}
        elif rl.kl.coef > 0 and rl.kl.where == "loss":
            columns_T |= {"reference_logprobs": ref_T, "kl_weights": rl.kl.coef * factors_T}
        parts = {name: self._split(values_T) for name, values_T in columns_T.items()}
        return [self._minibatch(set(numbers.tolist()), parts) for numbers in split]

    def correction(self, proximal: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return f(w) of each sequence's sampled tokens, and which of them are rejected."""
        weights_T, rejected_T = self._corrected(self._proximal(proximal))
        return self._split(weights_T), self._split(rejected_T)

    def _needs(self, rewards_G: Array) -> bool:
        unknown = self._rl.off_policy.proximal == "recompute" and not self._folded
        rejects = unknown and masks(self._rl.off_policy.correct)
        return self.pulled or rejects or not all_equal(rewards_G)

    def _counted(self) -> list[StepSequence]:
        """Return all that counts in a mean: every segment but those of masked samples."""
        found: list[StepSequence] = []
        sample = 0
        for number, group in enumerate(self.groups):
            for rollout in group.rollouts:
                masked = self._rl.overlong.mask_truncated and rollout.truncated
                for segment in () if masked else rollout.segments:
                    positions = np.flatnonzero(segment.sampled[1:])
                    if len(positions):
                        found.append(StepSequence(number, sample, segment, positions))
                sample += 1
        return found

    def _proximal(self, proximal: Sequence[Array] | None) -> Array:
        """Return what stands for p: q itself where the objective is in the ratio to q."""
        if self._folded or self._rl.off_policy.proximal == "behavior":
            return self._behavior_T
        return self._joined(proximal, "proximal")

    def _corrected(self, p_T: Array) -> tuple[Array, Array]:
        if self._folded:
            return np.ones(len(p_T)), np.zeros(len(p_T), dtype=bool)
        return corrected(p_T, self._behavior_T, self._sample_T, self._rl.off_policy)

    def _joined(self, arrays: Sequence[Array] | None, name: str) -> Array:
        """Join what a forward returned; where it was not asked, q stands for it."""
        if arrays is None or len(arrays) != len(self.sequences):
            given = "missing" if arrays is None else f"those of {len(arrays)} sequences"
            raise DataError(
                f"the {name} log-probabilities are {given}; the step has {len(self.sequences)} "
                "sequences"
            )
        for number, (array, one) in enumerate(zip(arrays, self.sequences, strict=True)):
            if len(array) != len(one.positions):
                raise DataError(
                    f"sequence {number} of the step has {len(array)} {name} log-probabilities for "
                    f"{len(one.positions)} sampled tokens"
                )
        exact = [np.asarray(array, dtype=np.float64) for array in arrays]
        return np.concatenate([*exact, self._behavior_T[self._num_trained :]])

    def _split(self, values_T: Array) -> list[Array]:
        count = len(self.sequences)
        return np.split(values_T, self._bounds[1 : count + 1])[:count]

    def _minibatch(self, numbers: set[int], parts: dict[str, list[Array]]) -> Minibatch:
        batch = Minibatch([], [])
        acting = [parts[name] for name in ("advantages", "kl_weights") if name in parts]
        for index, one in enumerate(self.sequences):
            if one.group in numbers and any(values[index].any() for values in acting):
                columns = {name: one.column(values[index]) for name, values in parts.items()}
                tokens = one.segment.tokens
                batch.data.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], **columns}))
                batch.sequences.append(index)
        return batch


def _centred(values_T: Array, kept_T: Array) -> Array:
    """Subtract the mean over what is kept."""
    return values_T - values_T[kept_T].mean() if kept_T.any() else values_T
