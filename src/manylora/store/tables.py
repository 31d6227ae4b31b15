"""A change of these tables needs a new migration beside those in `migrations/versions`."""

from dataclasses import fields
from typing import Any, ClassVar, Generic, Self, TypeVar

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, MetaData, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from manylora.store.records import (
    CheckpointRow,
    Json,
    KeyRow,
    ModelRow,
    RunRow,
    SamplerRow,
    SessionRow,
)

R = TypeVar("R")


class Base(DeclarativeBase):
    """Every table has this base. JSON, not JSONB: it keeps any text that a client may send."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        int: BigInteger,
        float: Double,
        Json: JSON,
        list[str]: JSON,
    }


class RowOf(Generic[R]):
    """A `RowOf` is a table whose columns are the fields of a row class."""

    row_type: ClassVar[type[Any]]

    @classmethod
    def of(cls, row: R) -> Self:
        return cls(**{name: getattr(row, name) for name in cls._names()})

    def row(self) -> R:
        made: R = self.row_type(**{name: getattr(self, name) for name in self._names()})
        return made

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in fields(cls.row_type)]


class Key(RowOf[KeyRow], Base):
    __tablename__ = "keys"
    row_type = KeyRow

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    prefix: Mapped[str] = mapped_column(index=True)
    hash: Mapped[str]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]


class SessionTable(RowOf[SessionRow], Base):
    __tablename__ = "sessions"
    __table_args__ = (Index(None, "tenant", "created_at"),)
    row_type = SessionRow

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    created_at: Mapped[float]
    last_seen_at: Mapped[float]
    tags: Mapped[list[str]]
    user_metadata: Mapped[Json]
    sdk_version: Mapped[str]
    ended_at: Mapped[float | None] = mapped_column(index=True)
    end_reason: Mapped[str | None]
    end_detail: Mapped[str | None]


class ModelTable(RowOf[ModelRow], Base):
    __tablename__ = "models"
    __table_args__ = (
        UniqueConstraint("session_id", "model_seq_id"),
        Index(None, "tenant", "created_at"),
    )
    row_type = ModelRow

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"))
    model_seq_id: Mapped[int]
    base_model: Mapped[str]
    spec: Mapped[Json]
    digest: Mapped[str]
    created_at: Mapped[float]
    last_request_at: Mapped[float]
    user_metadata: Mapped[Json]
    source_path: Mapped[str | None]
    step: Mapped[int]
    closed_at: Mapped[float | None] = mapped_column(index=True)
    fault: Mapped[str | None]


class Sampler(RowOf[SamplerRow], Base):
    __tablename__ = "samplers"
    __table_args__ = (UniqueConstraint("session_id", "seq_id"),)
    row_type = SamplerRow

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"))
    seq_id: Mapped[int]
    digest: Mapped[str]
    kind: Mapped[str]
    base_model: Mapped[str]
    created_at: Mapped[float]
    model_path: Mapped[str | None]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    snapshot: Mapped[str | None]


class CheckpointTable(RowOf[CheckpointRow], Base):
    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "tenant", "created_at"),)
    row_type = CheckpointRow

    tenant: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True, index=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    kind: Mapped[str]
    name: Mapped[str]
    folder: Mapped[str]
    size_bytes: Mapped[int]
    created_at: Mapped[float]
    request_id: Mapped[str]
    spec: Mapped[Json]
    step: Mapped[int]
    expires_at: Mapped[float | None] = mapped_column(index=True)
    public: Mapped[bool]
    user_metadata: Mapped[Json]


class RunTable(RowOf[RunRow], Base):
    __tablename__ = "runs"
    __table_args__ = (Index(None, "tenant", "created_at"),)
    row_type = RunRow

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    config: Mapped[str]
    status: Mapped[str]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    error: Mapped[str | None]
    progress: Mapped[Json]
