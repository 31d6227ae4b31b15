"""Users call torch's dtypes by these names (their bytes are in `types.memory`)."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
