"""An adapter's factors get their first values.

K input features, R rank, P parameters of the adapter.
"""

import hashlib
import math

import torch

from manylora.lora.layout import Layout
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec


def fresh_state(spec: AdapterSpec, layout: Layout) -> AdapterState:
    """Make a new adapter that changes nothing yet: A is random, B zero.

    A is drawn per module from a generator seeded by (adapter seed, module name), so that its
    values depend neither on the other modules that are targeted nor on how the base is sharded.
    `kaiming` is uniform in ±1/sqrt(K), which is `kaiming_uniform_(a=sqrt(5))`, PEFT's default;
    `gaussian` is normal with standard deviation 1/R.
    """
    weights_P = torch.zeros(layout.num_params)
    for factor in layout.factors:
        generator = torch.Generator().manual_seed(named_seed(spec.seed, factor.site))
        a_RK = factor.a(weights_P)
        if spec.init == "kaiming":
            bound = 1.0 / math.sqrt(factor.in_features)
            a_RK.uniform_(-bound, bound, generator=generator)
        else:
            a_RK.normal_(0.0, 1.0 / factor.rank, generator=generator)
    return AdapterState(spec, layout, weights_P.numpy())


def named_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for `name`, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
