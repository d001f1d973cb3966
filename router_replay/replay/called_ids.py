"""The token ids that a model is called with, compared with those of what is bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from router_replay.errors import PairingError
from router_replay.replay.uncompiled import never_compiled

Compare = Callable[[Tensor], None]


def watch(embedding: nn.Module, seen: Compare, argument: str = "input_ids") -> RemovableHandle:
    """Call `seen` with the token ids, `int64 [B, S]`, of every call of an embedding that is for a batch.

    Args:
        argument: name of the embedding's first parameter, where it is not passed by position.
    """

    @never_compiled
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs[argument]
        # Models of images and text look up single tokens, too.
        if ids.dim() == 2:
            seen(ids)

    return embedding.register_forward_pre_hook(look, with_kwargs=True)


def require_same_shape(called_with: Tensor, expected: Tensor) -> None:
    """Raise PairingError where a model is called with ids of another shape than the layout's."""
    if called_with.shape != expected.shape:
        raise PairingError(
            f"the model is called with token ids of shape {list(called_with.shape)}, the layout of this microbatch has"
            f" {list(expected.shape)} on this rank: a padded batch [B, S] takes BatchLayout.padded, a packed one [1, T]"
            " BatchLayout.packed"
        )
