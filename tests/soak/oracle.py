"""Hugging Face's float32 model as the judge of recorded routes, near-ties told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3MoeForCausalLM

# Two engines' errors, in each of the two logits that are compared, and twice that since a sample's largest is no bound.
_BOUND_PER_ERROR = 8.0


@dataclass(frozen=True)
class Judged:
    """What the reference says of one sequence's recorded routes.

    Attributes:
        margins: `float32 [tokens, L - 1]`: lowest logit of the recorded experts minus the highest of the others, in
            all layers but the last. Negative where the reference would have chosen others, -inf where no set of K
            different experts was recorded.
        last_logits: `float32 [tokens, E]`: of the last layer, under the first checkpoint.
    """

    margins: Tensor
    last_logits: Tensor


def margins_of(logits: Tensor, experts: Tensor) -> Tensor:
    """Lowest logit of a set `int64 [..., K]` minus the highest of the others, `[...]`; -inf for what is no set."""
    known = experts.clamp(min=0)
    member = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, known, True)
    margin = logits.gather(-1, known).amin(-1) - logits.masked_fill(member, -torch.inf).amax(-1)
    whole = (experts >= 0).all(-1) & (member.sum(-1) == experts.shape[-1])
    return torch.where(whole, margin, -torch.inf)


def routes_of(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """Experts `int64 [tokens, L, K]` that the model in a Hugging Face folder chooses in float32."""
    with torch.no_grad():
        _, experts = _logits(_loaded(folder, torch.float32), torch.tensor([list(token_ids)]), None)
    return torch.stack(experts, dim=1)


class Oracle:
    """The reference of a small Qwen3-MoE.

    Attributes:
        bounds: `float32 [L]`: how far the reference's logits may contradict a recorded set by rounding alone.
    """

    def __init__(self, model: Path, longest: int) -> None:
        self._model = _loaded(model, torch.float32)
        self._routers = _routers(self._model)
        self.bounds = self._derived_bounds(model, longest)

    @torch.no_grad()
    def judge(self, token_ids: Sequence[Sequence[int]], recorded: Sequence[Tensor]) -> list[Judged]:
        """Hold routes against the reference.

        Args:
            token_ids: of each sequence; the routes of token t depend on tokens [0, t].
            recorded: `int64 [tokens, L, K]` for each; -1 where nothing is known, where the reference chooses itself.
        """
        ids = pad_sequence([torch.tensor(each) for each in token_ids], batch_first=True)
        experts = pad_sequence(list(recorded), batch_first=True, padding_value=-1)
        margins: list[Tensor] = []
        with _following(self._routers, experts, self.bounds, margins) as last:
            self._model.model(input_ids=ids, use_cache=False)
        stacked = torch.stack(margins, dim=-1).view(*ids.shape, -1)
        last_logits = last[0].view(*ids.shape, -1)
        lengths = [len(each) for each in token_ids]
        return [Judged(stacked[i, :n], last_logits[i, :n]) for i, n in enumerate(lengths)]

    @torch.no_grad()
    def _derived_bounds(self, model: Path, longest: int) -> Tensor:
        """Rounding of the logits in float32 with the routes held fast, from the same passes in float64."""
        ids = torch.randint(self._model.config.vocab_size, (8, longest), generator=torch.Generator().manual_seed(0))
        single, chosen = _logits(self._model, ids, None)
        double, _ = _logits(_loaded(model, torch.float64), ids, chosen)
        errors = torch.stack([(a - b).abs().amax() for a, b in zip(double, single, strict=True)])
        return _BOUND_PER_ERROR * errors.float()


def _loaded(model: Path, dtype: torch.dtype) -> Any:
    # The grouped matrix products that are the default know no float64.
    return Qwen3MoeForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager").eval()


def _routers(model: Qwen3MoeForCausalLM) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _normalized(logits: Tensor, experts: Tensor) -> Tensor:
    chosen = logits.softmax(-1).gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True)


def _logits(model: Any, ids: Tensor, routes: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of every router, and the experts: `routes` where they are given."""
    logits: list[Tensor] = []
    experts: list[Tensor] = []

    def hook(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = routes[len(logits)] if routes is not None else output[2]
        logits.append(output[0])
        experts.append(chosen)
        return output[0], _normalized(output[0], chosen), chosen

    handles = [router.register_forward_hook(hook) for router in _routers(model)]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return logits, experts


@contextmanager
def _following(routers: list[Any], experts: Tensor, bounds: Tensor, margins: list[Tensor]) -> Iterator[list[Tensor]]:
    """The routers take the recorded experts where those hold, their own elsewhere; the last one only tells."""
    last: list[Tensor] = []

    def hook(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, _, native = output
        layer = len(margins)
        if layer == len(routers) - 1:
            last.append(logits)
            return output
        recorded = experts[:, :, layer].flatten(0, 1)
        margin = margins_of(logits, recorded)
        margins.append(margin)
        taken = torch.where((margin >= -bounds[layer])[:, None], recorded, native)
        return logits, _normalized(logits, taken), taken

    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()
