"""What a reader of an upstream tells of a name, however it reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Found:
    """A name that is there.

    Attributes:
        signature: of a function or a class, without `self` or `cls`; None for anything else.
        inherited_from: the class that a method comes from, where that is not the class on its path.
    """

    signature: inspect.Signature | None
    inherited_from: str | None = None


class Reader(Protocol):
    """Reads one release of one distribution."""

    @property
    def release(self) -> str | None:
        """The distribution's version; None where it is unknown."""

    def find(self, path: str) -> Found:
        """The name at a full dotted path.

        Raises:
            LookupError: there is none; its argument says what there is, as a clause.
        """

    def has_field(self, owner: str, name: str) -> bool:
        """Whether the class at a full dotted path, or a base of it, declares an annotated field.

        Raises:
            LookupError: there is no such class.
        """

    def has_attribute(self, owner: str, name: str) -> bool | None:
        """Whether objects of the class at a full dotted path get an attribute; None where that cannot be seen."""


def without_receiver(signature: inspect.Signature) -> inspect.Signature:
    """A signature without its first parameter, where that is `self` or `cls`.

    A bound method does not show it, and a plain function in a class does.
    """
    parameters = list(signature.parameters.values())
    shown = bool(parameters) and parameters[0].name in ("self", "cls")
    return signature.replace(parameters=parameters[shown:])
