"""What a store is: the place where a sequence's masks wait for the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from router_replay.masks.masks import RoutingMasks

Handle = Mapping[str, Any]
"""What travels in an answer in the place of the masks: a small dictionary of plain JSON types, whose key `store` is the
URL by which `open_store` opens the store that made it."""


@dataclass(frozen=True)
class Stat:
    """What a store has for a handle.

    Attributes:
        there: whether `get` would find the masks.
        num_bytes: size of their container; 0 where they are not there.
        num_tokens: their rows, valid or not; 0 where they are not there.
    """

    there: bool
    num_bytes: int = 0
    num_tokens: int = 0


class Store(ABC):
    """Keeps masks under handles. It is closed by `close`, or at the end of a `with` block.

    A store's constructor takes its URL, of which it knows the scheme. Every method but `put` takes the handles of
    stores with the same URL, in other processes too. Every method may be called from any thread.
    """

    @abstractmethod
    def __init__(self, url: str) -> None: ...

    def prepare(self) -> None:  # noqa: B027, a store that needs nothing has nothing to do
        """Make the place where masks are going to be put, and try it: who will write calls this once, at its start.

        Raises:
            StoreError: masks cannot be put there: it is not to be reached, read-only or full.
        """

    @abstractmethod
    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Keep masks, and give the handle under which they are.

        Raises:
            InputError: no masks.
            StoreError: they cannot be kept now; nothing of them stays, and the next ones may be put.
        """

    @abstractmethod
    def get(self, handle: Handle) -> RoutingMasks:
        """The masks of a handle made by `put`; they stay in the store.

        Raises:
            DataError: not a handle of this store, or nothing whole is behind it (any more).
            StoreError: the store cannot be reached or read now.
        """

    @abstractmethod
    def delete(self, handle: Handle) -> None:
        """Let the masks of a handle go; it is no error if they are gone.

        Raises:
            DataError: not a handle of this store.
            StoreError: the store cannot be reached now, or is read-only.
        """

    @abstractmethod
    def stat(self, handle: Handle) -> Stat:
        """What is behind a handle.

        Raises:
            DataError: not a handle of this store, or something is there that is not whole.
            StoreError: the store cannot be reached now.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go what the store holds open; a second call does nothing. Masks that were put stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
