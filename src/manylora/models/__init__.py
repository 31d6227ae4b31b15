"""This room opens base models from a folder or a hub id, and runs them frozen on packed streams.

Owns: opening and checking a base, its linear layers (sites) and output head, packed attention,
the key-value cache; the `seedling` model's files.
Does not own: adapters (lora wraps the layers), losses, sampling policy.
Talks to: transformers and torch; lora, sampling and engine use it.
"""

from manylora.models.base import BaseModel, Head, resolve_base
from manylora.models.cache import KVCache
from manylora.models.loading import open_base
from manylora.models.stream import PackedStream, packed

__all__ = ["BaseModel", "Head", "KVCache", "PackedStream", "open_base", "packed", "resolve_base"]
