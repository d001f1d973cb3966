"""Masks are read out of a server's answer, and an answer without them says what is missing at which end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from router_replay.errors import DataError
from router_replay.masks import RoutingGeometry, RoutingMasks, masks_from_meta_info
from router_replay.masks.stores.inline import InlineStore
from tests.router_replay.masks.routes import random_indices

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)


def _masks() -> RoutingMasks:
    valid = torch.tensor([True, False, True, True])
    return RoutingMasks.from_indices(
        random_indices(GEOMETRY, 4, seed=0), valid, start=2, geometry=GEOMETRY, codec="bitset", token_ids=range(6)
    )


def test_the_one_handle_is_read():
    masks = _masks()
    read = masks_from_meta_info({"id": "a", "routing_masks": [InlineStore().put(masks)]})
    assert (read.start, read.end, read.token_digest) == (2, 6, masks.token_digest)
    assert torch.equal(read.indices(), masks.indices())


@pytest.mark.parametrize(
    ("meta_info", "says"),
    [
        ({"id": "a"}, "return_routed_experts: true.*--enable-router-capture"),
        ({"routing_masks": []}, "return_routed_experts: true.*--enable-router-capture"),
        ({"routing_masks": None}, "return_routed_experts: true.*--enable-router-capture"),
        ({"routed_experts": "AAAA"}, "SGLang's own format.*--router-capture-format masks"),
        ({"routing_masks": [{}, {}]}, "found 2 handles"),
        ({"routing_masks": {"store": "inline:"}}, "found a dict"),
        ({"routing_masks": [{"store": "cloud"}]}, "not a handle of a known store"),
    ],
)
def test_an_answer_without_masks_is_refused(meta_info: dict[str, Any], says: str):
    with pytest.raises(DataError, match=says):
        masks_from_meta_info(meta_info)
