"""A server's start without the server: what its flags would be refused for, and what capture would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router_replay.errors import RouterReplayError
from router_replay.masks import RoutingGeometry, choose_codec
from sglang_router_capture import entry, live_refusals, options, refusals, wrappers
from sglang_router_capture.options import CaptureOptions


@dataclass(frozen=True)
class Preview:
    """What would become of a server's start.

    Attributes:
        asked: whether the flags, or this process's environment, ask for routes; if not, the rest is as if they did.
        options: what is asked for.
        refused: a sentence for everything that would stop the server. A live server looks further: at its kernels, at
            its KV pools and at the model's routers.
        geometry: of the model's routes; None where its configuration cannot be read.
        codec: by which its rows would be packed; None likewise.
    """

    asked: bool
    options: CaptureOptions
    refused: tuple[str, ...]
    geometry: RoutingGeometry | None = None
    codec: str | None = None

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one KV slot's row."""
        if self.geometry is None or self.codec is None:
            return None
        return choose_codec(self.codec, self.geometry).row_bytes(self.geometry)


def preview(argv: Sequence[str]) -> Preview:
    """Parse and resolve a server's flags by SGLang's own code, and hold them against everything that we refuse.

    Args:
        argv: as after `python -m sglang.launch_server`.

    Raises:
        SystemExit: SGLang's parser does not take the flags; it has said why.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import prepare_server_args

    # Our flags join SGLang's; the hook on the settings, which would end this process, stays out.
    wrappers.apply({path: hook for path, hook in entry.HOOKS.items() if not path.endswith(".resolve_once")})
    server_args = prepare_server_args(list(argv))
    found = options.of(server_args) or CaptureOptions.from_environment()
    if found is None and getattr(server_args, options.UPSTREAM_SETTING, False):
        found = CaptureOptions(format="sglang")
    chosen = found or CaptureOptions()
    server_args.enable_return_routed_experts = True
    try:
        server_args.resolve_once()
    except Exception as error:
        # SGLang refuses settings by exceptions of every kind.
        return Preview(found is not None, chosen, (f"SGLang itself: {type(error).__name__}: {error}",))
    config, refused = resolving_view(server_args), []
    try:
        refused = _refused(config, options.with_servers_url(chosen, config))
    except RouterReplayError as error:
        refused.append(str(error))
    geometry, codec = None, None
    try:
        model_config = ModelConfig.from_server_args(server_args)
        live_refusals.require_generation(model_config)
        geometry = RoutingGeometry.from_hf_config(model_config.hf_text_config)
        codec = choose_codec(chosen.codec, geometry, order=chosen.needs_order).name
    except RouterReplayError as error:
        refused.append(str(error))
    except Exception as error:
        refused.append(f"SGLang itself: the model's configuration: {type(error).__name__}: {error}")
    return Preview(found is not None, chosen, tuple(refused), geometry, codec)


def _refused(config: Any, chosen: CaptureOptions) -> list[str]:
    """Every refusal of settings, not only the first, as a server's start would word it."""
    refused = []
    for check in refusals.checks(config, chosen):
        try:
            check()
        except RouterReplayError as error:
            refused.append(str(error))
    return refused
