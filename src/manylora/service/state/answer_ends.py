"""A checkpoint records where its answers end, for requests that do not say so."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from manylora.checkpoint import recorded_format
from manylora.service.wire.pieces import SampleSubmit
from manylora.store import SamplerRow

# Samplers whose ends are kept in memory; the others are in their files.
MOST_KEPT = 10_000


class Ends:
    """`Ends` are what the files of samplers record. Like a sampler's weights, they never change."""

    def __init__(self, folder_of: Callable[[str], Path]):
        """Look for the snapshot of a name where `folder_of` says."""
        self._folder_of = folder_of
        self._kept: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    async def given(self, row: SamplerRow, submit: SampleSubmit) -> SampleSubmit:
        """Return the request with the tokens at which the adapter was trained to end. If it names
        tokens itself, or none are recorded, it is unchanged: then the base's are right. Raises
        CheckpointDamaged, TooManyFilesOpen."""
        if submit.stop is not None or row.kind != "path" or row.snapshot is None:
            return submit
        if row.snapshot not in self._kept:
            folder = self._folder_of(row.snapshot)
            if not await asyncio.to_thread(folder.exists):
                return submit  # sampling from it will say that it is gone
            self._kept[row.snapshot] = (await asyncio.to_thread(recorded_format, folder)).stop
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        stop = self._kept[row.snapshot]
        return replace(submit, stop=stop) if stop else submit
