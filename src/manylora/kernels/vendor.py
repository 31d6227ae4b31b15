"""This has to be done before the numbers of the CPU's vendor library can be relied on."""

import torch

# Elementwise functions that torch leaves to the library.
FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "exp", "exp2", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh"),
)


def settle_functions() -> None:
    """Call every elementwise function once, on few elements, which one thread computes.

    The library chooses a function's kernel in its first call. Where several threads make that call
    at once, one of them may get a kernel of low accuracy (up to 4,000 units in the last place), for
    that call alone: a process that goes on where another was killed would not get its bits.
    https://github.com/pytorch/pytorch/issues/188792
    """
    for dtype in (torch.float32, torch.float64):
        few = torch.full((8,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(few)
