"""The server file's pydantic models say what `manylora serve` may be told, and the defaults.

An attribute's docstring is its description in the JSON schema.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from manylora.config.settings import (
    MOST_SECONDS,
    Count,
    Flag,
    MeshText,
    OpeningSettings,
    Rank,
    Seconds,
    Settings,
    Steps,
    Text,
    Tokens,
)
from manylora.types.weight_forms import Quantization

Port = Annotated[int, Field(ge=0, le=65535)]
Bytes = Annotated[int, Field(ge=1, le=1 << 50)]
Hours = Annotated[float, Field(gt=0, le=MOST_SECONDS / 3600)]


class Quotas(Settings):
    """What one tenant may hold at once."""

    adapters: Count = 1000
    """Open adapters, resident or not."""
    checkpoint_bytes: Bytes = 1 << 40
    """Bytes of all checkpoints that are kept."""
    tokens_in_flight: Tokens = 1 << 24
    """Tokens of requests that have been accepted and are not done; beyond it, clients are asked
    to wait."""
    sessions: Count = 2000
    """Sessions that are remembered, open or over; those of which checkpoints are kept are not
    counted."""
    samplers: Count = 100_000
    """Sampling sessions that are remembered."""
    run_data_bytes: Bytes = 1 << 30
    """Bytes of data that were sent with runs that are not over."""
    runs: Count = 1000
    """Runs that are remembered once they are over; of more, the oldest go. Their checkpoints
    stay."""
    waiting_bytes: Bytes = 512 << 20
    """Bytes of the bodies of such requests; beyond it, clients are asked to wait."""
    decoded_bytes: Bytes = 1 << 30
    """Bytes of the tensors that such requests are decoded to, once their turn has come; beyond it,
    they wait. A single request that needs more is refused."""


class Memory(Settings):
    """What the requests of all tenants together may hold of the server's memory."""

    waiting_bytes: Bytes = 2 << 30
    """Bytes of the bodies of requests that have been accepted and are not done."""
    decoded_bytes: Bytes = 4 << 30
    """Bytes of the tensors that they are decoded to."""


class RequestLimits(Settings):
    """What one request may hold; more is refused with the limit in the answer."""

    body_bytes: Annotated[int, Field(ge=1, le=256 << 20)] = 64 << 20
    """Bytes of a request's body."""
    rank: Rank = 512
    """LoRA rank."""
    samples: Annotated[int, Field(ge=1, le=65_536)] = 1024
    """Answers to one prompt."""
    topk: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Likeliest tokens to report for each place."""


class Connections(Settings):
    """What clients may hold of the server's end of the network."""

    most: Count = 4096
    """Connections at once; fewer where the system allows fewer open files. Beyond it, those that
    have waited longest without a request are closed for newcomers."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of `most` and of `arriving_bytes` that one address may have, and one tenant."""
    head_seconds: Seconds = 20.0
    """How long the head of a request may take."""
    body_seconds: Seconds = 30.0
    """How long a body may take; a longer one must go on bringing 16 KiB a second. A client that
    reads nothing of its answer for so long is gone."""
    idle_seconds: Seconds = 75.0
    """How long a connection is kept open for another request."""
    arriving_bytes: Bytes = 1 << 30
    """Bytes of all bodies that are on their way or being read; beyond it, clients are asked to try
    again."""


class Saving(Settings):
    """When training states are written in the background."""

    every_seconds: Seconds = 30.0
    """After this long, if the adapter has done anything since."""
    every_steps: Steps = 200
    """After this many optimizer steps."""
    result_hours: Hours = 24.0
    """How long results stay readable."""
    session_hours: Hours = 168.0
    """How long sessions that are over are remembered, with their sampling sessions and models. A
    model that has checkpoints stays; a session in which nothing was made goes within minutes."""
    snapshot_hours: Hours = 24.0
    """How long a snapshot for sampling outlives its last use."""


class ServerFile(OpeningSettings):
    """Everything that `manylora serve` can be told."""

    base: Text
    """`seedling`, a folder, or a hub id of a Hugging Face causal LM."""
    aliases: Annotated[list[Text], Field(max_length=100, default_factory=list)]
    """Further names under which clients may ask for the base."""
    data_dir: Annotated[Path, Field(strict=False)]
    """Folder of the database, the journal, checkpoints and results."""
    data_roots: Annotated[list[Annotated[Path, Field(strict=False)]], Field(default_factory=list)]
    """Folders in which runs that are submitted may name data files; none by default."""
    host: Text = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs API keys."""
    port: Port = 8000
    """0 = any free one."""
    allowed_hosts: list[Text] | None = None
    """Names, without ports, that clients may call this server by (the Host of a request):
    `*.example.org` is every name below, `*` any. By default any if there are API keys, and only
    this machine's names for itself if there are none."""
    public_url: Text | None = None
    """How clients reach this server, such as https://lora.example.org, if a proxy stands before it:
    begins the download addresses that it gives them."""
    database: Text | None = None
    """SQLAlchemy URL; by default SQLite in the data folder."""
    token_budget: Tokens = 4096
    """Tokens of one packed micro-batch; a longer sequence runs alone."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the base: `auto` is as stored."""
    activation_checkpointing: Flag = False
    """Compute activations twice to hold fewer of them in memory."""
    quantization: Quantization | None = None
    """Keep the weights of the base's linear layers in 4 bits (`nf4`) or 8 (`int8`); needs
    bitsandbytes."""
    device: Text = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda:1`, …"""
    threads: Count | None = None
    """CPU threads of one operation."""
    ray: Text | None = None
    """Address of a Ray cluster whose devices the engine is to use: `auto` or HOST:PORT. By default
    the engine runs on this machine."""
    engine_address: Text | None = None
    """This machine's address for processes of the engine on other machines; by default the one on
    the route toward them."""
    step_seconds: Seconds = 600.0
    """A step of the engine that takes longer is taken for hung: the engine's processes write down
    where they stand, and are started again."""
    mesh: MeshText = "dp=1,tp=1"
    """Processes of the engine, such as dp=2,tp=2. The tp processes of a group hold
    the base's matrices in parts; tokens are dealt out over dp such groups. With replicas=2 all of
    that is there twice, each with adapters of its own."""
    max_resident: Count | None = None
    """Adapters in the engine at once; by default as many as measured memory allows."""
    long_poll_seconds: Annotated[float, Field(gt=0, le=40)] = 30.0
    """How long a poll for a result is held open."""
    session_seconds: Seconds = 300.0
    """A session without a heartbeat for this long is closed, its adapters saved first."""
    drain_seconds: Annotated[float, Field(ge=0, le=MOST_SECONDS)] = 30.0
    """How long a stopping server goes on with what is queued; the rest waits for the next start."""
    quotas: Quotas = Quotas()
    """What one tenant may hold at once."""
    memory: Memory = Memory()
    """What all tenants together may hold of the server's memory."""
    limits: RequestLimits = RequestLimits()
    """What one request may hold."""
    connections: Connections = Connections()
    """What clients may hold of the server's end of the network."""
    saving: Saving = Saving()
    """When training states are written in the background."""
