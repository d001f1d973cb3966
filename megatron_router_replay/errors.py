"""Errors of the trainer's end: each names both sides and the way out."""

from routing_masks.errors import RoutingMaskError


class ReplayError(RoutingMaskError):
    """Base of every error that replaying in the trainer raises by itself."""


class NoRouterError(ReplayError):
    """The model has no router to replay into: a dense model, or a pipeline stage of dense layers alone."""


class DuplicateLayerError(ReplayError):
    """Two routers claim the same decoder layer, so rows could go to the wrong one."""


class AlreadyAttachedError(ReplayError):
    """A router of the model already belongs to an attached replay."""


class UnsupportedConfigError(ReplayError):
    """A setting of the model under which replayed routes would be ignored or altered."""


class SeamError(ReplayError):
    """The installed Megatron-Core lacks a name that replay relies on, or has it with another signature."""


class LayoutError(ReplayError):
    """Lengths, bounds or token ids of a batch that do not add up."""


class MasksPlacementError(ReplayError):
    """Masks that do not fit the sequences of a batch: their number, start, end or codec."""


class RowCountError(ReplayError):
    """A router was called with another number of tokens than the microbatch's layout has."""


class UnboundForwardError(ReplayError):
    """A forward pass ran through an attached model without masks and without being told to route natively."""


class DetachedRecomputeError(ReplayError):
    """Activations are recomputed after the replay that their forward pass used was removed."""


class ObservationError(ReplayError):
    """Observed routes do not form one complete forward pass."""


class MismatchInputError(ReplayError, ValueError):
    """Log-probabilities, masks, bounds or settings that a function of the mismatch package cannot take."""


class AverageSourceError(ReplayError):
    """A model whose parameters cannot be averaged: none are trained, or this rank does not hold them as they are."""


class AverageInUseError(ReplayError):
    """Averages are swapped into the model, and the call needs the model's own values there."""


class AverageStateError(ReplayError):
    """A saved average, or a model's sharded state, that is not of the model that is averaged."""


class RunFileError(ReplayError):
    """A run's file, or a line of it, that the report cannot read."""
