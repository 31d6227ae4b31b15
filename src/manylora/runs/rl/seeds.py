"""Every turn of every sample has a seed that follows from the run file alone."""

import hashlib
import struct


def sample_seed(seed: int, step: int, group: int, sample: int, turn: int = 0, part: int = 0) -> int:
    """Return the seed of a turn: 63 bits of a hash, so that near numbers have unlike seeds.

    Args:
        seed: the adapter's.
        step: that it is sampled for, 1, 2, …
        group: its number in the step, over all waves.
        sample: its number in the group.
        turn: 1, 2, …; 0 = what is drawn besides turns.
        part: 1, 2, … of a turn that went on under newer weights.
    """
    numbers = struct.pack("<6Q", *(n % 2**64 for n in (seed, step, group, sample, turn, part)))
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little") >> 1
