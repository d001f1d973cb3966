"""`GET /router_capture/status`, in the process of SGLang's HTTP server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

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

    # A process that starts one server after another has one application for all of them.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != PATH]
    app.add_api_route(PATH, router_capture_status, methods=["GET"])
