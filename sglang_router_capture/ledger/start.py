"""The ledger's rows of the command line and the server's settings."""

from __future__ import annotations

from router_replay.upstream import At, Attribute, Seam

_FLAGS = "SGLang lets plugins declare server flags"
_REPORTS = "SGLang lets a plugin ask every scheduler what it runs"

SEAMS = (
    Seam(
        "server_args.ServerArgs.add_cli_args",
        ("parser",),
        "hooked by entry.after_add_cli_args",
        "our flags belong on the server's command line",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.from_cli_args",
        ("args",),
        "hooked by entry.after_from_cli_args",
        "our flags are read from the parsed command line, and SGLang drops what it does not know",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.resolve_once",
        (),
        "hooked by entry.around_resolve_once",
        "every process of a server comes there before it uses its settings, which say whether routes are wanted",
        _FLAGS,
    ),
    Seam(
        "server_args.prepare_server_args",
        ("argv",),
        "called by preview.preview",
        "flags are read as a server reads them, without one",
        _FLAGS,
    ),
    Seam(
        "configs.model_config.ModelConfig.from_server_args",
        ("server_args",),
        "called by preview.preview",
        "what capture would cost is in the model's configuration",
        _FLAGS,
    ),
    Seam(
        "arg_groups.overrides.resolving_view",
        ("server_args",),
        "called by takeover.begin",
        "settings are refused by what the server resolved them to",
        _FLAGS,
    ),
    Seam(
        "arg_groups.overrides.declare_resolution",
        ("server_args", "source"),
        "called by takeover.begin",
        "a server that a trainer starts has final settings before SGLang loads its plugins",
        "SGLang loads plugins before it resolves settings",
    ),
    Seam(
        "arg_groups.fields.exec_.ExecFeatures.enable_return_routed_experts",
        None,
        "read by entry.around_resolve_once",
        "SGLang keeps fused routers away only where it is set",
        _FLAGS,
    ),
    Seam(
        "arg_groups.fields.parallel.Parallel.nnodes",
        None,
        "read by refusals.checks",
        "the handles of stored masks are known on one node alone",
        "handles go with SGLang's own messages",
    ),
    *(
        Seam(
            f"arg_groups.fields.serving.Serving.{name}",
            None,
            "read by takeover.begin",
            "a server that serves its masks itself names its address in their handles",
            "never: it is where a server listens",
        )
        for name in ("host", "port", "ssl_certfile")
    ),
    Seam(
        "environ.Envs.SGLANG_RUST_SERVER",
        None,
        "read by refusals.require_python_server",
        "SGLang's server in Rust takes the place of processes that carry our part of an answer",
        "that server is run in our tests",
    ),
    Seam(
        "environ.envs",
        None,
        "read by refusals.require_python_server",
        "it holds the environment variables as SGLang reads them",
        "that server is run in our tests",
    ),
    Seam(
        "runtime_context.get_server_args",
        (),
        "called by hooks.process.options_of_this_process",
        "what a server was asked for travels with its settings, and a process may have had several servers",
        "SGLang tells plugins which server a process belongs to",
    ),
    Seam(
        "entrypoints.engine.Engine._launch_scheduler_processes",
        ("server_args",),
        "hooked by hooks.start.around_launch_scheduler_processes",
        "whoever starts a server waits there for what each scheduler says of itself",
        _REPORTS,
    ),
    Seam(
        "entrypoints.engine.SchedulerInitResult",
        None,
        "read by hooks.start.around_launch_scheduler_processes",
        "it holds what the schedulers said, and the processes that are to end with a start that failed",
        _REPORTS,
    ),
    Seam(
        "managers.scheduler.Scheduler.get_init_info",
        (),
        "hooked by hooks.start.after_get_init_info",
        "each scheduler says there which capturer it runs",
        _REPORTS,
    ),
    Seam(
        (At("managers.data_parallel_controller.DataParallelController.get_init_info", ">=0.5.23"),),
        (),
        "hooked by hooks.start.after_get_init_info_of_controller",
        "the controller of data-parallel schedulers keeps what they said, and passes on a part of it",
        _REPORTS,
    ),
    Seam(
        "managers.data_parallel_controller.SCHEDULER_PIDS_ARG",
        None,
        "read by hooks.start.around_launch_scheduler_processes",
        "it tells a controller that passes on nothing from a scheduler that is not ours",
        _REPORTS,
    ),
    Seam(
        "utils.kill_process_tree",
        ("parent_pid",),
        "called by hooks.start.around_launch_scheduler_processes",
        "the processes of a start that failed must end with it",
        _REPORTS,
    ),
)

ATTRIBUTES = (
    Attribute(
        "managers.data_parallel_controller.DataParallelController",
        "_scheduler_init_infos",
        "read by hooks.start.after_get_init_info_of_controller",
        "it holds what each data-parallel scheduler said of itself",
        "tests/sglang_router_capture/test_reports.py::test_a_controller_passes_on_what_its_schedulers_said",
        releases=">=0.5.23",
    ),
    Attribute(
        "server_args.ServerArgs",
        "_resolution_finished",
        "read by entry.around_resolve_once",
        "settings that are final cannot be changed any more",
        "tests/sglang_router_capture/test_launchers.py::test_engines_of_one_process",
    ),
)
