"""The adapters that are due make their optimizer steps on a mesh (of one rank, mostly)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from manylora.lora.adapter import Adapter
from manylora.optim import PendingStep, adamw_step, clip_, norms, publish, reduced
from manylora.parallel import Mesh
from manylora.types import NotFinite, OptimStep, OptimStepResult

Due = tuple[OptimStep, Adapter]

# Numbers of one rank's parts of the adapters of one pass; its flat buffers take 8 bytes for each.
PASS_NUMBERS = 1 << 27


def step_on_mesh(
    due: Sequence[Due], mesh: Mesh, device: torch.device
) -> list[OptimStepResult | NotFinite]:
    """Step each adapter by its own norm, clip and hyper-parameters; each rank updates its slice.

    As many adapters as fit share a pass, and its collectives.
    """
    outcomes: list[OptimStepResult | NotFinite] = []
    # Longest parts, so that the passes are the same on every rank.
    for together in passes([adapter.part.longest for _, adapter in due]):
        outcomes += _pass(due[together], mesh, device)
    return outcomes


def passes(lengths: Sequence[int], most: int | None = None) -> Iterator[slice]:
    """Group neighbours of at most `most` numbers (None = PASS_NUMBERS); a longer one is alone."""
    most = PASS_NUMBERS if most is None else most
    start, sum_ = 0, 0
    for number, length in enumerate(lengths):
        if number > start and sum_ + length > most:
            yield slice(start, number)
            start, sum_ = number, 0
        sum_ += length
    if lengths:
        yield slice(start, len(lengths))


def _pass(
    due: Sequence[Due], mesh: Mesh, device: torch.device
) -> list[OptimStepResult | NotFinite]:
    pending = [_pending(adapter) for _, adapter in due]
    slices = reduced(pending, mesh, device)
    outcomes: list[OptimStepResult | NotFinite] = []
    stepped: list[Adapter] = []
    # One process makes a norm when the loop comes to it, so that the step finds the gradient in
    # cache.
    found = norms(pending, slices, mesh)
    for (step, adapter), slice_C, norm in zip(due, slices, found, strict=True):
        # The same norm on every rank, so that all of them refuse or none.
        if np.isfinite(norm):
            _update(step, adapter, slice_C, norm)
            if mesh.dp.size == 1:
                adapter.publish()
            stepped.append(adapter)
        outcomes.append(_close(step, adapter, norm))
    if mesh.dp.size > 1 and stepped:
        living = [adapter.weights.weights_P for adapter in stepped]
        sizes = [adapter.part.slice_size for adapter in stepped]
        publish([adapter.master_P for adapter in stepped], living, sizes, mesh.dp)
    return outcomes


def _pending(adapter: Adapter) -> PendingStep:
    part = adapter.part
    ranks = adapter.share_ranks()
    return PendingStep(
        adapter.grad_P, part.local.num_params, part.slice_size, ranks, part.num_whole, part.repeated
    )


def _update(step: OptimStep, adapter: Adapter, grad_P: torch.Tensor, norm: float) -> None:
    clip_(grad_P, norm, step.params.clip_norm)
    adamw_step(adapter.master_P, grad_P, *adapter.require_moments(), adapter.step, step.params)
    adapter.step += 1


def _close(step: OptimStep, adapter: Adapter, norm: float) -> OptimStepResult | NotFinite:
    adapter.drop_grad()
    if np.isfinite(norm):
        return OptimStepResult(adapter.step, norm)
    return NotFinite(
        f"adapter {step.adapter!r}: the gradient's norm is {norm}; weights and moments are "
        "unchanged. Lower the learning rate or look at the data of this step"
    )
