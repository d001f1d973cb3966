"""Which responses to learn from: those that are sound, in groups that have something to teach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import GroupIds, ids_of

ONE_REWARD = "one_reward"
"""The reason of responses whose group, or what is left of it, has one reward."""


@dataclass(frozen=True)
class FilteredResponses:
    """What stays of the responses to a step's prompts.

    Attributes:
        kept: numbers of the responses that stay, rising: take the tokens, rewards and group ids at these.
        dropped: of each reason, how many responses left for it; each counts once, for its first.
        kept_groups, num_groups: prompts of which a response stays, and all of them.
        num_responses: all responses.
    """

    kept: tuple[int, ...]
    dropped: dict[str, int]
    kept_groups: int
    num_groups: int
    num_responses: int

    @property
    def nothing_left(self) -> bool:
        """No response stays: there is nothing to update on, and losses of an empty batch would be 0 in silence."""
        return not self.kept

    def flat(self, prefix: str = "filter/") -> dict[str, float]:
        """Names and numbers for a metrics logger: what stays, and what left by reason, as shares of all."""
        shares = {f"dropped/{reason}": count / max(self.num_responses, 1) for reason, count in self.dropped.items()}
        shares["kept"] = len(self.kept) / max(self.num_responses, 1)
        shares["kept_groups"] = self.kept_groups / max(self.num_groups, 1)
        return {f"{prefix}{name}": share for name, share in shares.items()}


def filter_responses(
    rewards: Sequence[float] | Tensor,
    group_ids: GroupIds,
    *,
    flags: Mapping[str, Sequence[bool] | Tensor] | None = None,
    one_reward: bool = True,
) -> FilteredResponses:
    """Drop flagged responses, then groups whose remaining responses all have one reward, before advantages are made.

    What leaves is as if it had never been sampled: it counts neither in its group's mean and standard deviation, nor
    in a loss's denominator, which is to be the number of what stays in the global batch.

    - Groups of one reward (DAPO's dynamic sampling, arXiv 2503.14476, eq. 11, there to be sampled again) have
      group-relative advantages of 0: dropping them leaves the direction of the gradient, and makes it longer by the
      share that they had of the denominator. Responses of which one is left in its group go with them.
    - Responses cut off at a limit of length are judged by what they could not say. Without them lengths near the limit
      cost nothing, and what is learned is conditional on ending before it. To mask them in the loss and let them count
      in their group's mean, as DAPO's overlong filtering does, keep them here and use `Responses.keep` later.
    - Responses with broken tool calls: without them nothing teaches not to break calls, and the others' advantages
      compare sound responses alone.

    It works on the host, and waits for tensors on a device. Under data parallelism every rank filters groups of its
    own; whether there is an update is decided by the sum over ranks of `len(kept)`, since ranks update together.

    Args:
        rewards: one for each response, `[S]`.
        group_ids: `[S]`, equal for the responses to one prompt.
        flags: by reason, whether a response leaves for it, `[S]`; in order, a response counts for its first.
        one_reward: drop groups of one reward.

    Raises:
        InputError: lengths that differ, a reward that is NaN or infinite, or flags that are no booleans.
    """
    scores = [float(each) for each in (rewards.tolist() if isinstance(rewards, Tensor) else rewards)]
    ids = ids_of(group_ids, len(scores)) or ()
    wrong = [number for number, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(scores)} rewards are not finite; the first is {scores[wrong[0]]} of response"
            f" {wrong[0]}: give a response without a reward a flag of its own, and any reward"
        )
    left: dict[int, str] = {}
    dropped: dict[str, int] = {}
    for reason, given in (flags or {}).items():
        found = _booleans(reason, given, len(scores))
        new = [number for number, flag in enumerate(found) if flag and number not in left]
        left |= dict.fromkeys(new, reason)
        dropped[reason] = len(new)
    if one_reward:
        of_group: dict[object, set[float]] = {}
        for number, (group, score) in enumerate(zip(ids, scores, strict=True)):
            if number not in left:
                of_group.setdefault(group, set()).add(score)
        new = [number for number, group in enumerate(ids) if number not in left and len(of_group[group]) == 1]
        left |= dict.fromkeys(new, ONE_REWARD)
        dropped[ONE_REWARD] = len(new)
    kept = tuple(number for number in range(len(scores)) if number not in left)
    return FilteredResponses(kept, dropped, len({ids[number] for number in kept}), len(set(ids)), len(scores))


def _booleans(reason: str, given: Sequence[bool] | Tensor, count: int) -> list[bool]:
    found = list(given.tolist() if isinstance(given, Tensor) else given)
    if reason == ONE_REWARD:
        raise InputError(f"flags must not be called {ONE_REWARD!r}, which is a reason of its own: take another name")
    if len(found) != count or any(each not in (False, True) for each in found):
        raise InputError(
            f"flags {reason!r} must be {count} booleans, one for each reward, got {len(found)}: {str(found[:4])[:80]}"
        )
    return [bool(each) for each in found]
