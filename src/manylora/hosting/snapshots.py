"""Snapshots are frozen weights: in the engine, or on disk until a sample needs them."""

import shutil
from collections.abc import Collection
from pathlib import Path

from manylora.hosting.engine_protocol import EngineProtocol
from manylora.hosting.page import bytes_of, file_name
from manylora.hosting.state_files import read_state, write_state
from manylora.hosting.state_writer import Writer
from manylora.lora.state import AdapterState
from manylora.scheduler import Residency
from manylora.types import AdapterNotFound


class Snapshots:
    """`Snapshots` are an engine's, in it or on disk. Methods belong to the engine's thread."""

    def __init__(
        self, engine: EngineProtocol, folder: Path | None, resident: Residency, writer: Writer
    ):
        """No snapshot is there yet. `resident` bounds how many are in the engine; `folder` is the
        `Pager`'s."""
        self._engine, self._folder, self._writer = engine, folder, writer
        self._resident = resident
        self._leaving: set[str] = set()  # dropped, with files that the writer has still to delete

    def __len__(self) -> int:
        """Return the number of snapshots in the engine."""
        return len(self._resident)

    def folder_of(self, snapshot: str) -> Path:
        """Return where the snapshot lies on disk."""
        assert self._folder is not None
        return self._folder / "snapshots" / file_name(snapshot)

    def take(self, adapter: str, snapshot: str) -> None:
        """Freeze a copy of a resident adapter's weights; it is on disk soon."""
        self._engine.snapshot(adapter, snapshot)
        self._leaving.discard(snapshot)
        self._note(snapshot)
        if self._folder is not None:
            self._write(snapshot, self._engine.snapshot_state(snapshot))

    def install(self, snapshot: str, state: AdapterState) -> None:
        """Make a snapshot of a state that `EngineProtocol.snapshot_state` gave earlier."""
        self._engine.install_snapshot(snapshot, state)
        self._leaving.discard(snapshot)
        self._note(snapshot)
        if self._folder is not None:
            self._write(snapshot, state)

    def state(self, snapshot: str) -> AdapterState:
        """Return a snapshot as a state. Raises AdapterNotFound."""
        self.bring(snapshot)
        return self._engine.snapshot_state(snapshot)

    def bring(self, snapshot: str, keep: Collection[str] = ()) -> None:
        """Bring a snapshot into the engine, if it is not there.

        Args:
            keep: others that have to stay there.

        Raises:
            AdapterNotFound, CheckpointDamaged
        """
        if snapshot not in self._engine.snapshots:
            folder = None if self._folder is None else self.folder_of(snapshot)
            if folder is None or snapshot in self._leaving or not folder.exists():
                raise AdapterNotFound(f"no snapshot named {snapshot!r}")
            state = read_state(self._engine, folder, called=f"snapshot {snapshot!r}").state
            self._engine.install_snapshot(snapshot, state)
        self._note(snapshot, keep)

    def drop(self, snapshot: str) -> None:
        """Forget a snapshot and delete it from disk."""
        self._engine.drop_snapshot(snapshot)
        self._resident.drop(snapshot)
        if self._folder is not None:
            folder = self.folder_of(snapshot)
            self._leaving.add(snapshot)

            def delete() -> None:
                shutil.rmtree(folder, ignore_errors=True)
                self._leaving.discard(snapshot)

            self._writer.write(delete, 0)

    def _write(self, snapshot: str, state: AdapterState) -> None:
        folder = self.folder_of(snapshot)
        self._writer.write(
            lambda: write_state(self._engine, folder, state, position=0), bytes_of(state)
        )

    def _note(self, snapshot: str, keep: Collection[str] = ()) -> None:
        self._resident.use(snapshot, self._engine.snapshots[snapshot].num_bytes)
        for victim in self._resident.excess(keep={snapshot, *keep}):
            if not self.folder_of(victim).exists():
                self._writer.drain()
            # A snapshot that could not be written stays: it is nowhere else.
            if self.folder_of(victim).exists():
                self._engine.drop_snapshot(victim)
                self._resident.drop(victim)
