"""The server knows these routes of the Tinker wire but does not serve them; it refuses by name.

With 400, not 501: the SDK tries a 5xx again for five minutes.
"""

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from manylora.service.http.context import Routes, TheCaller
from manylora.types import Unsupported

router = Routes(prefix="/api/v1", include_in_schema=False)

# method, path, what to do instead or why.
REFUSED = (
    ("POST", "/forward", "use forward_backward with forward_only, as the SDK does since 0.25.0"),
    ("POST", "/unload_model", "finish the session; idle models are paged out by themselves"),
    ("POST", "/retrieve_futures", "use retrieve_future; client/config switches this off"),
    ("POST", "/join_sampling_session", "client/config switches this off"),
    ("POST", "/cancel_future", "client/dynamic_config switches this off"),
    ("POST", "/create_custom_loss", "custom losses run in the client; client/config says so"),
    ("GET", "/sessions", "list training runs instead"),
    ("GET", "/sessions/{session_id}", "list training runs instead"),
    ("PUT", "/sessions/{session_id}/project", "there are no projects"),
    ("POST", "/sessions/search", "list training runs instead"),
    ("GET", "/sessions/{session_id}/trace_export", "no traces are kept"),
    ("POST", "/sessions/{session_id}/trace_export", "no traces are kept"),
    ("GET", "/audit", "no audit log is kept"),
    ("POST", "/audit", "no audit log is kept"),
    ("GET", "/billing/{what:path}", "nothing is billed"),
    ("POST", "/billing/{what:path}", "nothing is billed"),
    ("POST", "/auth/token", "send the key itself in X-API-Key"),
    ("GET", "/auth/apikey/me", "manage keys with `manylora keys`"),
    ("DELETE", "/auth/apikey/me", "manage keys with `manylora keys`"),
)


def _refusing(method: str, path: str, why: str) -> Callable[..., Awaitable[Response]]:
    async def refuse(caller: TheCaller) -> Response:
        raise Unsupported(f"{method} {router.prefix}{path} is not supported: {why}")

    return refuse


for _method, _path, _why in REFUSED:
    router.add_api_route(
        _path, _refusing(_method, _path, _why), methods=[_method], response_model=None
    )
