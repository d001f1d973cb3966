"""Hooks on the messages between the stages of a pipeline."""

from __future__ import annotations

from typing import Any

from sglang_router_capture.follow.pipeline import PASS_KEY, ROWS_KEY, FirstStage, LaterStage
from sglang_router_capture.hooks.process import other_rank_of_this_process, recorder_of_this_process
from sglang_router_capture.hooks.registry import hook

_PIPELINE = "managers.scheduler_pp_mixin.SchedulerPPMixin"


@hook(f"{_PIPELINE}._pp_send_dict_to_next_stage", "BEFORE")
def before_send_dict(
    scheduler: Any, tensor_dict: dict[str, Any], async_send: bool = True, msg_type: str = "default", **others: Any
) -> None:
    """A pass's hidden states go to the next stage."""
    capturer = recorder_of_this_process() or other_rank_of_this_process()
    if msg_type == "proxy" and isinstance(capturer, (FirstStage, LaterStage)):
        tensor_dict.update(capturer.outgoing())


@hook(f"{_PIPELINE}._pp_recv_proxy_tensors", "AFTER")
def after_recv_proxy_tensors(proxy_tensors: Any, scheduler: Any, **others: Any) -> None:
    """The hidden states of the batch that runs next came from the stage before."""
    stage = other_rank_of_this_process()
    if isinstance(stage, LaterStage):
        stage.received(proxy_tensors.tensors.pop(PASS_KEY, None), proxy_tensors.tensors.pop(ROWS_KEY, None))


@hook(f"{_PIPELINE}._pp_prepare_tensor_dict", "AFTER")
def after_prepare_tensor_dict(tensor_dict: dict[str, Any], scheduler: Any, *arguments: Any, **others: Any) -> None:
    """The last stage's result, on its way to the first one."""
    stage = other_rank_of_this_process()
    if isinstance(stage, LaterStage):
        tensor_dict.update(stage.outgoing())


@hook(f"{_PIPELINE}._pp_prep_batch_result", "BEFORE")
def before_prep_batch_result(scheduler: Any, batch: Any, mb_metadata: Any, pp_outputs: Any, **others: Any) -> None:
    """A pass's result has come back."""
    # Taken out on every rank of the first stage: the rest of the message goes round to the other stages, and the ranks
    # of one stage must send the same.
    number, message = pp_outputs.tensors.pop(PASS_KEY, None), pp_outputs.tensors.pop(ROWS_KEY, None)
    recorder = recorder_of_this_process()
    if isinstance(recorder, FirstStage):
        recorder.returned(number, message)
