"""This room does the optimizer's arithmetic on an adapter's vectors.

Owns: norms, clipping, AdamW; on a mesh, the sums of the gradients and the spreading of the weights.
Does not own: which adapters step (engine), learning-rate schedules (clients).
Talks to: parallel below; the engine calls it.
"""

from manylora.optim.adamw import adamw_step, clip_, gradient_norms
from manylora.optim.flat import PendingStep, norms, publish, reduced

__all__ = ["PendingStep", "adamw_step", "clip_", "gradient_norms", "norms", "publish", "reduced"]
