"""What a server was asked to do: its flags, its environment variables, and how its processes hear of it."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router_replay.errors import InputError

ENABLE_FLAG = "--enable-router-capture"
FORMAT_FLAG = "--router-capture-format"
CODEC_FLAG = "--router-capture-codec"
STORE_FLAG = "--router-capture-store"
UPSTREAM_FLAG = "--enable-return-routed-experts"
UPSTREAM_SETTING = "enable_return_routed_experts"

ENABLE_VARIABLE = "SGLANG_ROUTER_CAPTURE"
FORMAT_VARIABLE = "SGLANG_ROUTER_CAPTURE_FORMAT"
CODEC_VARIABLE = "SGLANG_ROUTER_CAPTURE_CODEC"
STORE_VARIABLE = "SGLANG_ROUTER_CAPTURE_STORE"

FORMATS = ("masks", "sglang")
INLINE = "inline:"
OWN = "http:"
"""The store of a server that serves its masks itself, at the address at which it listens."""
_EVERYWHERE = ("", "0.0.0.0", "::")

_ATTRIBUTE = "_router_capture"


def _new_start() -> str:
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class CaptureOptions:
    """What a server was asked to do.

    Attributes:
        format: 'masks' (a handle in `meta_info["routing_masks"]`) or 'sglang' (base64 int32 in
            `meta_info["routed_experts"]`).
        codec: of the rows; 'auto' is the smallest that the format can use.
        store: URL of the store that masks are put into.
        start: a name of this start of the server that no other has; all of its processes have the same.
    """

    format: str = "masks"
    codec: str = "auto"
    store: str = INLINE
    start: str = field(default_factory=_new_start, compare=False)

    def __post_init__(self) -> None:
        # Imported here: flags are declared in every server, and the codecs bring torch ops.
        from router_replay.masks import CODEC_NAMES, get_codec

        for name, value, known in (("format", self.format, FORMATS), ("codec", self.codec, ("auto", *CODEC_NAMES))):
            if value not in known:
                raise InputError(f"router capture {name} {value!r} is unknown: choose one of {', '.join(known)}")
        if self.needs_order and self.codec != "auto" and not get_codec(self.codec).keeps_order:
            raise InputError(
                f"{FORMAT_FLAG} sglang returns the experts in top-k order, which codec {self.codec!r} does not keep:"
                f" leave {CODEC_FLAG} away or choose 'ordered'"
            )
        if self.format == "sglang" and self.store != INLINE:
            raise InputError(
                f"{FORMAT_FLAG} sglang has its routes in the answer, and {STORE_FLAG} {self.store} would hold none:"
                " leave one of the two away"
            )

    @property
    def needs_order(self) -> bool:
        """Whether the format has the experts in the router's column order."""
        return self.format == "sglang"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> CaptureOptions | None:
        """Options that the environment asks for; None where it asks for none."""
        if environ.get(ENABLE_VARIABLE, "").lower() not in ("1", "true", "yes", "on"):
            return None
        return cls(
            environ.get(FORMAT_VARIABLE, "masks"),
            environ.get(CODEC_VARIABLE, "auto"),
            environ.get(STORE_VARIABLE, INLINE),
        )


def with_servers_url(chosen: CaptureOptions, config: Any) -> CaptureOptions:
    """The options, with the URL of the server itself in the place of `http:`.

    Args:
        config: the server's settings: `host`, `port` and `ssl_certfile`.

    Raises:
        InputError: it listens everywhere, which is no address.
    """
    if chosen.store != OWN:
        return chosen
    scheme, host = "https" if config.ssl_certfile else "http", config.host
    if host in _EVERYWHERE:
        raise InputError(
            f"{STORE_FLAG} {OWN} with --host {host}: say under which address trainers reach this server,"
            f" {STORE_FLAG} {scheme}://ADDRESS:{config.port}"
        )
    return replace(chosen, store=f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}")


def attach_for_a_start(server_args: Any, asked: CaptureOptions) -> CaptureOptions:
    """Give a server that starts now a name of its start that no other has, and the URL of its own store.

    The same settings may serve for one start after the other, and may have been made in another process.

    Raises:
        InputError: the server has no address that its store could have.
    """
    chosen = replace(asked, start=_new_start())
    if chosen.store == OWN:
        from sglang.srt.arg_groups.overrides import resolving_view

        chosen = with_servers_url(chosen, resolving_view(server_args))
    attach(server_args, chosen)
    return chosen


def attach(server_args: Any, chosen: CaptureOptions) -> None:
    """Let the options travel with a server's settings, which SGLang hands to every process of that server.

    The environment would tell the next server of the same process, too.
    """
    setattr(server_args, _ATTRIBUTE, chosen)


def of(server_args: Any) -> CaptureOptions | None:
    """Options that travel with a server's settings; None where nothing was asked for, or the settings are not final."""
    return getattr(server_args, _ATTRIBUTE, None)


def asked_on_command_line(argv: Sequence[str]) -> bool:
    """Whether a command line has a flag, maybe abbreviated, that asks for routes."""
    names = [argument.split("=")[0] for argument in argv if argument.startswith("--") and len(argument) > 2]
    flags = (ENABLE_FLAG, FORMAT_FLAG, CODEC_FLAG, STORE_FLAG, UPSTREAM_FLAG)
    return any(flag.startswith(name) for name in names for flag in flags)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our flags to the server's parser."""
    group = parser.add_argument_group("router capture (rollout routing replay)")
    group.add_argument(
        ENABLE_FLAG,
        action="store_true",
        help="Keep every token's top-k experts beside its KV cache entry, and return them for requests that say"
        f" return_routed_experts: true. Environment: {ENABLE_VARIABLE}=1.",
    )
    group.add_argument(
        FORMAT_FLAG,
        choices=FORMATS,
        default=None,
        help='masks (default): packed and checked, a handle in meta_info["routing_masks"]. sglang: exactly the format'
        f' of {UPSTREAM_FLAG}, base64 int32 in meta_info["routed_experts"]. Environment: {FORMAT_VARIABLE}.',
    )
    group.add_argument(
        CODEC_FLAG,
        metavar="CODEC",
        default=None,
        help="How rows are packed: bitset (one bit per expert), rank (the number of the expert set, smallest for most"
        " models), ordered (keeps the top-k column order), auto (default: the smallest that the format can use)."
        f" Environment: {CODEC_VARIABLE}.",
    )
    group.add_argument(
        STORE_FLAG,
        metavar="URL",
        default=None,
        help="Where masks wait for the trainer: inline: (default, in the answer itself), file:///dev/shm/r3 or any URL"
        " of fsspec (s3://bucket/prefix), ray:?address=auto (the object store of a Ray cluster), http: (this server"
        " serves them itself; http://ADDRESS:PORT where trainers know it by another address than --host)."
        f" Environment: {STORE_VARIABLE}.",
    )


def from_arguments(arguments: argparse.Namespace) -> CaptureOptions | None:
    """Options of a parsed command line; a flag wins over its environment variable. None where it asks for none.

    Raises:
        RouterReplayError: format or codec given without the flag that turns capture on, a codec that does not exist, or
            a combination of them that cannot be.
    """
    # A parser that was made before our flags were declared has none of them.
    format_, codec, store = (
        getattr(arguments, f"router_capture_{name}", None) for name in ("format", "codec", "store")
    )
    if not getattr(arguments, "enable_router_capture", False) and CaptureOptions.from_environment() is None:
        given = ((FORMAT_FLAG, format_), (CODEC_FLAG, codec), (STORE_FLAG, store))
        idle = [flag for flag, value in given if value is not None]
        if idle:
            raise InputError(f"{' and '.join(idle)} given without {ENABLE_FLAG}: add it, or take them away")
        return None
    return CaptureOptions(
        format_ or os.environ.get(FORMAT_VARIABLE, "masks"),
        codec or os.environ.get(CODEC_VARIABLE, "auto"),
        store or os.environ.get(STORE_VARIABLE, INLINE),
    )
