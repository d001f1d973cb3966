"""Which tensors of a Megatron model are averaged, and where their float32 values are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from router_replay.errors import UnsupportedError


def find_averaged(chunks: Sequence[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Module and attribute of every averaged tensor by its name.

    These are the parameters that require a gradient, a tied one under its first name only, and the persistent
    floating-point buffers. Names are those of the model inside its wrappers; with several chunks, `chunk<index>.`
    comes first.

    Raises:
        UnsupportedError: there is none, one is not a plain tensor, or a wrapper leaves parameters stale.
    """
    owners: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()
    for index, chunk in enumerate(chunks):
        prefix = f"chunk{index}." if len(chunks) > 1 else ""
        for path, module in _unwrapped(chunk).named_modules(prefix=prefix.removesuffix(".")):
            trained = [(name, value) for name, value in module.named_parameters(recurse=False) if value.requires_grad]
            kept = [
                (name, value)
                for name, value in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set
            ]
            for attribute, tensor in trained + kept:
                if id(tensor) in seen or not tensor.is_floating_point():
                    continue
                name = f"{path}.{attribute}" if path else attribute
                if type(tensor.data) is not Tensor:
                    raise UnsupportedError(
                        f"{name} is a {type(tensor.data).__name__}, not a plain torch.Tensor (quantised or distributed "
                        "storage), and could not be restored bit by bit: keep parameters in bf16, fp16 or fp32, "
                        "sharded by Megatron's own parallelism"
                    )
                seen.add(id(tensor))
                owners[name] = (module, attribute)
    if not owners:
        raise UnsupportedError(
            f"the {len(chunks)} model chunk(s) have no parameter that requires a gradient and no floating-point buffer:"
            " there is nothing to average; build the average before freezing the model"
        )
    return owners


def _unwrapped(chunk: nn.Module) -> nn.Module:
    while True:
        config = getattr(chunk, "ddp_config", None)
        for setting in ("overlap_param_gather", "use_megatron_fsdp"):
            if getattr(config, setting, False):
                raise UnsupportedError(
                    f"the model is wrapped with {setting}=True: after optimizer.step() this rank does not hold the "
                    f"new values of all its parameters, an average needs them; set {setting}=False"
                )
        own = [*chunk.named_parameters(recurse=False), *chunk.named_buffers(recurse=False)]
        children = dict(chunk.named_children())
        if own or list(children) != ["module"]:
            return chunk
        chunk = children["module"]


def is_half_parameter(tensor: Tensor) -> bool:
    """Whether an optimizer would keep a float32 main parameter for this tensor."""
    return isinstance(tensor, nn.Parameter) and tensor.dtype in (torch.bfloat16, torch.float16)


def main_param(parameter: Tensor) -> Tensor | None:
    """The float32 main parameter, of the parameter's shape; None where this rank has none or a slice of it."""
    main = getattr(parameter, "main_param", None)
    # A rank's slice may happen to be all of a small parameter, but then other replicas hold none of it.
    whole = main is not None and not getattr(parameter, "main_param_sharded", False)
    return main if whole else None
