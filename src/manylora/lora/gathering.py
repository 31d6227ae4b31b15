"""An adapter is made whole of the parts that the ranks of a mesh (or one process) hold.

Each function is a collective: every rank calls it, for the same adapter.

L numbers of an adapter's vector on one rank.
"""

import torch
from torch import Tensor
from torch.nn import functional

from manylora.lora.adapter import Adapter, AdapterWeights, to_array
from manylora.lora.sharding import Part
from manylora.lora.state import AdapterState, Floats
from manylora.parallel import Mesh


def gathered_state(adapter: Adapter, mesh: Mesh) -> AdapterState:
    """Copy everything that training needs to go on, detached, to numpy arrays.

    It is the same on each rank. Gradients that must not be used are left out, as the next step will
    be refused and drop them; that it will be is part of the state.
    """
    part = adapter.part
    # fp32 weights are whole along dp; their slices are views of them.
    whole = adapter.spec.dtype == "fp32"
    living_L = adapter.weights.weights_P
    return AdapterState(
        spec=adapter.spec,
        layout=adapter.layout,
        weights=_joined(living_L if whole else _unsliced(adapter.master_P, part, mesh), part, mesh),
        exp_avg=_moment(adapter.exp_avg_P, part, mesh),
        exp_avg_sq=_moment(adapter.exp_avg_sq_P, part, mesh),
        grad=_pending(adapter, mesh) if adapter.has_usable_grad else None,
        step=adapter.step,
        draws=adapter.draws,
        poison=adapter.poison,
    )


def gathered_weights(weights: AdapterWeights, mesh: Mesh) -> Floats:
    """Return fp32 [P]: what layers read on all ranks."""
    return _joined(weights.weights_P, weights.part, mesh)


def _moment(slice_C: Tensor | None, part: Part, mesh: Mesh) -> Floats | None:
    # All ranks make the moments at the same step.
    return None if slice_C is None else _joined(_unsliced(slice_C, part, mesh), part, mesh)


def _unsliced(slice_C: Tensor, part: Part, mesh: Mesh) -> Tensor:
    """Join the dp slices of a local vector [L]."""
    if mesh.dp.size == 1:
        return slice_C
    return mesh.dp.gather(_padded(slice_C, part.slice_size)).view(-1)[: part.local.num_params]


def _joined(vector_L: Tensor, part: Part, mesh: Mesh) -> Floats:
    """Join every tp rank's vector into the global one."""
    everyones = mesh.tp.gather(_padded(vector_L, part.longest))
    return part.join([to_array(own_L) for own_L in everyones])


def _pending(adapter: Adapter, mesh: Mesh) -> Floats:
    grad_L = adapter.grad_P
    if grad_L is None:
        grad_L = torch.zeros(0, device=adapter.master_P.device)
    grad_L = _padded(grad_L, adapter.part.longest)
    # Only the shares that were used go on along tp; no copy is made where all were.
    terms, ranks = mesh.dp.gather(grad_L), adapter.share_ranks()
    terms = mesh.tp.gather(terms if ranks == list(range(len(terms))) else terms[ranks])
    lanes = {
        (share, index): to_array(terms[index, share])
        for index in range(mesh.tp.size)
        for share in range(adapter.shares)
    }
    return adapter.part.pending(lanes)


def _padded(vector: Tensor, length: int) -> Tensor:
    missing = length - len(vector)
    return functional.pad(vector, (0, missing)) if missing else vector
