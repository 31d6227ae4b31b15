"""What is tried on a base's twin when it is opened: faults at the ends of windows are found.

Most tests plant the fault themselves: windows that attention does not keep, or keeps one token too
long, keys that are kept by layer instead of by call. Seen to fail as well: a twin of true windows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from manylora.models import attention, open_base, trial
from manylora.models.cache import DecodeStep
from manylora.models.sight import Sight
from manylora.models.stream import PackedStream
from manylora.models.twin import WINDOW, make_twin
from manylora.types import Unsupported
from tests.models import FAMILIES, ODD, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was found before this test."""
    monkeypatch.setattr(trial, "_found", {})


def attempt(config: Any, context_length: int = 1 << 20) -> None:
    trial.try_twin("mine", config, context_length, CPU)


@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_supported_families_pass(family: str):
    attempt(tiny_config(family))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2_moe", "cohere2", "llama4_text"])
def test_a_window_that_attention_does_not_keep_is_found(family: str, monkeypatch):
    monkeypatch.setattr(Sight, "covers", lambda self, length: True)
    with pytest.raises(Unsupported, match=r"'mine'.*in a packed stream"):
        # Far longer than anybody would run.
        attempt(tiny_config(family, sliding_window=4096, attention_chunk_size=4096))


@pytest.mark.parametrize("family", ["gemma2", "llama4_text"])
def test_a_window_of_one_token_more_is_found(family: str, monkeypatch):
    seen = Sight.seen
    # Nothing right is kept from before, nothing wrong for later.
    monkeypatch.setattr(attention, "_causal_mask", attention._causal_mask.__wrapped__)
    monkeypatch.setattr(
        Sight,
        "seen",
        lambda self, query, key: seen(
            replace(
                self,
                window=self.window and self.window + 1,
                chunk=self.chunk and self.chunk + 1,
            ),
            query,
            key,
        ),
    )
    with pytest.raises(Unsupported, match=r"'mine'.*in a packed stream"):
        attempt(tiny_config(family))


@pytest.mark.parametrize("family", ["granite", "phi3"])
def test_what_is_not_a_fault_is_rounding(family: str, monkeypatch):
    """At a family's own sizes, 32 or 40 layers: far below the tolerance."""
    monkeypatch.setattr(trial, "TOLERANCE", 1e-10)
    attempt(AutoConfig.for_model(family))


def test_a_window_that_only_decoding_forgets_is_found(monkeypatch):
    mask = DecodeStep.mask
    monkeypatch.setattr(DecodeStep, "mask", lambda self, sight, dtype: mask(self, Sight(), dtype))
    with pytest.raises(Unsupported, match="token by token"):
        attempt(tiny_config("gemma3_text", sliding_window=4096))


def test_a_second_call_in_a_layer_that_takes_the_firsts_place_is_found(monkeypatch):
    count = PackedStream.next_call
    monkeypatch.setattr(PackedStream, "next_call", lambda self: count(self) // 2)
    with pytest.raises(Unsupported, match="token by token"):
        attempt(tiny_config("diffllama"))


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_a_base_with_a_state_instead_of_keys_is_refused(family: str):
    with pytest.raises(Unsupported, match=f"'mine' .{family}. is not supported"):
        attempt(AutoConfig.for_model(family, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "mask is not causal"),
        ("bloom", "does not run"),
        ("falcon", "nobody replace its attention"),
        ("gptj", "nobody replace its attention"),
        ("gpt_oss", "s_aux"),
    ],
)
def test_other_attention_is_refused_by_name(family: str, reason: str):
    with pytest.raises(Unsupported, match=reason):
        attempt(AutoConfig.for_model(family, num_hidden_layers=2))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "smollm3"])
def test_positions_of_every_kind_pass(family: str):
    """Learned positions, rotary ones of a part of a head, layers without any."""
    attempt(AutoConfig.for_model(family, num_hidden_layers=4))


def test_a_twin_has_the_bases_layers_and_small_windows():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, layer_types=kinds * 2, sliding_window=4096
    )
    twin = make_twin(config, CPU)
    assert config.sliding_window == 4096  # the base's own config stays as it is
    assert twin.config.layer_types == kinds * 2 and len(twin.model.layers) == 12
    assert twin.config.sliding_window == WINDOW
    assert twin.config.head_dim == config.head_dim
    assert sum(p.numel() for p in twin.parameters()) < 1 << 26


def test_keys_that_the_last_layers_share_pass():
    config = AutoConfig.for_model("gemma3n_text")
    kinds = config.layer_types[:5] * 2
    attempt(
        AutoConfig.for_model(
            "gemma3n_text",
            num_hidden_layers=10,
            layer_types=kinds,
            num_kv_shared_layers=4,
            intermediate_size=[64] * 10,
            activation_sparsity_pattern=[0.5] * 2 + [0.0] * 8,
        )
    )


def test_a_context_shorter_than_the_trial():
    attempt(tiny_config("llama", max_position_embeddings=20), context_length=20)


def test_a_config_is_tried_once(tiny, monkeypatch):
    tried = []
    fault = trial._fault
    monkeypatch.setattr(trial, "_fault", lambda *args: tried.append(1) or fault(*args))
    for _ in range(3):
        open_base(tiny("llama"))
    assert len(tried) == 1


def test_the_generator_stays_where_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attempt(tiny_config("llama"))
    assert torch.equal(torch.rand(3), expected)


def test_nothing_is_loaded_of_a_base_that_is_refused(tmp_path: Path):
    AutoConfig.for_model("gpt_oss", num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Unsupported, match="s_aux"):
        open_base(tmp_path)
