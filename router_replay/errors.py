"""The errors of this project, by what a caller can do about them; messages name both sides and the way out."""


class RouterReplayError(Exception):
    """Base of every error that this project raises by itself."""


class InputError(RouterReplayError, ValueError):
    """A value that the function cannot take: mend the value, by what the message says is expected."""


class PairingError(RouterReplayError, ValueError):
    """Two things that are right by themselves and do not belong together: masks and tokens, a model and a geometry."""


class UnsupportedError(RouterReplayError, ValueError):
    """A model, a setting or an engine's feature under which routes could be wrong: change it, or leave them off."""


class DataError(RouterReplayError, ValueError):
    """Bytes, a file or an answer that does not hold what this version can read: get it again, or written anew."""


class StoreError(RouterReplayError, OSError):
    """A store of masks that cannot be reached, read or written: mend the place, or try again."""


class CallOrderError(RouterReplayError, RuntimeError):
    """A call at the wrong time: before what it needs, after its end, or twice."""


class SeamError(RouterReplayError, RuntimeError):
    """No engine, or one without a name that this project stands on, or with another signature of it."""
