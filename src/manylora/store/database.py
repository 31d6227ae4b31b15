"""A database is opened, brought to the present version, and asked in short transactions."""

import functools
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Engine,
    Select,
    Update,
    create_engine,
    event,
    exc,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import sessionmaker

from manylora.store.records import Page
from manylora.store.tables import RowOf
from manylora.types import ConfigError, DataError, ManyloraError, StoreError, StoreTooNew

log = logging.getLogger("manylora.store")

DATABASE = "manylora.db"
BUSY_SECONDS = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"
# Any number, as long as every process that migrates the same server takes the same.
_ADVISORY_LOCK = 0x6D616E796C6F7261
# Alembic keeps the migration that runs in module globals.
_MIGRATING = threading.Lock()

T = TypeVar("T")
R = TypeVar("R")


class Database:
    """A database is an engine with its migrations done. It is thread-safe."""

    def __init__(self, url: str | URL):
        """Open and migrate what SQLAlchemy calls a database URL: `sqlite:///FILE`, `postgresql://…`.

        Raises:
            StoreTooNew: a newer manylora has been here.
            StoreError: it cannot be opened.
            ConfigError: the URL is wrong, or its driver is not installed.
        """
        self.url = _usable_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        # One process's writers take turns here, where the wait is fair, and not in SQLite, where a
        # writer sleeps and tries again.
        self._turn: Any = threading.Lock() if self.is_sqlite else nullcontext()
        try:
            self.engine = self._make_engine()
        except (exc.ArgumentError, exc.NoSuchModuleError, ImportError) as error:
            raise ConfigError(
                f"{self.where} cannot be used: {error}; for PostgreSQL install manylora[postgres]"
            ) from error
        self._reading = sessionmaker(self.engine, expire_on_commit=False)
        writing = self.engine.execution_options(manylora_writes=True)
        self._writing = sessionmaker(writing, expire_on_commit=False)
        try:
            with _translated(self.where):
                self._migrate(writing)
        except BaseException:
            self.engine.dispose()
            raise

    @property
    def where(self) -> str:
        """This is the URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def close(self) -> None:
        self.engine.dispose()

    def read(self, work: Callable[[OrmSession], T]) -> T:
        """Run `work` in a transaction that writes nothing. Raises DataError: an argument that no
        column can hold; StoreError: the database failed."""
        with _translated(self.where), self._reading() as session, session.begin():
            return work(session)

    def write(self, work: Callable[[OrmSession], T]) -> T:
        """Run `work` in a transaction; it is durable when this returns.

        `work` may run twice: when a simultaneous writer made the same row first, the second time
        it finds that row.

        Raises:
            DataError: an argument that no column can hold.
            StoreError: the database failed; nothing was written.
        """
        with _translated(self.where), self._turn:
            try:
                with self._writing.begin() as session:
                    return work(session)
            except exc.IntegrityError:
                with self._writing.begin() as session:
                    return work(session)

    def one(self, table: type[RowOf[R]], *where: ColumnElement[bool]) -> R | None:
        """Return the row of which there is one at most."""
        query = _select(table, where)
        return self.read(lambda session: _row_or_none(session.scalar(query)))

    def all(
        self, table: type[RowOf[R]], *where: ColumnElement[bool], order: Sequence[Any]
    ) -> list[R]:
        query = _select(table, where).order_by(*order)
        return self.read(lambda session: [found.row() for found in session.scalars(query)])

    def page(
        self,
        table: type[RowOf[R]],
        *where: ColumnElement[bool],
        order: Sequence[Any],
        limit: int,
        offset: int,
    ) -> Page[R]:
        """Return so many rows from there on, and how many there are in all."""
        query = _select(table, where)
        count = select(func.count()).select_from(query.subquery())
        part = query.order_by(*order).limit(max(limit, 0)).offset(max(offset, 0))

        def work(session: OrmSession) -> Page[R]:
            rows = [found.row() for found in session.scalars(part)]
            return Page(rows, session.scalar(count) or 0)

        return self.read(work)

    def make(
        self, table: type[RowOf[R]], row: R, where: ColumnElement[bool], check: Callable[[R], None]
    ) -> R:
        """Add a row; or return the one that is there (`where`), unless `check` refuses it."""
        query = _select(table, (where,))

        def work(session: OrmSession) -> R:
            present = _row_or_none(session.scalar(query))
            if present is None:
                session.add(table.of(row))
                return row
            check(present)
            return present

        return self.write(work)

    def change(self, statement: Update | Delete) -> int:
        """Run an update or a deletion; return how many records it met."""
        return self.write(lambda session: changed(session, statement))

    def give_back(self) -> None:
        """Give the room of deleted rows back to the disk. PostgreSQL does so by itself
        (autovacuum), as far as it does."""
        if self.is_sqlite:
            with _translated(self.where), self._turn, self.engine.connect() as connection:
                found = connection.connection.driver_connection
                assert isinstance(found, sqlite3.Connection)
                # Unlike `execute`, it goes on until nothing is left to do.
                found.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")

    def _make_engine(self) -> Engine:
        options: dict[str, Any] = {}
        if self.is_sqlite:
            options["connect_args"] = {"timeout": BUSY_SECONDS}
        else:
            options["pool_pre_ping"] = True
        engine = create_engine(
            self.url, json_serializer=functools.partial(json.dumps, allow_nan=False), **options
        )
        if self.is_sqlite:
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _migrate(self, writing: Engine) -> None:
        script = ScriptDirectory(str(MIGRATIONS))
        if self.is_sqlite:
            _use_wal(self.engine, self.where)
        with _MIGRATING, writing.begin() as connection:
            if not self.is_sqlite:  # SQLite's writing transaction is such a lock
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _ADVISORY_LOCK})
            present = MigrationContext.configure(connection).get_current_revision()
            head = script.get_current_head()
            if present == head:
                return
            known = [revision.revision for revision in script.walk_revisions()]
            if present is not None and present not in known:
                raise StoreTooNew(
                    f"{self.where} is of version {present}, and this manylora knows versions up to "
                    f"{head}: use the manylora that wrote it, or a newer one"
                )
            log.info("%s: migrating from version %s to %s", self.where, present, head)
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            command.upgrade(config, "head")


class Queries:
    """`Queries` are those on one kind of thing in a database, with the clock that dates them."""

    def __init__(self, database: Database, clock: Callable[[], float]):
        self._database = database
        self._clock = clock


def changed(session: OrmSession, statement: Update | Delete) -> int:
    """Run an update or a deletion; return how many records it met."""
    done: Any = session.execute(statement.execution_options(synchronize_session=False))
    return int(done.rowcount)


def chunks(ids: Iterable[str], most: int = 500) -> Iterator[list[str]]:
    """Yield lists that fit into one statement."""
    rest = list(ids)
    for start in range(0, len(rest), most):
        yield rest[start : start + most]


def _select(table: type[Any], where: Sequence[ColumnElement[bool]]) -> Select[Any]:
    return select(table).where(*where)


def _row_or_none(found: RowOf[R] | None) -> R | None:
    return None if found is None else found.row()


def _usable_url(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise ConfigError(f"not a database URL: {error}") from error
    if parsed.drivername in {"postgres", "postgresql"}:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigError("a database in memory survives nothing; name a file: sqlite:///FILE")
    if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
        raise ConfigError(f"{parsed.drivername}: manylora knows sqlite and postgresql")
    return parsed


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Python's driver would begin and commit by its own rules; SQLAlchemy shall.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # WAL: a commit is on the disk


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins by reading cannot wait for its turn to write.
    writes = connection.get_execution_options().get("manylora_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _use_wal(engine: Engine, where: str) -> None:
    """The switch is for good. SQLite does not wait for others while it is made, so we do."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection = engine.raw_connection()
            try:
                cursor = connection.cursor()
                # Holds for a database that is made now; in an older one, room is used again.
                cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")
                for statement in ("PRAGMA journal_mode", "PRAGMA journal_mode = WAL"):
                    if cursor.execute(statement).fetchone() == ("wal",):
                        return
            finally:
                connection.close()
            raise StoreError(f"{where}: SQLite cannot keep a write-ahead log there")
        except sqlite3.Error as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise StoreError(f"{where}: {error}") from error
            time.sleep(0.01)


@contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except ManyloraError:
        raise
    except (exc.DataError, OverflowError, ValueError) as error:
        raise DataError(f"a value that the database cannot hold: {_first_line(error)}") from error
    except exc.StatementError as error:
        if isinstance(error.orig, ValueError | TypeError | OverflowError):
            raise DataError(f"a value that cannot be stored: {_first_line(error.orig)}") from error
        raise StoreError(f"{where}: {_first_line(error.orig or error)}") from error
    except exc.SQLAlchemyError as error:
        raise StoreError(f"{where}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
