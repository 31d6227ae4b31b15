"""These arms of `benchmarks.service` go over HTTP: latencies, idle pollers, memory, throughput."""

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tinker

from manylora.types import Datum
from tests.family import engine_processes
from tests.wire.data import random_data, to_sdk
from tests.wire.raw import encode
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server
from tests.wire.sockets import JSON, PROTOBUF, Connection

ADAM = {"learning_rate": 1e-4, "beta2": 0.95}
TOKENS = 64


class Client:
    """A `Client` has one connection that stays open."""

    def __init__(self, server: Server):
        self.connection = Connection(server.port, DEVELOPER)
        self.model = ""
        self.seq = 0

    async def open(self, rank: int = 8) -> None:
        session = (await self.post("create_session", tags=[], sdk_version="0"))["session_id"]
        made = await self.post(
            "create_model",
            session_id=session,
            model_seq_id=0,
            base_model=BASE_ALIAS,
            lora_config={"rank": rank, "seed": 1},
        )
        self.model = made["model_id"]
        await self.result(made["request_id"])

    async def post(self, path: str, **body: Any) -> Any:
        answer = await self.connection.request(
            "POST", f"/api/v1/{path}", json.dumps(body).encode(), JSON
        )
        assert answer.status == 200, answer.body
        return answer.json()

    async def result(self, request_id: str) -> bytes:
        while True:
            body = json.dumps({"request_id": request_id}).encode()
            answer = await self.connection.request("POST", "/api/v1/retrieve_future", body, JSON)
            if answer.status == 200:
                assert not answer.body.startswith(b'{"error'), answer.body
                return answer.body
            assert answer.status == 408, answer.body

    async def data(self, data: Sequence[Datum]) -> str:
        self.seq += 1
        body = encode(self.model, self.seq, data)
        answer = await self.connection.request("POST", "/api/v1/forward_backward", body, PROTOBUF)
        assert answer.status == 200, answer.body
        return answer.json()["request_id"]

    async def step(self) -> str:
        self.seq += 1
        answer = await self.post(
            "optim_step", model_id=self.model, seq_id=self.seq, adam_params=ADAM
        )
        return answer["request_id"]


def tokens(count: int, seed: int = 0) -> list[Datum]:
    """Make one datum of `count` tokens."""
    return random_data(seed, 1, lengths=(count, count + 1))


async def poll_forever(client: Client, request_id: str) -> None:
    """Poll as the SDK does, for a result that does not come."""
    try:
        while True:
            await client.result(request_id)
    finally:
        client.connection.close()


async def idle_pollers(server: Server, count: int) -> list[asyncio.Task[None]]:
    """Start clients that wait for operations behind a gap."""
    owner = Client(server)
    await owner.open(rank=1)
    owner.seq = 1  # number 1 never comes
    tasks = []
    for _ in range(count):
        id = await owner.step()
        client = Client(server)
        tasks.append(asyncio.create_task(poll_forever(client, id)))
    owner.connection.close()
    await asyncio.sleep(1.0)
    return tasks


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def resident_bytes(pid: int) -> int:
    """Return the bytes of memory that belong to a server and its engine alone."""
    total = 0
    for one in (pid, *engine_processes(pid)):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        anonymous = next(line for line in lines if line.startswith("Anonymous:"))
        total += int(anonymous.split()[1]) * 1024
    return total


async def active_round(clients: Sequence[Client], steps: int) -> dict[str, list[float]]:
    """Train `steps` steps with each client; return seconds of submits, and of whole steps."""
    submits: list[float] = []
    whole: list[float] = []

    async def timed(call: Callable[[], Awaitable[str]]) -> str:
        began = time.perf_counter()
        id = await call()
        submits.append(time.perf_counter() - began)
        return id

    async def live(client: Client, number: int) -> None:
        data = tokens(TOKENS, number)
        for _ in range(steps):
            began = time.perf_counter()
            ids = [await timed(lambda: client.data(data)), await timed(client.step)]
            for id in ids:
                await client.result(id)
            whole.append(time.perf_counter() - began)

    await asyncio.gather(*(live(client, number) for number, client in enumerate(clients)))
    return {"submit": submits, "step": whole}


# A poll is in the server's hand for so long, whether or not its client has gone, and a tenant may
# have only so many there.
LINGERING_SECONDS = 32.0


async def latencies(server: Server, pollers: int, rounds: int, steps: int = 10) -> dict[str, Any]:
    """Measure eight active clients with and without idle ones, in turns."""
    clients = [Client(server) for _ in range(8)]
    for client in clients:
        await client.open()
    await active_round(clients, steps)
    seen: dict[str, dict[str, list[float]]] = {
        arm: {"submit": [], "step": [], "cpu": []} for arm in ("alone", "polled")
    }
    for _ in range(rounds):
        for arm, kept in seen.items():
            tasks = await idle_pollers(server, pollers) if arm == "polled" else []
            before = cpu_seconds(server.pid)
            found = await active_round(clients, steps)
            kept["cpu"].append((cpu_seconds(server.pid) - before) / (8 * steps))
            kept["submit"] += found["submit"]
            kept["step"].append(statistics.median(found["step"]))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if tasks:
                await asyncio.sleep(LINGERING_SECONDS)
    for client in clients:
        client.connection.close()
    polled, alone = seen["polled"], seen["alone"]
    return {
        "pollers": pollers,
        "submit_ms": summary([1e3 * s for s in polled["submit"]]),
        "submit_ms_without_pollers": summary([1e3 * s for s in alone["submit"]]),
        "step_ms": summary([1e3 * s for s in polled["step"]]),
        "step_ms_without_pollers": summary([1e3 * s for s in alone["step"]]),
        "cpu_ms_per_step": summary([1e3 * s for s in polled["cpu"]]),
        "cpu_ms_per_step_without_pollers": summary([1e3 * s for s in alone["cpu"]]),
    }


async def memory(server: Server, requests: int) -> dict[str, Any]:
    """Measure memory as eight clients send requests: after a fifth of them and in the end."""
    clients = [Client(server) for _ in range(8)]
    for client in clients:
        await client.open(rank=4)
    data = tokens(8)
    readings: list[int] = []
    sent = 0

    async def live(client: Client) -> None:
        nonlocal sent
        while sent < requests:
            sent += 4
            for id in (await client.data(data), await client.step()):
                await client.result(id)

    for part in range(1, 6):
        goal, requests = requests, requests * part // 5
        await asyncio.gather(*(live(client) for client in clients))
        requests = goal
        readings.append(resident_bytes(server.pid))
    for client in clients:
        client.connection.close()
    return {
        "requests": sent,
        "mib_by_fifths": [round(size / 2**20, 1) for size in readings],
        "growth_bytes_per_request": (readings[-1] - readings[0]) / (0.8 * sent),
    }


def sdk_work(service: tinker.ServiceClient, seed: int, steps: int) -> Callable[[], float]:
    """Open an SDK client that is ready to train; what is returned trains, and says how long."""
    client = service.create_lora_training_client(BASE_ALIAS, rank=8, seed=seed).result()
    data = to_sdk(tokens(TOKENS, seed))
    adam = tinker.AdamParams(learning_rate=1e-4)

    def work(count: int = steps) -> float:
        began = time.perf_counter()
        for _ in range(count):
            futures = [client.forward_backward(data, "cross_entropy"), client.optim_step(adam)]
            for future in futures:
                future.result()
        return time.perf_counter() - began

    work(2)
    return work


def throughput(servers: dict[str, Server], rounds: int, steps: int) -> dict[str, Any]:
    """Measure eight clients of the SDK at once and one after another, on each server in turns."""
    services = {
        name: [tinker.ServiceClient(base_url=server.url, api_key=DEVELOPER) for _ in range(8)]
        for name, server in servers.items()
    }
    works = {
        name: [sdk_work(service, number, steps) for number, service in enumerate(own)]
        for name, own in services.items()
    }
    rates: dict[str, dict[str, list[float]]] = {
        name: {"one after another": [], "at once": []} for name in servers
    }
    with ThreadPoolExecutor(8) as pool:
        for _ in range(rounds):
            for name, own in works.items():
                total = len(own) * steps * TOKENS
                rates[name]["one after another"].append(total / sum(work() for work in own))
                began = time.perf_counter()
                for future in [pool.submit(work) for work in own]:
                    future.result()
                rates[name]["at once"].append(total / (time.perf_counter() - began))
    for service in (service for own in services.values() for service in own):
        service.close("success").result(30)
    alone = rates[next(iter(servers))]["one after another"]
    return {
        "tokens_per_request": TOKENS,
        **{
            name: {
                **{f"tokens_per_second {arm}": summary(values) for arm, values in own.items()},
                "gain": _ratio(own["at once"], own["one after another"]),
                "gain over the first server one after another": _ratio(own["at once"], alone),
            }
            for name, own in rates.items()
        },
    }


def _ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    return summary([a / b for a, b in zip(over, under, strict=True)])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the 10th and 90th percentile, and the number of values."""
    low, middle, high = np.percentile(np.asarray(values), [10, 50, 90])
    return {
        "median": round(float(middle), 4),
        "p10": round(float(low), 4),
        "p90": round(float(high), 4),
        "count": len(values),
    }
