"""A run's mismatch between rollout and trainer, written down step by step, and read back.

In the trainer, after its log-probability pass; needs torch and safetensors alone:

    responses = Responses.packed(response_mask, cu_seqlens, group_ids)
    passes = {"old": old_logprobs}
    write_step(
        folder,
        RunStep.of(step, rollout_logprobs=rollout_logprobs, trainer_logprobs=passes, responses=responses),
    )
"""

from router_replay.run.collapse import find_collapse
from router_replay.run.dynamics import Dynamics
from router_replay.run.reading import find_files, read_run, read_tallies
from router_replay.run.step import RunStep
from router_replay.run.step_files import read_step, write_step

__all__ = ["Dynamics", "RunStep", "find_collapse", "find_files", "read_run", "read_step", "read_tallies", "write_step"]
