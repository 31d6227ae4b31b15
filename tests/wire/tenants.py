"""A tenant that plans its work in advance and gets it done over any number of broken connections.

What it asks for depends on its plan alone; how often, in which order and over how many connections
depends on its luck. So what it sees must not.
"""

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import load

from manylora.types import Datum
from tests.wire.data import FIRST_PLAIN_TOKEN, VOCAB, random_data
from tests.wire.raw import encode
from tests.wire.server import BASE_ALIAS
from tests.wire.sockets import BROKEN, JSON, PROTOBUF, Answer, Dropped, request
from tests.wire.weights import WEIGHTS_FILE

LOSSES: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("cispo", {}),
    ("dro", {"beta": 0.05}),
    ("gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("cross_entropy", {}),
    ("importance_sampling", {}),
)
RANKS = (1, 16, 4, 33, 8, 2, 64, 7)
RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Luck:
    """How a tenant's requests fare; every number is a probability.

    Attributes:
        seed: of all that is drawn.
        window: operations that are sent before the results of the first are read.
    """

    seed: int = 0
    window: int = 1
    drop: float = 0.0
    repeat: float = 0.0
    late: float = 0.0
    slow: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """One numbered operation; `sampler` is the number of the ephemeral sampler that it makes."""

    path: str
    content_type: str
    body: bytes
    sampler: int | None = None


@dataclass
class Seen:
    """All that a tenant saw: its results, and at last its weights."""

    results: dict[str, bytes] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)


class Tenant:
    """One client process of one tenant."""

    def __init__(self, number: int, plan: int, port: Callable[[], int], key: str, luck: Luck):
        """`plan`: the seed of what it does. `port`: of the server that runs now."""
        self.number = number
        self.seen = Seen()
        self.now = "has not begun"
        self._port, self._key, self._luck = port, key, luck
        self._plan = random.Random(1000 * plan + number)
        self._draw = random.Random(1000 * luck.seed + number)
        self._session = self._model = ""
        self._sent: list[tuple[str, Work]] = []

    async def live(self, steps: int) -> Seen:
        """Do everything, to the last weights."""
        self._session = (await self._json("create_session", tags=[], sdk_version="0"))["session_id"]
        self._model = f"{self._session}:train:0"
        answer = await self._json(
            "create_model", session_id=self._session, model_seq_id=0, base_model=BASE_ALIAS,
            lora_config={"rank": RANKS[self.number % 8], "seed": self.number,
                         "train_attn": True, "train_mlp": self.number % 3 != 1,
                         "train_unembed": self.number % 3 != 2},
        )  # fmt: skip
        await self._result(answer["request_id"], "model")
        works = self._works(steps)
        sampling: list[asyncio.Task[None]] = []
        at = 0
        while at < len(works):
            count = self._draw.randint(1, self._luck.window)
            await self._window(at + 1, works[at : at + count], sampling)
            at += count
        self.now = "waits for its samples"
        await asyncio.gather(*sampling)
        await self._read_again()
        await self._download(len(works))
        return self.seen

    # --- what it does ---------------------------------------------------------------------------

    def _works(self, steps: int) -> list[Work]:
        loss, config = LOSSES[self.number % len(LOSSES)]
        works: list[Work] = []
        draw = self._plan

        def add_json(route: str, /, sampler: int | None = None, **body: Any) -> None:
            body |= {"model_id": self._model, "seq_id": len(works) + 1}
            works.append(Work(route, JSON, json.dumps(body).encode(), sampler))

        def add_data(data: list[Datum], loss: str = loss, forward_only: bool = False) -> None:
            body = encode(self._model, len(works) + 1, data, loss, config=config,
                          forward_only=forward_only)  # fmt: skip
            works.append(Work("forward_backward", PROTOBUF, body))

        for step in range(steps):
            for part in range(draw.choice((1, 1, 2))):
                seed = draw.randrange(2**31) + part
                add_data(_data(seed, draw.randint(1, 4), loss))
            if draw.random() < 0.06:
                bad = _data(step, 1, loss)  # fails, and so will the step
                bad[0].tokens[0] = VOCAB + 7
                add_data(bad)
            lr = draw.choice((1e-3, 3e-3))
            adam = {"learning_rate": lr, "beta2": 0.95, "grad_clip_norm": draw.choice((0.0, 0.5))}
            add_json("optim_step", adam_params=adam)
            if draw.random() < 0.35:
                add_json("save_weights_for_sampler", sampler=step, sampling_session_seq_id=step)
            if draw.random() < 0.15:
                add_data(_data(step, 2, loss), forward_only=True)
            if draw.random() < 0.1:
                add_json("save_weights", path=f"step-{step}")
        add_json("save_weights_external", path="end")
        return works

    async def _window(
        self, first: int, works: list[Work], sampling: list[asyncio.Task[None]]
    ) -> None:
        numbered = list(enumerate(works, first))
        self._draw.shuffle(numbered)
        ids = await asyncio.gather(*(self._submit(work) for _, work in numbered))
        for (number, work), id in zip(numbered, ids, strict=True):
            assert id == f"{self._model}:{number}", id
            self._sent.append((id, work))
        if self._draw.random() < self._luck.late:  # a request that arrives long after its time
            id, work = self._draw.choice(self._sent)
            assert await self._submit(work) == id
        for (number, work), id in zip(numbered, ids, strict=True):
            await self._result(id, f"{number:04d} {work.path}")
            if work.sampler is not None:
                for copy in range(2):
                    task = self._sample(work.sampler, copy)
                    sampling.append(asyncio.get_running_loop().create_task(task))

    async def _sample(self, sampler: int, copy: int) -> None:
        draw = random.Random(f"{self.number} {sampler} {copy}")
        tokens = [draw.randrange(FIRST_PLAIN_TOKEN, VOCAB) for _ in range(draw.randint(1, 12))]
        body = {
            "sampling_session_id": f"{self._session}:sample:{sampler}",
            "seq_id": copy,
            "num_samples": draw.randint(1, 3),
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            "sampling_params": {
                "max_tokens": draw.randint(1, 10), "seed": draw.randrange(2**31),
                "temperature": draw.choice((0.0, 0.7, 1.0)),
            },
            "prompt_logprobs": True,
        }  # fmt: skip
        id = await self._submit(Work("asample", JSON, json.dumps(body).encode()))
        await self._result(id, f"sample {sampler} {copy}")

    async def _read_again(self) -> None:
        """Results can be read as often as one likes."""
        for id, work in self._draw.sample(self._sent, min(5, len(self._sent))):
            name = f"{int(id.rpartition(':')[2]):04d} {work.path}"
            before = self.seen.results[name]
            await self._result(id, name)
            assert self.seen.results[name] == before, name

    async def _download(self, seq: int) -> None:
        path = f"/api/v1/training_runs/{self._model}/checkpoints/external_weights/end"
        urls = (await self._until_answered("GET", f"{path}/external_weights_urls")).json()["urls"]
        url = urls[WEIGHTS_FILE]
        answer = await self._until_answered("GET", "/" + url.split("/", 3)[3])
        tensors = load(answer.body)
        self.seen.weights = {
            name: hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).digest()
            for name, tensor in tensors.items()
        }
        # A model whose factors stayed zero would be equal too.
        assert any(np.abs(tensors[name]).max() > 0 for name in tensors if "lora_B" in name)

    # --- how it gets there ----------------------------------------------------------------------

    async def _submit(self, work: Work) -> str:
        """Send an operation until it is acknowledged; sometimes more often."""
        luck, draw = self._luck, self._draw
        copies = 1 + (draw.random() < luck.repeat) + (draw.random() < luck.repeat)
        self.now = f"sends {work.path}"
        answers = await asyncio.gather(
            *(self._post(work.path, work.body, work.content_type) for _ in range(copies))
        )
        ids = {answer["request_id"] for answer in answers}
        assert len(ids) == 1, ids
        return ids.pop()

    async def _post(self, path: str, body: bytes, content_type: str) -> Any:
        answer = await self._until_answered("POST", f"/api/v1/{path}", body, content_type)
        return answer.json()

    async def _json(self, path: str, **body: Any) -> Any:
        return await self._post(path, json.dumps(body).encode(), JSON)

    async def _until_answered(
        self, method: str, path: str, body: bytes = b"", content_type: str = JSON
    ) -> Answer:
        luck, draw = self._luck, self._draw
        while True:
            drop = draw.random() < luck.drop
            slow = draw.uniform(0.0, 0.3) if draw.random() < luck.slow else 0.0
            try:
                answer = await request(
                    self._port(), method, path, body, key=self._key, content_type=content_type,
                    drop_after=draw.choice((0.0, 0.001, 0.01, 0.1)) if drop else None, slow=slow,
                )  # fmt: skip
            except (*BROKEN, Dropped):
                await asyncio.sleep(RETRY_SECONDS * draw.random())
                continue
            if answer.status == 408:
                continue
            if answer.status == 503 and b"opening its base" in answer.body:
                continue  # there has been no engine for half a minute; the SDK comes again, too
            assert answer.status == 200, f"{path}: {answer.status} {answer.body[:500]!r}"
            return answer

    async def _result(self, id: str, name: str) -> None:
        self.now = f"waits for {id} ({name})"
        body = json.dumps({"request_id": id}).encode()
        answer = await self._until_answered("POST", "/api/v1/retrieve_future", body)
        self.seen.results[name] = answer.body.replace(self._session.encode(), b"SESSION")


async def everybody(
    tenants: list[Tenant], steps: int, seconds: float, beside: Awaitable[None] | None = None
) -> list[Seen]:
    """What all of them see, at once; `beside` runs until they are done."""
    other = None if beside is None else asyncio.ensure_future(beside)
    lives = [asyncio.ensure_future(tenant.live(steps)) for tenant in tenants]
    everything: list[asyncio.Future[Any]] = [*lives, *([other] if other is not None else [])]
    try:
        async with asyncio.timeout(seconds):
            pending: set[asyncio.Future[Any]] = set(everything)
            while not all(life.done() for life in lives):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    future.result()
        return [life.result() for life in lives]
    except TimeoutError:
        stuck = [t.now for t, life in zip(tenants, lives, strict=True) if not life.done()]
        raise AssertionError(f"after {seconds} s these are not done: {stuck}") from None
    finally:
        for future in everything:
            future.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


def _data(seed: int, count: int, loss: str) -> list[Datum]:
    """Data whose sampling policy is made up: near the uniform one, which seedling's is not far
    from."""
    data = random_data(seed, count, loss, lengths=(3, 24))
    rng = np.random.default_rng(seed)
    for datum in data:
        if "logprobs" in datum.loss_inputs:
            size = len(datum.tokens)
            inputs: Any = datum.loss_inputs
            inputs["logprobs"] = rng.normal(-8.0, 0.5, size).astype(np.float32)
    return data
