"""What a tenant may hold is bounded; beyond it there is a clear answer, and others go on."""

import threading

import pytest
import tinker

from tests.wire.data import random_data, sdk_adam, to_sdk
from tests.wire.raw import RawClient
from tests.wire.server import BASE_ALIAS, Server, create_key
from tests.wire.test_many_adapters import STEP


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory):
    """A server with small quotas and two keys."""
    settings = ("quotas.adapters=3", "quotas.tokens_in_flight=2000", "limits.rank=32")
    options = [word for setting in settings for word in ("--set", setting)]
    folder = tmp_path_factory.mktemp("tight")
    keys = [create_key(folder, tenant) for tenant in ("ann", "bob")]
    with Server(folder, *options) as server:
        yield server, *keys


def test_adapters(tight: tuple[Server, str, str]):
    server, ann, bob = tight
    client, other = RawClient(server, ann), RawClient(server, bob)
    client.open_session()
    other.open_session()
    for number in range(3):
        client.new_model(number)
    refused = client.create_model(3)
    assert refused.status_code == 400 and "3 adapters" in refused.text
    other.new_model(0)
    client.close()  # which frees them
    again = RawClient(server, ann)
    again.open_session()
    for number in range(3):
        again.new_model(number)
    again.close()
    other.close()


def test_rank(tight: tuple[Server, str, str]):
    client = RawClient(tight[0], tight[1])
    client.open_session()
    refused = client.create_model(0, rank=33)
    assert refused.status_code == 400 and "at most 32" in refused.text
    client.close()


def test_tokens_in_flight_are_waited_for_by_the_sdk(tight: tuple[Server, str, str], connect):
    """The SDK comes again until there is room; nothing is lost or done twice."""
    server, ann, _ = tight
    client = connect(server, ann).create_lora_training_client(BASE_ALIAS, rank=2).result()
    data = to_sdk(random_data(1, 12, lengths=(60, 61)))
    futures = [client.forward_backward(data, "cross_entropy") for _ in range(6)]
    step = client.optim_step(sdk_adam(STEP))
    assert [len(future.result().loss_fn_outputs) for future in futures] == [12] * 6
    assert step.result().metrics["optim/step"] == 1


def test_too_many_tokens_in_flight_are_told_so(tight: tuple[Server, str, str]):
    server, ann, _ = tight
    client = RawClient(server, ann)
    client.open_session()
    model = client.new_model()
    data = random_data(1, 30, lengths=(60, 61))  # more than the quota, and let in alone
    answers = []

    def submit(seq: int) -> None:
        answers.append(client.forward_backward(model, seq, data))

    threads = [threading.Thread(target=submit, args=(seq,)) for seq in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200 and set(codes) <= {200, 429} and 429 in codes
    told = next(answer for answer in answers if answer.status_code == 429)
    assert "in flight" in told.text
    client.close()


def test_checkpoint_bytes(serve, connect):
    server: Server = serve("--set", "quotas.checkpoint_bytes=200000")
    client = connect(server).create_lora_training_client(BASE_ALIAS, rank=1).result()
    client.save_weights_for_sampler("small").result()
    with pytest.raises(tinker.TinkerError, match="delete some"):
        for number in range(9):
            client.forward_backward(to_sdk(random_data(number, 1)), "cross_entropy")
            client.optim_step(sdk_adam(STEP)).result()
            client.save_state(f"s{number}").result()
    client.forward_backward(to_sdk(random_data(1, 1)), "cross_entropy").result()
