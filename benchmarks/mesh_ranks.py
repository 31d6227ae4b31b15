"""Each rank runs this for the benchmark of the mesh: the same work, counted.

H hidden size, T tokens of a stream.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import PeakBytes
from manylora.engine import Engine
from manylora.engine.engine import run
from manylora.engine.microbatch import build
from manylora.engine.plan import make_plan
from manylora.engine.results import found, gathered
from manylora.lora.adapter import Adapter
from manylora.losses import get_loss
from manylora.parallel import Mesh
from manylora.types import (
    AdamParams,
    AdapterSpec,
    ForwardBackward,
    ManyloraError,
    Opening,
    OptimStep,
    causal_datum,
)
from manylora.types.adapter_spec import DType

# LoRA ranks and dtypes of the adapters, in turn.
RANKS = (1, 3, 16, 8)
DTYPES: tuple[DType, ...] = ("fp32", "bf16", "fp32")
SEQUENCES, SEQUENCE = 16, 32
# A sequence is a piece, so that the pieces are the same for 1, 4 and 16 adapters.
BUDGET = 4 * SEQUENCE
CHUNK_ROWS = 32  # several chunks of the loss even in a small stream
VOCAB = 160
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


def specs(count: int) -> dict[str, AdapterSpec]:
    """Return the settings of `count` adapters, by name."""
    return {
        f"tenant{i}": AdapterSpec(rank=RANKS[i % 4], alpha=8.0, dtype=DTYPES[i % 3], seed=i)
        for i in range(count)
    }


def working(count: int, ranks: int) -> list[set[int]]:
    """Return for each adapter the dp ranks that have some of its work."""
    own = works(count)
    plan = make_plan(enumerate(own), BUDGET, draws={str(w.adapter): 0 for w in own}, ranks=ranks)
    return [
        {
            (plan.homes[str(w.adapter)] + share) % ranks
            for share in range(plan.shares[str(w.adapter)])
        }
        for w in own[:count]
    ]


def works(count: int) -> list[ForwardBackward]:
    """Deal out the same tokens to `count` adapters; for none, to one."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCAB, (SEQUENCES, SEQUENCE + 1))
    data = [causal_datum(row, np.ones(SEQUENCE + 1)) for row in rows]
    each = SEQUENCES // max(count, 1)
    names = list(specs(max(count, 1)))
    return [
        ForwardBackward(adapter=name, data=data[i * each : (i + 1) * each])
        for i, name in enumerate(names)
    ]


class Wire(TorchDispatchMode):
    """A `Wire` counts all that torch itself sends, and the parameters that are gathered.

    Attributes:
        bytes: bytes sent by this rank.
        calls: calls of torch's collectives; one of ours may be two of them.
        gathered: the most bytes of parameters that were whole at one time, of those at rest in
            shares.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.bytes = self.calls = self.gathered = 0
        self._shared = [
            (module, name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if hasattr(parameter, "to_local")
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            self._sent(name.removeprefix("c10d::"), args)
        elif func in PRODUCTS or name == "aten::embedding":
            whole = (module._parameters[name] for module, name in self._shared)
            now = {id(p): p.nbytes for p in whole if p is not None and not hasattr(p, "to_local")}
            self.gathered = max(self.gathered, sum(now.values()))
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> None:
        self.calls += 1
        if name == "allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self.bytes += sum(2 * t.nbytes * (size - 1) // size for t in args[0])
        elif name == "_allgather_base_":
            self.bytes += args[0].nbytes - args[1].nbytes
        elif name == "alltoall_base_":
            size = dist.ProcessGroup.unbox(args[2]).size()
            self.bytes += args[1].nbytes * (size - 1) // size
        else:
            raise AssertionError(f"a collective that is not counted: {name}")


def counted(
    mesh: Mesh, folder: str, counts: list[int], checkpointing: bool, quantization: str | None
) -> dict[str, Any]:
    """Return what this rank holds and sends, by the number of adapters."""
    engine = Engine(
        Opening(
            str(folder),
            token_budget=BUDGET,
            device="cpu",
            quantization=quantization,
            activation_checkpointing=checkpointing,
        ),
        mesh,
    )
    engine.head_loss.chunk_rows = CHUNK_ROWS
    base = _bytes(getattr(p, "to_local", lambda p=p: p)() for p in engine.base.model.parameters())
    rows = {}
    for count in counts:
        rows[str(count)] = {"base": base, **_counted(mesh, engine, count)}
    return rows


def _counted(mesh: Mesh, engine: Engine, count: int) -> dict[str, Any]:
    for name, spec in specs(count).items():
        engine.create(name, spec)
    own = works(count)
    steps = [OptimStep(adapter=str(w.adapter), params=AdamParams(lr=1e-3)) for w in own[:count]]
    forward_backward = (lambda: engine.forward_backward(own)) if count else _bare(engine, own[0])
    # The first round makes gradients and moments; the second is counted.
    _checked(forward_backward())
    _checked(engine.optim_step(steps))
    row = {"forward_backward": _sending(mesh, engine, forward_backward)}
    row["optim_step"] = _sending(mesh, engine, lambda: engine.optim_step(steps))
    row["optim_step"]["peak"] = _peak(lambda: engine.optim_step(steps))
    row["adapters"] = {name: _held(adapter) for name, adapter in engine.adapters.items()}
    for name in list(engine.adapters):
        engine.unload(name)
    return row


def _sending(mesh: Mesh, engine: Engine, verb: Callable[[], Any]) -> dict[str, Any]:
    mesh.traffic.clear()
    with Wire(engine.base.model) as wire:
        _checked(verb())
    return {
        "sent": {name: [one.calls, one.bytes] for name, one in mesh.traffic.sent().items()},
        "wire": [wire.calls, wire.bytes],
        "gathered": wire.gathered,
    }


def _bare(engine: Engine, work: ForwardBackward) -> Callable[[], list[Any]]:
    """Return a verb that runs the streams on the base alone, with the gradients adapters need."""
    mesh, device = engine.mesh, engine.base.device
    loss = (get_loss("cross_entropy"), get_loss("cross_entropy").settings({}))
    stand_in: Any = {work.adapter: type("Bare", (), {"weights": None})()}
    plan = make_plan([(0, work)], BUDGET, draws={str(work.adapter): 0}, ranks=mesh.dp.size)
    first = [engine.base.model.get_submodule(s.name) for s in engine.sites if s.group == 0]

    def verb() -> list[Any]:
        hooks = [
            layer.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
            for layer in first
        ]
        batches = [
            build(pieces, stand_in, [loss], backward=False, device=device)
            for pieces in plan.batches[mesh.dp.index]
        ]
        rows = [run(engine.base, engine.head_loss, batch, backward=True) for batch in batches]
        for hook in hooks:
            hook.remove()
        return [gathered(found(rows, [loss]), plan, [loss], mesh.dp, device)]

    return verb


def activation_peaks(mesh: Mesh, folder: str, dtype: DType, rank: int) -> dict[str, float]:
    """Return bytes of each token at the peak of forward and backward with recomputed blocks."""
    engine = Engine(
        Opening(
            str(folder),
            token_budget=1 << 16,
            dtype=dtype,
            device="cpu",
            activation_checkpointing=True,
        ),
        mesh,
    )
    engine.create("one", AdapterSpec(rank=rank, init="gaussian", dtype=dtype))
    rng = np.random.default_rng(0)
    peaks = []
    for number in (8, 16):
        rows = rng.integers(0, VOCAB, (number, SEQUENCE + 1))
        data = [causal_datum(row, np.ones(SEQUENCE + 1)) for row in rows]
        work = ForwardBackward(adapter="one", data=data)
        _checked(engine.forward_backward([work]))
        peaks.append(_peak(lambda work=work: engine.forward_backward([work])))
    return {"bytes_per_token": (peaks[1] - peaks[0]) / (8 * SEQUENCE)}


def _peak(verb: Callable[[], list[Any]]) -> int:
    """Return the bytes that a verb takes for itself.

    They are the least of a few times, as gloo's threads may let go of a buffer late.
    """
    found = []
    for _ in range(5):
        with PeakBytes() as memory:
            _checked(verb())
        found.append(memory.peak)
    return min(found)


def _held(adapter: Adapter) -> dict[str, int]:
    """Return the bytes of an adapter's own memory, each counted once."""
    weights, grad, master = adapter.weights.weights_P, adapter.grad_P, adapter.master_P
    moments = adapter.require_moments()
    return {
        "weights": _bytes([weights]),
        "gradient": _bytes([] if grad is None else [grad]),
        "master": _bytes([weights, master]) - _bytes([weights]),
        "moments": _bytes(moments),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _checked(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, ManyloraError):
            raise outcome
