"""verl's server and agent loop without a cluster: the real methods, on objects that have what these read."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Answer = dict[str, Any]
PROMPT_LENGTH, RESPONSE_LENGTH = 6, 8
"""What an agent loop's worker pads to."""


class TokenizerManager:
    """Answers each request by a function of it, as SGLang's does: by a generator that yields once."""

    def __init__(self, answer: Callable[[Any], Answer]) -> None:
        self.answer = answer

    async def generate_request(self, request: Any, raw_request: Any) -> AsyncGenerator[Answer, None]:
        yield self.answer(request)


def sglang_server(hf_config: Any, answer: Callable[[Any], Answer], **config: Any) -> SimpleNamespace:
    """What `SGLangHttpServer.generate` reads of its object; `config` are fields of its rollout configuration."""
    defaults = {
        "enable_rollout_routing_replay": True,
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "prompt_length": 256,
        "response_length": 256,
        "mtp": None,
    }
    return SimpleNamespace(
        config=SimpleNamespace(**{**defaults, **config}),
        model_config=SimpleNamespace(hf_config=hf_config),
        tokenizer_manager=TokenizerManager(answer),
        lora_as_adapter=False,
        replica_rank=0,
        global_steps=7,
        _disaggregation_role="null",
        _pd_decode_peers=[],
    )


def generate(server: SimpleNamespace, prompt_ids: list[int], *, stock: bool = False, **sampling: Any) -> Any:
    """A TokenOutput of `SGLangHttpServer.generate`; `stock`: without the adapter."""
    from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer

    method = SGLangHttpServer.generate
    method = inspect.unwrap(method) if stock else method
    return asyncio.run(method(server, prompt_ids=prompt_ids, sampling_params=sampling, request_id="r"))


def tool_loop_turns(answers: Sequence[Any]) -> list[Any]:
    """Routes of a conversation behind each of these TokenOutputs, by verl's own loop with tools, without any tool."""
    from verl.experimental.agent_loop.tool_agent_loop import AgentData, ToolAgentLoop

    async def generate(**_: Any) -> Any:
        return next(waiting)

    async def merge(prompt: list[int], sampled: list[int], mask: list[int], *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        return SimpleNamespace(token_ids=[*prompt, *sampled]), [*mask, *[1] * len(sampled)], None

    async def extract(*_: Any) -> tuple[str, list[Any]]:
        return "", []

    async def converse() -> list[Any]:
        seen = []
        for _ in answers:
            await loop._handle_generating_state(data, {})
            seen.append(data.routed_experts)
        return seen

    waiting = iter(answers)
    loop = ToolAgentLoop.__new__(ToolAgentLoop)
    loop.server_manager, loop.ct_merge_assistant_token = SimpleNamespace(generate=generate), merge
    loop.tool_parser = SimpleNamespace(stop_token_ids=[], extract_tool_calls=extract)
    loop.tools, loop.response_length = {}, 100
    loop.max_assistant_turns = loop.max_user_turns = None
    loop._build_assistant_message = lambda *_: {}
    data = AgentData([], [], [], None, None, {}, "r", {})
    data.prompt_ids = [1, 2, 3]
    return asyncio.run(converse())


def agent_loop_worker(kind: type, small_model: Path) -> Any:
    """A worker of an agent loop, as far as `_agent_loop_postprocess` needs one."""
    from transformers import AutoTokenizer

    worker = kind.__new__(kind)
    worker.tokenizer = AutoTokenizer.from_pretrained(small_model)
    worker.processor = worker.reward_loop_worker_handles = None
    worker.mm_processor_kwargs, worker.distillation_enabled = {}, False
    worker.rollout_config = SimpleNamespace(prompt_length=PROMPT_LENGTH, response_length=RESPONSE_LENGTH)
    return worker
