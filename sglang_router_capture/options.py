"""Server flags, and the environment variables that carry them to SGLang's child processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_replay.errors import InputError
from router_replay.masks import CODEC_NAMES, get_codec

ENABLE_FLAG = "--enable-router-capture"
FORMAT_FLAG = "--router-capture-format"
CODEC_FLAG = "--router-capture-codec"
UPSTREAM_FLAG = "--enable-return-routed-experts"

ENABLE_VARIABLE = "SGLANG_ROUTER_CAPTURE"
FORMAT_VARIABLE = "SGLANG_ROUTER_CAPTURE_FORMAT"
CODEC_VARIABLE = "SGLANG_ROUTER_CAPTURE_CODEC"

FORMATS = ("masks", "sglang")
CODECS = ("auto", *CODEC_NAMES)


@dataclass(frozen=True)
class CaptureOptions:
    """What a server was asked to do.

    Attributes:
        format: 'masks' (a handle in `meta_info["routing_masks"]`) or 'sglang' (base64 int32 in
            `meta_info["routed_experts"]`).
        codec: of the rows; 'auto' is the smallest that the format can use.
    """

    format: str = "masks"
    codec: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (("format", self.format, FORMATS), ("codec", self.codec, CODECS)):
            if value not in known:
                raise InputError(f"router capture {name} {value!r} is unknown: choose one of {', '.join(known)}")
        if self.needs_order and self.codec != "auto" and not get_codec(self.codec).keeps_order:
            raise InputError(
                f"{FORMAT_FLAG} sglang returns the experts in top-k order, which codec {self.codec!r} does not keep:"
                f" leave {CODEC_FLAG} away or choose 'ordered'"
            )

    @property
    def needs_order(self) -> bool:
        """Whether the format has the experts in the router's column order."""
        return self.format == "sglang"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> CaptureOptions | None:
        """Options of this process; None where capture is off."""
        if environ.get(ENABLE_VARIABLE, "").lower() not in ("1", "true", "yes", "on"):
            return None
        return cls(environ.get(FORMAT_VARIABLE, "masks"), environ.get(CODEC_VARIABLE, "auto"))

    def export(self) -> None:
        """Write the options into the environment, which child processes inherit."""
        os.environ[ENABLE_VARIABLE] = "1"
        os.environ[FORMAT_VARIABLE] = self.format
        os.environ[CODEC_VARIABLE] = self.codec


def asked_on_command_line(argv: Sequence[str]) -> bool:
    """Whether a command line has a flag that may turn capture on, abbreviations and a configuration file included."""
    names = [argument.split("=")[0] for argument in argv if argument.startswith("--") and len(argument) > 2]
    flags = (ENABLE_FLAG, FORMAT_FLAG, CODEC_FLAG, UPSTREAM_FLAG, "--config", "--help")
    return any(flag.startswith(name) for name in names for flag in flags) or "-h" in argv


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
        choices=CODECS,
        default=None,
        help="How rows are packed: bitset (one bit per expert), rank (the number of the expert set, smallest for most"
        " models), ordered (keeps the top-k column order), auto (default: the smallest that the format can use)."
        f" Environment: {CODEC_VARIABLE}.",
    )


def from_arguments(arguments: argparse.Namespace) -> CaptureOptions | None:
    """Options of a parsed command line; a flag wins over its environment variable. None where capture stays off.

    Raises:
        RouterReplayError: format or codec given without the flag that turns capture on, or a combination of them that
            cannot be.
    """
    ours = bool(arguments.enable_router_capture) or CaptureOptions.from_environment() is not None
    given = {FORMAT_FLAG: arguments.router_capture_format, CODEC_FLAG: arguments.router_capture_codec}
    if not ours:
        idle = [flag for flag, value in given.items() if value is not None]
        if idle:
            raise InputError(f"{' and '.join(idle)} given without {ENABLE_FLAG}: add it, or take them away")
        # Upstream's own flag alone keeps its format; who serves it changes.
        return CaptureOptions(format="sglang") if arguments.enable_return_routed_experts else None
    return CaptureOptions(
        given[FORMAT_FLAG] or os.environ.get(FORMAT_VARIABLE, "masks"),
        given[CODEC_FLAG] or os.environ.get(CODEC_VARIABLE, "auto"),
    )
