"""The ledger's rows of the HTTP server: the endpoints that take requests, and what makes their answers."""

from __future__ import annotations

from router_replay.upstream import Attribute, Seam

_OWN_FIELD = "each endpoint returns the fields that plugins add to meta_info"
_REQUEST_LEVEL = "SGLang takes fields of meta_info that belong to a whole request"
_TOKENIZER = "managers.tokenizer_manager.TokenizerManager"
_GENERATE = "managers.io_struct.GenerateReqInput"
_WHY_ENDPOINT = "a request for masks that its endpoint cannot return is refused"
_PACKED = "routes in SGLang's own format are packed until the answer is written"
_WIDE = "SGLang sends routes in a narrow type"
_TESTS = "tests/sglang_router_capture/test_endpoints.py"
_COMPLETIONS = f"{_TESTS}::test_endpoints_without_meta_info_refuse_a_request_for_routes"
_CHAT = f"{_TESTS}::test_chat_returns_each_choices_masks"
_TOKENS = f"{_TESTS}::test_requests_of_other_inputs_or_weights_are_refused"

SEAMS = (
    Seam(
        "entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        ("request", "raw_request"),
        "hooked by hooks.endpoints.around_handle_request",
        _WHY_ENDPOINT,
        _OWN_FIELD,
    ),
    Seam(
        "entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        ("request", "raw_request"),
        "hooked by hooks.endpoints.around_other_endpoint",
        _WHY_ENDPOINT,
        _OWN_FIELD,
    ),
    Seam(
        "entrypoints.anthropic.serving.AnthropicServing.handle_messages",
        ("request", "raw_request"),
        "hooked by hooks.endpoints.around_other_endpoint",
        _WHY_ENDPOINT,
        _OWN_FIELD,
    ),
    Seam(
        f"{_TOKENIZER}.generate_request",
        (),
        "hooked by hooks.endpoints.around_generate_request",
        "an answer waits there for the handle of its masks, which are stored in the background",
        _REQUEST_LEVEL,
    ),
    Seam(
        f"{_TOKENIZER}._validate_one_request",
        ("obj",),
        "hooked by hooks.endpoints.before_validate_one_request",
        "rows that cannot be told to be those of a trainer's tokens are not returned",
        "SGLang keeps the token ids of multimodal prompts and tells a capturer of them",
    ),
    Seam(
        f"{_TOKENIZER}.update_request_meta_info",
        ("meta_info", "state", "customized_info", "index"),
        "hooked by hooks.endpoints.around_update_request_meta_info",
        "masks are no list with an entry for every token, and only the request that asked has them",
        _REQUEST_LEVEL,
    ),
    Seam(
        "managers.detokenizer_manager.DetokenizerManager.handle_batch_token_id_out",
        ("recv_obj",),
        "hooked by hooks.endpoints.before_answers",
        _PACKED,
        _WIDE,
    ),
    Seam(
        f"{_TOKENIZER}._handle_batch_output", ("recv_obj",), "hooked by hooks.endpoints.before_answers", _PACKED, _WIDE
    ),
    Seam(
        f"{_GENERATE}.contains_mm_input",
        (),
        "called by hooks.endpoints.before_validate_one_request",
        "multimodal prompts have other token ids on the server than in the trainer",
        "SGLang keeps the token ids of multimodal prompts and tells a capturer of them",
    ),
)

ATTRIBUTES = (
    Attribute(
        "managers.io_struct.BatchTokenIDOutput",
        "routed_experts",
        "read by hooks.endpoints.before_answers",
        _PACKED,
        "tests/sglang_router_capture/test_sglang_format.py::test_bytes_are_upstreams",
    ),
    Attribute(
        "entrypoints.openai.protocol.CompletionRequest",
        "return_routed_experts",
        "read by hooks.endpoints.around_handle_request",
        _WHY_ENDPOINT,
        _COMPLETIONS,
    ),
    Attribute(
        "entrypoints.openai.protocol.ChatCompletionRequest",
        "return_meta_info",
        "read by hooks.endpoints.around_handle_request",
        "a chat's choices have their masks with it",
        _CHAT,
    ),
    Attribute(
        "entrypoints.openai.protocol.ChatCompletionRequest",
        "stream",
        "read by hooks.endpoints.around_handle_request",
        "streams of the chat endpoint have none",
        _COMPLETIONS,
    ),
    Attribute(
        _TOKENIZER,
        "server_args",
        "read by hooks.endpoints.around_generate_request",
        "a process that started two servers has answers of both",
        "tests/sglang_router_capture/test_server_store.py::test_every_answer_has_its_own_masks",
    ),
    Attribute(
        _GENERATE,
        "return_routed_experts",
        "read by hooks.endpoints.before_validate_one_request",
        "requests that do not ask are not refused",
        _TOKENS,
    ),
    Attribute(
        _GENERATE,
        "input_embeds",
        "read by hooks.endpoints.before_validate_one_request",
        "such a request has no token ids",
        _TOKENS,
    ),
    Attribute(
        _GENERATE,
        "positional_embed_overrides",
        "read by hooks.endpoints.before_validate_one_request",
        "the ids of such a request are not what was computed",
        _TOKENS,
    ),
    Attribute(
        _GENERATE,
        "lora_path",
        "read by hooks.endpoints.before_validate_one_request",
        "weights with an adapter have no version of their own",
        _TOKENS,
    ),
)
