"""Opening: versions, several at once, durability settings, what goes wrong."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from manylora.store import SessionRow, Store
from manylora.store.database import MIGRATIONS, Database
from manylora.store.tables import Base
from manylora.types import ConfigError, DataError, StoreError, StoreTooNew


def differences(url: str) -> list[object]:
    """What Alembic would change to make the database what the models say."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            options = {"compare_type": True, "compare_server_default": True}
            context = MigrationContext.configure(connection, opts=options)
            return list(compare_metadata(context, Base.metadata))
    finally:
        engine.dispose()


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def test_models_and_migrations_agree(store: Store, url: str):
    assert differences(url) == []


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX ix_keys_prefix",
        "ALTER TABLE runs ADD COLUMN extra TEXT",
        "CREATE TABLE more (id INTEGER)",
    ],
)
def test_a_difference_is_noticed(store: Store, url: str, change: str):
    execute(url, change)
    assert len(differences(url)) == 1


def test_opening_again_keeps_everything(open_store: Callable[[], Store]):
    first = open_store()
    key = first.keys.create("ann")
    first.close()
    assert open_store().keys.lookup(key) == "ann"


def test_a_newer_database_is_refused_and_left_alone(store: Store, open_store, url: str):
    key = store.keys.create("ann")
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreTooNew, match="version 9999, and this manylora knows versions up to"):
        open_store()
    execute(url, "UPDATE alembic_version SET version_num = '0001'")
    assert open_store().keys.lookup(key) == "ann"


def test_an_upgrade_that_fails_leaves_nothing_behind(
    url: str, open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    broken = tmp_path / "migrations"
    (broken / "versions").mkdir(parents=True)
    (broken / "env.py").write_text((MIGRATIONS / "env.py").read_text())
    first = (MIGRATIONS / "versions" / "v0001_first.py").read_text()
    (broken / "versions" / "v0001_first.py").write_text(
        first.replace("    _make_runs()\n", "    op.execute('no such words')\n", 1)
    )
    with monkeypatch.context() as patch:
        patch.setattr("manylora.store.database.MIGRATIONS", broken)
        with pytest.raises(StoreError, match="syntax error"):
            open_store()
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    assert not open_store().keys.any_keys()


OPENER = """
import sys
from manylora.store import Store
print("ready", flush=True)
sys.stdin.readline()
with Store(sys.argv[1]) as store:
    print(store.keys.create("ann"))
"""


def test_processes_may_open_at_the_same_moment(url: str, open_store: Callable[[], Store]):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    answers = []
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        answers.append(out.strip())
    store = open_store()
    assert [store.keys.lookup(key) for key in answers] == ["ann"] * 4


def test_threads_may_open_at_the_same_moment(url: str):
    failures: list[BaseException] = []

    def open_one() -> None:
        try:
            Database(url).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_may_write_at_the_same_moment(store: Store, open_store: Callable[[], Store]):
    """Two stores, as two processes would have; nobody is told that the database is busy."""
    row = SessionRow("s", "ann", 0.0, 0.0)
    store.sessions.create(row)
    failures: list[BaseException] = []

    def touch(which: Store, start: int) -> None:
        try:
            for at in range(start, start + 40):
                which.sessions.touch(["s"], float(at))
                which.sessions.get("ann", "s")
        except BaseException as error:
            failures.append(error)

    stores = [store, open_store()]
    threads = [threading.Thread(target=touch, args=(stores[i % 2], i * 40)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    seen = store.sessions.get("ann", "s")
    assert seen is not None and seen.last_seen_at == 239.0


def test_sqlite_commits_are_durable(tmp_path: Path):
    with Store.in_folder(tmp_path / "deep" / "data") as store:
        assert (tmp_path / "deep" / "data" / "manylora.db").exists()
        assert (tmp_path / "deep" / "data").stat().st_mode & 0o777 == 0o700
        for _ in range(3):  # every connection of the pool, not the first alone
            connection = store._database.engine.raw_connection()
            settings = [
                connection.cursor().execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
            assert settings == ["wal", 2, 1, 30000]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://here/there", "knows sqlite and postgresql"),
        ("nonsense", "not a database URL"),
        ("postgresql+nodriver://here/there", "cannot be used"),
    ],
)
def test_a_wrong_url_is_refused(url: str, words: str):
    with pytest.raises(ConfigError, match=words):
        Store(url)


def test_a_password_is_not_shown():
    with pytest.raises(StoreError) as caught:
        Store("postgresql://ann:hunter2@127.0.0.1:1/there")
    assert "hunter2" not in str(caught.value)
    assert "ann:***@127.0.0.1" in str(caught.value)


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: Path):
    (tmp_path / "manylora.db").write_text("something else " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store.in_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Store.in_folder(tmp_path / "file" / "data")


@pytest.mark.parametrize("text", ["half a pair \ud800", "zero \0 byte", "ünï ☃ 😀"])
def test_any_text_is_kept_or_refused_by_type(store: Store, text: str):
    """JSON keeps everything that a client may send; a plain column may refuse it, by type."""
    row = SessionRow("s", "ann", 0.0, 0.0, user_metadata={"k": text, text: 1})
    assert store.sessions.create(row) == row
    assert store.sessions.get("ann", "s") == row
    try:
        found = store.sessions.get("ann", text)
    except DataError:
        pass
    else:
        assert found is None


@pytest.mark.parametrize("number", [2**63, -(2**70)])
def test_a_number_too_large_is_refused_by_type(store: Store, number: int):
    with pytest.raises(DataError):
        store.models.set_steps({"m": number})
    with pytest.raises(DataError):
        store.sessions.create(SessionRow("s", "ann", 0.0, 0.0, user_metadata={"k": float("nan")}))
