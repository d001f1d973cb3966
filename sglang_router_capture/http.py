"""`/router_capture/status` and `/router_capture/masks/`, in the process of SGLang's HTTP server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from router_replay.masks.stores.served import ROUTE, ServedDirectory

PATH = "/router_capture/status"
STATE_KEY = "router_capture"
"""Key of a scheduler's status in SGLang's internal state, by which it comes to `/server_info`, too."""


def add_route(app: Any, internal_states: Callable[[], Awaitable[list[dict[str, Any]]]]) -> None:
    """Let a FastAPI application answer `PATH` with `{"schedulers": [status, ...]}`; in the place of an earlier route.

    Args:
        internal_states: asks every scheduler that answers requests (one for each data-parallel rank).
    """

    async def router_capture_status() -> dict[str, Any]:
        return {"schedulers": [state.get(STATE_KEY) for state in await internal_states()]}

    _add(app, PATH, router_capture_status, ["GET"])


def add_masks_route(app: Any, served: ServedDirectory) -> None:
    """Let a FastAPI application give and remove masks by their ids, under `ROUTE`; in the place of an earlier route.

    SGLang's --api-key guards it as it guards SGLang's own routes.
    """
    from fastapi import Request, Response

    # No coroutine: FastAPI has threads for what reads files.
    def router_capture_masks(entry_id: str, request: Request) -> Response:
        found = served.respond(request.method, entry_id, request.headers.get("range"))
        return Response(found.body, found.status, found.headers)

    # FastAPI takes annotations that are text for names of the module.
    router_capture_masks.__annotations__ = {"entry_id": str, "request": Request, "return": Response}
    _add(app, ROUTE + "{entry_id}", router_capture_masks, ["GET", "HEAD", "DELETE"])


def _add(app: Any, path: str, endpoint: Callable[..., Any], methods: list[str]) -> None:
    # A process that starts one server after another has one application for all of them.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != path]
    app.add_api_route(path, endpoint, methods=methods, response_model=None)
