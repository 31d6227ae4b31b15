"""A server on a base in 4 bits, its engine two processes, trains what those weights train.

The oracle is the reference engine on an ordinary base that holds the weights which the codes stand
for.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM

from manylora.engine import Engine
from manylora.models import resolve_base
from manylora.types import Opening
from tests.wire.data import assert_close, forward, random_data
from tests.wire.oracle import Oracle
from tests.wire.server import Server
from tests.wire.test_training import create, move_away


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("quantized")
    with Server(folder, "--mesh", "tp=2", "--set", "quantization=nf4") as running:
        yield running


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """seedling with the weights that its 4-bit codes stand for."""
    engine = Engine(Opening("seedling", dtype="fp32", device="cpu", quantization="nf4"))
    model = AutoModelForCausalLM.from_pretrained(resolve_base("seedling"), dtype=torch.float32)
    for site in engine.sites[:-1]:
        weight_NK = model.get_submodule(site.name).weight.detach()
        weight_NK.copy_(torch.from_numpy(engine.base_weight(site.name)))
    folder = tmp_path_factory.mktemp("rounded")
    model.save_pretrained(folder)
    return folder


def test_a_base_in_four_bits_trains_as_its_weights_do(service: tinker.ServiceClient, rounded: Path):
    client, oracle = create(service), Oracle(4, 1, base=rounded)
    move_away(client, oracle)
    probe = random_data(99, 4)
    expected = oracle.logprobs(probe)
    assert_close(forward(client, probe), expected)
    plain = Oracle(4, 1)
    difference = max(abs(a - b).max() for a, b in zip(plain.logprobs(probe), expected, strict=True))
    assert difference > 0.05, "four bits make a difference, and it was looked for"
