"""Far more adapters than fit: they train in turn, and each is what it would be alone."""

import numpy as np
import pytest

from manylora.types import AdamParams
from tests.wire.data import random_data
from tests.wire.raw import RawClient
from tests.wire.server import Server

ROUNDS = 2
PROBE = random_data(7, 2)
STEP = AdamParams(lr=5e-3, beta2=0.95, weight_decay=0.01, clip_norm=1.0)


def train_in_turn(server: Server, numbers: range) -> dict[int, np.ndarray]:
    """Create adapters, train them round by round, and score the probe with each."""
    client = RawClient(server)
    client.open_session()
    models = {n: client.new_model(n, rank=1 + n % 5, seed=n) for n in numbers}
    for turn in range(ROUNDS):
        submitted = []
        for number, model in models.items():
            data = random_data(1000 * turn + number, 1, lengths=(4, 12))
            submitted.append(client.ok(client.forward_backward(model, 2 * turn + 1, data)))
            submitted.append(client.ok(client.optim_step(model, 2 * turn + 2, STEP)))
        for answer in submitted:
            client.result(answer["request_id"])
    scores = {}
    for number, model in models.items():
        answer = client.ok(client.forward_backward(model, 2 * ROUNDS + 1, PROBE, forward_only=True))
        outputs = client.losses(answer["request_id"]).loss_fn_outputs
        scores[number] = np.concatenate([output["logprobs"].to_numpy() for output in outputs])
    client.close()
    return scores


@pytest.mark.parametrize(
    "count", [24, pytest.param(200, marks=pytest.mark.slow)], ids=["24", "200"]
)
def test_adapters_train_in_turn_with_eight_resident(serve, count: int):
    paged: Server = serve("--max-resident", "8", folder="paged")
    scores = train_in_turn(paged, range(count))
    roomy: Server = serve("--max-resident", str(count), folder="roomy")
    expected = train_in_turn(roomy, range(count))
    assert scores.keys() == expected.keys()
    for number, one in expected.items():
        assert np.array_equal(scores[number], one), number
    assert len({one.tobytes() for one in expected.values()}) == count
