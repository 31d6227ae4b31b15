"""Numbers as files have them, held against torch and against the library's own torch half.

Faults that were planted and seen to fail here: ties away from even, NaN rounded like a number,
subnormals flushed, strides ignored when writing, fp16 overflow as a warning.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.checkpoint.tensor_files import (
    DTYPES,
    decoded,
    encoded,
    read_fp32,
    read_tensors,
    rounded,
    write_tensors,
)
from manylora.lora.state import Floats
from manylora.types import CheckpointDamaged, CheckpointMismatch
from manylora.types.adapter_spec import DType

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_bits(bits: np.ndarray) -> Floats:
    return bits.astype(np.uint32).view(np.float32)


def numbers() -> dict[str, Floats]:
    draw = np.random.default_rng(0)
    upper = draw.integers(0, 1 << 16, 20_000, np.uint32) << 16
    halfway = np.concatenate([upper | low for low in (0x7FFF, 0x8000, 0x8001, 0)])
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    half = np.sort(half[np.isfinite(half)])
    between = (half[1:] + half[:-1]) / 2  # exact in fp32
    return {
        "normal": draw.normal(size=50_000).astype(np.float32),
        "any bits": of_bits(draw.integers(0, 1 << 32, 200_000, np.uint32)),
        "halfway in bf16": of_bits(halfway),
        "halfway in fp16": np.stack(
            [between, *(np.nextafter(between, np.float32(end)) for end in (-9e9, 9e9))]
        ).astype(np.float32),
        "subnormal": of_bits(draw.integers(0, 1 << 23, 50_000, np.uint32)),
        "ends": of_bits(
            np.array(
                [
                    *(0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF),
                    *(0x7F800000, 0xFF800000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001),
                ]
            )
        ),
        "nan": of_bits(np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF])),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", numbers())
def test_rounding_is_torchs_bit_for_bit(kind: str, dtype: DType):
    values = numbers()[kind]
    before = values.copy()
    with np.errstate(all="raise"):  # nothing may complain
        bits, back = encoded(values, dtype), rounded(values, dtype)
    expected = torch.from_numpy(values).to(TORCH[dtype])
    nan = np.isnan(values)
    assert np.isnan(back[nan]).all() and np.isnan(decoded(bits, dtype)[nan]).all()
    # torch's own NaN in bf16 depends on whether a number lies in a whole vector of the machine.
    width = {"fp32": torch.int32, "bf16": torch.int16, "fp16": torch.int16}[dtype]
    found_bits = bits.view(np.int32 if dtype == "fp32" else np.int16)
    assert np.array_equal(found_bits[~nan], expected.view(width).numpy()[~nan])
    assert np.array_equal(back[~nan], expected.float().numpy()[~nan])
    assert np.array_equal(np.signbit(back[~nan]), np.signbit(values[~nan]))
    assert not np.shares_memory(bits, values)
    assert np.array_equal(values.view(np.uint32), before.view(np.uint32))


def tensors_of(dtype: DType) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"b": (3, 5), "a.weight": (7, 2), "vector": (11,), "empty": (0, 4), "ä": (1,)}
    return {
        key: torch.randn(*shape, generator=generator).to(TORCH[dtype])
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_the_one_that_the_torch_half_writes(tmp_path: Path, dtype: DType, metadata):
    tensors = tensors_of(dtype)
    arrays = {key: encoded(value.float().numpy(), dtype) for key, value in tensors.items()}
    arrays["b"] = np.asfortranarray(arrays["b"])  # other strides, same numbers
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    write_tensors(tmp_path / "ours", arrays, dtype, metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

    found = read_tensors(tmp_path / "theirs")
    assert {key: found[key].shape for key in found} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    assert list(found) == sorted(found)
    for key, value in load_file(tmp_path / "ours").items():
        assert found[key].known == dtype
        assert np.array_equal(found[key].fp32(), value.float().numpy())


def test_dtypes_that_are_not_ours_are_named_and_never_touched(tmp_path: Path):
    tensors = {
        "int": torch.zeros(2, dtype=torch.int64),
        "double": torch.zeros(2, dtype=torch.float64),
        "eight": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "half": torch.zeros(2, dtype=torch.bfloat16),
    }
    for key, value in tensors.items():
        save_file({key: value}, tmp_path / key)
        (tensor,) = read_tensors(tmp_path / key).values()
        assert tensor.known == ("bf16" if key == "half" else None)
        with pytest.raises(CheckpointMismatch, match=rf"{key} is {tensor.dtype}; only F32"):
            read_fp32(tmp_path / key)


def test_what_is_read_has_its_own_memory(tmp_path: Path):
    values = np.arange(5, dtype=np.float32)
    write_tensors(tmp_path / "a", {"x": values}, "fp32")
    one, other = read_fp32(tmp_path / "a")["x"], read_tensors(tmp_path / "a")["x"].fp32()
    (tmp_path / "a").write_bytes(b"")
    for found in (one, other):
        assert np.array_equal(found, values)
        found[:] = 7  # and may be written


@pytest.mark.parametrize("content", [None, b"", b"\x08", b"\xff" * 40])
@pytest.mark.parametrize("read", [read_fp32, read_tensors])
def test_a_torn_file_is_damaged(tmp_path: Path, read, content: bytes | None):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="a cannot be read"):
        read(tmp_path / "a")
