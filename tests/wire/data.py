"""Data for both sides: as the SDK sends it and as the reference engine takes it.

N tokens of a datum.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tinker

from manylora.types import AdamParams, Datum

FIRST_PLAIN_TOKEN = 7  # seedling's special tokens come first
VOCAB = 2816

Array = np.ndarray[Any, Any]

# In fp32 the engine and the reference differ by rounding alone.
LOGPROB_TOLERANCE = 1e-5

# Plain gradient descent, as near as AdamW comes: with this eps its quotient is the gradient times
# 1e-6. Weights then show gradients, and rounding is not blown up where a gradient is all but zero.
LINEAR = AdamParams(lr=500.0, beta1=0.0, beta2=0.0, eps=1e6)


def seedling_tokenizer() -> Any:
    """The tokenizer of the base, as a client has it."""
    from transformers import AutoTokenizer

    from manylora.models.base import resolve_base

    return AutoTokenizer.from_pretrained(resolve_base("seedling"))


def random_data(
    seed: int, count: int, loss: str = "cross_entropy", lengths: tuple[int, int] = (3, 16)
) -> list[Datum]:
    """Data for `loss`; weights and advantages have either sign.

    The sampling policy's log-probabilities are still to be filled in (`sampled_near`).
    """
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        length = int(rng.integers(*lengths))
        tokens = rng.integers(FIRST_PLAIN_TOKEN, VOCAB, length + 1)
        inputs: dict[str, Any] = {"target_tokens": tokens[1:]}
        if loss == "cross_entropy":
            inputs["weights"] = rng.normal(size=length)
        else:
            inputs["logprobs"] = np.zeros(length)
            inputs["advantages"] = rng.normal(size=length)
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = (rng.random(length) < 0.7).astype(np.float32)
            inputs["sequence_ratio_mask"][-1] = 1.0
        data.append(Datum(tokens[:-1], inputs))
    return data


def sampled_near(data: Sequence[Datum], logprobs: Sequence[Array], seed: int) -> list[Datum]:
    """The same data, sampled by a policy near the one with these log-probabilities: near enough
    for ratios about 1, far enough for some of them to be clipped."""
    rng = np.random.default_rng(seed)
    return [
        Datum(
            datum.tokens,
            {**datum.loss_inputs, "logprobs": own_N + rng.normal(0.0, 0.3, size=len(own_N))},
        )
        for datum, own_N in zip(data, logprobs, strict=True)
    ]


def to_sdk(data: Sequence[Datum]) -> list[tinker.Datum]:
    """The same data in the SDK's classes."""
    return [sdk_datum(datum.tokens, datum.loss_inputs) for datum in data]


def sdk_datum(tokens: Array, inputs: Mapping[str, Any]) -> tinker.Datum:
    """One datum of the SDK; a two-dimensional torch tensor is sent sparse where that is smaller."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([int(token) for token in tokens]),
        loss_fn_inputs=dict(inputs),
    )


def sdk_adam(params: AdamParams) -> tinker.AdamParams:
    """The same hyper-parameters in the SDK's class."""
    return tinker.AdamParams(
        learning_rate=params.lr,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=params.eps,
        weight_decay=params.weight_decay,
        grad_clip_norm=params.clip_norm,
    )


def outputs(result: tinker.ForwardBackwardOutput) -> list[Array]:
    """The log-probabilities of each datum, in its own shape."""
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def forward(client: tinker.TrainingClient, data: Sequence[Datum]) -> list[Array]:
    """Log-probabilities under the client's present weights."""
    return outputs(client.forward(to_sdk(data), "cross_entropy").result())


def prompt_scores(sampler: tinker.SamplingClient, tokens: Sequence[int]) -> Array:
    """The log-probability of every token but the first."""
    values = sampler.compute_logprobs(tinker.ModelInput.from_ints(list(tokens))).result()
    assert len(values) == len(tokens)
    assert values[0] is None
    return np.array(values[1:], dtype=np.float32)


def scores(sampler: tinker.SamplingClient, datum: Datum) -> Array:
    """The log-probabilities of a datum's targets, asked of a sampler."""
    last = int(datum.loss_inputs["target_tokens"][-1])
    return prompt_scores(sampler, [*datum.tokens.tolist(), last])


def assert_close(
    given: Sequence[Array], expected: Sequence[Array], tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """Both have the same shapes, and no number differs by more than `tolerance`, relatively."""
    assert len(given) == len(expected) > 0
    for number, (one, other) in enumerate(zip(given, expected, strict=True)):
        assert one.shape == other.shape, number
        assert one.dtype == np.float32, number
        distance = float((np.abs(one - other) / np.maximum(1.0, np.abs(other))).max())
        assert distance <= tolerance, f"datum {number}: {distance:.2e}"


def assert_same_bits(given: Sequence[Array], expected: Sequence[Array]) -> None:
    """Both are the same to the last bit."""
    assert len(given) == len(expected) > 0
    for number, (one, other) in enumerate(zip(given, expected, strict=True)):
        assert np.array_equal(one, other), f"datum {number}"


def differ(given: Sequence[Array], other: Sequence[Array], by: float = 1e-3) -> bool:
    """Whether some number differs by more than `by`."""
    return any(float(np.abs(a - b).max()) > by for a, b in zip(given, other, strict=True))
