"""A base that is split, shared out, cast and quantised while it is opened: the same numbers.

Codes and scales are compared to the bit with those of one process; training as on any mesh.

Faults that were planted and seen to fail here: rows read one place too early, a block cut in the
middle.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from manylora.engine import Engine
from manylora.models.loading_in_parts import open_part
from manylora.models.quantized import conversions, kept, quantized_linears
from manylora.models.splitting import SplitLinear
from manylora.parallel import Mesh
from manylora.types import AdapterSpec, Opening
from tests.models import TinyBases
from tests.parallel.processes import RankFailed, run_ranks
from tests.parallel.test_base import FOUR, peak_of
from tests.parallel.test_training import ROUNDS, SHAPES, assert_agrees
from tests.parallel.training import crowd, train

conversions()  # imported once, before ranks are forked, rather than in each

# On four tp ranks a row of o_proj and of down_proj is one block.
SIZES: dict[str, Any] = {**FOUR, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
BYTES = {None: 4.0, "int8": 1 + 4 / 64, "nf4": 1 / 2 + 4 / 64}


def opened(mesh: Mesh, folder: str, kind: str, dtype: str) -> Any:
    """All weights put together again, what the rank holds of them, and the base's fingerprint."""
    engine = Engine(Opening(str(folder), device="cpu", dtype=dtype, quantization=kind), mesh)
    model = engine.base.model
    weights = {site.name: engine.base_weight(site.name) for site in engine.sites[:-1]}
    held = numbers = 0
    for _, layer in quantized_linears(model):
        tensors = kept(layer)[1].parameters(recurse=False)
        held += sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)
        whole_in = layer.whole_in if isinstance(layer, SplitLinear) else layer.in_features
        whole_out = layer.whole_out if isinstance(layer, SplitLinear) else layer.out_features
        numbers += whole_in * whole_out
    return {
        "weights": weights,
        "held": held,
        "numbers": numbers,
        "fingerprint": engine.base.fingerprint,
        "dtype": str(engine.base.dtype),
    }


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        *(("nf4", "auto", shape) for shape in SHAPES),
        ("int8", "auto", "dp=2,tp=2"),
        ("nf4", "bf16", "dp=2,tp=2"),
    ],
)
def test_parts_are_quantised_as_the_whole(tiny: TinyBases, kind: str, dtype: str, shape: str):
    folder = str(tiny("qwen3", **SIZES))
    expected = run_ranks(opened, "dp=1", folder, kind, dtype)[0]
    assert expected["held"] == expected["numbers"] * BYTES[kind]
    found = run_ranks(opened, shape, folder, kind, dtype)
    for rank in found:
        assert rank["fingerprint"] == expected["fingerprint"]
        assert rank["dtype"] == expected["dtype"]
        assert rank["weights"].keys() == expected["weights"].keys()
        for name, weight_NK in expected["weights"].items():
            assert np.array_equal(rank["weights"][name], weight_NK), name
        assert rank["held"] == expected["held"] / len(found)


def digest(engine: Engine) -> list[Any]:
    """Which modules the base is made of, and what its parameters hold."""
    modules = [(name, id(module)) for name, module in engine.base.model.named_modules()]
    values = [
        (name, getattr(p, "_local_tensor", p).detach().clone())
        for name, p in engine.base.model.named_parameters()
    ]
    return [modules, values]


def trained(mesh: Mesh, folder: str, kind: str) -> Any:
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu", quantization=kind), mesh)
    modules, values = digest(engine)
    found = train(mesh, engine, crowd(), range(ROUNDS))
    engine.unload("wide")
    engine.create("another", AdapterSpec(rank=5, targets=("v_proj",)))
    after_modules, after_values = digest(engine)
    assert modules == after_modules, "adapters came and went, and the base was wrapped anew"
    for (name, before), (_, after) in zip(values, after_values, strict=True):
        assert torch.equal(before, after), name
    return found if mesh.is_leader else None


@lru_cache
def alone(folder: Path, kind: str) -> Any:
    return run_ranks(trained, "dp=1", str(folder), kind)[0]


@pytest.mark.parametrize(
    ("family", "kind", "shape"),
    [
        ("llama", "nf4", "dp=2,tp=2"),
        pytest.param("gemma3_text", "int8", "dp=2,tp=2", marks=pytest.mark.slow),
        pytest.param("llama", "nf4", "dp=4", marks=pytest.mark.slow),
        pytest.param("llama", "nf4", "tp=4", marks=pytest.mark.slow),
        pytest.param("qwen3", "int8", "dp=2", marks=pytest.mark.slow),
        pytest.param("qwen3", "nf4", "tp=2", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_trains_on_a_quantised_base_as_one_process(
    tiny: TinyBases, family: str, kind: str, shape: str
):
    folder = tiny(family, **SIZES)
    found = run_ranks(trained, shape, str(folder), kind)[0]
    assert_agrees(found, alone(folder, kind))


def gathered(mesh: Mesh, folder: str, kind: str | None) -> Any:
    """Bytes that a rank sends to gather the blocks for one forward."""
    engine = Engine(Opening(str(folder), token_budget=64, device="cpu", quantization=kind), mesh)
    mesh.traffic.clear()
    engine.base.run_nothing()
    return mesh.traffic.sent()["dp.blocks"].bytes


def test_what_is_gathered_over_dp_is_codes_and_scales(tiny: TinyBases):
    folder = str(tiny("llama", **SIZES, num_hidden_layers=8, vocab_size=64))
    sent = {kind: run_ranks(gathered, "dp=2", folder, kind)[0] for kind in BYTES}
    for kind in ("nf4", "int8"):
        # The embedding and the norms stay as they are: 2 % here.
        assert sent[kind] / sent[None] == pytest.approx(BYTES[kind] / 4, abs=0.02), kind


def peak(mesh: Mesh, folder: str) -> Any:
    """See `test_base.peak`, of a base in 4 bits."""
    config = AutoConfig.from_pretrained(folder)
    cpu = torch.device("cpu")
    return peak_of(lambda: open_part(folder, config, None, cpu, mesh, "nf4").model)


@pytest.mark.parametrize("shape", ["dp=1", "dp=4", "tp=4"])
def test_opening_takes_the_codes_and_a_tensor(tiny: TinyBases, shape: str):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = tiny("llama", **FOUR, **sizes, vocab_size=1024, head_dim=128)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert whole > 200 << 20
    results = run_ranks(peak, shape, str(folder))
    for result in results:
        assert result["held"] < 0.17 * whole / len(results)
        # The largest tensor as it lies in the file, what converting it in parts takes, some pages.
        assert result["added"] < result["held"] + (8 << 20) + (40 << 20)


def opens(mesh: Mesh, folder: str) -> None:
    Engine(Opening(str(folder), device="cpu", quantization="nf4"), mesh)


def test_a_tp_that_cuts_a_block_is_refused_by_name(tiny: TinyBases):
    folder = tiny("llama", **{**SIZES, "head_dim": 32})
    run_ranks(opens, "tp=2", str(folder))
    with pytest.raises(RankFailed, match=r"o_proj has 32 inputs here.*or with a smaller tp"):
        run_ranks(opens, "tp=4", str(folder))
