"""Optimizer arithmetic on an adapter's vectors.

Owns: norms, clipping, AdamW.
Does not own: which adapters step (engine), learning-rate schedules (clients).
Talks to: nobody; the engine calls it.
"""

from manylora.optim.adamw import adamw_step, clip_, gradient_norms

__all__ = ["adamw_step", "clip_", "gradient_norms"]
