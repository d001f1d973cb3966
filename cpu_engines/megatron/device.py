"""A scoped answer to the CUDA calls that Megatron-Core makes on every path."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.overrides import TorchFunctionMode

from cpu_engines.megatron.context_parallel import rotary_of_pack, rotary_on_this_rank
from cpu_engines.megatron.norms import new_torch_norm
from cpu_engines.megatron.uneven import gather_along_first_dim, reduce_scatter_along_first_dim


class _Event:
    """torch.cuda.Event and torch.cuda.Stream for work that is already synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()


def _names_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on "cuda" to the CPU, and names types as on CUDA.

    The optimizers tell the parameters that need a float32 main parameter by the names of `Tensor.type()`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple("cpu" if _names_cuda(arg) else arg for arg in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).rpartition(".")[2]
        return func(*args, **kwargs)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu`, which leaves CPU tensors as they are where `all_to_all_single` needs sequences."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _replacements() -> list[tuple[Any, str, Any]]:
    """The (owner, attribute, stand-in) triples that CpuDevice installs."""
    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "Stream", _Event),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "current_stream", lambda *args: _Event()),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda *args: None),
        (torch.Tensor, "record_stream", lambda tensor, *args: None),
        # The CPU generator is saved beside these by Megatron itself, so a recompute still repeats its dropout.
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8)),
        (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        (megatron_random.CudaRNGStatesTracker, "fork", lambda tracker, *args, **kwargs: contextlib.nullcontext()),
        (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", rotary_on_this_rank),
        (yarn_rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", rotary_on_this_rank),
        (rope_utils, "_apply_rotary_pos_emb_thd", rotary_of_pack),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
        (mappings, "_gather_along_first_dim", gather_along_first_dim),
        (mappings, "_reduce_scatter_along_first_dim", reduce_scatter_along_first_dim),
        (WrappedTorchNorm, "__new__", staticmethod(new_torch_norm)),
    ]


class CpuDevice:
    """Makes torch.cuda's surface answer for the CPU, until `remove()`.

    Also runs what Megatron decorates with `torch.compile` eagerly: compiling it costs minutes on a CPU and says
    nothing about routing. Usable as a context manager; `apply` and `remove` may be called twice.
    """

    def __init__(self) -> None:
        self._undo: contextlib.ExitStack | None = None

    def apply(self) -> CpuDevice:
        if self._undo is not None:
            return self
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in _replacements():
                if name in vars(owner):
                    stack.callback(setattr, owner, name, vars(owner)[name])
                else:
                    stack.callback(delattr, owner, name)  # inherited: uncover it again
                setattr(owner, name, stand_in)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_CudaMeansCpu())
            self._undo = stack.pop_all()
        return self

    def remove(self) -> None:
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def __enter__(self) -> CpuDevice:
        return self.apply()

    def __exit__(self, *exc: object) -> None:
        self.remove()
