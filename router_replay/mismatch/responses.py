"""The response tokens of a batch, padded or packed, and sums over the sequences and prompt groups they belong to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import (
    GroupIds,
    boolean,
    described,
    groups_of,
    ids_of,
    lengths_of,
    require_tensors,
)
from router_replay.mismatch.parts import Joined, Parts, require_whole
from router_replay.mismatch.ranks import maximum, shared, summed, together
from router_replay.mismatch.segments import Segments


@dataclass(frozen=True, eq=False)
class Responses:
    """Which tokens of a batch are response tokens, of which sequence, of which prompt.

    Build one with `padded` or `packed`. Every function of this package takes tensors with one value per
    token in the shape of the mask (the *tokens' shape*, `[B, T]` or `[N]`) and ignores what they hold outside it.

    Under context parallelism a rank holds a part of each sequence. With `context_group`, the ranks that hold them
    together, sums over sequences are sums over the ranks, and every function of this package gives this rank's tokens
    what they have on one rank, and all ranks the same figures and losses. Every rank makes the same calls. Gradients
    are those of the one loss, each rank's with respect to its own tokens: those of parameters add up over the ranks.
    Without the group sequences must be whole; parts are noticed where `positions` or `cu_seqlens` show it. What is one
    for each sequence, such as rewards, is given alike on all ranks of the group, which nothing checks. A bad token is
    an error on all of them; a shape that does not fit is in functions that do not wait an error on its own rank only.

    Attributes:
        mask: bool, in the tokens' shape, True for tokens that the rollout sampled.
        tokens: all tokens as items of their sequences, which follow each other.
        lengths: int64 `[S]`, response tokens of each whole sequence.
        groups: sequences as items of their prompts, or None where prompts are not known.
        group_ids: `[S]` ids of the prompts as they were given, or None.
        one_token_each: every sequence is one token, packed: what is one for each may be of either.
        parts: what the other context-parallel ranks hold, or None where sequences are whole.
    """

    mask: Tensor
    tokens: Segments
    lengths: Tensor
    groups: Segments | None
    group_ids: tuple[Hashable, ...] | None = None
    one_token_each: bool = False
    parts: Parts | None = None

    @classmethod
    def padded(
        cls,
        mask: Tensor,
        group_ids: GroupIds | None = None,
        *,
        context_group: dist.ProcessGroup | None = None,
        positions: Tensor | None = None,
    ) -> Responses:
        """Sequences of one length.

        Args:
            mask: bool or 0/1, `[B, T]`.
            group_ids: `[B]`, equal for the responses to one prompt; what compares those refuses to without it.
            context_group: context-parallel ranks that hold parts of these sequences, `[B, T]` with a T of their own:
                every rank calls this, with the same prompts. What is refused on one of them is raised on all.
            positions: int, `[B, T]`, each token's position in its whole sequence: for functions to which the order
                counts, under a `context_group` whose ranks may hold any pieces of a sequence (a layout's `position`).
                Without them ranks that are no context group go unnoticed where they have as many sequences.

        Raises:
            InputError: shapes that do not fit, a mask of other values, positions of parts without a group, or with one
                positions that two response tokens have; for all of which the device is waited for.
            router_replay.errors.PairingError: ranks of the group that do not hold parts of the same sequences.
        """

        def made() -> Responses:
            return cls._padded(mask, group_ids)._at(positions)

        return together(made, context_group)._in_group(context_group, positions)

    @classmethod
    def packed(
        cls,
        mask: Tensor,
        cu_seqlens: Sequence[int] | Tensor,
        group_ids: GroupIds | None = None,
        *,
        context_group: dist.ProcessGroup | None = None,
        positions: Tensor | None = None,
    ) -> Responses:
        """Sequences one behind the other.

        Args:
            mask: bool or 0/1, `[N]`.
            cu_seqlens: S + 1 bounds of S sequences, from 0 to N, that do not fall; of this rank's parts of them. A
                tensor on the device is waited for.
            group_ids: `[S]`, as for `padded`.
            context_group, positions: as for `padded`; `[N]`.

        Raises:
            InputError: shapes or bounds that do not fit, or as of `padded`.
            router_replay.errors.PairingError: as of `padded`.
        """

        def made() -> Responses:
            return cls._packed(mask, cu_seqlens, group_ids)._at(positions)

        return together(made, context_group)._in_group(context_group, positions)

    @classmethod
    def _padded(cls, mask: Tensor, group_ids: GroupIds | None) -> Responses:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError(f"a padded response mask must be a tensor [B, T], got {described(mask)}")
        batch, width = mask.shape
        number = torch.arange(batch * width, device=mask.device)
        tokens = Segments(number // max(width, 1), torch.full((batch,), width, device=mask.device))
        ids = ids_of(group_ids, batch)
        mask = boolean(mask)
        return cls(mask, tokens, _lengths(mask, tokens), groups_of(ids, mask.device), ids)

    @classmethod
    def _packed(cls, mask: Tensor, cu_seqlens: Sequence[int] | Tensor, group_ids: GroupIds | None) -> Responses:
        if not isinstance(mask, Tensor) or mask.dim() != 1:
            raise InputError(f"a packed response mask must be a tensor [N], got {described(mask)}")
        lengths = lengths_of(cu_seqlens, len(mask))
        ids = ids_of(group_ids, len(lengths))
        tokens = Segments.following(lengths, mask.device)
        mask = boolean(mask)
        groups, one_token_each = groups_of(ids, mask.device), set(lengths) == {1}
        return cls(mask, tokens, _lengths(mask, tokens), groups, ids, one_token_each)

    def _at(self, positions: Tensor | None) -> Responses:
        """These, with positions of a form that fits."""
        if positions is not None:
            self.require(positions=positions)
            if positions.is_floating_point() or positions.dtype == torch.bool:
                raise InputError(f"positions must be integers, got {positions.dtype}")
        return self

    def _in_group(self, context_group: dist.ProcessGroup | None, positions: Tensor | None) -> Responses:
        flat = None if positions is None else positions.flatten().long()
        if context_group is not None:
            parts = Parts.of(context_group, self.tokens, self.mask.flatten(), self.group_ids, flat)
            return replace(self, parts=parts, lengths=summed(self.lengths, context_group))
        if flat is not None:
            begin = self.tokens.of_items(self.cu_seqlens[:-1])
            offset = torch.arange(len(flat), device=flat.device) - begin
            require_whole(flat, self.tokens.segment, offset, self.mask.flatten())
        return self

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold parts of these sequences, or None where they are whole."""
        return None if self.parts is None else self.parts.group

    @property
    def num_sequences(self) -> int:
        """Number of sequences, those without a response token included."""
        return self.tokens.num_segments

    @property
    def prompts(self) -> Segments:
        """`groups`, for a function that compares the responses to one prompt.

        Raises:
            InputError: no group ids were given.
        """
        if self.groups is None:
            raise InputError(
                "responses to one prompt are compared, and it is not known which those are: give group_ids to"
                " Responses.padded or Responses.packed"
            )
        return self.groups

    def groups_with(
        self, process_group: dist.ProcessGroup | None
    ) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The data-parallel ranks, and the `context_group`: the two groups over which a batch is joined.

        Raises:
            InputError: the first have other ranks of the second among them, with whom the batch would count twice.
        """
        if process_group is not None and self.parts is not None:
            ranks = [dist.get_process_group_ranks(group) for group in (process_group, self.parts.group)]
            if len(set(ranks[0]) & set(ranks[1])) > 1:
                raise InputError(
                    f"process group {ranks[0]} and context group {ranks[1]} may share this rank only: every context"
                    " rank has the figures of whole sequences. Pass the data-parallel group without context parallelism"
                    " (Megatron: with_context_parallel=False)"
                )
        return process_group, self.context_group

    @property
    def is_first(self) -> bool:
        """Whether this rank counts what every rank of a `context_group` has; True without one."""
        return self.parts is None or dist.get_rank(self.parts.group) == 0

    @property
    def counted(self) -> Tensor:
        """Sequences that have response tokens, bool `[S]`; under a `context_group` on one rank of it only.

        For what is added up over these ranks although every rank has it.
        """
        there = self.lengths > 0
        return there if self.is_first else torch.zeros_like(there)

    def whole(self) -> tuple[Responses, Joined]:
        """Packed, with all tokens of whole sequences in order, on every rank; and the way of values there and back.

        Every rank of a `context_group` calls.

        Raises:
            InputError: sequences are in parts, and no positions are known; on every rank alike.
        """
        flat = self.mask.flatten()
        if self.parts is None:
            return replace(self, mask=flat), Joined(self.mask.shape)
        tokens, joined = self.parts.whole(self.mask.shape)
        mask = joined.gather(flat.long()) > 0
        return replace(self, mask=mask, tokens=tokens, parts=None, one_token_each=False), joined

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of the sequences among all tokens, int64 `[S + 1]`, from 0 to the number of tokens."""
        return torch.nn.functional.pad(self.tokens.counts.cumsum(0), (1, 0))

    def keep(self, mask: Tensor) -> Responses:
        """Only response tokens where `mask` (bool or 0/1, tokens' shape) holds: the others leave all denominators.

        They leave every sum and mean over a sequence with them: the ratio of `gspo_loss`, sequence and geometric
        weights and the criteria of masks are then those of the tokens that stay, and no more of the response that was
        sampled. Whole responses may leave at will. For some tokens of a response form ratios and weights before, and
        multiply a token's loss by 0 (`weights`) rather than take it out.

        It waits for the device if the mask is not bool, and every rank of a `context_group` for the others.

        Raises:
            InputError: another shape, or a mask of other values; on every rank of the group alike.
        """

        def kept() -> Tensor:
            self.require(mask=mask)
            return self.mask & boolean(mask)

        found = together(kept, self.context_group)
        lengths = _lengths(found, self.tokens)
        return replace(self, mask=found, lengths=lengths if self.parts is None else summed(lengths, self.parts.group))

    def require(self, **tensors: Tensor) -> None:
        """Raise InputError unless every tensor has the tokens' shape and the mask's device."""
        require_tensors(**tensors)
        for name, tensor in tensors.items():
            self._require_device(name, tensor)
            if tensor.shape != self.mask.shape:
                raise InputError(
                    f"{name} {list(tensor.shape)} and the response mask {list(self.mask.shape)} must have one shape"
                )

    def is_per_sequence(self, **named: Tensor) -> bool:
        """Whether a tensor is `[S]`, one for each sequence, and not in the tokens' shape.

        Raises:
            InputError: it is neither, or it could be both and they differ: as many packed tokens as sequences.
        """
        ((name, values),) = named.items()
        require_tensors(**named)
        self._require_device(name, values)
        # On another rank the same tensor may be of the other kind: all of them refuse.
        ambiguous = self.parts is not None and self.mask.dim() == 1 and self.num_sequences in self.parts.sizes
        if values.shape != (self.num_sequences,) and not ambiguous:
            if values.shape != self.mask.shape:
                raise InputError(
                    f"{name} {list(values.shape)} must be [{self.num_sequences}], one for each sequence, or have the"
                    f" response mask's shape {list(self.mask.shape)}"
                )
            return False
        if self.mask.shape != values.shape and not ambiguous:
            return True
        if ambiguous or not self.one_token_each:
            raise InputError(
                f"{name} {list(values.shape)} may be one for each of {self.num_sequences} sequences or one for each of"
                f" {self.num_sequences} packed tokens: pad the batch, whose tokens then have two dimensions"
            )
        return False

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each sequence's response tokens: tokens' shape to `[S]`, 0 where there are none.

        In float64 and in one order, on any device: ranks that hold the same tokens get the same bits, and so do those
        of a `context_group`, whose parts are added up.
        """
        total = self.tokens.sum(values.masked_fill(~self.mask, 0).flatten().double())
        return (total if self.parts is None else summed(total, self.parts.group)).to(values.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sequence's response tokens: tokens' shape to `[S]`, 0 where there are none."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def max(self, values: Tensor) -> Tensor:
        """Maximum over each sequence's response tokens, detached: tokens' shape to `[S]`, -inf where there are none."""
        highest = self.tokens.max(values.detach().masked_fill(~self.mask, -torch.inf).flatten())
        return highest if self.parts is None else maximum(highest, self.parts.group)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[S]` to the tokens' shape, 0 (False) for all but response tokens.

        Gradients are summed over a `context_group`: they flow on all of its ranks or on none.
        """
        if self.parts is not None and per_sequence.requires_grad:
            per_sequence = shared(per_sequence, self.parts.group)
        return self.tokens.of_items(per_sequence).view(self.mask.shape).masked_fill(~self.mask, 0)

    def _require_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.mask.device:
            raise InputError(f"{name} is on {tensor.device}, the response mask on {self.mask.device}: move one")


def _lengths(mask: Tensor, tokens: Segments) -> Tensor:
    """Response tokens of each sequence that this rank has, int64 `[S]`."""
    lengths = torch.zeros(tokens.num_segments, dtype=torch.int64, device=mask.device)
    return lengths.index_add_(0, tokens.segment, mask.flatten().long())


def require_responses(responses: object) -> None:
    """Raise InputError unless it is a `Responses`: a mask alone does not say which tokens are of one sequence."""
    if not isinstance(responses, Responses):
        raise InputError(
            f"responses must be a Responses, got {'a tensor ' * isinstance(responses, Tensor)}{described(responses)}:"
            " make one with Responses.padded(mask) or Responses.packed(mask, cu_seqlens)"
        )
