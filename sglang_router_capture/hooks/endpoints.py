"""Hooks in the processes that take requests and write answers: who may ask for masks, and where they stand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from sglang_router_capture import options, refusals
from sglang_router_capture.answer import META_INFO_KEY
from sglang_router_capture.hooks.process import answers_wait_for_handles, options_of_this_process
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.mailbox import Mailbox, is_ticket
from sglang_router_capture.server_folder import ServerFolder
from sglang_router_capture.sglang_format import is_packed, unpacked

_TOKENIZER = "managers.tokenizer_manager.TokenizerManager"


@hook("entrypoints.openai.serving_base.OpenAIServingBase.handle_request", "AROUND")
async def around_handle_request(
    original: Callable[..., Any], serving: Any, request: Any, raw_request: Any, **others: Any
) -> Any:
    """Completions and chat, whose requests may say that they want routes."""
    if getattr(request, "return_routed_experts", False) and _masks_are_served():
        asked = getattr(request, "return_meta_info", None)
        _refuse(refusals.request_at_openai_endpoint(return_meta_info=asked, stream=bool(request.stream)))
    return await original(serving, request, raw_request, **others)


@hook("entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses", "AROUND")
@hook("entrypoints.anthropic.serving.AnthropicServing.handle_messages", "AROUND")
async def around_other_endpoint(
    original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None, **others: Any
) -> Any:
    """Responses and messages, whose requests have no field for it: SGLang drops it unread."""
    if raw_request is not None and _masks_are_served():
        # FastAPI has read the body, and the request keeps it.
        body = await raw_request.json()
        if body.get("return_routed_experts"):
            _refuse(refusals.request_at_openai_endpoint(return_meta_info=None, stream=False))
    return await original(serving, request, raw_request, **others)


@hook("managers.detokenizer_manager.DetokenizerManager.handle_batch_token_id_out", "BEFORE")
@hook(f"{_TOKENIZER}._handle_batch_output", "BEFORE")
def before_answers(manager: Any, recv_obj: Any, **others: Any) -> None:
    """The answers of a batch came from the scheduler; whoever is first to have them writes SGLang's own format."""
    routes = getattr(recv_obj, "routed_experts", None)
    if routes and any(map(is_packed, routes)):
        recv_obj.routed_experts = [unpacked(each) if is_packed(each) else each for each in routes]


@hook(f"{_TOKENIZER}.generate_request", "AROUND")
def around_generate_request(original: Callable[..., Any], tokenizer: Any, *args: Any, **others: Any) -> Any:
    """Answers on their way to whoever asked: those whose masks are being stored wait for their handles."""
    answers = original(tokenizer, *args, **others)
    # Not the process's: it may have started another server since.
    chosen = options.of(tokenizer.server_args)
    if chosen is None or not answers_wait_for_handles(tokenizer.server_args):
        return answers
    return with_handles(answers, Mailbox(ServerFolder(chosen.start).handles))


async def with_handles(answers: AsyncGenerator[Any, None], mailbox: Mailbox) -> AsyncGenerator[Any, None]:
    """Answers, or lists of them, with the handles of their masks in the place of tickets.

    Those with tickets come last, once SGLang is done with the request: it holds a lock until then, for which every
    update of the weights, and behind it every new request, would wait as long as the store takes.
    """
    held = []
    async with aclosing(answers):
        async for answer in answers:
            if any(map(is_ticket, _handles(answer))):
                held.append(answer)
            else:
                yield answer
    for answer in held:
        for one in answer if isinstance(answer, list) else [answer]:
            if handles := one["meta_info"].get(META_INFO_KEY):
                one["meta_info"][META_INFO_KEY] = [await mailbox.redeemed(each) for each in handles]
        yield answer


def _handles(answer: Any) -> list[dict[str, Any]]:
    ones = answer if isinstance(answer, list) else [answer]
    found = [one.get("meta_info", {}).get(META_INFO_KEY) or [] for one in ones if isinstance(one, dict)]
    return [handle for handles in found for handle in handles]


@hook(f"{_TOKENIZER}._validate_one_request", "BEFORE")
def before_validate_one_request(tokenizer: Any, obj: Any, *args: Any, **others: Any) -> None:
    """Requests whose rows could not be told to be those of a trainer's tokens and weights."""
    if getattr(obj, "return_routed_experts", False) and _masks_are_served():
        reason = refusals.request_of_other_rows(
            multimodal=obj.contains_mm_input(),
            embeddings=obj.input_embeds is not None or obj.positional_embed_overrides is not None,
            adapter=obj.lora_path is not None,
        )
        if reason is not None:
            raise ValueError(reason)


@hook(f"{_TOKENIZER}.update_request_meta_info", "AROUND")
def around_update_request_meta_info(
    original: Callable[..., None],
    tokenizer: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    *args: Any,
    **others: Any,
) -> None:
    """One request's part of what the scheduler sent with a batch's answers.

    SGLang would give the field to every request of the batch, and take the list for one with an entry per token, of
    which an incremental stream sends what is new.
    """
    rest = {key: values for key, values in customized_info.items() if key != META_INFO_KEY}
    original(tokenizer, meta_info, state, rest, index, *args, **others)
    if META_INFO_KEY in customized_info and (handles := customized_info[META_INFO_KEY][index]):
        meta_info[META_INFO_KEY] = handles


def _masks_are_served() -> bool:
    options = options_of_this_process()
    return options is not None and options.format == "masks"


def _refuse(reason: str | None) -> None:
    if reason is not None:
        from fastapi import HTTPException

        # The server renders it as each endpoint renders its errors.
        raise HTTPException(status_code=400, detail=reason)
