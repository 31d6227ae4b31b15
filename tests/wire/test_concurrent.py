"""Many tenants at once get, to the last bit, what each of them gets alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

from manylora.types import AdamParams, Datum
from tests.wire.data import (
    assert_same_bits,
    forward,
    outputs,
    random_data,
    sampled_near,
    sdk_adam,
    to_sdk,
)
from tests.wire.oracle import Oracle
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server, create_key

PROBE = random_data(99, 3)
ROUNDS = 4


@dataclass(frozen=True)
class Plan:
    """What one tenant does."""

    rank: int
    loss: str
    num_data: int
    lengths: tuple[int, int]
    samples: bool = False
    config: Any = None


PLANS = {
    "ann": Plan(1, "cross_entropy", 1, (3, 8)),
    "bob": Plan(16, "importance_sampling", 6, (10, 60), samples=True),
    "cat": Plan(4, "ppo", 3, (20, 21)),
    "dan": Plan(33, "cispo", 2, (3, 100)),
    "eve": Plan(8, "dro", 5, (5, 12), config={"beta": 0.05}),
    "fay": Plan(
        2, "gspo", 4, (8, 30), config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    ),
    "gus": Plan(64, "cross_entropy", 2, (40, 90), samples=True),
    "hal": Plan(7, "cross_entropy", 12, (3, 6), samples=True),
}


def batches(seed: int, plan: Plan, base: Oracle) -> list[list[Datum]]:
    """A tenant's data, of each round."""
    made = []
    for number in range(ROUNDS):
        data = random_data(1000 * seed + number, plan.num_data, plan.loss, plan.lengths)
        if plan.loss != "cross_entropy":
            data = sampled_near(data, base.logprobs(data), number)
        made.append(data)
    return made


def work(
    service: tinker.ServiceClient, seed: int, plan: Plan, rounds: list[list[Datum]]
) -> list[np.ndarray]:
    """Everything that a tenant sees: outputs, samples, and the last weights' log-probabilities."""
    client = service.create_lora_training_client(BASE_ALIAS, rank=plan.rank, seed=seed).result()
    seen: list[np.ndarray] = []
    for number, data in enumerate(rounds):
        params = AdamParams(lr=1e-3 * (1 + seed % 3), beta2=0.95, clip_norm=1.0)
        result = client.forward_backward(to_sdk(data), plan.loss, plan.config)  # type: ignore[arg-type]
        step = client.optim_step(sdk_adam(params))
        if plan.samples:
            sampler = client.save_weights_and_get_sampling_client().result()
            prompt = tinker.ModelInput.from_ints(data[0].tokens.tolist()[:5])
            settings = tinker.SamplingParams(max_tokens=8, seed=number, stop=[])
            for sequence in sampler.sample(prompt, 2, settings).result().sequences:
                seen.append(np.array(sequence.tokens))
        seen += outputs(result.result())
        step.result()
    return seen + forward(client, PROBE)


@pytest.mark.parametrize(
    ("same_tenant", "mesh"),
    [
        (True, "dp=1"),
        pytest.param(False, "dp=1", marks=pytest.mark.slow),
        (False, "replicas=2"),
    ],
    ids=["one tenant", "eight tenants", "two engines"],
)
def test_together_is_alone(serve, connect, tmp_path: Path, same_tenant: bool, mesh: str):
    keys = [DEVELOPER if same_tenant else create_key(tmp_path / "data", name) for name in PLANS]
    server: Server = serve("--mesh", mesh)
    base = Oracle(1, 0)
    seeds = range(len(PLANS))
    rounds = [batches(seed, plan, base) for seed, plan in enumerate(PLANS.values())]

    def job(number: int) -> list[np.ndarray]:
        plan = tuple(PLANS.values())[number]
        return work(connect(server, keys[number]), number, plan, rounds[number])

    alone = [job(number) for number in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(job, seeds))
    for name, one, other in zip(PLANS, together, alone, strict=True):
        assert len(one) == len(other), name
        assert_same_bits(one, other)
    untrained = base.logprobs(PROBE)
    for name, one in zip(PLANS, together, strict=True):
        moved = max(np.abs(a - b).max() for a, b in zip(one[-len(PROBE) :], untrained, strict=True))
        assert moved > 1e-3, name


def test_adapters_beyond_what_fits_come_back(serve, connect):
    """Six adapters take turns in a server that keeps two."""
    server: Server = serve("--max-resident", "2")
    service = connect(server)
    clients = [
        service.create_lora_training_client(BASE_ALIAS, rank=2 + number, seed=number).result()
        for number in range(6)
    ]
    step = sdk_adam(AdamParams(lr=2e-3, beta2=0.95))
    for turn in range(3):
        for number, client in enumerate(clients):
            data = random_data(100 * turn + number, 2)
            client.forward_backward(to_sdk(data), "cross_entropy").result()
            client.optim_step(step).result()
    for number, client in enumerate(clients):
        plain = service.create_lora_training_client(BASE_ALIAS, 2 + number, seed=number).result()
        for turn in range(3):
            data = random_data(100 * turn + number, 2)
            plain.forward_backward(to_sdk(data), "cross_entropy").result()
            plain.optim_step(step).result()
        assert_same_bits(forward(client, PROBE), forward(plain, PROBE))
