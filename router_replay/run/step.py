"""One step of a run: what the rollout sampled, and what the trainer says about it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks import RoutingMasks
from router_replay.masks.agreement import RouteTally
from router_replay.masks.arguments import as_bools, as_integer, require_type
from router_replay.masks.batch import list_of_masks
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.log_ratios import LogRatios
from router_replay.mismatch.responses import Responses, require_responses
from router_replay.run.dynamics import Dynamics
from router_replay.run.groups import group_numbers
from router_replay.run.joining import joined_dynamics, joined_routes, require_one_step, require_same
from router_replay.run.recorded_routes import recorded_routes


@dataclass(frozen=True, eq=False)
class RunStep:
    """The N tokens of a step's S sequences, one behind the other, on the CPU. Build it with `of`.

    Attributes:
        step: number of the step, 0 or more; what a step is, is the run's own affair.
        rollout_logprobs: float `[N]`, log-probabilities in nats of the tokens when they were sampled.
        trainer_logprobs: float `[N]` by the name of a trainer's pass, such as "old", or "own routes" and "replayed".
        responses: packed, of S sequences: which tokens the rollout sampled (what others hold does not matter), of
            which sequence, of which prompt. Ids of prompts are 64-bit integers, equal for the responses to one prompt
            in whichever part of the step, or not known.
        routes: how the trainer's own routes differ from the rollout's, or None where one of the two is not known.
        moe_layers: decoder layers (0-based) of the routes, in their order, or None where that is not known.
        weights: float `[N]` by name: importance weights that the trainer applied.
        dynamics: reward, evaluation, entropy and the like, or None where they are not known. A step that has them may
            be without tokens and passes, as one that was only evaluated: `without_tokens`.
    """

    step: int
    rollout_logprobs: Tensor
    trainer_logprobs: Mapping[str, Tensor]
    responses: Responses
    routes: RouteTally | None = None
    moe_layers: tuple[int, ...] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    dynamics: Dynamics | None = None

    def __post_init__(self) -> None:
        if as_integer("step", self.step) < 0:
            raise InputError(f"a step's number is 0 or more, got {self.step}")
        if self.dynamics is not None:
            require_type("dynamics", self.dynamics, Dynamics)
        _require_packed(self.responses)
        if not self.trainer_logprobs and (self.dynamics is None or len(self.responses.mask)):
            raise InputError("no log-probabilities of the trainer: give those of at least one pass")
        named = {"rollout_logprobs": self.rollout_logprobs}
        named |= {f"trainer_logprobs.{name}": values for name, values in self.trainer_logprobs.items()}
        named |= {f"weights.{name}": values for name, values in self.weights.items()}
        for name, values in named.items():
            if not values.is_floating_point():
                raise InputError(f"{name} must be floating point, got {values.dtype}")
        self.responses.require(**named)
        if self.routes is not None and self.moe_layers is not None and len(self.moe_layers) != len(self.routes.shared):
            raise InputError(
                f"moe_layers names {len(self.moe_layers)} decoder layers, the routes have {len(self.routes.shared)}"
            )

    def log_ratios(self, name: str) -> LogRatios:
        """Of one of the trainer's passes over the rollout.

        Raises:
            InputError: log-probabilities that `LogRatios.of` refuses.
        """
        return LogRatios.of(
            trainer=self.trainer_logprobs[name], rollout=self.rollout_logprobs, responses=self.responses
        )

    @classmethod
    def of(
        cls,
        step: int,
        *,
        rollout_logprobs: Tensor,
        trainer_logprobs: Tensor | Mapping[str, Tensor],
        responses: Responses,
        rollout_masks: Sequence[RoutingMasks] | None = None,
        rollout_routes: Tensor | None = None,
        trainer_routes: Tensor | None = None,
        routes_valid: Tensor | None = None,
        moe_layers: Sequence[int] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        dynamics: Dynamics | None = None,
    ) -> RunStep:
        """From what a trainer holds after its log-probability pass, on any device. Routes are compared at once.

        Args:
            trainer_logprobs: as the attribute; a tensor alone is a pass named "trainer".
            responses: packed, with group ids that are integers or names. Equal ids are one prompt in all parts of a
                step, whichever data-parallel rank wrote them: number prompts over the whole batch, not over a rank's.
                Without them, what compares the responses to one prompt is left out of the report.
            rollout_masks: one for each sequence, as the rollout recorded them: they also say which layers route.
            rollout_routes: in their place int `[N, L, K]`, the experts that the rollout took.
            trainer_routes: int `[N, L, K]`, those that the trainer took by itself; with the rollout's, or neither.
            routes_valid: bool `[N]`, False where the rollout's routes are not known; of `rollout_routes` only.
            moe_layers: decoder layers of the routes; those of `rollout_masks` where these are given.
            dynamics: as the attribute, of what is given here.

        Raises:
            InputError: shapes that do not fit, routes of one side only, or two sources of the rollout's routes.
            router_replay.errors.RouterReplayError: masks of different models.
        """
        if rollout_masks is not None and (rollout_routes is not None or routes_valid is not None):
            raise InputError("the rollout's routes are given twice: pass rollout_masks or rollout_routes")
        if routes_valid is not None and rollout_routes is None:
            raise InputError("routes_valid is of rollout_routes, which are not given")
        _require_packed(responses)
        passes = trainer_logprobs if isinstance(trainer_logprobs, Mapping) else {"trainer": trainer_logprobs}
        require_tensors(
            rollout_logprobs=rollout_logprobs,
            **{f"trainer_logprobs.{name}": values for name, values in passes.items()},
            **{f"weights.{name}": values for name, values in (weights or {}).items()},
        )
        groups = None if responses.group_ids is None else group_numbers(responses.group_ids)
        bounds = responses.cu_seqlens.tolist()
        responses = Responses.packed(responses.mask.cpu(), bounds, groups)
        if rollout_masks is not None:
            rollout_masks = list_of_masks(rollout_masks)
            if len(rollout_masks) != responses.num_sequences:
                raise InputError(
                    f"{len(rollout_masks)} rollout masks for {responses.num_sequences} sequences: one for each"
                )
            for number, masks in enumerate(rollout_masks):
                rollout_masks[0].geometry.require_same(masks.geometry, "sequence 0", f"sequence {number}")
            recorded = [
                recorded_routes([masks], end - begin)
                for masks, (begin, end) in zip(rollout_masks, itertools.pairwise(bounds), strict=True)
            ]
            rollout_routes = torch.cat([routes for routes, _ in recorded])
            routes_valid = torch.cat([valid for _, valid in recorded])
            moe_layers = rollout_masks[0].geometry.moe_layers
        for name, given in (("trainer_routes", trainer_routes), ("rollout_routes", rollout_routes)):
            if given is not None and not isinstance(given, Tensor):
                raise InputError(f"{name} must be an int tensor [N, L, K], got a {type(given).__name__}")
        if (rollout_routes is None) != (trainer_routes is None):
            raise InputError(
                "routes of one side only: give the trainer's own (trainer_routes) and the rollout's (rollout_masks or"
                " rollout_routes), or neither"
            )
        routes = None
        if rollout_routes is not None and trainer_routes is not None:
            if len(trainer_routes) != len(responses.mask):
                raise InputError(
                    f"trainer_routes {list(trainer_routes.shape)} must have one row for each of the"
                    f" {len(responses.mask)} tokens of the response mask"
                )
            valid = None if routes_valid is None else as_bools(routes_valid).detach().cpu()
            own, recorded_by_token = trainer_routes.detach().cpu(), rollout_routes.detach().cpu()
            routes = RouteTally.of(trainer=own, rollout=recorded_by_token, valid=valid)
        return cls(
            step=step,
            rollout_logprobs=rollout_logprobs.detach().cpu(),
            trainer_logprobs={name: values.detach().cpu() for name, values in passes.items()},
            responses=responses,
            routes=routes,
            moe_layers=None if routes is None or moe_layers is None else tuple(int(layer) for layer in moe_layers),
            weights={name: values.detach().cpu() for name, values in (weights or {}).items()},
            dynamics=dynamics,
        )

    @classmethod
    def without_tokens(cls, step: int, dynamics: Dynamics) -> RunStep:
        """A step of which no token is written, such as the evaluation before the first update."""
        nothing = Responses.packed(torch.zeros(0, dtype=torch.bool), [0, 0])
        return cls(step, torch.zeros(0), {}, nothing, dynamics=dynamics)

    @classmethod
    def join(cls, parts: Sequence[RunStep]) -> RunStep:
        """One step from its parts: sequences, ranks or files. Equal group ids are one prompt, in whichever part.

        Parts without routes, dynamics, or tokens and passes add none.

        Raises:
            InputError: parts of other steps, with other passes, other weights, or other layers; some with group
                ids and some without.
        """
        require_one_step([part.step for part in parts])
        step, dynamics = parts[0].step, joined_dynamics([part.dynamics for part in parts])
        # What is without passes is without tokens.
        parts = [part for part in parts if part.trainer_logprobs] or parts[:1]
        require_same(
            step,
            [
                {
                    "trainer_logprobs": sorted(part.trainer_logprobs),
                    "weights": sorted(part.weights),
                    "group ids": "not given" if part.responses.group_ids is None else "for its sequences",
                }
                for part in parts
            ],
        )
        routes, moe_layers = joined_routes(step, [(part.routes, part.moe_layers) for part in parts])
        first = parts[0]
        return cls(
            step=step,
            rollout_logprobs=torch.cat([part.rollout_logprobs for part in parts]),
            trainer_logprobs={
                name: torch.cat([part.trainer_logprobs[name] for part in parts]) for name in first.trainer_logprobs
            },
            responses=_joined([part.responses for part in parts]),
            routes=routes,
            moe_layers=moe_layers,
            weights={name: torch.cat([part.weights[name] for part in parts]) for name in first.weights},
            dynamics=dynamics,
        )


def _require_packed(responses: Responses) -> None:
    require_responses(responses)
    if responses.context_group is not None:
        raise InputError(
            "a step is written with whole sequences, and these responses are parts of a context group: gather"
            " log-probabilities and masks over it first, and write them from one of its ranks"
        )
    if responses.mask.dim() != 1:
        raise InputError(
            f"responses of a step must be packed, got a padded mask {list(responses.mask.shape)}: leave the padding"
            " out, and give Responses.packed(mask, cu_seqlens, group_ids)"
        )


def _joined(parts: Sequence[Responses]) -> Responses:
    lengths = torch.cat([part.tokens.counts for part in parts])
    ids = [part.group_ids for part in parts if part.group_ids is not None]
    return Responses.packed(
        torch.cat([part.mask for part in parts]),
        [0, *itertools.accumulate(lengths.tolist())],
        list(itertools.chain.from_iterable(ids)) if ids else None,
    )
