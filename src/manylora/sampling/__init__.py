"""Continuing prompts.

Owns: the embedded sampler, which decodes with the engine's own base and adapter vectors.
Does not own: adapters and snapshots (engine), tokenizers and text (clients).
Talks to: lora and models below; the engine calls it.
"""
