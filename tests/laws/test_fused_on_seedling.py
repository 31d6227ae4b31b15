"""On the base that ships, whose vocabulary is as long a sum as real ones have: neighbours of any
number leave an adapter's gradient as it is, to the bit.

Fault that was seen to fail here: the head's gradient as one product, on an Intel Xeon.
"""

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.types import AdapterSpec, ForwardBackward, causal_datum


def work(adapter: str, tokens: int) -> ForwardBackward:
    ids = np.random.default_rng(tokens).integers(8, 2000, size=tokens)
    return ForwardBackward(adapter=adapter, data=[causal_datum(ids, np.ones(tokens))])


@pytest.mark.parametrize("own", [20, 40, 200])
def test_the_gradient_does_not_depend_on_how_many_tokens_are_beside_it(own: int, threads: int):
    engine = Engine("seedling", threads=threads)

    def gradient(others: int) -> bytes:
        for name in list(engine.adapters):
            engine.unload(name)
        works = [work("own", own)]
        engine.create("own", AdapterSpec(rank=4, init="gaussian", seed=1))
        if others:
            engine.create("other", AdapterSpec(rank=8, init="gaussian", seed=2))
            works.append(work("other", others))
        engine.forward_backward(works)
        grad_SP = engine.state("own").grad
        assert grad_SP is not None
        return grad_SP.tobytes()

    alone = gradient(0)
    for others in (20, 60, 150, 300):
        assert gradient(others) == alone, others
