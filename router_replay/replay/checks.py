"""Checks whose answers are on the device: they are noted there during the step, and read where waiting costs nothing.

A check that fails raises a flag on the device. `read` waits for the device and raises; before an optimizer's step that
costs nothing that the step does not cost. Flags are also copied to the host behind the work that set them, so that a
caller who never reads them meets the error when the next microbatch is bound, without any wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks import RoutingGeometry
from router_replay.replay.overlap import MIN_PLACES, hardly_any

_WRONG_IDS, _HARDLY_ANY, _OTHER_MASKS = range(3)
# Fingerprints and orders are below it, so that ranks with none to compare leave the extremes as they are.
_MODULUS = (1 << 61) - 1
_NONE = (-_MODULUS, -_MODULUS)


class DeviceChecks:
    """Flags of one replay.

    Attributes:
        tensor_groups: process groups whose ranks must be given the same microbatch in the same pass (tensor and context
            parallelism).
        step_groups: process groups, these included, whose ranks must be given the same microbatches in the same order
            within a step (and pipeline stages).
    """

    def __init__(
        self,
        geometry: RoutingGeometry,
        device: torch.device,
        tensor_groups: Sequence[dist.ProcessGroup] = (),
        step_groups: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self._geometry = geometry
        self.tensor_groups, self.step_groups = tuple(tensor_groups), tuple(step_groups)
        self._apart: set[dist.ProcessGroup] = set()
        # Each holds the number of the pass that raised it first, from 1 on, or 0.
        self._flags = torch.zeros(3, dtype=torch.int64, device=device)
        self._on_host = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._is_read = False
        self._orders: dict[int, int] = {}
        self._num_sampled = 0
        self._with_hardly_any = torch.zeros((), dtype=torch.int64, device=device)

    def set_apart(self, group: dist.ProcessGroup | None) -> None:
        """Its ranks have microbatches of their own from now on; what one of them finds wrong is still raised on all."""
        if group is not None:
            self._apart.add(group)

    def count(self, chunk: int, fingerprint: int) -> None:
        """A model chunk with MoE layers has run a microbatch with this fingerprint; `read` compares their order."""
        self._orders[chunk] = (self._orders.get(chunk, 0) * 1_000_003 + fingerprint + 1) % _MODULUS

    def compare_ids(self, called_with: Tensor, expected: Tensor, number: int) -> None:
        """Token ids of the call, and those of the layout with -1 for padding; both of one shape, on the device."""
        self._raise(_WRONG_IDS, ((called_with != expected) & (expected >= 0)).any(), number)

    def compare_fingerprints(self, fingerprint: int, number: int) -> None:
        """Whether all ranks of the tensor groups bound the same microbatch; every rank of them calls it."""
        for group in self.tensor_groups:
            # A rank that set its group apart takes part as well: whether it did is no reason to leave others waiting.
            mine = _NONE if group in self._apart else (fingerprint, -fingerprint)
            # Filled by a kernel: a copy from the host's pageable memory would wait for the device.
            extremes = torch.stack([self._flags.new_full((), value) for value in mine])
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
            differ = (extremes[0] != -extremes[1]) & (extremes[0] != -_MODULUS)
            self._raise(_OTHER_MASKS, differ, number)

    def add_overlap(self, with_hardly_any: Tensor, num_places: int, number: int) -> bool:
        """Of `num_places` places, how many share hardly any expert with the trainer's own choice.

        Returns:
            Whether these and those before them were enough to be judged.
        """
        self._num_sampled += num_places
        self._with_hardly_any += with_hardly_any
        if self._num_sampled < MIN_PLACES:
            return False
        self._raise(_HARDLY_ANY, self._with_hardly_any * 2 > self._num_sampled, number)
        self._num_sampled = 0
        self._with_hardly_any.zero_()
        return True

    def copy_to_host(self) -> None:
        """Begin to copy the flags to the host; `raise_copied` looks at them."""
        self._on_host.copy_(self._flags, non_blocking=True)
        if self._flags.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def raise_copied(self) -> None:
        """Raise what a copy that has arrived says; never waits, and does nothing once `read` has been called.

        Whoever reads the flags on all ranks is not to meet them on one rank before.

        Raises:
            PairingError: as of `read`.
        """
        if not self._is_read and (self._copied is None or self._copied.query()):
            self._explain(self._on_host.numpy().tolist())

    def read(self) -> None:
        """Wait for the device, and raise what is wrong; every rank of the step groups calls it, and all of them raise.

        Raises:
            PairingError: the model was called with other token ids than those of the layout, hardly any replayed expert
                is the trainer's own choice, or chunks or ranks of one model were given different microbatches.
        """
        self._is_read = True
        orders, self._orders = set(self._orders.values()), {}
        # A rank without MoE layers has no order.
        extremes = self._flags.new_tensor((max(orders), -min(orders)) if orders else _NONE)
        flags = self._flags.clone()
        for group in self.step_groups:
            shared = torch.cat([flags, self._flags.new_tensor(_NONE) if group in self._apart else extremes])
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            flags = shared[:3]
            extremes = extremes if group in self._apart else shared[3:]
        self._explain(flags.tolist())
        largest, negated = extremes.tolist()
        if largest != -negated and largest != -_MODULUS:
            raise PairingError(
                "chunks or ranks of one model replayed different microbatches since the last check, or the same ones in"
                " another order: every model chunk, pipeline stage and tensor- or context-parallel rank must bind the"
                " same masks and layouts, in the order of its forward passes, and all ranks call check() after the same"
                " passes"
            )

    def _raise(self, flag: int, wrong: Tensor, number: int) -> None:
        self._flags[flag] = torch.where(wrong & (self._flags[flag] == 0), number, self._flags[flag])

    def _explain(self, flags: Sequence[int]) -> None:
        if not any(flags):
            return
        # What is reported is not reported again.
        self._flags.zero_()
        self._on_host.zero_()
        if number := flags[_WRONG_IDS]:
            raise PairingError(
                f"in the {number}. bound pass the model was called with other token ids than those of the layout of its"
                " block: bind each microbatch's own masks and layout, and call the model with the layout's token ids"
            )
        if number := flags[_OTHER_MASKS]:
            raise PairingError(
                f"in the {number}. bound pass, ranks of one tensor- or context-parallel group had different masks or"
                " layouts: give every rank of the group the whole sequences of the same microbatch"
            )
        top_k, experts = self._geometry.top_k, self._geometry.num_experts
        raise PairingError(
            f"up to the {flags[_HARDLY_ANY]}. bound pass, most sampled places share fewer than"
            f" {hardly_any(self._geometry):.0%} of their {top_k} experts with the trainer's own choice (unrelated"
            f" choices of {top_k} of {experts} share {top_k / experts:.0%}): the masks are of other tokens, of another"
            " model or of weights that have nothing to do with these; a model with random routers needs"
            " attach(..., overlap_every=None)"
        )
