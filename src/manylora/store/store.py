"""The store is one database, with the queries on each kind of thing in it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.engine import URL

from manylora.store.access import Keys, SessionQueries
from manylora.store.checkpoint_records import CheckpointQueries
from manylora.store.database import DATABASE, Database
from manylora.store.model_queries import ModelQueries, SamplerQueries
from manylora.store.run_queries import RunQueries
from manylora.store.tidying import Tidying
from manylora.types import StoreError


class Store:
    """The store has slow-changing things that must outlive the process. It is thread-safe; any
    method may raise StoreError (the database failed, and nothing was written) or DataError (an
    argument that no column can hold)."""

    def __init__(self, url: str | URL, clock: Callable[[], float] = time.time):
        """Open a database by its URL, and migrate it. See `Database` for what this raises."""
        self._database = Database(url)
        self.keys = Keys(self._database, clock)
        self.sessions = SessionQueries(self._database, clock)
        self.models = ModelQueries(self._database, clock)
        self.samplers = SamplerQueries(self._database, clock)
        self.checkpoints = CheckpointQueries(self._database, clock)
        self.runs = RunQueries(self._database, clock)
        self.tidying = Tidying(self._database, clock)

    @classmethod
    def in_folder(
        cls, data_dir: str | Path, url: str | None = None, clock: Callable[[], float] = time.time
    ) -> "Store":
        """Open the store of a data directory (`manylora.db` in it), or the database of that URL.

        What does not exist yet, the directory or the database in it, is made for this user's eyes
        alone.
        """
        if url is not None:
            return cls(url, clock)
        folder = Path(data_dir).resolve()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(f"{folder / DATABASE} cannot be made: {error}") from error
        return cls(URL.create("sqlite", database=str(folder / DATABASE)), clock)

    @property
    def where(self) -> str:
        """This names the database, without its password."""
        return self._database.where

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
