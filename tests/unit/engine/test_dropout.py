"""Dropout through the engine: new masks for every piece of work, none where nothing is learned."""

from dataclasses import replace

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.types import AdapterSpec, ForwardBackward, Opening
from tests.laws.tenants import must, perturb, random_data

pytestmark = pytest.mark.usefixtures("threads")


def test_each_call_draws_new_masks_and_forward_draws_none(tiny):
    engine = Engine(Opening(str(tiny("llama"))))
    engine.create("a", AdapterSpec(rank=4, dropout=0.5))
    perturb(engine, "a")
    work = ForwardBackward(adapter="a", data=random_data(np.random.default_rng(0), 1))
    first, second = (must(engine.forward_backward([work]))[0] for _ in range(2))
    assert engine.adapters["a"].draws == 2
    forward = must(engine.forward_backward([replace(work, backward=False)] * 2))
    assert engine.adapters["a"].draws == 2
    assert forward[0].loss == forward[1].loss
    assert len({first.loss, second.loss, forward[0].loss}) == 3
