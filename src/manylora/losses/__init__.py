"""This room has the losses on per-token log-probabilities: pure functions, one file each.

Owns: the formulas, their inputs and settings, and their derivatives.
Does not own: how log-probabilities are computed, sums over tokens, clients' normalisation.
Talks to: types below; the engine calls it.
"""

from manylora.losses.registry import Loss, Settings, get_loss, loss_names

__all__ = ["Loss", "Settings", "get_loss", "loss_names"]
