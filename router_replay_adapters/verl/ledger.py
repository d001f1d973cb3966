"""The ledger of verl: every name that this adapter stands on, by the module that has it, and why."""

from __future__ import annotations

from dataclasses import replace

from router_replay.upstream import Attribute, Ledger, Seam

_MASK = "verl's mask says by layer which routes are known"
_PAD = "verl marks rows that it adds as unknown"
_PACKED = "verl carries packed routes and has a place for a replay of others"
_LOUD = "verl itself says that an engine leaves the routes of its batches alone"
_DECODE = "verl decodes the answers of these releases of SGLang"

REPLAY = "utils.megatron.router_replay_patch"
REPLAY_DATA = "utils.megatron.router_replay_utils"
AGENT_LOOP = "experimental.agent_loop.agent_loop"
TOOL_LOOP = "experimental.agent_loop.tool_agent_loop"
PADDING_SAMPLES = "trainer.ppo.padding_utils"
ENGINE = "workers.engine.megatron.transformer_impl"
ANY_ENGINE = "workers.engine.base"
ENGINE_CONFIG = "workers.config.engine"
ROLLOUT_CONFIG = "workers.config.rollout"
MODEL_CONFIG = "workers.config.model"
PACKS = "models.mcore.util"
MEGATRON = "utils.megatron_utils"
SGLANG_SERVER = "workers.rollout.sglang_rollout.async_sglang_server"

_SEAMS: dict[str, tuple[Seam, ...]] = {
    REPLAY: (
        Seam(
            f"{REPLAY}.RouterReplay.set_target_indices",
            ("topk_indices", "replay_mask"),
            "wrapped by known_rows.around_set_target_indices",
            "a layer's routes come there, cut for this rank, with the mask of those that are replayed",
            _MASK,
        ),
        Seam(
            f"{REPLAY}.RouterReplay.get_replay_topk",
            ("scores", "topk", "num_groups", "group_topk", "default_compute_topk"),
            "wrapped by known_rows.around_get_replay_topk",
            "it takes the trainer's own choice where the mask says so, and chooses anew in a recompute",
            "verl keeps a forward pass's own choice for its recompute",
        ),
        Seam(
            f"{REPLAY}.RouterReplayAction.REPLAY_FORWARD",
            None,
            "read by known_rows.around_get_replay_topk",
            "it tells a forward pass from its recompute",
            "verl keeps a forward pass's own choice for its recompute",
        ),
    ),
    REPLAY_DATA: (
        Seam(
            f"{REPLAY_DATA}.set_router_replay_data",
            ("layers_topk_idx", "attention_mask", "tf_config", "vp_rank", "replay_mask", "local_cp_size", "model"),
            "relied on by known_rows.around_set_target_indices",
            "it cuts routes for this rank without a look at them, and gives each layer its own",
            _MASK,
        ),
        Seam(
            f"{REPLAY_DATA}.align_r3_router_replay_data",
            ("layers_topk_idx", "input_ids"),
            "relied on by known_rows.around_set_target_indices",
            "the row that it adds is that of a token which the mask leaves out",
            _MASK,
        ),
        Seam(
            f"{REPLAY_DATA}.build_r3_replay_mask",
            ("input_ids", "response_mask"),
            "relied on by known_rows.around_set_target_indices",
            "the last token of a sequence, which no rollout has a route of, is left out there",
            _MASK,
        ),
        Seam(
            f"{REPLAY_DATA}.iter_model_routers",
            ("model",),
            "called by unreplayed.refuse_experts_without_replay",
            "it gives the routers of a chunk, which know whether they replay",
            _LOUD,
        ),
    ),
    AGENT_LOOP: (
        Seam(
            f"{AGENT_LOOP}.AgentLoopOutput.as_dict",
            (),
            "wrapped by padding.around_as_dict",
            "it adds rows up to the end of the response",
            _PAD,
        ),
        Seam(
            f"{AGENT_LOOP}.AgentLoopWorker._agent_loop_postprocess",
            ("output",),
            "wrapped by padding.around_agent_loop_postprocess",
            "it adds rows before the prompt and behind the last route",
            _PAD,
        ),
        *(
            Seam(
                f"{AGENT_LOOP}.{name}.{field}",
                None,
                "read by padding.around_agent_loop_postprocess",
                "they tell how many rows there were, and where they are",
                _PAD,
            )
            for name in ("AgentLoopOutput", "_InternalAgentLoopOutput")
            for field in ("prompt_ids", "routed_experts")
        ),
        *(
            Seam(
                f"{AGENT_LOOP}.AgentLoopOutput.{field}",
                None,
                "read by padding.require_trained",
                "they tell which tokens teach, whose rows have to be there",
                _PAD,
            )
            for field in ("response_ids", "response_mask")
        ),
        Seam(
            f"{AGENT_LOOP}._InternalAgentLoopOutput.extra_fields",
            None,
            "read by packed.around_agent_loop_postprocess",
            "what is put there is in the batch of all samples",
            _PACKED,
        ),
    ),
    TOOL_LOOP: (
        Seam(
            f"{TOOL_LOOP}.ToolAgentLoop._handle_generating_state",
            ("agent_data",),
            "wrapped by answers.around_handle_generating_state",
            "it puts the routes of an answer in the place of those of the turns before",
            "verl keeps routes where a turn brings none",
        ),
    ),
    PADDING_SAMPLES: (
        Seam(
            f"{PADDING_SAMPLES}.build_padding_routed_experts",
            ("source_routed_experts", "seq_len"),
            "wrapped by padding.around_build_padding_routed_experts",
            "the routes of samples that fill up a batch are made there",
            _PAD,
        ),
        Seam(
            f"{PADDING_SAMPLES}.construct_minimal_padding_template",
            ("source_td", "source_tag", "eos_token_id"),
            "wrapped by packed.around_construct_minimal_padding_template",
            "it makes samples that fill up a batch of another one, whose masks are not theirs",
            _PACKED,
        ),
    ),
    ENGINE: (
        Seam(
            f"{ENGINE}.MegatronEngineWithLMHead.forward_step",
            ("batch_iter", "model", "logits_processor_func", "postprocess_micro_batch_func"),
            "wrapped by engine.around_forward_step",
            "it is what calls the model once, with the next microbatch",
            _PACKED,
        ),
        Seam(
            f"{ENGINE}.MegatronEngine.optimizer_step",
            (),
            "wrapped by engine.around_optimizer_step",
            "what was found on the device has to be raised before it",
            _PACKED,
        ),
        Seam(
            f"{ENGINE}.MegatronEngine._get_context_parallel_layout",
            ("unwrapped_model",),
            "called by engine._require_supported",
            "it tells how ranks of context parallelism cut a pack",
            _PACKED,
        ),
    ),
    ANY_ENGINE: (
        Seam(
            f"{ANY_ENGINE}.BaseEngine.train_batch",
            ("data", "loss_function"),
            "wrapped by engine.around_train_batch",
            "what a step logs is in what it returns, and every engine gets its batches there",
            _PACKED,
        ),
        Seam(
            f"{ANY_ENGINE}.BaseEngine.is_mp_src_rank_with_outputs",
            (),
            "called by engine.around_train_batch",
            "it tells which ranks have a step's metrics",
            _PACKED,
        ),
    ),
    ENGINE_CONFIG: (
        Seam(
            f"{ENGINE_CONFIG}.McoreEngineConfig.forward_only",
            None,
            "read by engine.around_forward_step",
            "it tells the policy's engine from the reference model's",
            _PACKED,
        ),
        *(
            Seam(
                f"{ENGINE_CONFIG}.McoreEngineConfig.{name}",
                None,
                "read by engine._layout",
                "it decides how far a pack is filled up",
                _PACKED,
            )
            for name in ("pad_to_length", "pad_to_length_bucket")
        ),
        *(
            Seam(
                f"{ENGINE_CONFIG}.{name}",
                None,
                "read by engine._require_supported",
                "masks are not replayed with some of its values",
                _PACKED,
            )
            for name in (
                "McoreEngineConfig.router_replay",
                "EngineRouterReplayConfig.mode",
                "McoreEngineConfig.use_remove_padding",
                "McoreEngineConfig.dynamic_context_parallel",
            )
        ),
    ),
    ROLLOUT_CONFIG: (
        Seam(
            f"{ROLLOUT_CONFIG}.RolloutConfig.enable_rollout_routing_replay",
            None,
            "read by answers.around_generate",
            "it tells whether answers have routes",
            _DECODE,
        ),
        Seam(
            f"{ROLLOUT_CONFIG}.RolloutConfig.skip_tokenizer_init",
            None,
            "answered by answers.around_generate",
            "it decides how verl reads the routes of an answer",
            _DECODE,
        ),
    ),
    MODEL_CONFIG: (
        Seam(
            f"{MODEL_CONFIG}.HFModelConfig.hf_config",
            None,
            "read by answers.around_generate",
            "numbers of layers and experts are those of the model that SGLang serves",
            _DECODE,
        ),
        Seam(
            f"{MODEL_CONFIG}.HFModelConfig.model_type",
            None,
            "read by unreplayed.refuse_engine_without_replay",
            "it tells the policy's engine from a critic's, which gets the same batches",
            _LOUD,
        ),
    ),
    PACKS: (
        Seam(
            f"{PACKS}.preprocess_thd_engine",
            ("input_ids", "pre_process", "*", "use_fp8_padding", "pad_to_length_bucket"),
            "called by engine.around_forward_step",
            "it tells where the sequences of a microbatch begin in the pack that the model is called with",
            _PACKED,
        ),
    ),
    MEGATRON: (
        Seam(
            f"{MEGATRON}.unwrap_model",
            ("model",),
            "called by engine.around_forward_step",
            "the configuration of the model is below what is wrapped around it",
            _PACKED,
        ),
    ),
    SGLANG_SERVER: (
        Seam(
            f"{SGLANG_SERVER}.SGLangHttpServer.generate",
            ("prompt_ids", "sampling_params", "request_id"),
            "wrapped by answers.around_generate",
            "it asks SGLang, and decodes the routes in the answer",
            _DECODE,
        ),
    ),
}

_ROUTER_REPLAY = f"{REPLAY}.RouterReplay"
_SERVER = f"{SGLANG_SERVER}.SGLangHttpServer"
_OF_FSDP = "workers.engine.fsdp.transformer_impl.FSDPEngine"
_OF_VEOMNI = "workers.engine.veomni.transformer_impl.VeOmniEngine"
_TESTS = "tests/router_replay_adapters/verl"

_ATTRIBUTES = (
    *(
        Attribute(
            _ROUTER_REPLAY,
            name,
            "read by known_rows.around_get_replay_topk",
            "what a recompute will take is kept there, in the order of the forward passes",
            f"{_TESTS}/test_known_rows.py::test_a_recompute_takes_what_its_forward_pass_chose",
        )
        for name in ("target_topk_idx", "router_replay_action", "replay_backward_list", "replay_backward_mask_list")
    ),
    *(
        Attribute(
            _SERVER,
            name,
            "read by answers.around_generate",
            "generate reads its settings and answers from it",
            f"{_TESTS}/test_answers.py::test_routes_reach_verl",
        )
        for name in ("tokenizer_manager", "config", "model_config")
    ),
    *(
        Attribute(
            f"{TOOL_LOOP}.AgentData",
            name,
            "read by answers.around_handle_generating_state",
            "they are what a turn sampled, and the routes of all turns",
            f"{_TESTS}/test_answers.py::test_a_turn_in_which_nothing_was_sampled_keeps_the_routes_before_it",
        )
        for name in ("response_ids", "routed_experts")
    ),
    *(
        Attribute(
            f"{ENGINE}.MegatronEngine",
            name,
            "read by engine.around_forward_step",
            "the model and its settings are there",
            f"{_TESTS}/test_engine.py::test_masks_are_replayed_in_verls_engine",
        )
        for name in ("module", "engine_config")
    ),
    Attribute(
        f"{ENGINE}.MegatronEngine",
        "enable_routing_replay",
        "read by unreplayed.refuse_experts_without_replay",
        "it tells whether verl's own replay takes the experts of a batch",
        f"{_TESTS}/test_engine.py::test_what_could_be_wrong_is_refused",
    ),
    Attribute(
        _OF_VEOMNI,
        "enable_routing_replay",
        "read by unreplayed.refuse_engine_without_replay",
        "that engine has a replay of its own, which takes the experts of a batch",
        f"{_TESTS}/test_unreplayed.py::test_an_engine_with_a_replay_of_its_own_takes_experts",
    ),
    Attribute(
        _OF_FSDP,
        "model_config",
        "read by unreplayed.refuse_engine_without_replay",
        "what kind of model an engine has is said there",
        f"{_TESTS}/test_unreplayed.py::test_a_policy_whose_engine_replays_nothing_is_refused",
    ),
)

LEDGER = Ledger(
    distribution="verl",
    title="verl",
    prefix="verl.",
    subject="the adapter to verl",
    tested=("0.9.1",),
    checked=(),
    way_out="leave router_replay_adapters.verl out of VERL_USE_EXTERNAL_MODULES",
    seams=tuple(seam for seams in _SEAMS.values() for seam in seams),
    attributes=_ATTRIBUTES,
)
"""All that the adapter needs of verl."""

MODULES = tuple(_SEAMS)
"""Modules below the ledger's prefix that have these names."""


def ledger_of(module: str) -> Ledger:
    """The rows of one module's names: what can be checked without importing another."""
    return replace(LEDGER, seams=_SEAMS[module], attributes=())
