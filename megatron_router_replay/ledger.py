"""The ledger: every name of Megatron-Core that replay and averages rely on, why, and when the row can go."""

from __future__ import annotations

from router_replay.upstream import At, Attribute, Ledger, Seam

TESTED = ("0.19.2",)
CHECKED = ("0.17.1", "0.18.2")

_HOOK = "never: this is the hook that replay uses"
_PROTOCOL = "Megatron-Core publishes a protocol for router_replay"
_NUMBERS = "never: rows are matched to layers by this number"
_GROUPS = "Megatron-Core hands a model its process groups only"
_LIVE = "never: the live layers are checked against the rollout's"
_MTP = "MTP routers count their layers on from the decoder's"
_FLEX = "DeepEP's dispatcher reads its indices from the routing map"
_CHECKPOINT = "Megatron-Core lets a caller add state to an activation checkpoint"
_QUANTISED = "Transformer Engine lets a caller add state to its activation checkpoint"
_SHARDED = "never: averages are sharded as the parameters are"
_STALE = "never: stale parameters must not be averaged"
_RANKS = "never: a rank's places are found by its process groups"
_MAIN = "Megatron-Core has a function that returns a parameter's main parameter"

_ROUTER = "transformer.moe.router.TopKRouter"
_CONFIG = "transformer.transformer_config.TransformerConfig"

_FLEX_TEST = "tests/megatron_router_replay/test_flex_gates.py::test_experts_whose_gate_is_zero_keep_their_tokens"

_ROUTING = (
    Seam(
        _ROUTER,
        None,
        "read by live_model.find_routers",
        "the live routers are found by their class",
        _HOOK,
    ),
    Seam(
        f"{_ROUTER}.routing",
        ("logits",),
        "relied on by layer_replay.LayerReplay",
        "it hands its attribute router_replay to the top-k function in every forward pass",
        _HOOK,
    ),
    Seam(
        "transformer.moe.moe_utils.topk_routing_with_score_function",
        ("logits", "topk", "*", "score_function", "fused", "router_replay"),
        "relied on by layer_replay.LayerReplay",
        "it asks router_replay for the experts and computes the gates from the scores that it returns",
        _HOOK,
    ),
    Seam(
        "transformer.moe.router_replay.RouterReplay.get_replay_topk",
        ("scores", "topk", "num_groups", "group_topk", "default_compute_topk"),
        "answered by layer_replay.LayerReplay.get_replay_topk",
        "it is the call that the object put into router_replay answers",
        _PROTOCOL,
    ),
    Seam(
        "transformer.moe.moe_utils.group_limited_topk",
        ("scores", "topk", "num_tokens", "num_experts", "num_groups", "group_topk"),
        "called by layer_replay.LayerReplay",
        "it routes some of the places by themselves, which the function that the router hands over cannot",
        "the top-k that a router hands over takes any number of places",
    ),
    Seam(
        "models.common.embeddings.language_model_embedding.LanguageModelEmbedding.forward",
        ("input_ids",),
        "hooked by replay.Replay",
        "it is called with the model's token ids, which are compared with those of the layout",
        _LIVE,
    ),
    Seam(
        f"{_ROUTER}.__init__",
        ("*", "config", "is_mtp_layer"),
        "read by live_model.find_routers",
        "it tells the routers of multi-token prediction from those of decoder layers with the same number",
        _MTP,
    ),
    Seam(
        f"{_ROUTER}.set_layer_number",
        ("layer_number",),
        "relied on by live_model.find_routers",
        "it gives a router its 1-based number in the whole model",
        _NUMBERS,
    ),
    Seam(
        "transformer.transformer_layer.TransformerLayer.__init__",
        ("*", "config", "layer_number"),
        "read by live_model.check_live_layers",
        "its layer_number tells which decoder layers a model chunk holds, dense ones included",
        _LIVE,
    ),
    Seam(
        "transformer.transformer_layer.TransformerLayer",
        None,
        "read by live_model.check_live_layers",
        "the live layers are found by their class",
        _LIVE,
    ),
    Seam(
        "transformer.multi_token_prediction.MultiTokenPredictionLayer",
        None,
        "read by live_model.check_live_layers",
        "it holds the layers of multi-token prediction, which no rollout recorded",
        _MTP,
    ),
    Seam(
        "models.common.language_module.language_module.LanguageModule",
        None,
        "read by layer_plan.config_of",
        "the language model has the configuration that counts, whatever is around or beside it",
        _LIVE,
    ),
    Seam(
        (
            At("models.hybrid.hybrid_model.HybridModel.__init__", ">=0.18"),
            At("models.mamba.mamba_model.MambaModel.__init__", "<0.18"),
        ),
        ("*", "config", "hybrid_layer_pattern"),
        "read by layer_plan.layer_plan",
        "its pattern tells which layers of the whole model have experts",
        _NUMBERS,
    ),
    Seam(
        "tensor_parallel.random.CheckpointFunction.forward",
        ("ctx", "run_function"),
        "wrapped by recompute.checkpoint_patches",
        "its run_function is wrapped, so that a recompute sees the masks of its own forward pass",
        _CHECKPOINT,
    ),
    Seam(
        _CONFIG,
        None,
        "read by layer_plan.config_of",
        "the model's geometry and the settings to refuse are in it",
        _LIVE,
    ),
    Seam(
        f"{_CONFIG}.moe_layer_freq",
        None,
        "read by layer_plan.geometry_of",
        "it tells which decoder layers route",
        _LIVE,
    ),
    Seam(
        f"{_CONFIG}.num_layers",
        None,
        "read by layer_plan.geometry_of",
        "masks are of a model with as many decoder layers",
        _LIVE,
    ),
    Seam(
        f"{_CONFIG}.num_moe_experts",
        None,
        "read by layer_plan.geometry_of",
        "masks are of a model with as many experts",
        _LIVE,
    ),
    Seam(
        f"{_CONFIG}.moe_router_topk",
        None,
        "read by layer_plan.geometry_of",
        "masks are of a model with as many experts for every token",
        _LIVE,
    ),
    Seam(
        f"{_CONFIG}.moe_router_fusion",
        None,
        "overridden by router_settings.UnfusedConfig",
        "the fused router never asks for replayed experts",
        _HOOK,
    ),
    Seam(
        "transformer.moe.moe_layer.BaseMoELayer",
        None,
        "read by flex_gates.FlexGates",
        "a router's dispatcher is found in the layer of both",
        _FLEX,
    ),
    Seam(
        "transformer.moe.token_dispatcher.MoEFlexTokenDispatcher",
        None,
        "read by flex_gates.FlexGates",
        "flex dispatchers are found by their class",
        _FLEX,
    ),
    Seam(
        "transformer.moe.token_dispatcher._DeepepManager.setup_metadata",
        ("routing_map", "probs"),
        "wrapped by flex_gates.FlexGates",
        "it takes the experts with the largest gates, where a replayed one with a gate of 0 would be swapped",
        _FLEX,
    ),
)

_SHARDS = (
    Seam(
        "parallel_state.model_parallel_is_initialized",
        (),
        "called by shards.rank_shards",
        "it tells whether there are process groups to ask",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_tensor_model_parallel_world_size",
        (),
        "called by shards.rank_shards",
        "it is the number of parts into which sequence parallelism cuts a batch",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_tensor_model_parallel_group",
        (),
        "called by model_groups.ModelGroups",
        "its ranks must be given the same microbatches, and are told what one of them finds wrong",
        _GROUPS,
    ),
    Seam(
        "parallel_state.get_context_parallel_group",
        (),
        "called by model_groups.ModelGroups",
        "its ranks must be given the same microbatches, and are told what one of them finds wrong",
        _GROUPS,
    ),
    Seam(
        "parallel_state.get_pipeline_model_parallel_group",
        (),
        "called by model_groups.ModelGroups",
        "its ranks must be given the same microbatches, and are told what one of them finds wrong",
        _GROUPS,
    ),
    Seam(
        "parallel_state.get_tensor_model_parallel_rank",
        (),
        "called by shards.rank_shards",
        "it is the number of this rank's part under sequence parallelism",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_context_parallel_world_size",
        (),
        "called by shards.rank_shards",
        "it is the number of ranks that share a sequence",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_context_parallel_rank",
        (),
        "called by shards.rank_shards",
        "it tells which part of every sequence is here",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_hybrid_data_context_parallel_groups",
        ("*", "group_size"),
        "called by shards.rank_shards",
        "it has this rank's number among those that share one microbatch",
        _RANKS,
    ),
    Seam(
        "parallel_state.get_data_parallel_world_size",
        ("with_context_parallel",),
        "called by shards.rank_shards",
        "an error names how many ranks could share a microbatch",
        _RANKS,
    ),
    Seam(
        f"{_CONFIG}.sequence_parallel",
        None,
        "read by shards.rank_shards",
        "it tells whether tensor-parallel ranks route parts of a sequence or all of it",
        _RANKS,
    ),
    Seam(
        f"{_CONFIG}.tensor_model_parallel_size",
        None,
        "read by shards.rank_shards",
        "a model of another size has process groups of its own",
        _RANKS,
    ),
    Seam(
        f"{_CONFIG}.context_parallel_size",
        None,
        "read by shards.rank_shards",
        "a model of another size has process groups of its own",
        _RANKS,
    ),
)

_ROUTING_ATTRIBUTES = (
    Attribute(
        _ROUTER,
        "router_replay",
        "answered by layer_replay.LayerReplay",
        "the object that chooses the experts is put there",
        "tests/megatron_router_replay/test_replay_remove.py::test_objects_are_put_back",
    ),
    Attribute(
        "models.gpt.gpt_model.GPTModel",
        "pre_process",
        "read by input_ids.first_embeddings",
        "it tells the stage that is called with token ids from the one that only predicts further ones",
        "tests/megatron_router_replay/test_replay_mistakes.py::test_model_that_runs_on_other_tokens_than_the_layout",
    ),
    Attribute(
        "models.gpt.gpt_model.GPTModel",
        "embedding",
        "read by input_ids.first_embeddings",
        "it is where the model's token ids are seen",
        "tests/megatron_router_replay/test_replay_mistakes.py::test_model_that_runs_on_other_tokens_than_the_layout",
    ),
    Attribute(
        _ROUTER,
        "layer_number",
        "read by live_model.find_routers",
        "a router's rows are found by its number",
        "tests/megatron_router_replay/test_replay_refusals.py::test_two_routers_of_one_number",
    ),
    Attribute(
        _ROUTER,
        "is_mtp_layer",
        "read by live_model.find_routers",
        "routers of multi-token prediction are left alone",
        "tests/megatron_router_replay/test_replay_mtp.py::test_mtp_routers_are_left_alone",
    ),
    Attribute(
        _ROUTER,
        "num_experts",
        "read by live_model.check_live_layers",
        "a live router may have another number of experts than the configuration",
        "tests/megatron_router_replay/test_replay_refusals.py::test_configuration_that_is_not_the_live_model",
    ),
    Attribute(
        _ROUTER,
        "topk",
        "read by live_model.check_live_layers",
        "a live router may choose another number of experts than the configuration",
        "tests/megatron_router_replay/test_replay_refusals.py::test_configuration_that_is_not_the_live_model",
    ),
    Attribute(
        _ROUTER,
        "config",
        "read by attach.attach",
        "settings are refused by what the live router reads",
        "tests/megatron_router_replay/test_replay_refusals.py::test_settings_that_would_ignore_or_undo_replay",
    ),
    Attribute(
        None,
        "config",
        "read by layer_plan.config_of",
        "which layers of the whole model route is read from the chunk's model, since a stage may have no router",
        "tests/megatron_router_replay/test_live_model.py::test_a_stage_without_moe_layers_has_no_routers",
    ),
    Attribute(
        None,
        "hybrid_layer_pattern",
        "read by layer_plan.layer_plan",
        "HybridModel has it, also where the pattern came in by a deprecated name",
        "tests/megatron_router_replay/test_hybrid_model.py::test_routers_are_matched_by_ordinal",
    ),
    *(
        Attribute(
            "transformer.moe.moe_layer.BaseMoELayer",
            name,
            "read by flex_gates.FlexGates",
            "the dispatcher of a replayed router is beside it",
            _FLEX_TEST,
        )
        for name in ("router", "token_dispatcher")
    ),
    Attribute(
        "transformer.moe.token_dispatcher.MoEFlexTokenDispatcher",
        "_comm_manager",
        "read by flex_gates.FlexGates",
        "it is the part that knows DeepEP",
        _FLEX_TEST,
    ),
    *(
        Attribute(
            "transformer.moe.token_dispatcher._DeepepManager",
            name,
            "read by flex_gates.FlexGates",
            "gates are taken again where the indices say",
            _FLEX_TEST,
        )
        for name in ("num_experts", "token_indices", "token_probs")
    ),
    Attribute(
        "transformer.transformer_layer.TransformerLayer",
        "layer_number",
        "read by live_model.check_live_layers",
        "a decoder layer that is dense here may be routed in the rollout",
        "tests/megatron_router_replay/test_replay_refusals.py::test_configuration_that_is_not_the_live_model",
    ),
    Attribute(
        None,
        "get_dynamic_data_context_parallel_groups",
        "called by shards.rank_shards",
        "parallel_state has the hybrid groups under this name where it comes from Megatron-LM's dev branch",
        "tests/megatron_router_replay/test_shards.py::test_groups_of_the_dev_branch",
    ),
)

LEDGER = Ledger(
    distribution="megatron-core",
    title="Megatron-Core",
    prefix="megatron.core.",
    subject="replay",
    tested=TESTED,
    checked=CHECKED,
    way_out="train without replay",
    seams=_ROUTING + _SHARDS,
    attributes=_ROUTING_ATTRIBUTES,
)
"""What `attach` needs."""

TRANSFORMER_ENGINE_LEDGER = Ledger(
    distribution="transformer-engine",
    title="Transformer Engine",
    prefix="transformer_engine.pytorch.distributed.",
    subject="replay in activation checkpoints",
    tested=(),
    checked=("1.5", "2.0", "2.9", "2.18"),
    way_out="train without replay",
    seams=(
        Seam(
            "_CheckpointFunction.forward",
            ("ctx", "run_function"),
            "wrapped by recompute.checkpoint_patches",
            "its run_function is what a recompute of fp8 and fp4 layers calls",
            _QUANTISED,
        ),
        Seam(
            "get_activation_recompute_contexts",
            (),
            "wrapped by recompute.checkpoint_patches",
            "its checkpoint that is not reentrant asks there for the contexts of a forward pass and of its recompute",
            _QUANTISED,
        ),
    ),
)
"""What `attach` needs of Transformer Engine, where it is installed."""

AVERAGES_LEDGER = Ledger(
    distribution="megatron-core",
    title="Megatron-Core",
    prefix="megatron.core.",
    subject="averaging of parameters",
    tested=TESTED,
    checked=CHECKED,
    way_out="save the averages by state_dict(), which needs nothing of Megatron-Core",
    seams=(
        Seam(
            "optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
            ("*", "optimizer", "config", "grad_scaler", "init_state_fn"),
            "relied on by averages.averaged_tensors.main_param",
            "it keeps every 16-bit parameter's float32 main parameter as its attribute main_param, which is averaged",
            _MAIN,
        ),
        Seam(
            "optimizer.distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
            ("*", "gbuf_ranges", "param_gbuf_map", "opt_group_ranges", "config"),
            "relied on by averages.averaged_tensors.main_param",
            "it sets main_param_sharded on parameters whose main_param is a slice, which is not averaged",
            _MAIN,
        ),
        Seam(
            "distributed.DistributedDataParallelConfig.overlap_param_gather",
            None,
            "read by averages.averaged_tensors.find_averaged",
            "it tells whether a rank holds its new parameters after optimizer.step()",
            _STALE,
        ),
        Seam(
            "distributed.DistributedDataParallelConfig.use_megatron_fsdp",
            None,
            "read by averages.averaged_tensors.find_averaged",
            "it tells whether a rank holds all of its parameters",
            _STALE,
        ),
        Seam(
            "distributed.DistributedDataParallel.__init__",
            ("*", "config", "ddp_config", "module"),
            "relied on by averages.averaged_tensors.find_averaged",
            "it keeps ddp_config, and the model that it wraps as its only child, module",
            _STALE,
        ),
        Seam(
            "dist_checkpointing.optimizer.get_param_id_to_sharded_param_map",
            ("model_sharded_state_dict", "optim_params_iter"),
            "called by averages.ema.ExponentialMovingAverage.sharded_state_dict",
            "it finds the sharding of every averaged tensor in the model's sharded state dict",
            _SHARDED,
        ),
        Seam(
            "dist_checkpointing.optimizer.make_sharded_optimizer_tensor",
            ("model_param", "optim_param", "*", "prefix"),
            "called by averages.ema.ExponentialMovingAverage.sharded_state_dict",
            "it gives an average the sharding of its parameter",
            _SHARDED,
        ),
    ),
    attributes=(
        Attribute(
            None,
            "main_param",
            "read by averages.averaged_tensors.main_param",
            "an optimizer leaves a 16-bit parameter's float32 values there",
            "tests/megatron_router_replay/test_ema.py::test_main_parameters_are_averaged_where_bfloat16_stands_still",
        ),
        Attribute(
            None,
            "main_param_sharded",
            "read by averages.averaged_tensors.main_param",
            "a slice of a main parameter is not averaged",
            "tests/megatron_router_replay/test_ema.py::test_the_distributed_optimizers_slices_are_not_taken_for_parameters",
        ),
        Attribute(
            "distributed.DistributedDataParallel",
            "ddp_config",
            "read by averages.averaged_tensors.find_averaged",
            "it tells whether the wrapper leaves parameters stale",
            "tests/megatron_router_replay/test_ema_contents.py::test_parameters_that_are_stale_after_a_step_are_refused",
        ),
        Attribute(
            "distributed.DistributedDataParallel",
            "module",
            "read by averages.averaged_tensors.find_averaged",
            "names of averages are those of the model inside of its wrappers",
            "tests/megatron_router_replay/test_ema.py::test_main_parameters_are_averaged_where_bfloat16_stands_still",
        ),
    ),
)
"""What averages of parameters need, checked when their sharded state is asked for."""
