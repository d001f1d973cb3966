"""Starts SGLang as trainers do, with nothing on the command line: `python launchers.py WAY MODEL`.

Each way prints one line per server, `RESULT` and JSON: what a request got, and what the server says of itself.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
import sglang.srt.entrypoints.engine as engine_module
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import kill_process_tree

from cpu_engines.sglang.ports import free_port

SETTINGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.05,
    "skip_tokenizer_init": True,
    "max_total_tokens": 1024,
    "sleep_on_idle": True,
    "log_level": "info",
}
PROMPT = [5, 6, 7, 8]
REQUEST = {
    "input_ids": PROMPT,
    "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
    "return_routed_experts": True,
}


def slime_and_miles(model: str) -> None:
    """A process of its own for `launch_server`, and requests over HTTP; the settings ask for routes."""
    multiprocessing.set_start_method("spawn", force=True)
    port = free_port()
    server_args = ServerArgs(
        model_path=model, port=port, enable_return_routed_experts=True, tokenizer_worker_num=2, **SETTINGS
    )
    process = multiprocessing.Process(target=launch_server, args=(server_args,))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(f"{url}/health_generate"):
            if not process.is_alive():
                sys.exit("the server ended before it could answer")
            time.sleep(1)
        request = urllib.request.Request(
            f"{url}/generate", json.dumps(REQUEST).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            got = json.load(answer)
        with urllib.request.urlopen(f"{url}/server_info", timeout=60) as info:
            told = json.load(info)
        _result(got, told)
    finally:
        kill_process_tree(process.pid)


def verl(model: str) -> None:
    """The launcher's inner function in a coroutine, and requests to the tokenizer manager; no setting asks."""
    asyncio.run(_verl(model))


async def _verl(model: str) -> None:
    # verl has its own in the place of SGLang's, which would take over the actor's signals.
    engine_module._set_envs_and_config = lambda server_args: multiprocessing.set_start_method("spawn", force=True)
    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
    tokenizer_manager, _, _, launched, *_ = Engine._launch_subprocesses(
        server_args=ServerArgs(model_path=model, **SETTINGS),
        init_tokenizer_manager_func=engine_module.init_tokenizer_manager,
        run_scheduler_process_func=engine_module.run_scheduler_process,
        run_detokenizer_process_func=engine_module.run_detokenizer_process,
    )
    got = await anext(tokenizer_manager.generate_request(GenerateReqInput(**REQUEST), None))
    _result(got, launched.scheduler_infos[0])
    for pid in launched.all_child_pids:
        kill_process_tree(pid)


def engines(model: str) -> None:
    """What a process may start one after the other: asked by the environment, by upstream's setting, by nothing.

    Of the second and third only a child process is started, which does what the processes of a server begin with.
    """
    os.environ |= {"SGLANG_ROUTER_CAPTURE": "1", "SGLANG_ROUTER_CAPTURE_CODEC": "bitset"}
    _engine(Engine, model)
    del os.environ["SGLANG_ROUTER_CAPTURE"], os.environ["SGLANG_ROUTER_CAPTURE_CODEC"]
    for asked, loads_plugins in ((True, False), (False, True)):
        server_args = ServerArgs(model_path=model, enable_return_routed_experts=asked, **SETTINGS)
        server_args.resolve_once()
        child = multiprocessing.get_context("spawn").Process(target=_child, args=(server_args, loads_plugins))
        child.start()
        child.join()


def others(model: str) -> None:
    """A server of which a scheduler runs somebody else's capturer, started beside a process of the trainer's own."""
    trainers_own = subprocess.Popen(["sleep", "600"])
    try:
        _engine(_EngineOfOthers, model, enable_return_routed_experts=True)
    except SystemExit as stopped:
        children = psutil.Process().children()
        left = [each.name() for each in children if "sglang" in each.name() and each.status() != psutil.STATUS_ZOMBIE]
        print("STOPPED", json.dumps([str(stopped), left, trainers_own.poll()]), flush=True)
    finally:
        trainers_own.kill()


def _child(server_args: ServerArgs, loads_plugins: bool) -> None:
    # SGLang loads no plugins in its Ray actors and in further tokenizer processes.
    if loads_plugins:
        load_plugins()
    publish(server_args, role="detokenizer")
    ours = [name for name in sys.modules if name.partition(".")[0] in ("sglang_router_capture", "router_replay")]
    hooked = [path for path in json.loads(os.environ["LAUNCHERS_HOOKED"]) if _is_hooked(path)]
    print("CHILD", json.dumps({"modules": sorted(ours), "hooked": hooked}), flush=True)


def _is_hooked(path: str) -> bool:
    function, modules = pkgutil.resolve_name(path), []
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        modules += [getattr(cell.cell_contents, "__module__", None) or "" for cell in function.__closure__ or ()]
        function = wrapped
    return any(module.startswith("sglang_router_capture.") for module in modules)


def _engine(kind: type[Engine], model: str, **settings: Any) -> None:
    with kind(model_path=model, **SETTINGS, **settings) as engine:
        _result(engine.generate(**REQUEST), engine.get_server_info())


class _Other:
    """A capturer of somebody else."""


def _run_scheduler_of_others(*args: Any, **others: Any) -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

    make = Scheduler.__init__

    def make_and_replace(self: Scheduler, *args: Any, **others: Any) -> None:
        make(self, *args, **others)
        set_global_experts_capturer(_Other())

    Scheduler.__init__ = make_and_replace
    run_scheduler_process(*args, **others)


class _EngineOfOthers(Engine):
    run_scheduler_process_func = staticmethod(_run_scheduler_of_others)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _result(answer: dict[str, Any], told: dict[str, Any]) -> None:
    print("RESULT", json.dumps({"answer": answer, "told": told.get("router_capture")}), flush=True)


WAYS: dict[str, Callable[[str], None]] = {way.__name__: way for way in (slime_and_miles, verl, engines, others)}

if __name__ == "__main__":
    way, model_path = sys.argv[1:]
    sys.argv = ["train.py", "--rollout-batch-size", "32", "trainer.nnodes=1"]
    WAYS[way](model_path)
