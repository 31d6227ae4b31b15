"""A base whose weights are kept in 4 or 8 bits keeps the laws: fused is solo, and QLoRA's numbers.

The oracle for nf4 is stock transformers with bitsandbytes under stock PEFT. For int8 it is the
reference engine on an ordinary base that holds the weights which the codes stand for.

Faults that were planted and seen to fail here: scales of the neighbouring row, codes of other
columns.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from manylora.engine import Engine
from manylora.engine.reference import ReferenceEngine
from manylora.types import Opening
from manylora.types.weight_forms import QUANTIZATIONS
from tests.laws.stock_peft import StockPeft
from tests.laws.tenants import train
from tests.laws.test_fused_is_peft import ROUNDS, assert_agrees, crowd
from tests.laws.test_fused_is_solo import assert_alone_as_together
from tests.laws.test_fused_is_solo import crowd as every_kind
from tests.models import TinyBases

pytestmark = pytest.mark.usefixtures("threads")
# Rows of 64, 128 and 256: one block and several.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
FAMILIES = ("llama", "qwen3", "gemma3_text")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("family", "threads"), [("qwen3", 1), ("gemma2", 2)], indirect=["threads"])
def test_fused_is_solo(tiny: TinyBases, family: str, quantization: str):
    base = tiny(family, **SIZES)
    assert_alone_as_together(base, every_kind(), token_budget=192, quantization=quantization)


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_fused_is_solo_in_half_precision(tiny: TinyBases):
    assert_alone_as_together(tiny("llama", **SIZES), every_kind(), dtype="bf16", quantization="nf4")


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_gives_what_stock_qlora_gives(tiny: TinyBases, family: str):
    base = tiny(family, **SIZES)
    tenants = crowd()
    traces = train(
        Engine(Opening(str(base), token_budget=128, quantization="nf4")), tenants, ROUNDS
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    for tenant in tenants:
        trace = traces[tenant.name]
        oracle = StockPeft(base, trace.start, dtype=torch.float32, quantization_config=nf4)
        # As one trains; in evaluation its product on a CPU may round to bf16.
        oracle.model.train()
        assert_agrees(tenant, trace, oracle, ROUNDS)


def rounded(base: Path, engine: Engine) -> Path:
    """The base in whose files stand the weights that the engine's codes stand for."""
    folder = base.with_name(f"{base.name}-rounded")
    model = AutoModelForCausalLM.from_pretrained(base)
    moved = []
    for site in engine.sites[:-1]:
        weight_NK = model.get_submodule(site.name).weight.detach()
        before = weight_NK.clone()
        weight_NK.copy_(torch.from_numpy(engine.base_weight(site.name)))
        moved.append(float((weight_NK - before).norm() / before.norm()))
    assert min(moved) > 0.002 and max(moved) < 0.02, "eight bits are off by less than a hundredth"
    model.save_pretrained(folder)
    return folder


def test_int8_gives_what_its_weights_give_alone(tiny: TinyBases):
    base = tiny("llama", **SIZES)
    tenants = crowd()
    engine = Engine(Opening(str(base), token_budget=128, quantization="int8"))
    folder = rounded(base, engine)
    traces = train(engine, tenants, ROUNDS)
    for tenant in tenants:
        trace = traces[tenant.name]
        assert_agrees(tenant, trace, ReferenceEngine(folder, trace.start), ROUNDS)
