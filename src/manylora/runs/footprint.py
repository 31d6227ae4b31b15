"""The memory that a run's process takes is found without a weight.

The heaviest micro-batch is run forwards and backwards on torch's meta device, whose tensors have
sizes and no contents, and the bytes that are alive are counted: the same code as in the run, so
that what it keeps for the backward is what the run keeps.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from manylora.engine.engine import run
from manylora.engine.head_loss import HeadLoss
from manylora.engine.microbatch import build
from manylora.engine.plan import make_plan
from manylora.lora.adapter import Adapter, SiteIndex
from manylora.lora.layout import plan_layout
from manylora.lora.linear import wrap_linears
from manylora.lora.sites import Site, resolve_targets
from manylora.lora.state import AdapterState
from manylora.losses import get_loss
from manylora.models.base import BaseModel, Head, checkpoint_activations
from manylora.models.linears import find_linears
from manylora.parallel import Mesh
from manylora.types import AdapterSpec, Datum, DoesNotFit, ForwardBackward, Unsupported
from manylora.types.memory import bytes_text
from manylora.types.mesh_shape import MeshShape

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

# An allocator holds more than what is alive. glibc's aligned blocks leave small pieces between
# them, small objects take those, and then the next tensor of that size does not fit. In runs of
# SmolLM2 and of seedling it held 1.31 and 1.32 of what was alive; with recomputation, where tensors
# come and go by the layer, 2.4 to 4 times as much.
HELD_FOR_ALIVE = 1.3
HELD_FOR_RECOMPUTED = 3.0
# What opening a base leaves besides its weights, and what the products of few rows that sampling
# tries on a CPU leave in oneDNN: mostly code. 60 to 105 and 78 to 85 MiB were seen.
OPENING_BYTES = 80 << 20
TRIAL_BYTES = 80 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A `MemoryPlan` counts the bytes of one process of the run at its peak.

    Attributes:
        process: the interpreter, its libraries and the data.
        libraries: what they come to hold once the base is open and sampled from.
        base: its weights.
        adapters: their weights, with gradients and optimizer.
        plain: activations of the largest micro-batch, the loss's chunk included.
        recomputed: the same with activation checkpointing; None where the base has none.
        activations: the one of these two that the run is set to.
        decode_weights: weights of the base once more, from the first evaluation that samples on.
        decode_cache: keys and values while an evaluation samples.
        kept_cache: those of them that are there while it trains, too.
        ranks: processes, each of which takes that much.
        free: what a process could take of this machine now.
    """

    process: int
    libraries: int = 0
    base: int
    adapters: int
    plain: int
    recomputed: int | None
    activations: int
    decode_weights: int = 0
    decode_cache: int
    kept_cache: int = 0
    ranks: int
    free: int

    @property
    def total(self) -> int:
        """One process takes this much at the peak."""
        return self.process + self.needed

    @property
    def needed(self) -> int:
        """This much comes on top of what the process takes already."""
        passing_cache = self.decode_cache - self.kept_cache
        return self._lasting + self.adapters + max(self.activations, passing_cache)

    @property
    def _lasting(self) -> int:
        return self.libraries + self.base + self.decode_weights + self.kept_cache

    def refusal(self) -> DoesNotFit | None:
        """Say why this machine's memory cannot hold it."""
        if self.needed <= self.free:
            return None
        lighter = self._lasting + (self.recomputed or self.activations)
        left = max(0, self.free - lighter)
        return DoesNotFit(
            f"the run needs {bytes_text(self.needed)} more memory in each process, and "
            f"{bytes_text(self.free)} is free; {bytes_text(left)} would fit for all adapters "
            f"together, which need {bytes_text(self.adapters)}, beside the base and one "
            "micro-batch (a smaller token_budget, or activation_checkpointing, makes that lighter)"
        )


def process_bytes() -> int:
    """Return what this process takes now."""
    return _status_bytes("self", "VmRSS")


def peak_bytes() -> int:
    """Return the most that this process has taken."""
    told = _status_bytes("self", "VmHWM")
    if told or resource is None:
        return told
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def children_peak_bytes() -> int:
    """Return the most that a running child process has taken; 0 = none, or they cannot be seen."""
    found: list[str] = []
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            found += file.read_text(encoding="utf-8").split()
        except OSError:  # the thread has just ended
            continue
    return max((_status_bytes(pid, "VmHWM") for pid in found), default=0)


def _status_bytes(pid: str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:")), 0)


@contextmanager
def _without_contents() -> Iterator[None]:
    """Have transformers, as while it is traced, not look into positions for the ends of sequences:
    on the meta device they have no contents, and the stream knows its sequences itself."""
    asked = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = asked


@_without_contents()
def activation_bytes(
    make_model: Callable[[], Any],
    adapters: Mapping[str, tuple[AdapterSpec, Sequence[Datum]]],
    token_budget: int,
    *,
    recomputed: bool,
) -> int | None:
    """Return the peak bytes of the heaviest micro-batch.

    Args:
        make_model: a new model on the meta device.
        adapters: name → settings and the data of its heaviest step.
        recomputed: with activation checkpointing; None if the base has none.
    """
    meta = torch.device("meta")
    base = _base(make_model(), meta)
    sites = tuple(
        Site(f.name, f.in_features, f.out_features, f.group, f.is_head) for f in find_linears(base)
    )
    index = SiteIndex(sites)
    wrap_linears(base.model, sites)
    if recomputed:
        try:
            checkpoint_activations(base)
        except Unsupported:
            return None
    made = {name: _adapter(spec, sites, index) for name, (spec, _) in adapters.items()}
    works = [
        (number, ForwardBackward(adapter=name, data=data))
        for number, (name, (_, data)) in enumerate(adapters.items())
    ]
    plan = make_plan(works, token_budget, draws=dict.fromkeys(made, 0))
    heaviest = max(plan.batches[0], key=lambda pieces: sum(piece.rows for piece in pieces))
    loss = get_loss("cross_entropy")
    losses = [(loss, loss.settings(None))] * len(works)
    batch = build(heaviest, made, losses, backward=True, device=meta)
    known = [*base.model.parameters(), *base.model.buffers()]
    known += [vector for one in made.values() for vector in (one.master_P, one.grad_P)]
    with _Alive([tensor for tensor in known if tensor is not None]) as alive:
        run(base, HeadLoss(base.head, sites[-1].group), batch, backward=True)
    return int(alive.most * (HELD_FOR_RECOMPUTED if recomputed else HELD_FOR_ALIVE))


class _Alive(TorchDispatchMode):
    """`_Alive` counts the bytes of tensors that are made and not gone."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _base(model: Any, meta: torch.device) -> BaseModel:
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(meta)
    layer = model.get_output_embeddings()
    name = next(n for n, module in model.named_modules() if module is layer)
    return BaseModel(
        name="",
        folder="",
        model=model,
        backbone=model.base_model,
        head=Head(layer, None, name),
        tokenizer=None,
        context_length=1 << 30,
        eos_token_ids=(),
        vocab_size=layer.out_features,
        device=meta,
        dtype=layer.weight.dtype,
        fingerprint="",
        mesh=Mesh.join(MeshShape(), meta),
    )


def _adapter(spec: AdapterSpec, sites: tuple[Site, ...], index: SiteIndex) -> Adapter:
    layout = plan_layout(spec, resolve_targets(spec, sites))
    nothing = np.zeros(layout.num_params, np.float32)  # never written, so never there
    return Adapter(AdapterState(spec, layout, nothing), index, torch.device("meta"))
