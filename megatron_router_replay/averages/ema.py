"""Exponential moving averages of a Megatron model's parameters, sharded as the parameters are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_router_replay.averages.averaged_tensors import find_averaged, is_half_parameter, main_param
from megatron_router_replay.ledger import AVERAGES_LEDGER
from router_replay.errors import CallOrderError, InputError, PairingError
from router_replay.upstream import require


class ExponentialMovingAverage:
    """Averages, in float32, of the shards that this rank holds; no rank speaks to another.

        ema = ExponentialMovingAverage(model_chunks, decay=0.99)
        optimizer.step(); ema.update()
        with ema.swapped_in(), torch.no_grad():
            proximal_logprobs = ...  # or an evaluation, or the weights that go to the rollout engine

    The rule, with b the decay, p_0 the values at construction and p_t those at the t-th update:

        w_0 = 1,    w_t = b w_{t-1} + 1,    average_t = average_{t-1} + (p_t - average_{t-1}) / w_t

    so that average_t = sum_i b^(t-i) p_i / sum_i b^(t-i), i = 0..t: the weighted mean of what was seen, p_0 being one
    sample like any other. This is the warm-up. It is the proximal policy of PPO-EWMA (Hilton, Cobbe, Schulman, "Batch
    size-invariance for policy optimization", arXiv 2110.00641, and `EwmaModel` of its code), and it is Adam's
    correction of the bias towards the start (Kingma, Ba, arXiv 1412.6980, section 3): 1 / w_t = (1-b) / (1-b^(t+1)).
    Without warm-up w_t = 1 / (1-b) throughout and p_0 has the weight b^t, far more than one sample's share until t is
    several times 1 / (1-b). TensorFlow's `ExponentialMovingAverage(num_updates=...)` and the `EMAModel` of
    diffusers lower the decay to min(b, (1+t) / (10+t)) instead, which forgets the start as t^-9; but there the
    constant 10, and not b, decides how much of the past counts while t is small, and the weights are not b^(t-i).

    What is averaged: parameters that require a gradient at construction, a tied one once, and persistent
    floating-point buffers. Of a router these are the expert bias, which chooses experts together with the averaged
    weights and so must lag as they do. Frozen parameters, counters (buffers that are not persistent, such as
    `local_tokens_per_expert`) and integers stay as they are, inside `swapped_in` too.

    Where values come from: the optimizer's float32 main parameters (`param.main_param`) where every 16-bit parameter
    has a whole one here, as with Megatron's `Float16OptimizerWithFloat16Params`; else the parameters themselves. A
    bfloat16 parameter stands still until its main parameter has moved by about half a unit in the last place, 2^-8 of
    its value or less, and an average of it is off by at most that much. Ranks of the distributed optimizer hold slices
    of main parameters; there the parameters are averaged, since replicas that used what they own would come to differ.

    The average itself must be float32 for the same reason: it moves by the fraction 1 / w of its distance, and in
    float32 stops short of a value that stands still by 2^-24 / (1-b) of it at most; up to b = 1 - 2^-15 that is less
    than half a unit of bfloat16.

    Attributes:
        decay: b.
        total_weight: w_t; a number of the host, so that no update waits for the device.
    """

    def __init__(self, model_chunks: nn.Module | Sequence[nn.Module], decay: float, *, warm_up: bool = True) -> None:
        """Start with the present values as the average.

        Build it when model and optimizer hold their weights, and after the model has its dtype and device.

        Args:
            model_chunks: this rank's model, or its chunks under interleaved pipelining, as Megatron wrapped them (DDP,
                Float16Module) or bare.
            decay: in [0, 1); the average looks back over about 1 / (1 - decay) updates.
            warm_up: False gives w_0 = 1 / (1 - decay), the plain recursion average += (1-b) (p - average).

        Raises:
            InputError: a decay outside [0, 1).
            UnsupportedError: nothing to average, or parameters that are not plain whole tensors of their shard at
                the end of `optimizer.step()`.
        """
        if not 0 <= decay < 1:
            raise InputError(f"decay must be in [0, 1), got {decay}: 0 follows the model, 1 would never move")
        self.decay = decay
        self.total_weight = 1.0 if warm_up else 1 / (1 - decay)
        chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
        self._owners = find_averaged(chunks)
        self._swapped = False
        sources = zip(self._owners, self._sources(), strict=True)
        self._averages = {name: source.detach().to(torch.float32, copy=True) for name, source in sources}

    @property
    def uses_main_params(self) -> bool:
        """Whether 16-bit parameters are averaged from the optimizer's float32 main parameters."""
        half = [tensor for tensor in self._tensors() if is_half_parameter(tensor)]
        return bool(half) and all(main_param(parameter) is not None for parameter in half)

    @torch.no_grad()
    def update(self) -> None:
        """Take the present values in; call it after every `optimizer.step()` that was not skipped.

        Raises:
            CallOrderError: inside `swapped_in`, where the model's values are the average's own.
        """
        if self._swapped:
            raise CallOrderError(
                "update() inside swapped_in(): the model holds the averages now, not the values of a training step; "
                "leave the block first"
            )
        total_weight = self.decay * self.total_weight + 1
        pairs = list(zip(self._averages.values(), self._sources(), strict=True))
        same = [(average, source) for average, source in pairs if source.dtype == average.dtype]
        if same:
            averages, sources = (list(side) for side in zip(*same, strict=True))
            torch._foreach_lerp_(averages, sources, 1 / total_weight)
        for average, source in pairs:
            if source.dtype != average.dtype:
                # One at a time: a float32 copy of the whole model would not fit beside it.
                average.lerp_(source.to(average.dtype), 1 / total_weight)
        self.total_weight = total_weight

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model compute with the averages, rounded to its dtypes, inside the block; then restore every bit.

        Values are written in place: objects, storages and the views that optimizers and DDP buffers hold of them stay.
        The present values wait in a copy on their own device. Run forward passes inside under `torch.no_grad()`:
        routers count tokens for their expert bias otherwise, and a backward pass that crosses either end of the block
        is refused by autograd. Do not step an optimizer inside: what it writes is lost.

        Raises:
            CallOrderError: a block inside a block.
        """
        if self._swapped:
            raise CallOrderError("swapped_in() inside swapped_in(): the model holds the averages already")
        tensors = self._tensors()
        present = [tensor.detach().clone() for tensor in tensors]
        self._swapped = True
        try:
            _copy(self._averages.values(), tensors)
            yield
        finally:
            _copy(present, tensors)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's averages, for `torch.save` beside its other state.

        Returns:
            `decay`, `total_weight`, and `averages`: float32 tensors by parameter name, with the parameters' local
            shapes; they are the averages themselves, which the next update moves.
        """
        return {"decay": self.decay, "total_weight": self.total_weight, "averages": dict(self._averages)}

    def sharded_state_dict(self, model_sharded_state_dict: Mapping[str, Any], prefix: str = "ema") -> dict[str, Any]:
        """The state for `megatron.core.dist_checkpointing`, to save, or to load under another sharding.

            sharded = {"ema": ema.sharded_state_dict(model.sharded_state_dict())}
            dist_checkpointing.save(sharded, folder)
            ema.load_state_dict(dist_checkpointing.load(sharded, folder)["ema"])

        Every average is sharded as its parameter is, as Megatron's optimizers do with their own state
        (`make_sharded_optimizer_tensor`). `load` writes into the averages in place, as it does with parameters: if
        it fails, load again or build the average anew.

        Args:
            model_sharded_state_dict: of the same, live model; of all chunks, nested in any way, under interleaved
                pipelining.
            prefix: put before every key of the model, with a dot.

        Returns:
            `state_dict()` with `ShardedTensor` or `ShardedTensorFactory` in place of tensors.

        Raises:
            PairingError: an averaged tensor that is not in the model's sharded state.
            SeamError: the installed Megatron-Core lacks what this needs.
        """
        # The ledger first: the import below fails on a name that is gone, and would not say what it was for.
        require(AVERAGES_LEDGER)
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        sharded = get_param_id_to_sharded_param_map(model_sharded_state_dict, self._tensors())
        missing = [name for index, name in enumerate(self._averages) if index not in sharded]
        if missing:
            raise PairingError(
                f"{len(missing)} of {len(self._averages)} averaged tensors are not in the model's sharded state dict: "
                f"{_some(missing)}; pass sharded_state_dict() of the very model and chunks that are averaged, whose "
                "entries hold the parameters themselves"
            )
        averages = {
            name: make_sharded_optimizer_tensor(sharded[index], average, prefix=prefix)
            for index, (name, average) in enumerate(self._averages.items())
        }
        return {**self.state_dict(), "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; nothing is changed unless all of it fits.

        Raises:
            PairingError: another decay, or tensors with other names, shapes or dtypes.
        """
        lacks = {"decay", "total_weight", "averages"} - set(state)
        if lacks:
            raise PairingError(f"the state lacks {sorted(lacks)}, it has {sorted(state)}: pass what state_dict() gave")
        if state["decay"] != self.decay:
            raise PairingError(
                f"the state was averaged with decay {state['decay']}, this average has decay {self.decay}: construct "
                "it with the saved decay, or set the state's 'decay' to the new one to go on with that"
            )
        saved: Mapping[str, Tensor] = state["averages"]
        if saved.keys() != self._averages.keys():
            raise PairingError(
                f"the state has {len(saved)} averages, this model {len(self._averages)}; only in the state: "
                f"{_some(saved.keys() - self._averages.keys())}; only in the model: "
                f"{_some(self._averages.keys() - saved.keys())}. Use the state of the same rank, architecture and "
                "frozen parameters; for another pipeline split use sharded_state_dict()"
            )
        for name, average in self._averages.items():
            if (saved[name].shape, saved[name].dtype) != (average.shape, average.dtype):
                raise PairingError(
                    f"{name} is {_describe(saved[name])} in the state and {_describe(average)} in this model: use the "
                    "state of the same rank and tensor-parallel size, or sharded_state_dict()"
                )
        for name, average in self._averages.items():
            average.copy_(saved[name])
        self.total_weight = float(state["total_weight"])

    def _tensors(self) -> list[Tensor]:
        # Looked up each time: Module.to() puts new buffer objects in place of the old.
        return [getattr(owner, attribute) for owner, attribute in self._owners.values()]

    def _sources(self) -> list[Tensor]:
        tensors = self._tensors()
        if not self.uses_main_params:
            return tensors
        return [getattr(tensor, "main_param", tensor) if is_half_parameter(tensor) else tensor for tensor in tensors]


@torch.no_grad()
def _copy(values: Sequence[Tensor] | Any, targets: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: Any) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") if shown else "none"
