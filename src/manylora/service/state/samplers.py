"""A sampling session says which frozen weights a client's samples come from."""

import asyncio
import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from manylora.journal import Record
from manylora.service.contract import PROTOBUF_TYPE
from manylora.service.http_errors import Lost, QuotaExceeded, missing
from manylora.service.state.answer_ends import Ends
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.resources import HeldRequest, Resources
from manylora.service.state.sessions import Sessions
from manylora.service.state.wire_operations import sampler_id
from manylora.service.wire.codec import digest_json
from manylora.service.wire.messages import CreateSamplingSessionRequest
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.pieces import SampleSubmit
from manylora.service.wire.replies import SamplerInfo, Submitted
from manylora.service.wire.sample_messages import check_answer_cells, encode_sample, unpack
from manylora.service.wire.wire_limits import WireLimits
from manylora.store import ModelRow, SamplerRow
from manylora.types import DataError, Sample, SampleResult

KIND = "sample"
# Rows kept in memory; the others are in the database.
MOST_CACHED = 10_000
# Of a cell in a table of likeliest tokens: an id (int64) and a log-probability (float32).
TABLE_BYTES = 12


class Samplers:
    """`Samplers` are the sampling sessions of a server."""

    def __init__(self, resources: Resources, checkpoints: Checkpoints, sessions: Sessions):
        self._resources = resources
        self._store = resources.store.samplers
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._wall = resources.wall
        self._ends = Ends(lambda snapshot: resources.host.snapshot_folder(snapshot))
        self._rows: OrderedDict[str, SamplerRow] = OrderedDict()
        # Model → snapshot that its `inflight` samplers use.
        self._published: dict[str, str] = {}
        # Session → its requests that run.
        self._running: Counter[str] = Counter()
        # Snapshot → requests that run on it, and when the last one ended (unix seconds). Only
        # snapshots that a save made for samplers; those of checkpoints cost nothing.
        self._in_use: Counter[str] = Counter()
        self._used_at: dict[str, float] = {}
        self._noted_at = 0.0

    async def create(
        self, tenant: str, request: CreateSamplingSessionRequest, path: TinkerPath | None
    ) -> str:
        """Make a sampling session on the bare base or on a checkpoint; its weights never change.

        Raises:
            NotFound, Gone: no such session or checkpoint.
            DataError: another base, or a checkpoint for training.
            Conflict: the number was used for another request.
        """
        await self._sessions.require(tenant, request.session_id)
        names = self._resources.base_names
        if path is None and request.base_model not in names:
            raise DataError(f"base_model is {request.base_model!r}; here is {' or '.join(names)}")
        await self._check_quota(tenant)
        id = sampler_id(request.session_id, request.sampling_session_seq_id)
        base, snapshot = request.base_model or names[0], None
        if path is not None:
            checkpoint = await self._checkpoints.readable(tenant, path, "sampler_weights")
            base = str(checkpoint.spec.get("base_model", names[0]))
            snapshot = id
            folder = self._resources.host.snapshot_folder(snapshot)
            await asyncio.to_thread(self._checkpoints.link, checkpoint, folder)
        row = SamplerRow(
            id=id, tenant=tenant, session_id=request.session_id,
            seq_id=request.sampling_session_seq_id, digest=digest_json(request),
            kind="base" if path is None else "path", base_model=base, created_at=self._wall(),
            model_path=None if path is None else str(path), snapshot=snapshot,
        )  # fmt: skip
        self._note(await asyncio.to_thread(self._store.create, row))
        return id

    async def of_adapter(
        self, model: ModelRow, seq: int, kind: Literal["snapshot", "inflight"]
    ) -> None:
        """Make a sampling session on an adapter's weights as they will be once its save has run."""
        await self._check_quota(model.tenant)
        id = sampler_id(model.session_id, seq)
        row = SamplerRow(
            id=id,
            tenant=model.tenant,
            session_id=model.session_id,
            seq_id=seq,
            digest=model.id,
            kind=kind,
            base_model=model.base_model,
            created_at=self._wall(),
            model_id=model.id,
            snapshot=id,
        )
        self._note(await asyncio.to_thread(self._store.create, row))
        self._used_at.setdefault(id, self._wall())

    def publish(self, model_id: str, snapshot: str) -> None:
        """Have a model's `inflight` samplers use this snapshot from now on."""
        self._published[model_id] = snapshot

    async def require(self, tenant: str, id: str) -> SamplerRow:
        """Return the tenant's sampling session of that id. Raises NotFound."""
        row = self._rows.get(id)
        if row is None:
            row = await asyncio.to_thread(self._store.get, tenant, id)
            if row is not None:
                self._note(row)
        if row is None or row.tenant != tenant:
            raise missing("sampler")
        return row

    async def info(self, tenant: str, id: str) -> SamplerInfo:
        """Tell what a sampling session samples from. Raises NotFound."""
        row = await self.require(tenant, id)
        return SamplerInfo(sampler_id=id, base_model=row.base_model, model_path=row.model_path)

    async def sample(self, tenant: str, submit: SampleSubmit) -> Submitted:
        """Take a sampling request: durable when this returns.

        Raises:
            NotFound: no such sampling session. DataError: beyond a limit, or the number was used
            for another request. Backpressure: too much waits already. TooLarge: it is more than
            can ever be held.
        """
        row = await self.require(tenant, submit.sampling_session_id)
        request_id = f"{row.id}:{submit.seq_id}"
        ids = [f"{request_id}:{n}" for n in range(submit.num_samples)]
        reply = Submitted(request_id=request_id, sample_sequence_ids=ids)
        submit = await self._ends.given(row, submit)
        operation = self._operation(row, request_id, submit, await self._snapshot(row))
        if self._resources.promises.repeated(request_id, submit.digest) is None:
            # Outcomes are looked up only where they cost nothing: a retry follows within minutes.
            if self._resources.promises.results.recent(request_id) is not None:
                return reply
            held = _held_by(operation, submit)
            self._resources.count_in(held)
            try:
                submit, operation = await self._unpacked(submit, operation)
                id, meta = request_id, {"snapshot": operation.snapshot}
                record = Record(id, 1, KIND, tenant, id, submit.digest, submit.body, meta)
                new = await self._resources.accept(record)
            except BaseException:
                self._resources.count_out(held)
                raise
            if new:
                self._run(row, request_id, operation, submit, held)
            else:
                self._resources.count_out(held)
        return reply

    async def replay(self, tenant: str, submit: SampleSubmit, snapshot: str | None) -> None:
        """Run a request again that had no outcome when the server stopped, on the `snapshot` that
        it was accepted for."""
        row = await self.require(tenant, submit.sampling_session_id)
        request_id = f"{row.id}:{submit.seq_id}"
        submit = await self._ends.given(row, submit)
        operation = self._operation(row, request_id, submit, snapshot)
        self._resources.enter(tenant, operation.num_tokens)
        held = _held_by(operation, submit)
        self._resources.waiting.take(tenant, held.body_bytes)
        self._resources.decoded.take(tenant, held.decoded_bytes)
        try:
            submit, operation = await self._unpacked(submit, operation)
        except BaseException:
            self._resources.count_out(held)
            raise
        self._run(row, request_id, operation, submit, held)

    async def forget_session(self, tenant: str, session_id: str) -> None:
        """Free the snapshots of a session that is over."""
        for row in await asyncio.to_thread(self._store.of_session, tenant, session_id):
            self._rows.pop(row.id, None)
            if row.snapshot is not None:
                self._used_at.pop(row.snapshot, None)
                self._resources.host.drop_snapshot(row.snapshot)
            if row.model_id is not None:
                self._published.pop(row.model_id, None)

    async def restore(self, tenant: str, session_id: str) -> set[Path]:
        """Take up the snapshots of a session open when the server stopped; return their folders."""
        rows = await asyncio.to_thread(self._store.of_session, tenant, session_id)
        folder_of = self._resources.host.snapshot_folder

        def last_uses() -> dict[str, float]:
            names = [row.snapshot for row in rows if row.kind != "path" and row.snapshot]
            return {n: folder_of(n).stat().st_mtime for n in names if folder_of(n).exists()}

        self._used_at |= await asyncio.to_thread(last_uses)
        return {folder_of(row.snapshot) for row in rows if row.snapshot is not None}

    async def drop_unused(self, seconds: float) -> list[str]:
        """Drop the snapshots that no request has used for so long, and return their names. Requests
        that run are not touched, and neither is what a model's `inflight` samplers use."""
        limit, kept = self._wall() - seconds, {*self._in_use, *self._published.values()}
        gone = [name for name, at in self._used_at.items() if at < limit and name not in kept]
        for name in gone:
            del self._used_at[name]
            self._resources.host.drop_snapshot(name)
        recent = {name: at for name, at in self._used_at.items() if at > self._noted_at}
        self._noted_at = self._wall()
        await asyncio.to_thread(self._note_uses, recent)
        return gone

    def _note_uses(self, uses: Mapping[str, float]) -> None:
        """Have each folder's time say when it was last used, for the next start."""
        for name, at in uses.items():
            with suppress(OSError):
                os.utime(self._resources.host.snapshot_folder(name), (at, at))

    @property
    def num_running(self) -> int:
        """So many requests are without an outcome."""
        return self._running.total()

    def is_busy(self, session_id: str) -> bool:
        """Return whether requests of the session are without an outcome."""
        return self._running[session_id] > 0

    # -- inside ---------------------------------------------------

    async def _check_quota(self, tenant: str) -> None:
        most = self._resources.settings.quotas.samplers
        held = await asyncio.to_thread(self._resources.store.tidying.count_samplers, tenant)
        if held >= most:
            raise QuotaExceeded(
                f"you have {held:,} sampling sessions, and {most:,} are remembered: sample from "
                "one that you have, or come again when old ones have been forgotten"
            )

    async def _unpacked(
        self, submit: SampleSubmit, operation: Sample
    ) -> tuple[SampleSubmit, Sample]:
        """Return both with the request's arrays, whose bytes have been counted in."""
        if submit.packed is None:
            return submit, operation
        submit = await asyncio.to_thread(unpack, submit)
        return submit, replace(operation, scoring=submit.scoring)

    def _operation(
        self, row: SamplerRow, request_id: str, submit: SampleSubmit, snapshot: str | None
    ) -> Sample:
        limits = self._resources.settings.limits
        if submit.num_samples > limits.samples:
            raise DataError(f"num_samples is {submit.num_samples}; at most {limits.samples}")
        for name, k in (
            ("topk_prompt_logprobs", submit.scoring.topk_prompt),
            ("topk_sample_logprobs", submit.scoring.topk_sampled),
        ):
            if k > limits.topk:
                raise DataError(f"{name} is {k}; at most {limits.topk}")
        room = max(1, self._resources.host.engine.base.context_length - len(submit.prompt))
        params = submit.params(room=room, seed=_seed_of(request_id))
        check_answer_cells(
            submit.num_samples, params.max_tokens, submit.scoring.topk_sampled, WireLimits().cells
        )
        return Sample(
            adapter=None, prompts=[submit.prompt], params=params, num_samples=submit.num_samples,
            snapshot=snapshot, scoring=submit.scoring, tenant=row.tenant,
        )  # fmt: skip

    async def _snapshot(self, row: SamplerRow) -> str | None:
        if row.kind != "inflight" or row.model_id is None:
            return row.snapshot
        if row.model_id not in self._published:
            rows = await asyncio.to_thread(self._store.of_model, row.tenant, row.model_id)
            saved = [r.snapshot for r in rows if r.kind == "inflight" and r.snapshot is not None]
            return next((name for name in reversed(saved) if self._exists(name)), saved[-1])
        return self._published[row.model_id]

    def _exists(self, snapshot: str) -> bool:
        """Return whether it can be used, or will be there soon."""
        folder = self._resources.host.snapshot_folder(snapshot)
        return snapshot in self._resources.coming or folder.exists()

    def _run(
        self,
        row: SamplerRow,
        request_id: str,
        operation: Sample,
        submit: SampleSubmit,
        held: HeldRequest,
    ) -> None:
        resources, snapshot, wanted = self._resources, operation.snapshot, submit.wanted
        self._running[row.session_id] += 1
        if snapshot is not None:
            self._in_use[snapshot] += 1

        def done(error: BaseException | None) -> None:
            _count_down(self._running, row.session_id)
            if snapshot is not None:
                if snapshot in self._used_at:
                    self._used_at[snapshot] = self._wall()
                _count_down(self._in_use, snapshot)
            if error is None:
                resources.suspects.acquit(operation)
            self._resources.count_out(held)
            resources.finished(request_id)

        def submit_it() -> None:
            future: Future[SampleResult] = Future()
            if resources.suspects.is_given_up(operation):
                future.set_exception(Lost("the engine broke down each time this was running"))
            else:
                future = resources.host.submit(operation)
            resources.promises.follow(
                request_id,
                future,
                lambda result: (PROTOBUF_TYPE, encode_sample(result, wanted)),
                done,
            )

        resources.coming.when_there(snapshot, submit_it)

    def _note(self, row: SamplerRow) -> None:
        self._rows[row.id] = row
        while len(self._rows) > MOST_CACHED:
            self._rows.popitem(last=False)


def _count_down(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def _held_by(operation: Sample, submit: SampleSubmit) -> HeldRequest:
    """Return what a request holds until it is done, with the tables that its answer will have."""
    scoring, length = submit.scoring, len(submit.prompt)
    answers = operation.num_samples * operation.params.max_tokens
    cells = length * scoring.topk_prompt + answers * scoring.topk_sampled
    size = submit.decoded_bytes + TABLE_BYTES * cells
    return HeldRequest(operation.tenant, operation.num_tokens, len(submit.body), size)


def _seed_of(request_id: str) -> int:
    """Return a seed for a request without one; the same when it is run again."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:6], "big")
