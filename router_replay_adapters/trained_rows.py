"""Tokens that teach have routes: a sample whose later ones have none is an error, and no native row."""

from __future__ import annotations

from collections.abc import Sequence

from router_replay.errors import DataError


def require_trained_rows(known: int, num_tokens: int, trained: Sequence[int], way_out: str) -> None:
    """Refuse a sample that teaches tokens behind its routes.

    A token's log-probability is of the pass over those in front of it. Rows that a server does not know are among the
    routes, and native; those behind the last one nobody ever asked a server for.

    Args:
        known: tokens from the first one on that have routes.
        num_tokens: of the whole sample.
        trained: its response's loss mask.
        way_out: a clause, what has to be done for them to have some.

    Raises:
        DataError: tokens that teach, and no routes of the tokens in front of the last of them.
    """
    last = max((index for index, teaches in enumerate(trained) if teaches), default=None)
    if last is None:
        return
    position = num_tokens - len(trained) + last
    if known < position:
        raise DataError(
            f"a sample teaches its token {position}, and has routes of {known} of the {position} tokens in front of it:"
            f" {way_out}; set the loss mask of such tokens to 0 to go without them"
        )
