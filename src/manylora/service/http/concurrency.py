"""Only so many requests of a tenant are served at once. Each holds a connection, and its polls for
half a minute."""

from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.service.http.capacity import Capacity
from manylora.service.http.connections import OpenConnections, Peer
from manylora.service.http.responses import error_response
from manylora.service.http_errors import Backpressure


class Admission:
    """`Admission` is ASGI middleware behind the authentication. A tenant's connection works from
    here on, and is not closed for another's sake; a tenant with too many requests is answered 429.

    Sets `scope["state"]["stays"]`, for those that prove their right in another way.
    """

    def __init__(
        self, app: ASGIApp, *, most_each: int, connections: OpenConnections | None
    ) -> None:
        """Serve at most `most_each` requests of one tenant at once."""
        self.app = app
        self.connections = connections
        self.room = Capacity(1 << 62, most_each, "requests in hand")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["state"]["stays"] = partial(self._work, scope.get("client"))
        tenant = scope["state"].get("tenant")
        if tenant is None:
            await self.app(scope, receive, send)
            return
        with self.room.holding(f"tenant {tenant}") as held:
            try:
                held.grow(1)
            except Backpressure as error:
                await error_response(error, scope["state"]["request_id"])(scope, receive, send)
                return
            scope["state"]["stays"]()
            await self.app(scope, receive, send)

    def _work(self, client: Peer | None) -> None:
        line = None if self.connections is None else self.connections.find(client)
        if self.connections is not None and line is not None:
            self.connections.works(line)
