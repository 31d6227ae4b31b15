"""Adapters on disk: PEFT's files, training state, merged models.

Owns: what an adapter looks like as files, folders that are whole or not there, manifests, and what
is refused when files are read.
Does not own: the adapter's vectors and layout (lora), the base model (models), when to save and
what to delete (engine and runs).
Talks to: lora and types below; engine, sampling and the doors use it.
"""
