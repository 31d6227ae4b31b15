"""The memory of the loss is counted: the largest sum of live tensors while head and loss run.

T tokens of the stream, H hidden size, V vocabulary.
"""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from manylora.engine.head_loss import HeadLoss
from manylora.engine.microbatch import build
from manylora.engine.plan import cut
from manylora.lora.routing import RoutingTable
from manylora.losses import get_loss
from manylora.models import open_base
from manylora.types import ForwardBackward, causal_datum


class PeakBytes(TorchDispatchMode):
    """`PeakBytes` counts storages that operations make inside the block, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {
            t.untyped_storage()._cdata
            for t in tree_iter((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in before:
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


def loss_memory(base: Path | str, tokens: int = 4096) -> dict[str, int]:
    """Return peak bytes of the chunked loss on a stream, and of whole logits with autograd."""
    opened = open_base(base)
    loss = get_loss("cross_entropy")
    rng = np.random.default_rng(0)
    data = [causal_datum(rng.integers(0, 2000, 257), np.ones(257)) for _ in range(tokens // 256)]
    work = ForwardBackward(adapter="", data=data)
    pieces = cut(0, work, 4 * tokens)
    stand_in = {"": type("Bare", (), {"weights": None, "draws": 0})()}
    batch = build(pieces, stand_in, [(loss, {})], backward=False, device=opened.device)
    hidden_TH = torch.randn(batch.total, opened.head.weight_VH.shape[1])
    with PeakBytes() as chunked:
        HeadLoss(opened.head, -1)(
            hidden_TH, batch.head, RoutingTable(batch.segments, False), backward=True
        )
    hidden_TH.requires_grad_()
    with PeakBytes() as whole:
        logits_TV = opened.logits(hidden_TH)
        torch.nn.functional.cross_entropy(
            logits_TV, batch.head.targets_L, reduction="sum"
        ).backward()
    return {
        "loss_peak_bytes": chunked.peak,
        "whole_logits_peak_bytes": whole.peak,
        "tokens": tokens,
    }
