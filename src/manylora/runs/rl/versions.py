"""The versions of an adapter's weights that may still be sampled.

Version v is the weights after v steps. It is frozen and published before a request may name it, and
retired when no step that follows can ask for it.
"""

import asyncio
import re
import shutil
from asyncio import wrap_future
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manylora.servers import Policy, Sampler
from manylora.types import AdapterNotFound

_FOLDER = re.compile(r"version-(\d+)")


class Versions:
    """`Versions` are those of one adapter, each with a frozen copy of its weights.

    Attributes:
        seconds: what publishing has taken in all.
    """

    def __init__(self, sampler: Sampler, adapter: Any, folder: Path | None):
        """Nothing is published yet.

        Args:
            adapter: the handle of the adapter.
            folder: where `keep` writes; None = nothing is kept.
        """
        self._sampler, self._adapter, self._folder = sampler, adapter, folder
        self._frozen: dict[int, Any] = {}
        self._policies: dict[int, Policy] = {}
        self.seconds = 0.0

    @property
    def newest(self) -> int:
        """This version was published last."""
        return max(self._policies, default=-1)

    def policy(self, version: int) -> Policy:
        """Return how requests name a version. Raises AdapterNotFound if it is not published."""
        if version not in self._policies:
            raise AdapterNotFound(
                f"adapter {self._adapter.name!r}: version {version} is not published; there are "
                f"{sorted(self._policies)}"
            )
        return self._policies[version]

    def frozen(self, version: int) -> Any:
        """Return the frozen weights of a published version."""
        self.policy(version)
        return self._frozen[version]

    async def publish(self, version: int) -> None:
        """Publish the adapter's weights as they are now, unless that version is there."""
        if version not in self._policies:
            await self._put(version, self._adapter.snapshot())

    async def restore(self, version: int) -> None:
        """Publish a version that `keep` has written. Raises CheckpointDamaged."""
        folder = self._path(version)
        frozen = await asyncio.to_thread(self._adapter.restore_snapshot, folder)
        await self._put(version, frozen)

    async def keep(self, needed: Iterable[int]) -> None:
        """Write versions to disk, those that are not there."""
        if self._folder is None:
            return
        writing = [
            wrap_future(self._frozen[version].save(self._path(version)))
            for version in needed
            if version in self._frozen and not self._path(version).exists()
        ]
        for one in writing:
            await one

    def forget_kept(self, needed: set[int]) -> None:
        """Delete the versions on disk that no training state needs."""
        for path in [] if self._folder is None else self._folder.glob("version-*"):
            found = _FOLDER.fullmatch(path.name)
            if found and int(found[1]) not in needed:
                shutil.rmtree(path, ignore_errors=True)

    async def retire(self, *, below: int, but: int = -1) -> None:
        """Forget the versions below one, but for one of them."""
        for version in [v for v in self._policies if v < below and v != but]:
            await self._sampler.retire(self._policies.pop(version))
            await wrap_future(self._frozen.pop(version).drop())

    async def _put(self, version: int, frozen: Any) -> None:
        published = await self._sampler.publish(self._adapter.name, version, frozen)
        self._frozen[version] = frozen
        self._policies[version] = published.policy
        self.seconds += published.seconds

    def _path(self, version: int) -> Path:
        assert self._folder is not None
        return self._folder / f"version-{version}"
