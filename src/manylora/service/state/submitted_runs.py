"""The server trains runs by itself. Submitted as JSON, they are clients of the queue like others.

All of them live in one event loop on a thread of their own, because preparing batches and writing
metrics is more than the requests' loop may be kept from its work. A run's own folder (`runs/<id>`
in the data directory) is laid out as that of `manylora train`, which is what makes it go on exactly
where it was after a crash; its end is a model with checkpoints, like any other.
"""

import asyncio
import json
import logging
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from manylora.checkpoint import newest_state
from manylora.config import AdapterEntry
from manylora.runs.outcome import Outcome
from manylora.runs.run_folder import AdapterPaths
from manylora.service.http_errors import NotReady, QuotaExceeded, TooLarge, missing
from manylora.service.state.checkpoints import CheckpointOrder, Checkpoints
from manylora.service.state.data_preparation import MOST_PAUSED, Preparing
from manylora.service.state.listings import run_info
from manylora.service.state.live_run import LiveRun, metrics_after
from manylora.service.state.open_adapters import OpenAdapters
from manylora.service.state.resources import Resources
from manylora.service.state.run_data import RunData, accept, check_size
from manylora.service.state.wire_operations import row_spec
from manylora.service.wire.messages import Slot
from manylora.service.wire.paths import PathKind, TinkerPath
from manylora.service.wire.replies import Cursor
from manylora.service.wire.run_messages import ENDED, Data, Run, RunList, SubmitRunRequest
from manylora.store import ModelRow, RunRow, SessionRow
from manylora.types import EngineLost, ManyloraError, StoreError, errors

log = logging.getLogger("manylora.service")

GOING_ON = ("queued", "running", "cancelling")
STATE_KINDS: tuple[PathKind, ...] = ("weights", "sampler_weights")


class SubmittedRuns:
    """These are a server's runs. Methods run on the requests' event loop unless they say else."""

    def __init__(self, resources: Resources, checkpoints: Checkpoints, adapters: OpenAdapters):
        self._resources, self._checkpoints, self._adapters = resources, checkpoints, adapters
        self._store = resources.store
        self._live: dict[str, LiveRun] = {}
        self._tasks: set[Future[None]] = set()
        self._preparing = Preparing()
        self._closing = False
        self._loop = asyncio.new_event_loop()
        # Preparations that wait for their next turn hold a thread each; others need some too.
        self._loop.set_default_executor(ThreadPoolExecutor(2 * MOST_PAUSED, "manylora-runs"))
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="manylora-runs", daemon=True
        )
        self._thread.start()

    # -- requests ---------------------------------------------------

    def count(self, tenant: str) -> int:
        """Return how many runs of a tenant are going on."""
        return sum(live.row.tenant == tenant for live in list(self._live.values()))

    def check_room(self, tenant: str) -> None:
        """Raise QuotaExceeded if the tenant has all adapters that it may, in runs or open."""
        quota = self._resources.settings.quotas.adapters
        if self._adapters.count(tenant) + self.count(tenant) >= quota:
            raise QuotaExceeded(
                f"you have {quota} adapters open, which is all that you may: finish a session or a "
                "run, or let one end"
            )

    async def submit(self, tenant: str, request: SubmitRunRequest) -> Run:
        """Take a run: durable when this returns. Raises DataError, Unsupported, TooLarge: something
        that cannot be trained here; QuotaExceeded, SaveFailed."""
        if request.base_model is not None:
            self._resources.check_base(request.base_model)
        self.check_room(tenant)
        if self._closing:
            raise NotReady("the server is stopping")
        check_size(request.adapter, self._resources.settings.limits.rank)
        await asyncio.to_thread(self._check_data, tenant, request.data)
        row, data = await asyncio.to_thread(self._accept, tenant, request)
        return run_info(self._start(row, data).row)

    def forget_old(self) -> None:
        """Delete runs that are over, and their folders, beyond those remembered. In a thread."""
        for row in self._store.tidying.runs_beyond(self._resources.settings.quotas.runs):
            if row.id not in self._live:
                shutil.rmtree(self._paths(row.id).root, ignore_errors=True)
                self._store.runs.delete(row.tenant, row.id)

    def _check_data(self, tenant: str, data: Data | None) -> None:
        """Raise TooLarge or QuotaExceeded if the tenant's runs bring more data than they may."""
        texts = () if data is None else (data.train, data.eval or "")
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        limit = self._resources.settings.quotas.run_data_bytes
        if size > limit:
            raise TooLarge(f"the run's data have {size:,} bytes, and {limit:,} are allowed")
        own = [live for live in list(self._live.values()) if live.row.tenant == tenant]
        held = sum(live.data.uploaded_bytes() for live in own)
        if held + size > limit:
            raise QuotaExceeded(
                f"the data of your runs that are not over have {held:,} bytes, this one's "
                f"{size:,}, and {limit:,} are allowed: let one end, or cancel one"
            )

    async def page(self, tenant: str, limit: int, offset: int) -> RunList:
        """Return a tenant's runs, newest first."""
        page = await asyncio.to_thread(self._store.runs.page, tenant, limit, offset)
        cursor = Cursor(offset=offset, limit=limit, total_count=page.total)
        return RunList(runs=[self._info(row) for row in page.rows], cursor=cursor)

    async def get(self, tenant: str, id: str, after: int = 0) -> Run:
        """Return a run, with figures of its last steps after that one. Raises NotFound."""
        row = await self._row(tenant, id)
        live = self._live.get(id)
        if live is not None:
            rows = [figures for figures in list(live.rows) if figures["step"] > after]
        else:
            rows = await asyncio.to_thread(metrics_after, self._paths(id), after)
            row = await self._row(tenant, id)  # it may have ended since
        return self._info(row).model_copy(update={"metrics": rows})

    async def cancel(self, tenant: str, id: str) -> Run:
        """Have a run end after the steps in hand, and keep what it has learned. One that is over
        stays as it is. Raises NotFound."""
        row, live = await self._row(tenant, id), self._live.get(id)
        if live is not None and row.status not in ENDED:
            await asyncio.to_thread(self._note_cancelled, live)
            self._loop.call_soon_threadsafe(live.stop.set)
            row = await self._row(tenant, id)
        return self._info(row)

    # -- the server's life ---------------------------------------------------

    async def resume(self) -> int:
        """Go on with what was going on when the last server stopped; return how many runs."""
        rows = await asyncio.to_thread(self._store.runs.with_status, *GOING_ON)
        for row in rows:
            # Where paging had put the adapter; its run has a training state of its own.
            folder = self._resources.host.state_folder(row.id)
            await asyncio.to_thread(shutil.rmtree, folder, True)
            try:
                self._start(row, self._data(row))
            except (ValueError, KeyError, TypeError) as error:
                log.error("run %s cannot be read: %s", row.id, error)
                told = {"type": "StoreError", "message": "the run's settings cannot be read"}
                await asyncio.to_thread(
                    self._store.runs.update, row.tenant, row.id, status="failed",
                    error=told["message"], progress={**row.progress, "error": told},
                )  # fmt: skip
        return len(rows)

    async def stop(self, seconds: float) -> None:
        """Have every run save where it is; the next start goes on with it."""
        self._closing = True
        for live in list(self._live.values()):
            self._loop.call_soon_threadsafe(live.stop.set)
        if self._tasks:
            waiting = [asyncio.wrap_future(task) for task in list(self._tasks)]
            await asyncio.wait(waiting, timeout=seconds)

    def close(self, seconds: float | None = None) -> None:
        """Wait for what `stop` asked to end; any thread, when the queue takes no more. What is
        preparing its data after `seconds` is left to it; None = all is waited for."""
        if wait(list(self._tasks), seconds).not_done:
            log.warning("runs that are still preparing their data are left behind")
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    # -- inside ---------------------------------------------------

    def _paths(self, id: str) -> AdapterPaths:
        return AdapterPaths(self._resources.folder.resolve() / "runs" / id)

    async def _row(self, tenant: str, id: str) -> RunRow:
        row = await asyncio.to_thread(self._store.runs.get, tenant, id)
        if row is None:
            raise missing("run")
        return row

    def _info(self, row: RunRow) -> Run:
        live = self._live.get(row.id)
        return run_info(row, None if live is None or row.status in ENDED else live.figures())

    def _accept(self, tenant: str, request: SubmitRunRequest) -> tuple[RunRow, RunData]:
        id, now = f"run-{secrets.token_hex(8)}", time.time()
        paths, entry = self._paths(id), request.adapter
        roots = self._resources.settings.data_roots
        try:
            stamps = accept(entry, request.data, paths, roots)
            config = {"adapter": entry.model_dump(mode="json"), "stamps": stamps}
            row = RunRow(
                id=id, tenant=tenant, name=entry.name, config=json.dumps(config), status="queued",
                created_at=now, updated_at=now, progress={},
            )  # fmt: skip
            self._store.runs.create(row)
        except BaseException:
            shutil.rmtree(paths.root, ignore_errors=True)
            raise
        return row, RunData(entry, paths, roots, stamps)

    def _data(self, row: RunRow) -> RunData:
        config = json.loads(row.config)
        entry = AdapterEntry.model_validate_json(json.dumps(config["adapter"]))
        stamps = {which: (size, at) for which, (size, at) in config["stamps"].items()}
        return RunData(entry, self._paths(row.id), self._resources.settings.data_roots, stamps)

    def _start(self, row: RunRow, data: RunData) -> LiveRun:
        live = LiveRun(row, data, dict(row.progress), cancelled=row.status == "cancelling")
        if live.cancelled:
            live.stop.set()
        self._live[row.id] = live
        task = asyncio.run_coroutine_threadsafe(self._train(live), self._loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return live

    async def _train(self, live: LiveRun) -> None:
        """Run the whole of a run, on the runs' loop."""
        try:
            outcome = await live.train(self._resources.host, self._preparing, self._note)
            await asyncio.to_thread(self._conclude, live, outcome)
        except Exception:
            log.exception("run %s: its end could not be written down", live.row.id)
        finally:
            self._live.pop(live.row.id, None)

    def _note(self, live: LiveRun) -> None:
        """Write down how far a run is. Any thread."""
        with live.lock, suppress(StoreError):
            if not live.over:
                status = "cancelling" if live.cancelled else "running"
                self._update(live, status, live.figures())

    def _note_cancelled(self, live: LiveRun) -> None:
        with live.lock:
            live.cancelled = True
            if not live.over:
                self._update(live, "cancelling", live.figures())

    def _conclude(self, live: LiveRun, outcome: Outcome) -> None:
        """Write down how a run ended; what it has learned becomes checkpoints. In a thread."""
        status, figures = outcome.status or "failed", outcome.to_dict()
        figures["error"] = _told(figures["error"], live.row.id)
        broken = bool(figures["error"]) and figures["error"]["type"] == EngineLost.__name__
        if broken or (self._closing and status != "completed" and not live.cancelled):
            return  # the next start goes on with it
        model_id = None
        try:
            model_id = self._keep(live, outcome)
        except ManyloraError as error:
            log.error("run %s: %s", live.row.id, error)
            status = "failed"
            figures["error"] = {"type": type(error).__name__, "message": str(error)}
        with live.lock:
            live.over = True
            self._update(live, status, figures, model_id)
        self._resources.journal.forget(live.row.id)
        if model_id is not None or outcome.status != "completed":
            live.data.forget()

    def _update(
        self, live: LiveRun, status: str, figures: dict[str, Any], model_id: str | None = None
    ) -> None:
        error = figures.get("error")
        self._store.runs.update(
            live.row.tenant, live.row.id, status=status, progress=figures, model_id=model_id,
            error=None if not error else f"{error['type']}: {error['message']}",
        )  # fmt: skip

    def _keep(self, live: LiveRun, outcome: Outcome) -> str | None:
        """Make checkpoints of the newest training state, and of a finished run's PEFT files. They
        are a model's of the tenant; return the model's id, or None if nothing was trained."""
        state = newest_state(live.paths.checkpoints)
        if state is None:
            return None
        # Metrics may be ahead of the newest state.
        row, step = live.row, int(state.name.removeprefix("step-"))
        completed = outcome.status == "completed"
        base, host = self._resources.settings.base, self._resources.host
        spec = row_spec(live.data.entry.spec(), base, host.engine.sites)
        # A run has a session of its own that is over, and a model that takes no requests.
        session = SessionRow(
            id=row.id, tenant=row.tenant, created_at=row.created_at,
            last_seen_at=row.created_at, ended_at=row.created_at, end_reason="run",
        )  # fmt: skip
        self._store.sessions.create(session)
        slot = Slot(row.id, 0)
        model = ModelRow(
            id=slot.model_id,
            tenant=row.tenant,
            session_id=slot.session_id,
            model_seq_id=slot.number,
            base_model=base,
            spec=spec,
            digest=row.id,
            created_at=row.created_at,
            last_request_at=time.time(),
            closed_at=time.time(),
            step=step,
            user_metadata={"run": row.name},
        )
        self._store.models.create(model)
        name = "final" if completed else "last"
        folders: list[tuple[PathKind, Path]] = [(kind, state) for kind in STATE_KINDS]
        if completed:
            folders.append(("external_weights", live.paths.final))
        for kind, folder in folders:
            order = CheckpointOrder(
                path=TinkerPath(model.id, kind, name), tenant=row.tenant,
                request_id=f"{row.id}:{name}", seq=step, spec=spec,
            )  # fmt: skip
            self._checkpoints.adopt(order, folder, step)
        return model.id


def _told(error: dict[str, str] | None, id: str) -> dict[str, str] | None:
    """Return an error as its owner may read it; one not raised on purpose stays in the log."""
    if error is None or hasattr(errors, error["type"]):
        return error
    return {"type": "InternalError", "message": f"internal error, run {id}"}
