"""This room holds the mesh of processes under one engine: its axes, their collectives and counts.

Owns: the process groups of the axes, sums whose order is fixed, the counting of what is sent.
Does not own: what is split and why (models, lora, optim), starting and watching processes.
Talks to: torch.distributed; models, lora, sampling and engine use it.
"""

from manylora.parallel.mesh import Axis, Mesh, share
from manylora.parallel.traffic import Traffic

__all__ = ["Axis", "Mesh", "Traffic", "share"]
