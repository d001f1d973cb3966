"""Rollout: the masks of one conversation, asked for turn by turn and put together at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from router_replay.errors import CallOrderError, PairingError
from router_replay.masks.client import masks_from_meta_info
from router_replay.masks.digest import PrefixDigest, TokenIds, as_token_ids
from router_replay.masks.masks import RoutingMasks, require_same_rows
from router_replay.masks.weight_versions import joined_runs

_ASK_WHOLE = "ask for this turn again with request_fields(prompt_ids, whole=True), which takes all rows anew"


@dataclass(frozen=True)
class Turn:
    """What an answer brought.

    Attributes:
        asked_from: position from which rows were asked for (`routed_experts_start_len`).
        start, end: positions [start, end) of the answer's rows; both `asked_from` where it had none.
        num_new: rows that were taken; those before `asked_from` were there already.
    """

    asked_from: int
    start: int
    end: int
    num_new: int

    @property
    def is_delta(self) -> bool:
        """The answer has rows of a part of the sequence only, and is nothing without those of earlier turns."""
        return self.start > 0


class Rollout:
    """Collects the rows of one conversation of several turns, each row once.

        rollout = Rollout()
        while not done:
            answer = post({"input_ids": token_ids, **rollout.request_fields(token_ids), ...})
            rollout.add(answer["meta_info"], answer["output_ids"])
            token_ids = token_ids + answer["output_ids"] + environment_ids
        masks = rollout.join()

    A row depends on the tokens up to its own and on nothing after them. So the rows in front of the first token that a
    new prompt changes are kept, and all others are asked for: after a turn that was retried, cut short, edited or
    rolled back, as after any other. An answer that is refused, or never comes, changes nothing. Rows that an answer
    repeats are not taken again: those that are kept were computed by the passes that sampled earlier turns.

    Two threads must not share one. It can be pickled.
    """

    def __init__(self) -> None:
        self._ids = np.empty(0, dtype=np.int64)
        self._parts: list[RoutingMasks] = []
        # Of as many of the parts' ids as were hashed already.
        self._digest = PrefixDigest()
        self._request: tuple[np.ndarray, int] | None = None

    @property
    def end(self) -> int:
        """Rows of the tokens [0, end) are there, valid or not."""
        return self._parts[-1].end if self._parts else 0

    @property
    def token_ids(self) -> np.ndarray:
        """`int64 [n]`: prompt and output of the last answer that was taken."""
        return self._ids.copy()

    def request_fields(self, prompt_ids: TokenIds, *, whole: bool = False) -> dict[str, Any]:
        """What the next request says, so that its answer has the rows that are not there yet.

        Nothing changes until `add` is given the answer; a request that failed is made again by calling this again.

        Args:
            prompt_ids: `int [n]`, the whole sequence that the server reads, earlier turns included. In a session of
                the server's pass the whole conversation here, too.
            whole: ask for all rows, whatever is there.

        Returns:
            `return_routed_experts` and `routed_experts_start_len`, for the request's JSON.

        Raises:
            InputError: prompt_ids are not the token ids of one sequence.
        """
        # A copy, since the answer is checked against them when the caller may have gone on.
        prompt = as_token_ids(prompt_ids).copy()
        kept = 0 if whole else _length_in_common(prompt, self._ids[: self.end])
        self._request = (prompt, kept)
        return {"return_routed_experts": True, "routed_experts_start_len": kept}

    def add(self, answer: Mapping[str, Any] | RoutingMasks, output_ids: TokenIds) -> Turn:
        """Take the answer to the request that `request_fields` was called for last.

        Args:
            answer: its `meta_info`, or masks that were made of it.
            output_ids: `int [m]`, the tokens that it sampled.

        Returns:
            Where the answer's rows are, and how many of them were new. A request that was aborted before it sampled
            anything has none, and leaves everything as it was.

        Raises:
            CallOrderError: no request is open.
            InputError, DataError: as of `masks_from_meta_info`, or output_ids that are none.
            PairingError: rows of other tokens than prompt and output, rows that begin after those that were asked for,
                or rows that cannot stand behind those that are there: of another model, another codec, or of weights
                that nobody named behind named ones.
        """
        if self._request is None:
            raise CallOrderError("no request is open: call request_fields(prompt_ids) before each request")
        prompt, asked = self._request
        output = as_token_ids(output_ids)
        if not len(output) and _was_aborted(answer):
            self._request = None
            return Turn(asked, asked, asked, 0)
        masks = answer if isinstance(answer, RoutingMasks) else masks_from_meta_info(answer)
        ids = np.concatenate([prompt, output])
        if masks.start > asked:
            raise PairingError(
                f"the answer's rows begin at position {masks.start}, but were asked for from position {asked} on: send"
                " what request_fields gives, and add the answers in the order of the requests"
            )
        parts, digest = self._kept(asked)
        found = masks.check_prefix(ids, digest)
        new = masks[asked - masks.start :]
        if len(new):
            _require_continues(parts, new)
            parts, digest = [*parts, new], found
        self._ids, self._parts, self._digest, self._request = ids, parts, digest, None
        return Turn(asked, masks.start, masks.end, len(new))

    def fork(self) -> Rollout:
        """Another conversation with the same turns so far, which goes on by itself; rows are shared, not copied."""
        other = Rollout()
        other._ids, other._parts, other._digest = self._ids, self._parts, self._digest
        other._request = self._request
        return other

    def join(self) -> RoutingMasks:
        """The rows of the whole conversation as they are now, `[0, end)`; more turns may follow.

        Raises:
            CallOrderError: no answer had rows yet.
        """
        if not self._parts:
            raise CallOrderError("no rows were collected yet: add the answer of a request first")
        return RoutingMasks.join(self._parts, self._ids)

    def _kept(self, end: int) -> tuple[list[RoutingMasks], PrefixDigest]:
        """The parts up to position `end`, and what is known of the digest of its tokens."""
        if end == self.end:
            return self._parts, self._digest
        parts = [part.cut(end, self._ids) if part.end > end else part for part in self._parts if part.start < end]
        return parts, PrefixDigest()

    def __getstate__(self) -> dict[str, Any]:
        # A hash in progress cannot be pickled.
        return {name: value for name, value in vars(self).items() if name != "_digest"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _digest=PrefixDigest())


def _length_in_common(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    differing = (left[:length] != right[:length]).nonzero()[0]
    return int(differing[0]) if len(differing) else length


def _was_aborted(answer: object) -> bool:
    """Whether an answer is that of a request which ended before it had rows."""
    if not isinstance(answer, Mapping) or answer.get("routing_masks"):
        return False
    reason = answer.get("finish_reason")
    return isinstance(reason, Mapping) and reason.get("type") == "abort"


def _require_continues(parts: list[RoutingMasks], new: RoutingMasks) -> None:
    if not parts:
        return
    # Those of the last turn whose weights were named speak for all: join looks at every one.
    named = next((part for part in reversed(parts) if part.weight_versions), parts[-1])
    try:
        require_same_rows(parts[-1], new, "the turns before", "this answer")
        joined_runs([(part.weight_versions, part.start, part.valid) for part in (named, new)])
    except PairingError as error:
        raise PairingError(f"the answer's rows do not continue those of the turns before: {error}; {_ASK_WHOLE}") from (
            error
        )
