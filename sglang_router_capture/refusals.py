"""What cannot be captured is refused when the server starts, with the reason and the way out."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from router_replay.errors import UnsupportedError
from router_replay.upstream import Refusal, refuse
from sglang_router_capture.ledger import LEDGER
from sglang_router_capture.options import INLINE, STORE_FLAG, CaptureOptions
from sglang_router_capture.server_store import store_of

logger = logging.getLogger(__name__)

_WITHOUT_ONE = "start the server without one of the two"
_OFF = (None, "", "none", "NONE", "null")

SETTINGS = (
    Refusal(
        "pipeline parallelism with attention data parallelism",
        "arg_groups.fields.parallel.Parallel.pp_size",
        lambda value: value <= 1,
        "each is followed by itself, and a stage's message beside a gathered batch was not",
        _WITHOUT_ONE,
        flag="--pipeline-parallel-size",
        only_with=("enable_dp_attention",),
    ),
    Refusal(
        "asynchronous pipeline batches",
        "arg_groups.fields.parallel.Parallel.pp_async_batch_depth",
        lambda value: value <= 0,
        "results come back in another order of the scheduler's steps, which was not run",
        _WITHOUT_ONE,
        flag="--pp-async-batch-depth",
    ),
    Refusal(
        "speculative decoding",
        "arg_groups.fields.spec.Spec.speculative_algorithm",
        lambda value: value in _OFF,
        "accepted drafts move in the KV cache and their routes would stay behind",
        _WITHOUT_ONE,
        flag="--speculative-algorithm",
    ),
    Refusal(
        "prefill-decode disaggregation",
        "arg_groups.fields.disagg.Disagg.disaggregation_mode",
        lambda value: value in _OFF,
        "routes are not sent along with the KV cache",
        _WITHOUT_ONE,
        flag="--disaggregation-mode",
    ),
    Refusal(
        "expert all-to-all backends",
        "arg_groups.fields.exec_.ExecMoe.moe_a2a_backend",
        lambda value: value in _OFF,
        "each rank routes a part of the batch",
        _WITHOUT_ONE,
        flag="--moe-a2a-backend",
    ),
    Refusal(
        "attention context parallelism",
        "arg_groups.fields.parallel.Parallel.attn_cp_size",
        lambda value: value <= 1,
        "ranks see parts of a prompt",
        _WITHOUT_ONE,
        flag="attention context parallelism (--attn-cp-size)",
    ),
    Refusal(
        "two-batch overlap",
        "arg_groups.fields.exec_.ExecOverlap.enable_two_batch_overlap",
        lambda value: not value,
        "both halves of a batch would write the same rows",
        _WITHOUT_ONE,
        flag="--enable-two-batch-overlap",
    ),
    Refusal(
        "PD multiplexing",
        "arg_groups.fields.disagg.Disagg.enable_pdmux",
        lambda value: not value,
        "prefill and decode run at once and would share the rows",
        _WITHOUT_ONE,
        flag="--enable-pdmux",
    ),
    Refusal(
        "hierarchical sparse attention",
        "arg_groups.fields.memory.Memory.enable_hisparse",
        lambda value: not value,
        "KV entries move without notice",
        _WITHOUT_ONE,
        flag="--enable-hisparse",
    ),
    Refusal(
        "HiCache with host memory as a buffer only",
        "arg_groups.fields.memory.Memory.hicache_host_memory_mode",
        lambda value: value == "cache",
        "KV that stays in host memory for one copy only has not been followed yet",
        "start the server with --hicache-host-memory-mode cache",
        flag="--hicache-host-memory-mode",
        only_with=("enable_hierarchical_cache",),
    ),
    Refusal(
        "Ray scheduler actors",
        "arg_groups.fields.device.Device.use_ray",
        lambda value: not value,
        "SGLang loads no plugins in them, and what we put there in spite of it was not run",
        "start the server without that flag: a server of its own may be started in a Ray actor, as trainers do",
        flag="--use-ray",
    ),
    Refusal(
        "embedding servers",
        "arg_groups.fields.model.Model.is_embedding",
        lambda value: not value,
        "SGLang drops what a pass recorded there and no answer carries routes",
        "start the server without router capture",
        flag="--is-embedding",
    ),
    Refusal(
        "gRPC servicers",
        "arg_groups.fields.serving.Serving.smg_grpc_mode",
        lambda value: not value,
        "its answers have no field for routing_masks",
        "start the server without that flag, or without router capture",
        flag="--smg-grpc-mode",
    ),
    Refusal(
        "NVIDIA megakernels",
        "arg_groups.fields.exec_.ExecKernel.enable_nvidia_megakernel",
        lambda value: not value,
        "they take the place of the forward pass in which the routers report",
        _WITHOUT_ONE,
        flag="--enable-nvidia-megakernel",
        releases=">=0.5.23",
    ),
    Refusal(
        "AMD monokernels",
        "arg_groups.fields.exec_.ExecKernel.enable_amd_monokernel",
        lambda value: not value,
        "they take the place of the forward pass in which the routers report",
        _WITHOUT_ONE,
        flag="--enable-amd-monokernel",
        releases=">=0.5.23",
    ),
    Refusal(
        "diffusion language models",
        "arg_groups.fields.exec_.ExecDllm.dllm_algorithm",
        lambda value: value in _OFF,
        "tokens are computed more than once",
        _WITHOUT_ONE,
        flag="--dllm-algorithm",
    ),
)
"""Settings under which a row could be wrong and look right."""


def stop(error: Exception) -> NoReturn:
    """Leave this process with `error` as its message: SGLang swallows a plugin's ordinary exceptions."""
    if threading.current_thread() is not threading.main_thread():
        # A thread that ends by SystemExit says nothing, and a trainer may start its servers in one.
        logger.error("router capture: %s", error)
    raise SystemExit(f"router capture: {error}") from error


def checks(config: Any, chosen: CaptureOptions) -> Iterator[Callable[[], object]]:
    """What a server is held against before it starts, one refusal each; to be called by whoever wants it raised.

    Args:
        config: what `sglang.srt.arg_groups.overrides.resolving_view` gives.
        chosen: what it was asked for.
    """
    yield require_python_server
    yield require_no_ray_actors
    for row in SETTINGS:
        yield partial(refuse, LEDGER, (row,), config)
    if config.pp_size > 1:
        yield require_every_pass_to_return
    yield partial(store_of, chosen)
    if config.nnodes > 1:
        yield partial(require_store_of_many_nodes, chosen.store, config.nnodes)


def require_supported_config(config: Any, chosen: CaptureOptions) -> None:
    """Refuse resolved server arguments under which a row could be wrong and look right. Arguments as of `checks`.

    Raises:
        UnsupportedError: naming the flag or the environment variable.
        SeamError: naming a setting that the installed SGLang no longer has.
    """
    for check in checks(config, chosen):
        check()


def require_store_of_many_nodes(store: str, num_nodes: int) -> None:
    """Refuse a store behind a server of several nodes: handles follow their answers through the memory of one.

    Raises:
        UnsupportedError: naming the flag.
    """
    if store != INLINE:
        raise UnsupportedError(
            f"{STORE_FLAG} {store} cannot be used with --nnodes {num_nodes}: schedulers on other nodes cannot tell the"
            f" process that writes the answers that masks were stored. Leave the flag away ({INLINE}, in the answer"
            " itself), or start a server on each node"
        )


def require_python_server() -> None:
    """Refuse SGLang's server in Rust, which takes the place of the processes that carry our part of an answer.

    Raises:
        UnsupportedError: naming the environment variable.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise UnsupportedError(
            "router capture cannot run where SGLANG_RUST_SERVER is set: that server's answers were not seen to carry"
            " routes; unset the variable, or start the server without router capture"
        )


def require_no_ray_actors() -> None:
    """Refuse SGLang's own engine in Ray, whose class sets no flag: a process that imports it is taken to use it.

    Raises:
        UnsupportedError: naming the class.
    """
    if "sglang.srt.ray.scheduler_actor" in sys.modules:
        raise UnsupportedError(
            "router capture cannot run where sglang.srt.ray is imported: SGLang loads no plugins in the actors of its"
            " RayEngine, and what we put there in spite of it was not run; start sglang.Engine in a Ray actor of your"
            " own, as trainers do, or the engine without router capture"
        )


def request_at_openai_endpoint(*, return_meta_info: bool | None, stream: bool) -> str | None:
    """Why a request for routes is refused at an endpoint other than `/generate`; None where it is not.

    Args:
        return_meta_info: what the request says of it; None at an endpoint whose answers have no place for it.
        stream: whether the answer is a stream.
    """
    if return_meta_info is None:
        way_out = "this endpoint's answers have no meta_info: send the request to /generate, or to /v1/chat/completions"
        way_out += ' with "return_meta_info": true'
    elif stream:
        way_out = 'streams of this endpoint have no meta_info: send the request to /generate, or without "stream"'
        way_out += ' and with "return_meta_info": true'
    elif not return_meta_info:
        way_out = 'add "return_meta_info": true, and take them from each choice, or send the request to /generate'
    else:
        return None
    return f"return_routed_experts: routing masks are returned in meta_info. {way_out[0].upper()}{way_out[1:]}."


def request_of_other_rows(*, multimodal: bool, embeddings: bool, adapter: bool) -> str | None:
    """Why a request for routes is refused for what it consists of; None where it is not.

    Args:
        multimodal: it has images, videos or audio.
        embeddings: it has embeddings in the place of tokens.
        adapter: it names a LoRA adapter.
    """
    if embeddings:
        found = "input_embeds and positional_embed_overrides: rows belong to token ids, and others were computed"
    elif multimodal:
        found = (
            "images, video or audio: SGLang puts values of its own in the place of their tokens, so the rows could not"
            " be told to be those of a trainer's tokens"
        )
    elif adapter:
        found = "LoRA adapters: rows of every adapter would be under the one weight version of the server"
    else:
        return None
    return f"return_routed_experts is refused for {found}. Send the request without return_routed_experts."


def require_every_pass_to_return() -> None:
    """Refuse a pipeline in which the first stage hears nothing of some passes, whose rows come with their results.

    Raises:
        UnsupportedError: naming the environment variable.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM.get():
        raise UnsupportedError(
            "router capture cannot run where SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM is on: the routes of a later"
            " stage come back with the results that it leaves away; unset it"
        )
