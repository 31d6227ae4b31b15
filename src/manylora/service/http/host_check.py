"""A request for another host, or whose end can be read in two ways, is refused at once. That is
before it is known whose it is. This module also knows under which address the server is known.

A browser that a hostile page has led here (DNS rebinding) sends that page's name as Host.
"""

from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.service.http.auth import header_values
from manylora.service.http.responses import error_response
from manylora.service.http_errors import WrongHost
from manylora.types import DataError, ManyloraError
from manylora.types.host_names import is_loopback

ANY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """`Names` say under which this server answers, and under which it tells others to come.

    Attributes:
        allowed: hosts in lower case, without ports; `*.example.org` = all below; `*` = any. The
            names of this machine for itself are always allowed.
        public_url: begins every address that is handed out; None = an allowed name that the client
            used, else the address that it reached.
    """

    allowed: Collection[str] = (ANY,)
    public_url: str | None = None

    def allows(self, host: str) -> bool:
        """Return whether requests for that host are answered."""
        return ANY in self.allowed or self.knows(host)

    def knows(self, host: str) -> bool:
        """Return whether that host is named, not just any."""
        if is_loopback(host) or host in self.allowed:
            return True
        return any(
            name.startswith("*.") and host.endswith(name[1:]) and host != name[1:]
            for name in self.allowed
        )

    def base_url(self, scope: Scope, given: str | None) -> str:
        """Return where this client's later requests are to go."""
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        scheme = scope.get("scheme", "http")
        if given is not None and self.knows(host_of(given)):
            return f"{scheme}://{given.lower()}"
        host, port = scope.get("server") or ("127.0.0.1", None)
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}" if port is None else f"{scheme}://{host}:{port}"


class HostCheck:
    """`HostCheck` is ASGI middleware: it sets `scope["state"]["base_url"]`, or refuses with 400."""

    def __init__(self, app: ASGIApp, *, names: Names) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        hosts = header_values(headers, b"host")
        error: ManyloraError | None = None
        ends = [header_values(headers, name) for name in (b"transfer-encoding", b"content-length")]
        if all(ends):
            error = DataError("Content-Length and Transfer-Encoding exclude each other; send one")
        elif len(hosts) > 1:
            error = DataError("send one Host header")
        given = hosts[0].decode("latin-1").strip() if hosts else None
        if error is None and not self.names.allows(host_of(given or "")):
            error = WrongHost(
                f"this server does not answer for host {(given or '')[:100]!r}; its operator may "
                "name it under allowed_hosts"
            )
        if error is not None:
            # Nothing behind this request on its connection is to be believed.
            response = error_response(error, scope["state"]["request_id"])
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        scope["state"]["base_url"] = self.names.base_url(scope, given)
        await self.app(scope, receive, send)


def host_of(given: str) -> str:
    """Return a Host header's host: without the port, in lower case, an IPv6 address bare."""
    host = given.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.rstrip(".")
