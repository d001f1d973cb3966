"""The ledger's rows of the command line and the server's settings."""

from __future__ import annotations

from router_replay.upstream import Attribute, Seam

_FLAGS = "SGLang lets plugins declare server flags"

SEAMS = (
    Seam(
        "server_args.ServerArgs.add_cli_args",
        ("parser",),
        "hooked by hooks.start.after_add_cli_args",
        "our flags belong on the server's command line",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.from_cli_args",
        ("args",),
        "hooked by hooks.start.after_from_cli_args",
        "our flags are read from the parsed command line, and SGLang drops what it does not know",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.resolve_once",
        (),
        "hooked by hooks.start.around_resolve_once",
        "fused routers must be kept away before the settings are final, and settings be refused once they are",
        _FLAGS,
    ),
    Seam(
        "arg_groups.overrides.resolving_view",
        ("server_args",),
        "called by hooks.start.around_resolve_once",
        "settings are refused by what the server resolved them to",
        _FLAGS,
    ),
    Seam(
        "arg_groups.fields.exec_.ExecFeatures.enable_return_routed_experts",
        None,
        "read by hooks.start.around_resolve_once",
        "SGLang keeps fused routers away only where it is set",
        _FLAGS,
    ),
)

ATTRIBUTES = (
    Attribute(
        "server_args.ServerArgs",
        "_resolution_finished",
        "read by hooks.start.around_resolve_once",
        "settings that are final cannot be changed any more",
        "tests/sglang_router_capture/test_start.py::test_engine_with_the_environment_variable",
    ),
)
