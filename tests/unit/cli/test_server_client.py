"""The commands' HTTP client: whose words an error has, and where a key goes."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from manylora.cli.server_client import Client, Refused, ServerUnreachable
from manylora.types import ConfigError

KEY = "tml-very-secret"


class Echo(BaseHTTPRequestHandler):
    """Answers by the path; notes what came."""

    seen: list[tuple[str, str | None, bytes]]
    elsewhere = ""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, self.headers["X-API-Key"], body))
        name = self.path.rpartition("/")[2]
        status = int(name) if name.isdecimal() else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.elsewhere)
        answers = {"garbage": b"<html>", "502": b"bad gateway"}
        content = answers.get(name, json.dumps({"error": f"no {name}", "ok": 1}).encode())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    Echo.seen = []
    with HTTPServer(("127.0.0.1", 0), Echo) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def client(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for this machine's own servers
    Echo.elsewhere = f"http://127.0.0.1:{server.server_port}/taken"
    return Client(f"http://127.0.0.1:{server.server_port}/", None)


def test_a_request_and_its_answer(client: Client) -> None:
    assert client.call("POST", "runs", {"a": "ü"}) == {"error": "no runs", "ok": 1}
    assert Echo.seen == [("/api/v1/runs", KEY, json.dumps({"a": "ü"}).encode())]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_the_server_refuses(client: Client, status: int) -> None:
    with pytest.raises(Refused, match=f"no {status}") as caught:
        client.get(str(status))
    assert caught.value.status == status


@pytest.mark.parametrize("name", ["429", "500", "503", "502", "garbage"])
def test_what_may_pass(client: Client, name: str) -> None:
    with pytest.raises(ServerUnreachable) as caught:
        client.get(name)
    assert KEY not in str(caught.value)


def test_a_key_follows_no_redirect(client: Client) -> None:
    with pytest.raises(Refused):
        client.get("302")
    assert [path for path, _, _ in Echo.seen] == ["/api/v1/302"]


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="TINKER_API_KEY"):
        Client("http://127.0.0.1:1", None)
    (tmp_path / "key").write_text(f" {KEY}\n")
    Client("http://127.0.0.1:1", tmp_path / "key")
    (tmp_path / "odd").write_text(f"{KEY}\nInjected: header")
    for file in ("none", "odd"):
        with pytest.raises(ConfigError) as caught:
            Client("http://127.0.0.1:1", tmp_path / file)
        assert KEY not in str(caught.value)
    for url in ("127.0.0.1:8000", "ftp://x", "file:///etc/passwd", ""):
        with pytest.raises(ConfigError, match="--url"):
            Client(url, tmp_path / "key")
