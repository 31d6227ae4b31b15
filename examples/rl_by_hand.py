"""GRPO by hand: reinforcement learning with the Python API alone, in a loop that one can read.

    python examples/rl_by_hand.py --steps 40

teaches an adapter of `seedling` to answer with digits. `manylora train` does the same from a run
file, for many adapters at once, and samples while it trains: see docs/rl.md.

M tokens of a prompt, n sampled tokens, G samples of a group.
"""

import argparse
from dataclasses import dataclass

import numpy as np

import manylora
from manylora.types import SampledSequence

PROMPTS = [
    f"{first} {second}"
    for first in ("The garden", "My sister", "A number", "The train")
    for second in ("is", "has", "comes from", "was")
]
GROUPS, GROUP_SIZE, MAX_TOKENS = 8, 8, 24
# The thresholds bound the ratio itself: 0.2 below 1 and 0.28 above it.
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}


@dataclass(frozen=True, slots=True)
class Step:
    """A `Step` is what one step has shown.

    Attributes:
        reward: mean over all samples.
        gap: largest difference between the sampler's log-probabilities and the trainer's; 0 where
            no group taught anything.
        grad_norm: of the gradient, before clipping.
    """

    reward: float
    gap: float
    grad_norm: float


def digits(text: str) -> float:
    """Return the share of digits in an answer."""
    return sum(letter.isdigit() for letter in text) / max(1, len(text))


def advantages(rewards_G: np.ndarray) -> np.ndarray:
    """Return (R - mean) / std of a group (https://arxiv.org/abs/2402.03300), 0 if all are equal."""
    if rewards_G.min() == rewards_G.max():
        return np.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + 1e-6)


def policy_datum(prompt: list[int], answer: SampledSequence, advantage: float) -> manylora.Datum:
    """Return the M + n - 1 predictions of a prompt with its answer; the prompt's weigh nothing."""
    tokens = np.array([*prompt, *answer.tokens])
    logprobs, weights = np.zeros(len(tokens) - 1), np.zeros(len(tokens) - 1)
    logprobs[len(prompt) - 1 :] = answer.logprobs
    weights[len(prompt) - 1 :] = advantage
    inputs = {"target_tokens": tokens[1:], "logprobs": logprobs, "advantages": weights}
    return manylora.Datum(tokens[:-1], inputs)


def take_step(trainer: manylora.Trainer, adapter: manylora.AdapterHandle, number: int) -> Step:
    """Sample groups from the weights as they are, score them, and make one optimizer step."""
    start = number * GROUPS
    texts = [PROMPTS[(start + group) % len(PROMPTS)] for group in range(GROUPS)]
    prompts = [trainer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    params = manylora.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=number)
    snapshot = adapter.snapshot()
    answers = snapshot.sample(prompts, params, num_samples=GROUP_SIZE).result().sequences
    snapshot.drop()
    # Token ids are trained as they were sampled; the text is for the reward alone.
    decoded = [trainer.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in answers]
    rewards = np.array([digits(text) for text in decoded])
    factors = np.concatenate([advantages(own) for own in np.split(rewards, GROUPS)])
    # The losses are sums. Dividing by all sampled tokens makes of that the mean over tokens.
    factors /= sum(len(one.tokens) for one in answers)
    trained = [n for n in range(len(answers)) if factors[n] != 0]
    data = [policy_datum(prompts[n // GROUP_SIZE], answers[n], factors[n]) for n in trained]
    if not data:
        return Step(float(rewards.mean()), 0.0, 0.0)
    result = adapter.forward_backward(data, "ppo", CLIP)
    update = adapter.optim_step(lr=5e-3, clip_norm=1.0)
    gap = max(
        np.abs(found[-len(answers[n].tokens) :] - np.array(answers[n].logprobs)).max()
        for n, found in zip(trained, result.result().logprobs, strict=True)
    )
    return Step(float(rewards.mean()), float(gap), update.result().grad_norm)


def main() -> None:
    """Train and print a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    with manylora.Trainer("seedling") as trainer:
        adapter = trainer.create("digits", rank=8, alpha=16)
        for number in range(arguments.steps):
            step = take_step(trainer, adapter, number)
            print(f"step {number + 1}: reward {step.reward:.3f}, gap {step.gap:.1e}", flush=True)


if __name__ == "__main__":
    main()
