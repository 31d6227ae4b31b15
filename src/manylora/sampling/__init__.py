"""This room continues prompts.

Owns: the embedded sampler: one decode loop for all requests, on the engine's own base and adapter
vectors; how tokens are drawn, when an answer ends, what is reported beside it.
Does not own: adapters and snapshots (engine), who may ask how much (scheduler), text (clients).
Talks to: lora and models below; the engine calls it.
"""

from manylora.sampling.loop import MAX_CACHED_TOKENS, MAX_SEQUENCES, DecodeLoop
from manylora.sampling.request import Answer, Request
from manylora.sampling.together import LoopsTogether

__all__ = ["MAX_CACHED_TOKENS", "MAX_SEQUENCES", "Answer", "DecodeLoop", "LoopsTogether", "Request"]
