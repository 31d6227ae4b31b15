"""The same numbers on a CUDA device, where there is one."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from manylora.engine import Engine
from manylora.models.loading_in_parts import open_part
from manylora.parallel import Mesh
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
from manylora.types.mesh_shape import MeshShape
from manylora.types.weight_forms import QUANTIZATIONS, Quantization

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = {
    "one": AdapterSpec(rank=1, alpha=2, seed=1),
    "eight": AdapterSpec(rank=8, alpha=16, targets=("q_proj", "down_proj", "lm_head"), seed=2),
}


def train(
    folder: str, device: str, dtype: str, rounds: int = 5, quantization: str | None = None
) -> tuple[Engine, list[float]]:
    """Two adapters, trained together for a few rounds; their losses."""
    engine = Engine(
        Opening(
            str(folder), device=device, dtype=dtype, token_budget=256, quantization=quantization
        )
    )
    for name, spec in SPECS.items():
        engine.create(name, spec)
    rng = np.random.default_rng(0)
    losses: list[float] = []
    for _ in range(rounds):
        works = [
            ForwardBackward(
                adapter=name,
                data=[causal_datum(rng.integers(0, 100, n), np.ones(n)) for n in (5, 17, 9)],
            )
            for name in SPECS
        ]
        for result in engine.forward_backward(works):
            assert not isinstance(result, ManyloraError)
            losses.append(result.loss)
        steps = [OptimStep(adapter=name, params=AdamParams(lr=1e-2)) for name in SPECS]
        assert not any(isinstance(r, ManyloraError) for r in engine.optim_step(steps))
    return engine, losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_cuda_trains_as_the_cpu_does(tiny, dtype: str, tolerance: float):
    """bf16 takes the variable-length kernel, fp32 one attention call a run."""
    _, expected = train(tiny("qwen3"), "cpu", "fp32")
    _, losses = train(tiny("qwen3"), "cuda", dtype)
    assert losses == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_cuda_trains_on_a_quantised_base_as_the_cpu_does(tiny, quantization: str):
    folder = tiny("qwen3", hidden_size=128, intermediate_size=256)
    _, expected = train(folder, "cpu", "fp32", quantization=quantization)
    _, losses = train(folder, "cuda", "fp32", quantization=quantization)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_opening_takes_what_is_held_and_a_tensor(tiny, quantization: Quantization | None):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = str(tiny("llama", **sizes, vocab_size=1024, head_dim=128))
    cuda = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mesh, config = Mesh.join(MeshShape(), cuda), AutoConfig.from_pretrained(folder)
    opened = open_part(folder, config, None, cuda, mesh, quantization)
    held = sum(parameter.nbytes for parameter in opened.model.parameters())
    peak = torch.cuda.max_memory_allocated() - before
    # The largest tensor is 8 MiB; converting it in parts takes as much again.
    assert held <= peak <= held + (20 << 20)


def test_cuda_samples_as_the_cpu_does(tiny):
    """Greedy answers of adapters and base in one decode loop."""
    requests = [
        Sample(adapter=name, prompts=[[3, 4, 5]], params=SamplingParams(max_tokens=8, stop=()))
        for name in (*SPECS, None)
    ]
    answers = [
        train(tiny("qwen3"), device, "fp32")[0].sample(requests) for device in ("cpu", "cuda")
    ]
    for on_cpu, on_cuda in zip(*answers, strict=True):
        assert not isinstance(on_cpu, ManyloraError)
        assert not isinstance(on_cuda, ManyloraError)
        assert on_cpu.sequences[0].tokens == on_cuda.sequences[0].tokens
