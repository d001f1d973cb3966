"""The ledger's rows of several ranks: which of them answers, whose tokens are whose, and what the stages send."""

from __future__ import annotations

from router_replay.upstream import Attribute, Seam

_TESTS = "tests/sglang_router_capture/test_parallel.py"
_PIPELINE = "managers.scheduler_pp_mixin.SchedulerPPMixin"
_RANKS = "SGLang tells a capturer its place among the ranks"
_GATHERED = "SGLang hands a capturer this rank's tokens alone"
_MESSAGES = "SGLang brings what a capturer holds from each stage to the first one"

SEAMS = (
    Seam(
        "runtime_context.get_parallel",
        (),
        "called by hooks.capturer.around_create",
        "a rank that answers no request needs no table",
        _RANKS,
    ),
    Seam(
        "layers.dp_attention.is_dp_attention_enabled",
        (),
        "called by ranks.own_tokens",
        "a layer sees the tokens of all ranks then",
        _GATHERED,
    ),
    Seam(
        "layers.dp_attention.get_dp_local_slice_cpu",
        ("forward_batch", "can_run_graph", "cuda_graph_batch"),
        "called by ranks.own_tokens",
        "SGLang itself knows where a rank's tokens begin among those of all",
        _GATHERED,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardBatch.global_num_tokens_cpu",
        None,
        "read by ranks.own_tokens",
        "it tells how many rows the layers of a gathered pass wrote",
        _GATHERED,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardBatch._original_num_tokens",
        None,
        "read by ranks.own_tokens",
        "what follows in a padded batch are no tokens",
        _GATHERED,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardBatch.forward_mode",
        None,
        "read by ranks.own_tokens",
        "the size of a graph that a capturer is told is that of the decode graph",
        _GATHERED,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardMode.is_extend",
        (),
        "called by ranks.own_tokens",
        "the size of a graph that a capturer is told is that of the decode graph",
        _GATHERED,
    ),
    Seam(
        f"{_PIPELINE}._pp_send_dict_to_next_stage",
        ("tensor_dict", "async_send", "msg_type"),
        "hooked by hooks.parallel.before_send_dict",
        "the next stage needs the routes of a pass beside its hidden states",
        _MESSAGES,
    ),
    Seam(
        f"{_PIPELINE}._pp_recv_proxy_tensors",
        (),
        "hooked by hooks.parallel.after_recv_proxy_tensors",
        "they are taken out before the model sees its hidden states",
        _MESSAGES,
    ),
    Seam(
        f"{_PIPELINE}._pp_prepare_tensor_dict",
        (),
        "hooked by hooks.parallel.after_prepare_tensor_dict",
        "the last stage's result carries the routes to the first one",
        _MESSAGES,
    ),
    Seam(
        f"{_PIPELINE}._pp_prep_batch_result",
        ("batch", "mb_metadata", "pp_outputs"),
        "hooked by hooks.parallel.before_prep_batch_result",
        "a pass's rows are whole when its result is back",
        _MESSAGES,
    ),
    Seam(
        "environ.envs",
        None,
        "read by refusals.require_every_pass_to_return",
        "SGLang's own environment variables are read through it",
        _MESSAGES,
    ),
    Seam(
        "environ.Envs.SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM",
        None,
        "read by refusals.require_every_pass_to_return",
        "some results are not sent back then",
        _MESSAGES,
    ),
)

ATTRIBUTES = (
    *(
        # What `get_parallel` returns answers some of them by `__getattr__`, which no reader sees.
        Attribute(
            None,
            name,
            "read by ranks.Place.of",
            why,
            f"{_TESTS}::{test}",
        )
        for name, why, test in (
            ("pp_rank", "the first stage is the one that answers", "test_pipeline_parallel"),
            ("pp_size", "a later stage has to hand its routes on", "test_pipeline_parallel"),
            ("attn_tp_rank", "of tensor parallelism, the first rank is the one that answers", "test_tensor_parallel"),
            ("attn_cp_rank", "of context parallelism, the first rank is the one that answers", "test_tensor_parallel"),
            ("attn_dp_size", "the staging buffer must hold the tokens of all ranks", "test_attention_data_parallel"),
            ("attn_tp_size", "each rank's tokens are padded to a multiple of it", "test_attention_data_parallel"),
        )
    ),
    Attribute(
        None,
        "start_layer",
        "read by hooks.capturer.layers_of_stage",
        "it tells where a model's part on a stage begins",
        f"{_TESTS}::test_pipeline_parallel",
    ),
    Attribute(
        None,
        "end_layer",
        "read by hooks.capturer.layers_of_stage",
        "it tells where a model's part on a stage ends",
        f"{_TESTS}::test_pipeline_parallel",
    ),
    Attribute(
        "model_executor.forward_batch_info.PPProxyTensors",
        "tensors",
        "read by hooks.parallel.before_prep_batch_result",
        "it is the dictionary that travels between stages",
        f"{_TESTS}::test_pipeline_parallel",
    ),
)
