"""What users call torch's dtypes (their bytes are in `types.memory`)."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
