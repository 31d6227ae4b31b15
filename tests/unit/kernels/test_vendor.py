"""Nothing that the vendor's library computes is computed by several threads for the first time."""

import subprocess
import sys

# Of fewer elements torch leaves an operation to one thread.
GRAIN = 1 << 15

RUN = """
import sys
import numpy as np, torch
from torch.utils._python_dispatch import TorchDispatchMode
from manylora.engine import Engine
from manylora.kernels.vendor import FUNCTIONS
from manylora.types import AdamParams, AdapterSpec, ForwardBackward, Opening, OptimStep
from manylora.types import Sample, SamplingParams, causal_datum

first = {}

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in FUNCTIONS:
            first.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))

with Watch():
    engine = Engine(Opening("seedling", threads=2))
    engine.create("a", AdapterSpec(rank=8))
    ids = np.random.default_rng(0).integers(8, 2000, size=200)
    data = [causal_datum(ids, np.ones(200))]
    [result] = engine.forward_backward([ForwardBackward(adapter="a", data=data)])
    assert not isinstance(result, Exception), result
    [result] = engine.optim_step([OptimStep(adapter="a", params=AdamParams(lr=1e-3))])
    assert not isinstance(result, Exception), result
    params = SamplingParams(max_tokens=2)
    [result] = engine.sample([Sample(adapter="a", prompts=(ids,), params=params)])
    assert not isinstance(result, Exception), result
assert {"exp", "log"} <= {name for name, _ in first}, first
late = {key: count for key, count in first.items() if count >= int(sys.argv[1])}
assert not late, late
"""


def test_first_calls_are_small():
    command = [sys.executable, "-c", RUN, str(GRAIN)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
