"""Frozen weights are kept in 4 or 8 bits, and made whole where a product reads them.

Every row of a weight is cut into blocks of 64 numbers with a scale each, so what becomes of a row
depends on that row alone: a rank of a mesh that has some of the rows, or whole blocks of columns,
holds the very numbers that one process holds. bitsandbytes converts both ways.

N output features, K input features, C bytes of a row, S scales of a row (K / 64).

    nf4     4-bit NormalFloat, two codes a byte     codes [N, K/2]    scales [N, K/64] in fp32
    int8    127 even steps on either side of zero   codes [N, K]      scales [N, K/64] in fp32

Embedding, head, norms and biases stay as they are.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manylora.types import ConfigError, Unsupported
from manylora.types.weight_forms import QUANTIZATIONS, Quantization

BLOCK = 64
BITS: dict[Quantization, int] = {"nf4": 4, "int8": 8}
# Numbers that are converted at once, which takes some twenty bytes for each.
AT_ONCE = 1 << 18


class WholeWeight(nn.Module):
    """A `WholeWeight`, torch's parametrization of a layer, makes [N, K] of codes and scales.

    Attributes:
        kind: how the numbers are coded.
        columns: K.
        dtype: of the weight that is made.
    """

    def __init__(self, kind: Quantization, columns: int, dtype: torch.dtype):
        super().__init__()
        self.kind: Quantization = kind
        self.columns = columns
        self.dtype = dtype

    def forward(self, codes_NC: Tensor, scales_NS: Tensor) -> Tensor:
        """Return the weight [N, K]."""
        shape = (len(codes_NC), self.columns)
        if not len(codes_NC):
            return torch.empty(shape, dtype=self.dtype, device=codes_NC.device)
        convert, scales = conversions(), scales_NS.reshape(-1)
        if self.kind == "nf4":
            state = convert.QuantState(scales, shape, None, BLOCK, "nf4", self.dtype)
            return convert.dequantize_4bit(codes_NC.reshape(-1, 1), state)
        state = convert.QuantState(scales, shape, _steps(codes_NC.device), BLOCK, None, self.dtype)
        return convert.dequantize_blockwise(codes_NC, state)

    def right_inverse(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [N, C] and scales [N, S] of a weight; without values on the meta device."""
        rows = len(weight_NK)
        kept = (rows, self.columns * BITS[self.kind] // 8), (rows, self.columns // BLOCK)
        codes_NC = torch.empty(kept[0], dtype=torch.uint8, device=weight_NK.device)
        scales_NS = torch.empty(kept[1], dtype=torch.float32, device=weight_NK.device)
        if weight_NK.is_meta:
            return codes_NC, scales_NS
        step = max(1, AT_ONCE // self.columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            codes, scales = self._converted(weight_NK[part].to(self.dtype).contiguous())
            codes_NC[part] = codes.view_as(codes_NC[part])
            scales_NS[part] = scales.view_as(scales_NS[part])
        return codes_NC, scales_NS

    def _converted(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        convert = conversions()
        if self.kind == "nf4":
            codes, state = convert.quantize_4bit(weight_NK, blocksize=BLOCK, quant_type="nf4")
        else:
            code = _steps(weight_NK.device)
            codes, state = convert.quantize_blockwise(weight_NK, code=code, blocksize=BLOCK)
        return codes, state.absmax


def check_quantization(kind: str | None) -> Quantization | None:
    """Return the kind by its name. Raises ConfigError: there is none of that name, or bitsandbytes
    is not installed."""
    if kind is None:
        return None
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"quantization is {kind!r}; choose {' or '.join(QUANTIZATIONS)}, or none")
    conversions()
    return cast(Quantization, kind)


def quantize_linears(model: Any, kind: Quantization) -> None:
    """Keep the weights of a model's linear layers, but the head's, as codes and scales.

    The model is a frozen causal LM, or a rank's part of one, on the meta device. Raises
    Unsupported: a layer's rows are no whole number of blocks.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if layer.in_features % BLOCK:
            raise Unsupported(
                f"base {model.config._name_or_path!r}: {name} has {layer.in_features} inputs "
                f"here, no whole number of the blocks of {BLOCK} that {kind} scales together; "
                "open it without quantization, or with a smaller tp"
            )
        whole = WholeWeight(kind, layer.in_features, layer.weight.dtype)
        parametrize.register_parametrization(layer, "weight", whole, unsafe=True)


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return the layers whose weights are codes and scales, by name."""
    for name, module in model.named_modules():
        if is_quantized(module):
            assert isinstance(module, nn.Linear)
            yield name, module


def is_quantized(layer: nn.Module) -> bool:
    """Say whether a layer's weight is kept as codes and scales."""
    return parametrize.is_parametrized(layer, "weight")


def kept(layer: nn.Linear) -> tuple[WholeWeight, Any]:
    """Find what makes a quantised layer's weight, and the module with its codes and scales.

    They are the module's `original0` and `original1`.
    """
    parametrization: Any = layer.parametrizations
    return parametrization.weight[0], parametrization.weight


def plain_type(layer: nn.Module) -> type[nn.Module]:
    """Return a layer's class, whether its weight is quantised or not."""
    return parametrize.type_before_parametrizations(layer)


def quantized_fingerprint(whole: str, kind: Quantization) -> str:
    """Return a base's fingerprint when its weights are quantised, from that of the base as it is
    stored."""
    return hashlib.sha256(f"{whole} {kind} {BLOCK}".encode()).hexdigest()


@cache
def _steps(device: torch.device) -> Tensor:
    """Return the numbers that the 256 codes of int8 stand for."""
    return conversions().create_linear_map(signed=True, total_bits=8).to(device)


@cache
def conversions() -> Any:
    """Import bitsandbytes' conversions.

    Its import would load machine code from a model hub where the package `kernels` is installed,
    for products that are not used here; it is told that there is no such package.
    """
    modules: dict[str, Any] = sys.modules
    before = modules.get("kernels")
    modules["kernels"] = None
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_of_the_kernel)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError(
            f"quantization needs bitsandbytes ({error}); pip install 'manylora[quantized]'"
        ) from error
    finally:
        if before is None:
            del modules["kernels"]
        else:
            modules["kernels"] = before
    return functional


def _not_of_the_kernel(record: logging.LogRecord) -> bool:
    """Return whether a line of bitsandbytes' log is not of the kernel that is kept away."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
