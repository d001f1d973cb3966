"""Errors of routing masks: each names both sides of a mismatch and the way out."""


class RoutingMaskError(ValueError):
    """Base of every error that this project raises about routing masks."""


class GeometryError(RoutingMaskError):
    """A model configuration does not say, or says twice, where and how tokens are routed."""


class GeometryMismatchError(RoutingMaskError):
    """Two sides disagree about the number of layers, the routed layers, the experts or top-k."""


class TokenMismatchError(RoutingMaskError):
    """Masks were recorded for other token ids than those they are paired with."""


class MaskValueError(RoutingMaskError):
    """Expert indices or packed rows that no router can have produced."""


class ContainerError(RoutingMaskError):
    """Bytes or a handle that do not hold routing masks that this version can read."""
