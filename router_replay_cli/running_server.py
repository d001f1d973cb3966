"""What `r3 doctor --server` says of a server that runs."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_TIMEOUT_S = 30.0


def print_running_server(console: Console, url: str, wanted_format: str | None) -> bool:
    """Tell which capturer a server runs, by what it says itself.

    Args:
        wanted_format: of the routes, which a stack decodes; None for any.

    Returns:
        Whether it captures as it should.
    """
    console.print(f"\nThe server {url}", style="bold", markup=False)
    try:
        schedulers = _get(url.rstrip("/") + "/router_capture/status")["schedulers"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            console.print(
                "  [red]not ours[/]: it has no /router_capture/status, so that its routes, if any, come from SGLang's"
                " own capture: install this package where it runs, and ask it for routes before it starts"
            )
        else:
            console.print(f"  [red]no answer[/]: HTTP status {error.code}")
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        console.print("  [red]no answer[/]:", end=" ")
        console.print(f"{type(error).__name__}: {error}", markup=False)
        return False
    if not schedulers:
        console.print("  [red]captures nothing[/]: it names no scheduler")
        return False
    fits = True
    for number, status in enumerate(schedulers):
        fits &= _print_scheduler(console, number, status, wanted_format)
    return fits


def _print_scheduler(console: Console, number: int, status: Any, wanted_format: str | None) -> bool:
    if status is None:
        console.print(f"  [red]captures nothing[/] scheduler {number}: it was not asked for routes")
        return False
    rows = status["rows"]
    returned = f"{rows['returned']} rows returned"
    unknown = rows["returned_without_routes"] + rows["returned_unrecorded"]
    if unknown:
        returned += f", {unknown} of them unknown"
    text = f"scheduler {number}: {status['capturer']}, format {status['format']}, codec {status['codec']}, {returned}"
    if wanted_format in (None, status["format"]):
        console.print(f"  [green]captures[/] {text}")
        return True
    console.print(
        f"  [red]another format[/] {text}: the stack reads format {wanted_format}, which the server has to be told"
        f" before it starts: SGLANG_ROUTER_CAPTURE_FORMAT={wanted_format}"
    )
    return False


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        return json.load(answer)
