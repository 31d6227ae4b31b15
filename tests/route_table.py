"""The application's own table of routes is read here, to be compared with a matrix of calls.

A matrix asks every route once for each way of authentication; what it leaves out on purpose is
named here, and `unasked` finds a route that is neither asked nor named.
"""

from collections.abc import Iterable, Iterator

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path

from manylora.service.http.routes_refused import REFUSED

Call = tuple[str, str]

# No tenant's key opens these: health, the document, figures, and addresses that carry their own
# proof.
OPEN: frozenset[Call] = frozenset(
    (
        ("GET", "/openapi.json"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/api/v1/healthz"),
        ("GET", "/api/v1/archives/{token}"),
        ("GET", "/api/v1/external_weights/{token}"),
    )
)
# Known and not served; a test for each asks it.
NOT_SERVED: frozenset[Call] = frozenset(
    (method, f"/api/v1{path.replace(':path', '')}") for method, path, _ in REFUSED
)


def routes(app: FastAPI) -> Iterator[Call]:
    """Yield method and path of everything that the application answers, HEAD apart."""
    for route in iter_route_contexts(app.routes):
        assert route.path is not None and route.methods, f"{route.original_route}: another kind"
        for method in route.methods - {"HEAD"}:
            yield method, compile_path(route.path)[1]


def unasked(app: FastAPI, asked: Iterable[Call]) -> list[Call]:
    """Return the routes, neither open nor refused, that none of these calls takes.

    Args:
        asked: methods and paths as a client sends them.
    """
    known = set(asked)
    return sorted(
        (method, path)
        for method, path in set(routes(app)) - OPEN - NOT_SERVED
        if not any(method == m and compile_path(path)[0].match(p) for m, p in known)
    )


def unknown(app: FastAPI) -> frozenset[Call]:
    """Return what is left out by name, and is no route at all."""
    return (OPEN | NOT_SERVED) - frozenset(routes(app))
