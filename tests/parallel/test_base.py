"""A base in parts: the same numbers, the same fingerprint, and no more memory than the part."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.models import PackedStream, open_base, packed
from manylora.models.loading_in_parts import open_part
from manylora.models.stream import padded_rows
from manylora.parallel import Mesh
from tests.models import TinyBases
from tests.parallel.processes import RankFailed, run_ranks

MESHES = ["dp=2", "tp=2", "dp=4", "dp=2,tp=2", "tp=4"]
# Four key-value heads, so that four ranks can share them.
FOUR = {"num_key_value_heads": 4}
BASES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"vocab_size": 157},  # no rank's part is as long as the last one's
    "qwen3-tied": {"tie_word_embeddings": True, "vocab_size": 157},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "granite": {},
    "cohere-tied": {"tie_word_embeddings": True},
}
LENGTHS = [7, 1, 12]


def folder_of(tiny: TinyBases, base: str) -> Path:
    folder = tiny(base.partition("-")[0], **FOUR, **BASES[base])
    return biased(folder) if base.endswith("-biased") else folder


def biased(folder: Path) -> Path:
    """The same base with biases, which a fresh one has as zeros."""
    target = folder.with_name(f"{folder.name}-biased")
    if not target.exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0.0, 0.5, generator=generator)
        model.save_pretrained(target)
    return target


def tokens_of(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = padded_rows(sum(LENGTHS))
    tokens_T = torch.randint(vocab, (total,), generator=torch.Generator().manual_seed(3))
    places = [torch.arange(n) for n in LENGTHS]
    positions_T = torch.cat([*places, torch.zeros(total - sum(LENGTHS), dtype=torch.long)])
    return tokens_T, positions_T


@torch.no_grad()
def numbers(mesh: Mesh | None, folder: str, dtype: str):
    """What a rank's base says of itself and computes."""
    base = open_base(folder, dtype=dtype, device="cpu", mesh=mesh)
    tokens_T, positions_T = tokens_of(base.vocab_size)
    with packed(PackedStream(LENGTHS, len(tokens_T))):
        hidden_TH = base.hidden(tokens_T, positions_T)
    logits_TV = base.logits(hidden_TH)
    held = Counter[str]()
    for name, parameter in base.model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held["norms" if "norm" in name else "linears"] += local.numel()
    return {
        "hidden": hidden_TH.float().numpy(),
        "logits": logits_TV.numpy(),
        "buffers": {name: b.float().numpy() for name, b in base.model.named_buffers()},
        "fingerprint": base.fingerprint,
        "vocab": base.vocab_size,
        "dtype": str(base.dtype),
        "eos": list(base.eos_token_ids),
        "frozen": not any(p.requires_grad for p in base.model.parameters()),
        "held": dict(held),
    }


@lru_cache
def alone(folder: str, dtype: str):
    return numbers(None, folder, dtype)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("base", BASES)
def test_a_base_in_parts_gives_the_same_numbers(tiny: TinyBases, base: str, mesh: str):
    folder = str(folder_of(tiny, base))
    expected = alone(folder, "auto")
    scale = np.abs(expected["hidden"]).max()
    for result in run_ranks(numbers, mesh, folder, "auto"):
        for word in ("fingerprint", "vocab", "dtype", "eos", "frozen"):
            assert result[word] == expected[word], word
        assert np.abs(result["hidden"] - expected["hidden"]).max() < 2e-6 * scale
        assert result["logits"].shape == expected["logits"].shape
        assert np.abs(result["logits"] - expected["logits"]).max() < 2e-5
        assert result["buffers"].keys() == expected["buffers"].keys()
        for name, buffer in expected["buffers"].items():
            assert result["buffers"][name].tobytes() == buffer.tobytes(), name


def test_data_parallel_shares_change_no_bit(tiny: TinyBases):
    folder = str(folder_of(tiny, "llama"))
    expected = alone(folder, "auto")
    for result in run_ranks(numbers, "dp=4", folder, "auto"):
        assert result["hidden"].tobytes() == expected["hidden"].tobytes()
        assert result["logits"].tobytes() == expected["logits"].tobytes()


@pytest.mark.parametrize("mesh", MESHES)
def test_each_rank_holds_its_part_and_together_they_hold_all(tiny: TinyBases, mesh: str):
    folder = str(folder_of(tiny, "qwen3"))
    whole = alone(folder, "auto")["held"]
    results = run_ranks(numbers, mesh, folder, "auto")
    assert sum(result["held"]["linears"] for result in results) == whole["linears"]
    for result in results:
        assert result["held"]["linears"] <= 1.05 * whole["linears"] / len(results)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("base", ["llama-tied", "gemma3_text"])
def test_values_are_cast_while_loading(tiny: TinyBases, base: str, dtype: str):
    folder = str(folder_of(tiny, base))
    expected = alone(folder, dtype)
    for result in run_ranks(numbers, "dp=2,tp=2", folder, dtype):
        assert result["fingerprint"] == expected["fingerprint"]
        assert result["dtype"] == expected["dtype"]
        for name, buffer in expected["buffers"].items():
            assert result["buffers"][name].tobytes() == buffer.tobytes(), name
        error = np.abs(result["hidden"] - expected["hidden"]).max()
        assert error < 0.05 * np.abs(expected["hidden"]).max()


def peak(mesh: Mesh, folder: str):
    """See `peak_of`."""
    config = AutoConfig.from_pretrained(folder)
    return peak_of(lambda: open_part(folder, config, None, torch.device("cpu"), mesh).model)


def peak_of(opening: Callable[[], Any]) -> dict[str, int]:
    """Bytes that opening a base added at most, and that the rank holds afterwards."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = _status("VmRSS")
    model = opening()
    tensors = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return {"added": _status("VmHWM") - before, "held": sum(t.nbytes for t in tensors)}


def _status(word: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))


@pytest.mark.parametrize("mesh", ["dp=4", "tp=4", "dp=2,tp=2"])
def test_opening_takes_the_part_and_a_tensor(tiny: TinyBases, mesh: str):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    folder = tiny("llama", **FOUR, **sizes, vocab_size=16_000, head_dim=128)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert whole > 160 << 20
    for result in run_ranks(peak, mesh, str(folder)):
        assert result["held"] < 1.01 * whole / 4
        # The largest tensor as it lies in the file (half of that, over tp), and some pages.
        assert result["added"] < whole / 4 + (33 << 20) + (16 << 20)


def opens(mesh: Mesh, folder: str):
    open_base(folder, device="cpu", mesh=mesh)


@pytest.mark.parametrize(
    ("family", "overrides", "mesh", "words"),
    [
        ("phi3", FOUR, "tp=2", "qkv_proj by 'colwise_gather_output'"),
        (
            "llama",
            {},
            "tp=4",
            "its key-value heads .*4 query heads, 2 key-value",
        ),
        (
            "llama",
            {**FOUR, "intermediate_size": 97},
            "tp=2",
            ".*97 intermediate_size",
        ),
        ("stablelm", FOUR, "tp=2", "no tensor-parallel plan"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    tiny: TinyBases, family: str, overrides: dict[str, int], mesh: str, words: str
):
    folder = tiny(family, **overrides)
    with pytest.raises(RankFailed, match=f"Unsupported: base .*({words})"):
        run_ranks(opens, mesh, str(folder))
