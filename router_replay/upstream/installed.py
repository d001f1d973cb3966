"""Reads the installed upstream by importing it: what is checked at a start is what will run."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from router_replay.upstream.reader import Found, without_receiver


@dataclass(frozen=True)
class Installed:
    """Reader of this process's own upstream.

    Attributes:
        distribution: name on the index.
    """

    distribution: str

    # Once: each time reads the metadata of all that is installed, and hooks ask for every seam.
    @cached_property
    def release(self) -> str | None:
        """The distribution's version; None where it is imported from a folder that was never installed."""
        # A package's own `__version__` may be another: Megatron-Core's has the commit of the current folder in it.
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def find(self, path: str) -> Found:
        """The name at a full dotted path, imported.

        Raises:
            LookupError: there is none, or a module on the way cannot be imported.
        """
        owner_path, _, name = path.rpartition(".")
        try:
            owner = resolve(owner_path)
            found = _member(owner, name) if inspect.isclass(owner) else resolve(path)
        except (ImportError, AttributeError) as error:
            raise LookupError(f"nothing of that name ({error})") from error
        signature = without_receiver(inspect.signature(found)) if callable(found) else None
        return Found(signature, _bequeather(owner, name))

    def has_field(self, owner: str, name: str) -> bool:
        """Whether the class at a full dotted path, or a base of it, declares an annotated field.

        Raises:
            LookupError: there is no such class.
        """
        try:
            return _declares(resolve(owner), name)
        except (ImportError, AttributeError) as error:
            raise LookupError(f"nothing of that name ({error})") from error

    def has_attribute(self, owner: str, name: str) -> bool | None:
        """Not to be seen in a class."""
        return None


def resolve(path: str) -> Any:
    """Import what is at a dotted path.

    Raises:
        ImportError, AttributeError: naming the first part that is not there.
    """
    try:
        return pkgutil.resolve_name(path)
    except AttributeError:
        # It hides why a module on the way cannot be imported.
        names = path.split(".")
        for end in range(1, len(names)):
            module = importlib.import_module(".".join(names[:end]))
            if not hasattr(module, "__path__"):
                break
        raise


def _member(owner: type, name: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    # A field without a default is no attribute of its class.
    if _declares(owner, name):
        return None
    raise AttributeError(f"{owner.__name__} has no attribute or field {name!r}")


def _declares(owner: type, name: str) -> bool:
    return any(name in vars(base).get("__annotations__", {}) for base in owner.__mro__)


def _bequeather(owner: Any, name: str) -> str | None:
    # A method that is gone from its class may still be found in a base class, as a stub.
    if not inspect.isclass(owner) or name in vars(owner):
        return None
    return next((base.__name__ for base in owner.__mro__ if name in vars(base)), None)
