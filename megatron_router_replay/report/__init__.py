"""A run's mismatch between rollout and trainer, written down step by step, and one HTML page about it.

In the trainer, after its log-probability pass; needs torch and safetensors alone:

    write_step(folder, RunStep.of(step, rollout_logprobs, {"old": old_logprobs}, response_mask, cu_seqlens))

On the command line, with the extra ``report`` installed:

    r3 report folder --out report.html
"""

from megatron_router_replay.report.reading import find_files, read_run
from megatron_router_replay.report.records import RunStep
from megatron_router_replay.report.step_files import read_step, write_step

__all__ = ["RunStep", "find_files", "read_run", "read_step", "write_step"]
