"""Weights in 4 or 8 bits are the library's, row by row; what cannot be so is refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from manylora.engine import Engine
from manylora.models import open_base, quantized
from manylora.models.base_memory import base_bytes
from manylora.models.quantized import BLOCK, WholeWeight, is_quantized, kept
from manylora.types import ConfigError, Opening, Unsupported
from manylora.types.weight_forms import QUANTIZATIONS, Quantization
from tests.models import TinyBases

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)


def random_weight(rows: int = 7, columns: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(rows, columns, generator=generator)
    weight_NK[2, :BLOCK] = 0.0  # a block without a scale
    weight_NK[3] *= 1000.0
    return weight_NK


def through(kind: Quantization, weight_NK: torch.Tensor) -> torch.Tensor:
    whole = WholeWeight(kind, weight_NK.shape[1], weight_NK.dtype)
    return whole(*whole.right_inverse(weight_NK))


def test_int8_is_the_nearest_of_255_even_steps():
    weight_NK = random_weight()
    blocks = weight_NK.view(7, -1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    error = (through("int8", weight_NK).view_as(blocks) - blocks).abs()
    assert bool((error <= 0.501 * step).all())


def test_nf4_is_the_nearest_of_sixteen_normal_floats():
    # QLoRA (arXiv:2305.14314), appendix E.
    levels = torch.tensor(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    )
    weight_NK = random_weight()
    blocks = weight_NK.view(7, -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    distances = ((blocks / largest.clamp_min(1e-30)).unsqueeze(-1) - levels).abs()
    expected = levels[distances.argmin(-1)] * largest
    torch.testing.assert_close(through("nf4", weight_NK).view_as(blocks), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_weights_are_stock_ones(tiny: TinyBases, dtype: torch.dtype):
    from bitsandbytes import functional, nn

    folder = tiny("llama", **SIZES)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    base = open_base(
        folder,
        dtype=str(dtype)[6:].replace("float", "fp").replace("bfp", "bf"),
        device="cpu",
        quantization="nf4",
    )
    compared = 0
    for name, layer in stock.named_modules():
        if isinstance(layer, nn.Linear4bit):
            expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # pyrefly: ignore[missing-attribute]
            found = base.model.get_submodule(name).weight
            assert found.dtype == dtype and torch.equal(found, expected), name
            compared += 1
    assert compared == 21


@KINDS
def test_a_row_depends_on_itself_alone(kind: Quantization):
    weight_NK = random_weight()
    whole = through(kind, weight_NK)
    assert torch.equal(through(kind, weight_NK[2:5]), whole[2:5])
    assert torch.equal(through(kind, weight_NK[:, BLOCK : 2 * BLOCK]), whole[:, BLOCK : 2 * BLOCK])
    assert through(kind, weight_NK[:0]).shape == (0, 192)


@KINDS
def test_converting_in_parts_changes_nothing(kind: Quantization, monkeypatch: pytest.MonkeyPatch):
    weight_NK = random_weight()
    expected = through(kind, weight_NK)
    monkeypatch.setattr(quantized, "AT_ONCE", 400)
    assert torch.equal(through(kind, weight_NK), expected)


@KINDS
def test_a_base_holds_codes_and_scales_and_nothing_more(tiny: TinyBases, kind: Quantization):
    folder = tiny("qwen3", **SIZES, tie_word_embeddings=True)
    plain = open_base(folder, device="cpu")
    base = open_base(folder, device="cpu", quantization=kind)
    layers = {n: m for n, m in plain.model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = plain.model.get_output_embeddings()
    numbers = sum(m.weight.numel() for m in layers.values() if m is not head)
    held = sum(parameter.nbytes for parameter in base.model.parameters())
    rest = sum(parameter.nbytes for parameter in plain.model.parameters()) - 4 * numbers
    assert held == rest + numbers * {"nf4": 4, "int8": 8}[kind] // 8 + numbers // BLOCK * 4
    for name, layer in base.model.named_modules():
        if name in layers:
            assert is_quantized(layer) == (layers[name] is not head)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.quantization == kind and base.dtype == torch.float32


def test_another_quantization_is_another_base(tiny: TinyBases):
    folder = tiny("llama", **SIZES)
    prints = {
        open_base(folder, device="cpu", quantization=kind).fingerprint
        for kind in (None, *QUANTIZATIONS)
    }
    assert len(prints) == 3
    again = open_base(folder, device="cpu", quantization="nf4").fingerprint
    assert again in prints


@KINDS
def test_the_whole_weight_is_what_products_read(tiny: TinyBases, kind: Quantization):
    engine = Engine(Opening(str(tiny("llama", **SIZES)), device="cpu", quantization=kind))
    name = engine.sites[3].name
    layer = engine.base.model.get_submodule(name).base
    whole, owner = kept(layer)
    expected = whole(owner.original0, owner.original1)
    assert np.array_equal(engine.base_weight(name), expected.numpy())


def test_rows_that_are_no_whole_number_of_blocks_are_refused(tiny: TinyBases):
    folder = tiny("llama")  # 96 inputs of down_proj
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.down_proj has 96 inputs.*blocks of 64"):
        open_base(folder, device="cpu", quantization="nf4")


def test_an_unknown_kind_is_refused(tiny: TinyBases):
    with pytest.raises(ConfigError, match="quantization is 'fp3'; choose nf4 or int8, or none"):
        open_base(tiny("llama", **SIZES), quantization="fp3")


def test_without_the_library_the_error_says_what_to_install(
    tiny: TinyBases, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized.conversions.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'manylora\[quantized\]'"):
        open_base(tiny("llama", **SIZES), quantization="nf4")


def test_files_that_are_quantised_already_are_refused(tiny: TinyBases, tmp_path: Path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder = tiny("llama", **SIZES)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(
        tmp_path
    )
    with pytest.raises(Unsupported, match="are quantised already"):
        open_base(tmp_path, device="cpu", quantization="nf4")
    with pytest.raises(Unsupported, match=r"bitsandbytes.*open the original with a `quantization`"):
        Engine(Opening(str(tmp_path), device="cpu"))


LOADS_KERNELS = """
import sys, types
from manylora.models.quantized import conversions

def get_kernel(*_, **__):
    raise SystemExit("asked a hub for machine code")

fake = sys.modules["kernels"] = types.ModuleType("kernels")
fake.get_kernel = get_kernel
conversions()
assert sys.modules["kernels"] is fake
"""


def test_no_machine_code_is_asked_for_at_a_hub():
    done = subprocess.run(
        [sys.executable, "-c", LOADS_KERNELS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_the_bytes_of_a_base_are_those_that_it_takes(kind):
    base = open_base("seedling", dtype="fp32", device="cpu", quantization=kind)
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in base.model.state_dict().values()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.model.config)
    assert base_bytes(model, torch.float32, kind) == pytest.approx(sum(held.values()), rel=0.01)
