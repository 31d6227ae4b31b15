"""The application's own table of routes, so that a matrix of them can be held against it.

A matrix asks every route once for each way that there is in; what it leaves out on purpose is named
here, and a route that is neither is found by `unasked`.
"""

from collections.abc import Iterable, Iterator

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path

from manylora.service.http.routes_refused import REFUSED

Call = tuple[str, str]

# Nothing here is a tenant's by its key: health, the document, figures, and addresses that carry
# their own proof.
OPEN: frozenset[Call] = frozenset((
    ("GET", "/openapi.json"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/api/v1/healthz"),
    ("GET", "/api/v1/archives/{token}"),
    ("GET", "/api/v1/external_weights/{token}"),
))  # fmt: skip
# Known and not served; each is asked by a test of its own.
NOT_SERVED: frozenset[Call] = frozenset(
    (method, f"/api/v1{path.replace(':path', '')}") for method, path, _ in REFUSED
)


def routes(app: FastAPI) -> Iterator[Call]:
    """Method and path of everything that the application answers, an answer to HEAD apart."""
    for route in iter_route_contexts(app.routes):
        assert route.path is not None and route.methods, f"{route.original_route}: another kind"
        for method in route.methods - {"HEAD"}:
            yield method, compile_path(route.path)[1]


def unasked(app: FastAPI, asked: Iterable[Call]) -> list[Call]:
    """The routes, neither open nor refused, that none of these calls takes.

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
    """What is left out by name, and is no route at all."""
    return (OPEN | NOT_SERVED) - frozenset(routes(app))
