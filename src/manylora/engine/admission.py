"""The engine lets work in by its bytes, before anything of it is allocated.

On a mesh the ranks have to agree, and each sees its own memory only: there the bounds are the fixed
ones, and adapters are admitted by the control process.
"""

from typing import Any

from manylora.engine.host_memory import FreeMemory
from manylora.models import BaseModel
from manylora.models.cache import BLOCK
from manylora.sampling.loop import MAX_CACHED_TOKENS
from manylora.types import DoesNotFit, ForwardBackward, Sample
from manylora.types.memory import ANSWER_TOKEN_BYTES, admit, bytes_text

# Of the memory that is free once the base is open: for keys and values while decoding.
CACHE_SHARE = 0.3
# Of one likeliest token that is reported: an id and a log-probability.
TOPK_BYTES = 16


def kv_bytes(config: Any, itemsize: int, tp: int = 1) -> int:
    """Return the bytes of one token's keys and values in all layers, by a base's text config; a
    number of the base takes `itemsize` bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * max(1, heads // tp) * size * itemsize


def cached_tokens(base: BaseModel, free: int) -> int | None:
    """Return how many tokens the decode cache has memory for here; None = all that it may hold."""
    if base.mesh.shape.size > 1:
        return None
    each = kv_bytes(base.model.config.get_text_config(), base.dtype.itemsize)
    found = max(BLOCK, int(free * CACHE_SHARE) // each)
    return found if found < MAX_CACHED_TOKENS else None


def admit_sample(
    sample: Sample, base: BaseModel, most_tokens: int | None, promised: int, memory: FreeMemory
) -> None:
    """Let a request be sampled, if a continuation fits the cache and all answers the host.

    Args:
        most_tokens: of a sequence, that there is memory for; None = it is not memory that bounds
            the decode loop, and an answer is cut there, as it is at the context's end.
        promised: bytes of weights that will be kept twice from now on. Where they do not fit
            nothing is sampled: the weights as they are may give other bits, and which ones are read
            must not hang on what is free.
        memory: of the host, where answers are kept.

    Raises:
        DoesNotFit
    """
    lengths = [len(list(prompt)) for prompt in sample.prompts]
    limits = [min(sample.params.max_tokens, max(0, base.context_length - n)) for n in lengths]
    longest = max((n + limit for n, limit in zip(lengths, limits, strict=True)), default=0)
    if most_tokens is not None and longest > most_tokens:
        each = kv_bytes(base.model.config.get_text_config(), base.dtype.itemsize)
        raise DoesNotFit(
            f"a prompt and its max_tokens, {longest:,} tokens together, need "
            f"{bytes_text(longest * each)} of decode cache and {bytes_text(most_tokens * each)} "
            f"are free for it; {most_tokens:,} tokens would fit"
        )
    if not sample.prompts or sample.num_samples < 1:
        return
    each = ANSWER_TOKEN_BYTES + TOPK_BYTES * max(0, sample.scoring.topk_sampled)
    needed = each * sum(limits) * sample.num_samples
    free = memory.beside(promised + needed)
    fits = f"a base whose linear layers take at most {bytes_text(free)} would fit"
    admit("sampling, which on CPU keeps the base's weights twice,", promised, free, fits)
    free -= promised
    what = (
        f"num_samples={sample.num_samples:,} answers of up to {max(limits):,} tokens to "
        f"{len(lengths):,} prompts"
    )
    fits = f"num_samples × max_tokens × prompts of at most {free // each:,} would fit"
    admit(what, needed, free, fits)


def admit_work(work: ForwardBackward, base: BaseModel, memory: FreeMemory) -> None:
    """Let an operation run, if what is certainly kept of its longest datum fits. The `memory` is
    that of the base's device. Raises DoesNotFit."""
    if base.mesh.shape.size > 1 or not work.data:
        return
    config = base.model.config.get_text_config()
    blocks = config.num_hidden_layers if work.backward else 1
    each = blocks * config.hidden_size * base.dtype.itemsize
    rows = max(len(datum) for datum in work.data)
    free = memory.beside(rows * each)
    what = f"{work.called}: a datum of {rows:,} tokens"
    fits = f"one of at most {max(0, free) // each:,} tokens would fit"
    admit(what, rows * each, free, fits)
