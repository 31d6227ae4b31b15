"""This room holds the engine: the verbs on one base and many adapters.

Owns: the base model and every adapter's tensors; cutting work into pieces and packing them; the
forward, the chunked loss, the backward; optimizer steps; snapshots.
Does not own: queues and order (scheduler), tenants, files (checkpoint), HTTP.
Talks to: sampling, lora, losses, optim and models below; the api composes it with a scheduler.
"""

from manylora.engine.engine import Engine
from manylora.models.base_memory import free_bytes

__all__ = ["Engine", "free_bytes"]
