"""An open adapter knows what its client asked for, and how far that is."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from manylora.service.state.in_order import InOrder
from manylora.service.state.listings import moment
from manylora.service.state.wire_operations import OperationRequest
from manylora.service.wire.run_messages import Adapter
from manylora.store import ModelRow
from manylora.types import ManyloraError


@dataclass(slots=True)
class Turn:
    """A `Turn` is an operation whose turn has come. `replayed` is as for `Operations.run`; with a
    `refusal`, it is to fail so."""

    seq: int
    request: OperationRequest
    replayed: bool = False
    refusal: ManyloraError | None = None


@dataclass(slots=True)
class OpenAdapter:
    """An `OpenAdapter` is an open training run.

    Attributes:
        order: its operations, by number.
        due: those whose turn has come and of which one has still to be decoded.
        feeding: decodes them, while there are any.
        restored: an earlier server made it; whatever has been acknowledged is in `order`, unless
            it was lost.
        running: due or handed to the queue, without an outcome yet.
        steps: optimizer steps made.
        unsaved_steps: of them, since its state was last asked for.
        touched: whether anything has changed since then.
        saved_at: when that was (`Resources.clock`).
        arrived_at: when the last operation arrived.
        fault: why it can no longer be used.
    """

    row: ModelRow
    order: InOrder[OperationRequest] = field(default_factory=InOrder)
    restored: bool = False
    due: deque[Turn] = field(default_factory=deque)
    feeding: asyncio.Task[None] | None = None
    running: int = 0
    steps: int = 0
    unsaved_steps: int = 0
    touched: bool = False
    saved_at: float = 0.0
    arrived_at: float = 0.0
    fault: str | None = None
    closing: bool = False

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def tenant(self) -> str:
        return self.row.tenant

    def info(self) -> Adapter:
        """Return the adapter as its owner sees it."""
        return Adapter(
            adapter_id=self.id,
            session_id=self.row.session_id,
            base_model=self.row.base_model,
            rank=int(self.row.spec["rank"]),
            created_at=moment(self.row.created_at),
            step=self.steps,
            running=self.running,
            fault=self.fault,
        )
