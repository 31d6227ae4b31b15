"""Law 1 on bases whose sums are as long as real ones': neighbours of any number leave an adapter's
gradient and samples as they are, to the bit.

A vendor's product may add a row up in another order when there are more rows beside it; with the
short sums of tiny bases it hardly ever does.

Faults that were seen to fail here, on an Intel Xeon: frozen products in one piece, without the
library's strict mode (seedling's head gradient, everything of the wide base) and in bf16; likewise
the low-rank products of a decode step.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from manylora.engine import Engine
from manylora.types import (
    AdamParams,
    AdapterSpec,
    ForwardBackward,
    ManyloraError,
    Opening,
    OptimStep,
    Sample,
    SamplingParams,
    causal_datum,
)
from manylora.types.adapter_spec import DType

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
}
BOTH_THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True)

Result = TypeVar("Result")


def checked(results: Sequence[Result | ManyloraError]) -> list[Result]:
    found = [result for result in results if not isinstance(result, ManyloraError)]
    assert len(found) == len(results), results
    return found


def work(adapter: str, tokens: int) -> ForwardBackward:
    ids = np.random.default_rng(tokens).integers(8, 2000, size=tokens)
    return ForwardBackward(adapter=adapter, data=[causal_datum(ids, np.ones(tokens))])


def start(engine: Engine, neighbours: int, dtype: DType) -> list[str]:
    """Adapters of different ranks; the first is the one that is looked at."""
    for name in list(engine.adapters):
        engine.unload(name)
    names = ["own", *(f"other{number}" for number in range(neighbours))]
    for number, name in enumerate(names):
        rank = (64, 4)[number % 2]
        spec = AdapterSpec(rank=rank, alpha=4 * rank, seed=number, dtype=dtype)
        engine.create(name, spec)
        # One large step, alone, so that B is not zero.
        checked(engine.forward_backward([work(name, 30)]))
        checked(engine.optim_step([OptimStep(adapter=name, params=AdamParams(lr=0.02))]))
    return names


def gradient(engine: Engine, own: int, others: int, dtype: DType) -> bytes:
    names = start(engine, int(others > 0), dtype)
    works = [work("own", own), *(work(name, others) for name in names[1:])]
    checked(engine.forward_backward(works))
    grad_SP = engine.state("own").grad
    assert grad_SP is not None
    return grad_SP.tobytes()


def samples(engine: Engine, neighbours: int, dtype: DType) -> list[object]:
    """Two answers of `own`, with others' and more of its own beside them."""
    start(engine, 1, dtype)
    requests = [
        Sample(
            adapter="other0" if number % 8 == 7 else "own",
            prompts=(np.random.default_rng(number).integers(8, 2000, size=8 + number % 13),),
            params=SamplingParams(max_tokens=6, temperature=1.0, seed=number, stop=()),
        )
        for number in range(2 + neighbours)
    ]
    results = checked(engine.sample(requests))
    return [(s.tokens, s.logprobs) for result in results[:2] for s in result.sequences]


def assert_neighbours_do_not_matter(
    folder: str | Path,
    dtype: DType,
    threads: int,
    *,
    lengths: Sequence[int] = (20, 200),
    beside: Sequence[int] = (40, 140, 300),
    # The last makes one adapter's rows as many as change the order of its own products' sums.
    requests: Sequence[int] = (3, 30, 252),
) -> None:
    engine = Engine(Opening(str(folder), dtype=dtype, threads=threads))
    for own in lengths:
        alone = gradient(engine, own, 0, dtype)
        for others in beside:
            assert gradient(engine, own, others, dtype) == alone, (own, others)
    alone_too = samples(engine, 0, dtype)
    for others in requests:
        assert samples(engine, others, dtype) == alone_too, others


# A CPU without products in bf16 takes three minutes for it with each number of threads.
@pytest.mark.parametrize(
    ("dtype", "threads"),
    [
        ("fp32", 1),
        ("fp32", 2),
        pytest.param("bf16", 1, marks=pytest.mark.slow),
        pytest.param("bf16", 2, marks=pytest.mark.slow),
    ],
    indirect=["threads"],
)
def test_a_wide_base(dtype: DType, tiny, threads: int):
    assert_neighbours_do_not_matter(tiny("llama", **WIDE), dtype, threads)


def test_a_wide_base_in_bf16_with_few_neighbours(tiny, threads: int):
    assert_neighbours_do_not_matter(
        tiny("llama", **WIDE), "bf16", threads, lengths=(20,), beside=(140,), requests=(30,)
    )


@BOTH_THREADS
def test_the_base_that_ships(threads: int):
    assert_neighbours_do_not_matter("seedling", "fp32", threads)


def test_a_process_that_has_computed_before(tiny):
    """Then the library cannot be asked any more; if it needs to be, products go in blocks."""
    run = (
        "import torch; torch.randn(64, 64) @ torch.randn(64, 64)\n"
        "from tests.laws.test_fused_on_wide_bases import assert_neighbours_do_not_matter\n"
        f"assert_neighbours_do_not_matter({str(tiny('llama', **WIDE))!r}, 'fp32', 1)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    result = subprocess.run(
        [sys.executable, "-c", run], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_nobody_computes_before_the_library_is_asked():
    """In fp32 no CPU that we know needs blocks, once it is asked."""
    run = (
        "import torch, manylora.kernels as kernels\n"
        "torch.set_num_threads(2)\n"
        "assert kernels.whole_products(torch.device('cpu'), torch.float32)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    subprocess.run([sys.executable, "-c", run], env=environment, check=True)
