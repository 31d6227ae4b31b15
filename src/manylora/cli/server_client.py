"""Commands speak with a server by JSON over HTTP, with an API key."""

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from manylora.cli.options import KEY_VARIABLE
from manylora.types import ConfigError, ManyloraError
from manylora.types.host_names import is_loopback

JSON_TYPE = "application/json"
SECONDS = 120.0


class Refused(ManyloraError):
    """The server has refused a request; the message is in its words."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ServerUnreachable(ManyloraError):
    """No server answers, or it cannot answer now."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """A `Client` makes the calls of one user, and never prints a key."""

    def __init__(self, url: str, key_file: Path | None):
        """Read the key, from the environment where `key_file` is None. Raises ConfigError if there
        is no address of a server, or no key."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r}; write http://HOST:PORT, as `manylora serve` does")
        self.url = url.rstrip("/").removesuffix("/api/v1")
        self._key = _read_key(key_file)
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if is_loopback(parts.hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> Any:
        """Return the answer to a question; `path` goes from /api/v1 on."""
        return self.call("GET", path)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer to a request.

        Raises:
            Refused: the server refused it, in its own words.
            ServerUnreachable: the server may answer later.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}",
            data=data,
            method=method,
            headers={"X-API-Key": self._key, "Content-Type": JSON_TYPE},
        )
        try:
            with self._opener.open(request, timeout=SECONDS) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            words = _words(error.read())
            if error.code >= 500 or error.code == 429:
                raise ServerUnreachable(f"{self.url}: {words} (status {error.code})") from None
            raise Refused(words, error.code) from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerUnreachable(f"{self.url} does not answer: {reason}") from None
        except ValueError:
            raise ServerUnreachable(
                f"{self.url} does not answer as a manylora server does"
            ) from None


def _read_key(file: Path | None) -> str:
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: the key cannot be read: {error}") from None
    else:
        key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ConfigError(f"there is no API key; set {KEY_VARIABLE} or give --key-file")
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key holds characters that no key has")
    return key


def _words(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return "the server has refused the request"
