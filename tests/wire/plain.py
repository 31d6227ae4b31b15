"""The plain API as a client without any SDK speaks it, and runs for its tests."""

import json
import time
from typing import Any

import httpx

from tests.wire.server import DEVELOPER, Server

ENDED = ("completed", "failed", "cancelled")
END_SECONDS = 120.0


def lines(*, start: int = 0, count: int = 48) -> str:
    """Sums as prompts and completions, one a line."""
    pairs = [(number % 8, (start + number) // 8) for number in range(count)]
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def entry(name: str, *, rank: int = 4, steps: int = 12, **settings: Any) -> dict[str, Any]:
    """An adapter as in a run file."""
    return {
        "name": name,
        "lora": {"rank": rank, "alpha": 3.0 * rank},
        "optimizer": {"lr": 2e-3},
        "sft": {"train": f"{name}.jsonl", "batch_size": 4, "max_steps": steps},
        "save_every": 5,
        **settings,
    }


class Plain:
    """One tenant's calls."""

    def __init__(self, server: Server, key: str = DEVELOPER) -> None:
        self._server, self._key = server, key

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """One request; `path` from /api/v1 on."""
        return httpx.request(
            method,
            f"{self._server.url}/api/v1/{path}",
            json=body,
            headers={"X-API-Key": self._key},
            timeout=60,
            trust_env=False,
        )

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """The answer to a request that must be taken."""
        reply = self.call(method, path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def submit(self, adapter: dict[str, Any], train: str, evaluation: str | None = None) -> str:
        """Submit a run; its id."""
        data = {"train": train, **({} if evaluation is None else {"eval": evaluation})}
        return self.ok("POST", "runs", {"adapter": adapter, "data": data})["id"]

    def until(self, run_id: str, *statuses: str, step: int = 0) -> dict[str, Any]:
        """The run once it has one of these statuses and has come so far."""
        end = time.monotonic() + END_SECONDS
        while True:
            run = self.ok("GET", f"runs/{run_id}")
            if run["status"] in (statuses or ENDED) and run["step"] >= step:
                return run
            assert run["status"] not in ENDED, run
            assert time.monotonic() < end, run
            time.sleep(0.05)
