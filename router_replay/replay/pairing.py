"""Whether masks belong to the sequences of a layout."""

from __future__ import annotations

from collections.abc import Sequence

from router_replay.errors import PairingError
from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.replay.layout import BatchLayout


def check_pairing(
    masks: Sequence[RoutingMasks | None],
    layout: BatchLayout,
    geometry: RoutingGeometry,
    partial: bool,
    valid: bool,
) -> None:
    """Refuse masks that are not those of the layout's sequences, in its order.

    Args:
        masks: one for each sequence; None where the rollout has no routes of it.
        geometry: of the model.
        partial: accept masks that end before the last token but one of their sequence.
        valid: whether a row has to be valid.

    Raises:
        PairingError: masks of another model, of other tokens, of another number of sequences; a missing prefix, rows
            beyond a sequence or, without `partial`, short of it; mixed codecs; where a row has to be valid, none in any
            of them.
    """
    if len(masks) != layout.num_sequences or not masks:
        raise PairingError(
            f"the layout has {layout.num_sequences} sequences, masks were given for {len(masks)}: pass one RoutingMasks"
            " per sequence, in the layout's order, and None for a sequence without routes"
        )
    given = [(index, one) for index, one in enumerate(masks) if one is not None]
    tokens = layout.by_sequence(layout.token_ids)
    for index, one in given:
        token_ids = tokens[index]
        one.geometry.require_same(geometry, "the rollout", "this model")
        if one.start != 0:
            raise PairingError(
                f"masks of sequence {index} begin at token {one.start}, the sequence at token 0: join the masks of all "
                "turns first (RoutingMasks.join)"
            )
        if one.end > token_ids.numel():
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: do not cut"
                " a sequence shorter than its rollout without cutting its masks (RoutingMasks.cut)"
            )
        first_index, first = given[0]
        if one.codec != first.codec:
            raise PairingError(
                f"masks of sequence {index} use codec {one.codec!r}, those of sequence {first_index} {first.codec!r}:"
                " one microbatch needs one codec"
            )
        try:
            one.check_tokens(token_ids)
        except PairingError as error:
            raise PairingError(
                f"masks of sequence {index}: {error}; a batch that is padded on the left needs"
                ' BatchLayout.padded(..., side="left")'
            ) from error
        # The last token of a rollout was sampled and not fed back: it alone has no row.
        if one.end < token_ids.numel() - 1 and not partial:
            raise PairingError(
                f"masks of sequence {index} cover {one.end} tokens, the layout gives it {token_ids.numel()}: the tokens"
                " after them would be routed natively; join the masks of all turns (RoutingMasks.join), or pass"
                " partial=True if these tokens were never in the rollout"
            )
    num_rows = sum(one.num_tokens for _, one in given)
    if valid and num_rows and not any(bool(one.valid.any()) for _, one in given):
        raise PairingError(
            f"none of the {num_rows} rows of these {len(given)} masks is valid, so nothing would be replayed: look at"
            " what the server says of them, and pass valid=False if a microbatch as small as this one may be routed"
            " natively"
        )
