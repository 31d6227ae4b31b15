"""How a base's weights are held."""

from typing import Literal, get_args

# Weights of linear layers as 4-bit NormalFloat or 8-bit integer codes, in blocks with a scale each.
Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
