"""What each query answers, on both databases."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from manylora.store import (
    CheckpointRow,
    ModelRow,
    RunRow,
    SamplerRow,
    SessionRow,
    Store,
)
from manylora.types import CheckpointExists, ConfigError, Conflict, StoreError
from tests.unit.store.conftest import Clock


def session(id: str = "s", tenant: str = "ann", at: float = 10.0, **more: Any) -> SessionRow:
    return SessionRow(id, tenant, at, at, **more)


def model(seq: int = 1, session_id: str = "s", tenant: str = "ann", **more: Any) -> ModelRow:
    fields: dict[str, Any] = {
        "id": f"{session_id}:train:{seq}",
        "tenant": tenant,
        "session_id": session_id,
        "model_seq_id": seq,
        "base_model": "seedling",
        "spec": {"rank": 8, "seed": None},
        "digest": "d",
        "created_at": float(seq),
        "last_request_at": float(seq),
    }
    return ModelRow(**(fields | more))


def sampler(seq: int = 1, session_id: str = "s", tenant: str = "ann", **more: Any) -> SamplerRow:
    fields: dict[str, Any] = {
        "id": f"{session_id}:sample:{seq}",
        "tenant": tenant,
        "session_id": session_id,
        "seq_id": seq,
        "digest": "d",
        "kind": "base",
        "base_model": "seedling",
        "created_at": float(seq),
    }
    return SamplerRow(**(fields | more))


def checkpoint(name: str = "one", tenant: str = "ann", **more: Any) -> CheckpointRow:
    fields: dict[str, Any] = {
        "path": f"tinker://s:train:1/weights/{name}",
        "tenant": tenant,
        "model_id": "s:train:1",
        "kind": "weights",
        "name": name,
        "folder": f"checkpoints/{name}",
        "size_bytes": 100,
        "created_at": 5.0,
        "request_id": "s:train:1:1",
    }
    return CheckpointRow(**(fields | more))


@pytest.fixture
def peopled(store: Store) -> Store:
    """ann has session s with a model, bob session t with one."""
    store.sessions.create(session())
    store.sessions.create(session("t", "bob"))
    store.models.create(model())
    store.models.create(model(session_id="t", tenant="bob"))
    return store


# --- keys ---------------------------------------------------------------------------------------


def test_a_key_opens_for_its_tenant_until_it_is_revoked(store: Store, clock: Clock):
    assert not store.keys.any_keys()
    first, second, other = (store.keys.create(name) for name in ("ann", "ann", "bob"))
    assert len({first, second, other}) == 3
    assert all(key.startswith("tml-") and len(key) >= 4 + 32 for key in (first, second))
    assert [store.keys.lookup(key) for key in (first, second, other)] == ["ann", "ann", "bob"]
    clock.now = 1001.0
    assert store.keys.revoke("ann", first) == 1
    assert store.keys.revoke("ann", first) == 0
    assert [store.keys.lookup(key) for key in (first, second, other)] == [None, "ann", "bob"]
    assert [key.revoked_at for key in store.keys.of("ann")].count(1001.0) == 1
    assert store.keys.revoke("ann") == 1
    assert [store.keys.lookup(key) for key in (second, other)] == [None, "bob"]


def test_a_key_is_revoked_by_id_or_prefix_and_only_by_its_tenant(store: Store):
    keys = [store.keys.create("ann") for _ in range(3)]
    rows = {row.prefix: row for row in store.keys.of("ann")}
    assert store.keys.revoke("bob", keys[0]) == 0
    assert store.keys.revoke("bob", rows[keys[0][:10]].id) == 0
    assert store.keys.revoke("bob") == 0
    assert store.keys.revoke("ann", rows[keys[0][:10]].id) == 1
    assert store.keys.revoke("ann", keys[1][:10]) == 1
    assert [store.keys.lookup(key) for key in keys] == [None, None, "ann"]


def test_what_is_no_key_opens_nothing(store: Store):
    key = store.keys.create("ann")
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    for wrong in ("", "tml-", key[:-1], key + "A", key[4:], key[:10], changed, "tml-é\0\ud800"):
        assert store.keys.lookup(wrong) is None
    assert store.keys.lookup("tml-" + "A" * 100_000) is None


def test_of_keys_with_one_prefix_each_opens_its_own(store: Store, monkeypatch: pytest.MonkeyPatch):
    secrets = iter(["same__" + "a" * 37, "same__" + "b" * 37])
    monkeypatch.setattr("secrets.token_urlsafe", lambda _: next(secrets))
    keys = [store.keys.create("ann"), store.keys.create("bob")]
    assert [store.keys.lookup(key) for key in keys] == ["ann", "bob"]


def test_a_key_is_nowhere_in_the_database(store: Store):
    key = store.keys.create("ann")
    with store._database.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM keys").all()
    assert key[10:] not in str(rows) and key[:10] in str(rows)
    assert key[10:] not in str(store.keys.of())


def test_revoking_the_last_key_does_not_open_the_door(store: Store):
    store.keys.create("ann")
    store.keys.revoke("ann")
    assert store.keys.any_keys()


def test_keys_are_listed_by_tenant(store: Store):
    for tenant in ("ann", "bob", "ann"):
        store.keys.create(tenant)
    assert [row.tenant for row in store.keys.of()] == ["ann", "ann", "bob"]
    assert [row.tenant for row in store.keys.of("bob")] == ["bob"]


@pytest.mark.parametrize("name", ["", "a b", "../x", "-a", "a" * 65, "ä", "a\n"])
def test_not_everything_names_a_tenant(store: Store, name: str):
    with pytest.raises(ConfigError):
        store.keys.create(name)


# --- sessions -----------------------------------------------------------------------------------


def test_a_session_is_its_tenants(store: Store):
    row = session(tags=["a", "b"], user_metadata={"k": [1, {"x": None}]}, sdk_version="0.38.0")
    assert store.sessions.create(row) == row == store.sessions.create(row)
    assert store.sessions.get("ann", "s") == row
    assert store.sessions.get("bob", "s") is None
    assert store.sessions.page("bob").rows == []
    assert store.sessions.end("bob", "s", "success") is None
    assert store.sessions.get("ann", "s") == row
    with pytest.raises(Conflict):
        store.sessions.create(session(tenant="bob"))


def test_the_first_reason_for_an_end_stays(store: Store, clock: Clock):
    store.sessions.create(session())
    store.sessions.create(session("t"))
    clock.now = 20.0
    first = store.sessions.end("ann", "s", "interrupted", "by hand")
    clock.now = 30.0
    again = store.sessions.end("ann", "s", "success")
    assert first == again == store.sessions.get("ann", "s")
    assert first is not None
    assert (first.ended_at, first.end_reason, first.end_detail) == (20.0, "interrupted", "by hand")
    assert [row.id for row in store.sessions.open()] == ["t"]


def test_many_are_touched_at_once(store: Store):
    names = [f"s{i:04d}" for i in range(1203)]
    for name in (names[0], names[600], names[1202], "other", "ended"):
        store.sessions.create(session(name))
    store.sessions.end("ann", "ended", "success")
    store.sessions.touch([*names, "ended"], 50.0)
    store.sessions.touch([names[0]], 40.0)
    seen = {row.id: row.last_seen_at for row in store.sessions.page("ann").rows}
    assert seen == {names[0]: 50, names[600]: 50, names[1202]: 50, "other": 10, "ended": 10}
    store.sessions.touch([])


def test_pages_are_in_order_and_whole(store: Store):
    for i in range(7):
        store.sessions.create(session(f"s{i}", at=float(i // 2)))
    store.sessions.create(session("t", "bob"))
    pages = [store.sessions.page("ann", limit=3, offset=offset) for offset in (0, 3, 6, 9)]
    assert [page.total for page in pages] == [7] * 4
    names = [[row.id for row in page.rows] for page in pages]
    assert names == [["s6", "s4", "s5"], ["s2", "s3", "s0"], ["s1"], []]
    assert store.sessions.page("ann", limit=-1, offset=-5).rows == []


# --- models -------------------------------------------------------------------------------------


def test_the_same_creation_gives_the_same_model(peopled: Store):
    peopled.models.touch(["s:train:1"], 99.0)
    again = peopled.models.create(model(created_at=77.0))
    assert again == replace(model(), last_request_at=99.0)
    for other in (model(digest="e"), model(id="another"), model(tenant="bob")):
        with pytest.raises(Conflict):
            peopled.models.create(other)
    with pytest.raises(Conflict):
        peopled.models.create(model(2, id="s:train:1"))
    assert peopled.models.page("ann").total == 1


def test_a_model_is_its_tenants(peopled: Store):
    mine, others = "s:train:1", "t:train:1"
    assert peopled.models.get("ann", mine) == model()
    assert peopled.models.get("ann", others) is None
    assert [row.id for row in peopled.models.page("bob").rows] == [others]
    assert peopled.models.of_session("ann", "t") == []
    assert not peopled.models.close("ann", others)
    assert [row.id for row in peopled.models.open()] == [mine, others]


def test_a_model_needs_its_session(store: Store):
    with pytest.raises(StoreError):
        store.models.create(model())


def test_what_happens_to_a_model_is_kept(peopled: Store, clock: Clock):
    id = "s:train:1"
    peopled.models.set_steps({id: 12, "unknown": 3})
    peopled.models.set_steps({})
    peopled.models.touch([id], 60.0)
    peopled.models.touch([id], 50.0)
    peopled.models.set_fault(id, "its weights became NaN")
    assert peopled.models.close("ann", id)
    clock.now = 2000.0
    assert not peopled.models.close("ann", id)
    assert peopled.models.get("ann", id) == replace(
        model(), step=12, last_request_at=60.0, fault="its weights became NaN", closed_at=1000.0
    )
    peopled.models.set_fault(id, None)
    found = peopled.models.get("ann", id)
    assert found is not None and found.fault is None
    assert peopled.models.get("bob", "t:train:1") == model(session_id="t", tenant="bob")


# --- samplers -----------------------------------------------------------------------------------


def test_samplers_are_made_once_and_are_their_tenants(peopled: Store):
    of_base = sampler()
    live = sampler(2, kind="inflight", model_id="s:train:1", snapshot="v1")
    assert [peopled.samplers.create(row) for row in (of_base, live, live)] == [of_base, live, live]
    with pytest.raises(Conflict):
        peopled.samplers.create(sampler(2, digest="e"))
    assert peopled.samplers.get("ann", of_base.id) == of_base
    assert peopled.samplers.get("bob", of_base.id) is None
    assert peopled.samplers.of_model("ann", "s:train:1") == [live]
    assert peopled.samplers.of_session("ann", "s") == [of_base, live]
    assert peopled.samplers.of_model("bob", "s:train:1") == []
    assert peopled.samplers.of_session("bob", "s") == []
    assert peopled.samplers.create(live) == live


# --- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_is_named_once(peopled: Store):
    row = checkpoint(spec={"rank": 8}, user_metadata={"note": "x"}, step=3)
    assert peopled.checkpoints.put(row) is None
    assert peopled.checkpoints.get("ann", row.path) == row
    # The same request again changes nothing, not even what happened to the checkpoint since.
    peopled.checkpoints.set_public("ann", row.path, True)
    assert peopled.checkpoints.put(replace(row, size_bytes=1)) is None
    assert peopled.checkpoints.get("ann", row.path) == replace(row, public=True)
    other = checkpoint(request_id="s:train:1:9", folder="elsewhere", size_bytes=7)
    with pytest.raises(CheckpointExists, match="weights/one exists"):
        peopled.checkpoints.put(other)
    assert peopled.checkpoints.put(other, overwrite=True) == replace(row, public=True)
    assert peopled.checkpoints.get("ann", row.path) == other


def test_a_checkpoint_is_its_tenants(peopled: Store):
    row = checkpoint()
    peopled.checkpoints.put(row)
    for answer in (
        peopled.checkpoints.get("bob", row.path),
        peopled.checkpoints.readable("bob", row.path),
        peopled.checkpoints.delete("bob", row.path),
        peopled.checkpoints.set_ttl("bob", row.path, 1.0),
        peopled.checkpoints.set_public("bob", row.path, True),
    ):
        assert answer is None
    assert peopled.checkpoints.of_model("bob", row.model_id) == []
    assert peopled.checkpoints.page("bob").total == 0
    assert peopled.checkpoints.bytes_of("bob") == 0
    assert peopled.checkpoints.get("ann", row.path) == row
    assert peopled.checkpoints.set_public("ann", row.path, True) == replace(row, public=True)
    assert peopled.checkpoints.readable("bob", row.path) == replace(row, public=True)
    assert peopled.checkpoints.get("bob", row.path) is None
    assert peopled.checkpoints.delete("bob", row.path) is None


def test_a_checkpoint_whose_time_is_over_is_missing(peopled: Store, clock: Clock):
    row, stays = checkpoint(public=True), checkpoint("two", request_id="r2", created_at=6.0)
    for one in (row, stays):
        peopled.checkpoints.put(one)
    assert peopled.checkpoints.bytes_of("ann") == 200
    assert [one.name for one in peopled.checkpoints.page("ann").rows] == ["two", "one"]
    aging = peopled.checkpoints.set_ttl("ann", row.path, 60.0)
    assert aging == replace(row, expires_at=1060.0)
    clock.now = 1059.9
    assert peopled.checkpoints.readable("bob", row.path) == aging
    assert peopled.checkpoints.expired() == []
    clock.now = 1060.0
    assert peopled.checkpoints.get("ann", row.path) is None
    assert peopled.checkpoints.readable("bob", row.path) is None
    assert peopled.checkpoints.of_model("ann", row.model_id) == [stays]
    assert peopled.checkpoints.page("ann").total == 1
    assert peopled.checkpoints.bytes_of("ann") == 100
    assert peopled.checkpoints.set_ttl("ann", row.path, None) is None
    assert peopled.checkpoints.delete("ann", row.path) is None
    assert peopled.checkpoints.expired() == [aging]
    assert peopled.checkpoints.expired(now=1059.0) == []
    # Its path is free; dropping the old one does not take the new one with it.
    new = checkpoint(request_id="r3", created_at=1060.0)
    assert peopled.checkpoints.put(new) == aging
    assert aging is not None and not peopled.checkpoints.drop(aging)
    assert peopled.checkpoints.get("ann", row.path) == new


def test_a_ttl_can_be_taken_back(peopled: Store, clock: Clock):
    row = checkpoint(expires_at=1010.0)
    peopled.checkpoints.put(row)
    assert peopled.checkpoints.set_ttl("ann", row.path, None) == replace(row, expires_at=None)
    clock.now = 1e9
    assert peopled.checkpoints.expired() == []


def test_a_deleted_checkpoint_says_where_its_files_are(peopled: Store, clock: Clock):
    row, brief = checkpoint(), checkpoint("two", request_id="r2", expires_at=1001.0)
    peopled.checkpoints.put(row)
    peopled.checkpoints.put(brief)
    assert peopled.checkpoints.delete("ann", row.path) == row
    assert peopled.checkpoints.delete("ann", row.path) is None
    clock.now = 1002.0
    assert [peopled.checkpoints.drop(one) for one in peopled.checkpoints.expired()] == [True]
    assert peopled.checkpoints.expired() == []


# --- runs ---------------------------------------------------------------------------------------


def test_runs_are_kept_and_are_their_tenants(store: Store, clock: Clock):
    row = RunRow("r1", "ann", "upper", "model: x\n", "queued", 1.0, 1.0)
    assert store.runs.create(row) == row
    with pytest.raises(Conflict):
        store.runs.create(row)
    assert store.runs.update("bob", "r1", status="running") is None
    running = store.runs.update("ann", "r1", status="running", progress={"step": 3})
    expected = replace(row, status="running", progress={"step": 3}, updated_at=1000.0)
    assert running == expected
    clock.now = 1001.0
    failed = store.runs.update("ann", "r1", status="failed", error="no data")
    assert failed == replace(expected, status="failed", error="no data", updated_at=1001.0)
    assert store.runs.get("bob", "r1") is None
    assert store.runs.page("ann").rows == [failed] and store.runs.page("bob").total == 0
    assert store.runs.with_status("queued", "failed") == [failed]
    assert store.runs.with_status("running") == []
    assert not store.runs.delete("bob", "r1")
    assert store.runs.delete("ann", "r1") and not store.runs.delete("ann", "r1")


# --- two writers of one row ---------------------------------------------------------------------


def test_of_two_that_create_the_same_one_wins_and_both_get_it(
    peopled: Store, open_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, url: str
):
    """Both have looked and found nothing when the other one writes."""
    if url.startswith("sqlite"):
        pytest.skip("SQLite lets one writer look at a time")
    other = open_store()
    add = peopled.models._database._writing.class_.add
    once = iter([True])

    def add_late(self: Any, record: Any) -> None:
        if next(once, False):
            assert other.models.create(model(2, created_at=3.0)) == model(2, created_at=3.0)
        add(self, record)

    monkeypatch.setattr(peopled.models._database._writing.class_, "add", add_late)
    assert peopled.models.create(model(2, created_at=4.0)) == model(2, created_at=3.0)
