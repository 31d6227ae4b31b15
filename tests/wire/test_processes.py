"""A server is a process that waits and processes that compute."""

import time
from pathlib import Path

import tinker

from tests.family import engine_processes, runs
from tests.wire.data import random_data, to_sdk
from tests.wire.server import BASE_ALIAS, Server


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_the_process_that_waits_has_no_torch(serve, connect):
    server: Server = serve("--max-resident", "1")
    service: tinker.ServiceClient = connect(server)
    adam = tinker.AdamParams(learning_rate=1e-3)
    paths = []
    for number in range(2):  # one is paged out for the other
        client = service.create_lora_training_client(BASE_ALIAS, rank=4, seed=number).result()
        client.forward_backward(to_sdk(random_data(number, 2)), "cross_entropy")
        client.optim_step(adam).result()
        paths.append(client.save_state("kept").result().path)
        sampler = client.save_weights_and_get_sampling_client().result()
        prompt = tinker.ModelInput.from_ints([5, 6, 7])
        sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=3)).result()
    service.create_training_client_from_state_with_optimizer(paths[0]).result()
    assert "libtorch" not in maps(server.pid)
    [engine] = engine_processes(server.pid)
    assert "libtorch" in maps(engine)


def test_nothing_is_left_of_a_server_that_was_killed(serve):
    server: Server = serve()
    family = engine_processes(server.pid)
    assert family
    server.kill()
    end = time.monotonic() + 10.0
    while any(runs(pid) for pid in family):
        assert time.monotonic() < end
        time.sleep(0.02)
