"""The mesh of processes that one engine runs on: its axes, their collectives, and their count.

Owns: the process groups of the axes, sums whose order is fixed, the counting of what is sent.
Does not own: what is split and why (models, lora, optim), starting and watching processes.
Talks to: torch.distributed; models, lora, sampling and engine use it.
"""

from manylora.parallel.mesh import Axis, Mesh, share
from manylora.parallel.traffic import Traffic

__all__ = ["Axis", "Mesh", "Traffic", "share"]
