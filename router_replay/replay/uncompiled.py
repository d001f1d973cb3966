"""Hooks that run as they stand in models that are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def never_compiled[F: Callable[..., Any]](function: F) -> F:
    """Keep a hook out of `torch.compile`: what is bound is this pass's, for which compiled code would be made anew."""
    return torch.compiler.disable(function)
