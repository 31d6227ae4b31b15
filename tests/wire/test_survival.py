"""Servers that die or stop, and sessions that fall silent."""

import time

import tinker

from manylora.types import AdamParams
from tests.wire.data import (
    assert_close,
    assert_same_bits,
    forward,
    outputs,
    random_data,
    scores,
    sdk_adam,
    to_sdk,
)
from tests.wire.raw import RawClient
from tests.wire.server import BASE_ALIAS, Server

STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8)
PROBE = random_data(99, 3)
PAIRS = 12


def create(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()


def submit(client: tinker.TrainingClient):
    """Twelve pairs at once."""
    return [
        (
            client.forward_backward(to_sdk(random_data(600 + number, 3)), "cross_entropy"),
            client.optim_step(sdk_adam(STEP)),
        )
        for number in range(PAIRS)
    ]


def test_a_client_does_not_notice_that_its_server_was_killed(serve, connect, server: Server):
    undisturbed = create(connect(server))
    expected = [outputs(pair[0].result()) for pair in submit(undisturbed)]
    mortal = serve("--set", "saving.every_steps=5")
    client = create(connect(mortal))
    early = client.save_weights_and_get_sampling_client().result()
    at_first = [scores(early, datum) for datum in PROBE]
    pairs = submit(client)
    pairs[2][1].result()
    mortal.restart()
    for (result, step), logprobs in zip(pairs, expected, strict=True):
        assert_same_bits(outputs(result.result()), logprobs)
        step.result()
    assert_same_bits(forward(client, PROBE), forward(undisturbed, PROBE))
    # The snapshot that was taken before is still what it was.
    assert_close([scores(early, datum) for datum in PROBE], at_first, 1e-6)
    late = client.save_weights_and_get_sampling_client().result()
    assert_close([scores(late, datum) for datum in PROBE], forward(client, PROBE), 1e-4)


def test_a_session_that_falls_silent_is_closed(serve):
    server: Server = serve("--set", "session_seconds=2")
    silent, lively = RawClient(server), RawClient(server)
    for raw in (silent, lively):
        raw.open_session()
    model_id = silent.new_model()
    end = time.monotonic() + 6
    while time.monotonic() < end:
        lively.ok(lively.post("session_heartbeat", session_id=lively.session_id))
        time.sleep(0.2)
    assert silent.post("session_heartbeat", session_id=silent.session_id).status_code == 410
    for refused in (
        silent.forward_backward(model_id, 1, PROBE),
        silent.optim_step(model_id, 1, STEP),
    ):
        assert 400 <= refused.status_code < 500
        assert refused.status_code not in (408, 409, 429)
    assert lively.new_model()
    for raw in (silent, lively):
        raw.http.close()
