"""The most probable tokens of the sampler at each place, as the rollout engine returns them, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.ranks import together
from router_replay.mismatch.responses import Responses, require_responses

LARGEST_MASS = 1.05
"""Of the probabilities of one place: what engines leave that take their logarithms in bfloat16 is below."""


@dataclass(frozen=True, eq=False)
class SamplerTopK:
    """The K most probable tokens under mu at each place, and their log-probabilities; detached.

    It is made with `SamplerTopK.of`, which checks them, once, and waits for the device for that; what takes it checks
    them no more, and does not wait.

    Attributes:
        token_ids: int64 `[*tokens, K]`, distinct at each place; -1 where there is no token, and at all places that are
            no response token.
        logprobs: `[*tokens, K]` in nats, normalised over the whole vocabulary, at least float32; 0 where there is none.
    """

    token_ids: Tensor
    logprobs: Tensor

    @classmethod
    def of(
        cls,
        *,
        token_ids: Tensor,
        logprobs: Tensor,
        responses: Responses,
        vocab_size: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> SamplerTopK:
        """What came with the rollout, padded or packed as the tokens are.

        Which tokens are listed must not hang on which one was sampled: it is added to the list by no one, in it or not.
        Log-probabilities are those of the distribution that was sampled, after temperature. SGLang's
        `output_top_logprobs` are those before top-p, top-k and min-p, penalties and grammars, so with any of these they
        are of another distribution, which nothing can notice here.

        Args:
            token_ids: int `[*tokens, K]`; -1 fills up places at which there are fewer. K may be 0.
            logprobs: float, of the same shape; ignored where the id is -1.
            vocab_size: columns of the trainer's logits.
            process_group: as of `LogRatios.of`.

        Raises:
            InputError: shapes or devices that do not fit; or at a response token an id beyond the vocabulary or twice,
                a log-probability that is not finite or above 0, or probabilities that sum to more than 1.
        """
        require_responses(responses)

        def made() -> SamplerTopK:
            shape = (*responses.mask.shape, token_ids.shape[-1] if token_ids.dim() else 0)
            for name, tensor in (("token_ids", token_ids), ("logprobs", logprobs)):
                if tensor.shape != shape:
                    raise InputError(
                        f"{name} {list(tensor.shape)} of the sampler's top-k must be the response mask's shape"
                        f" {list(responses.mask.shape)} and K, the same for ids and log-probabilities"
                    )
                if tensor.device != responses.mask.device:
                    raise InputError(f"{name} is on {tensor.device}, the response mask on {responses.mask.device}")
            if token_ids.is_floating_point() or token_ids.dtype == torch.bool or not logprobs.is_floating_point():
                raise InputError(
                    f"token_ids must be integers and logprobs floating point, got {token_ids.dtype} and"
                    f" {logprobs.dtype}"
                )
            ids = token_ids.long().masked_fill(~responses.mask[..., None], -1)
            dtype = torch.promote_types(logprobs.dtype, torch.float32)
            found = cls(ids, logprobs.detach().to(dtype).masked_fill(ids == -1, 0))
            found._require_distributions(vocab_size)
            return found

        require_tensors(token_ids=token_ids, logprobs=logprobs)
        return together(made, process_group, responses.context_group)

    @property
    def mass(self) -> Tensor:
        """Probability that mu gives to the tokens of each place together, tokens' shape; 0 where there are none."""
        return self.logprobs.exp().masked_fill(self.token_ids == -1, 0).sum(-1)

    def _require_distributions(self, vocab_size: int) -> None:
        ids = self.token_ids
        ordered = ids.sort(-1).values
        mass = self.mass
        bad = {
            "outside": ((ids < -1) | (ids >= vocab_size)).any(-1),
            "twice": ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1),
            "values": ~(self.logprobs.isfinite() & (self.logprobs <= 0)).all(-1),
            "mass": ~(mass <= LARGEST_MASS),
        }
        # One transfer from the device.
        counts = dict(zip(bad, torch.stack([each.sum() for each in bad.values()]).tolist(), strict=True))
        for name, count in counts.items():
            if count:
                place = tuple(bad[name].nonzero()[0].tolist())
                raise InputError(f"at {count} response tokens {self._said(name, place, vocab_size)}")

    def _said(self, name: str, place: tuple[int, ...], vocab_size: int) -> str:
        ids, logprobs = self.token_ids[place].tolist(), self.logprobs[place].tolist()
        first = f"the first, at {list(place)}, has"
        if name == "outside":
            return (
                f"the sampler's top-k has ids that are not in [0, {vocab_size}), nor -1; {first} {ids[:8]}: the"
                " trainer's vocabulary is that of its logits, of all tensor-parallel ranks"
            )
        if name == "twice":
            return (
                f"the sampler's top-k lists a token twice; {first} {ids[:8]}: it would count twice. Do not add the"
                " sampled token to the engine's list"
            )
        if name == "values":
            return (
                f"the sampler's top-k has log-probabilities that are not finite, or above 0; {first}"
                f" {[round(each, 4) for each in logprobs[:8]]}: pass natural logarithms, and the id -1 where there is"
                " no token"
            )
        return (
            f"the probabilities of the sampler's top-k sum to more than 1; {first}"
            f" {float(self.mass[place]):.4g}: pass natural logarithms of probabilities over the whole vocabulary"
        )
