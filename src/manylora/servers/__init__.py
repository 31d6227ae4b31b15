"""This room names what samples: the embedded decode loop, or servers elsewhere.

Owns: the protocol between those who want samples and those who make them.
Does not own: prompts, rewards, training; the decode loop itself.
Talks to: types below; runs uses it. No torch.
"""

from manylora.servers.sampler import (
    Generating,
    Policy,
    Published,
    Sampler,
    ServerState,
    Turn,
    Weights,
)

__all__ = ["Generating", "Policy", "Published", "Sampler", "ServerState", "Turn", "Weights"]
