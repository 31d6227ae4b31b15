"""Which low-rank operation the layers of a device call."""

import numpy as np
import pytest
import torch

from manylora.engine import Engine
from manylora.kernels import LOWRANK, LowRank, low_rank_on, shrink_expand, shrink_expand_backward
from manylora.kernels import by_device as module
from manylora.types import AdapterSpec, ForwardBackward, Opening
from tests.laws.tenants import random_data


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "meta"])
def test_every_device_has_the_plain_loop_or_its_own(device: str):
    found = low_rank_on(torch.device(device))
    assert found is LOWRANK.get(torch.device(device).type, module.PLAIN)


def test_an_engine_calls_what_its_device_has(tiny, monkeypatch: pytest.MonkeyPatch):
    calls = {"forward": 0, "backward": 0}

    def forward(*args):
        calls["forward"] += 1
        return shrink_expand(*args)

    def backward(*args):
        calls["backward"] += 1
        shrink_expand_backward(*args)

    monkeypatch.setattr(module, "LOWRANK", {"cpu": LowRank(forward, backward)})
    engine = Engine(Opening(str(tiny("llama")), device="cpu"))
    monkeypatch.undo()  # it is looked up once, when the layers are built
    engine.create("all", AdapterSpec(rank=2, targets=("q_proj", "v_proj", "o_proj", "lm_head")))
    engine.forward_backward(
        [ForwardBackward(adapter="all", data=random_data(np.random.default_rng(0), 1))]
    )
    layers = engine.base.model.config.num_hidden_layers
    assert calls == {"forward": 2 * layers + 1, "backward": 2 * layers + 1}
