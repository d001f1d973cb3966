"""Stores by their URL, and the handles by which a trainer finds them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from router_replay.errors import DataError, InputError
from router_replay.masks import RoutingMasks, Stat, Store, load, open_store, to_bytes
from router_replay.masks.stores import STORES
from router_replay.masks.stores.inline import InlineStore
from tests.router_replay.masks.test_container import assert_same, make_masks

SHELVES: dict[str, dict[str, RoutingMasks]] = {}
OPEN: list[Shelf] = []


class Shelf(Store):
    """A store that a newcomer might write: dictionaries of this process, by name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._kept = SHELVES.setdefault(url.partition(":")[2], {})
        OPEN.append(self)

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        key = str(len(self._kept))
        self._kept[key] = masks
        return {"store": self.url, "key": key}

    def get(self, handle: Any) -> RoutingMasks:
        if handle["key"] not in self._kept:
            raise DataError(f"{handle}: deleted")
        return self._kept[handle["key"]]

    def delete(self, handle: Any) -> None:
        self._kept.pop(handle["key"], None)

    def stat(self, handle: Any) -> Stat:
        masks = self._kept.get(handle["key"])
        return Stat(False) if masks is None else Stat(True, len(to_bytes(masks)), len(masks))

    def close(self) -> None:
        if self in OPEN:
            OPEN.remove(self)


@pytest.fixture(params=["inline:", "shelf:one"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    SHELVES.clear()
    OPEN.clear()
    monkeypatch.setitem(STORES, "shelf", f"{__name__}:Shelf")
    return open_store(request.param)


def test_what_was_put_is_behind_its_handle_wherever_it_is_read(store: Store):
    masks = make_masks()
    handle = json.loads(json.dumps(store.put(masks)))
    assert_same(store.get(handle), masks)
    assert_same(load(handle), masks)
    assert_same(open_store(handle["store"]).get(handle), masks)
    assert store.stat(handle) == Stat(there=True, num_bytes=len(to_bytes(masks)), num_tokens=6)


def test_an_inline_handle_says_where_its_rows_are():
    handle = InlineStore().put(make_masks(start=7, num_tokens=5))
    assert (handle["start"], handle["num_tokens"]) == (7, 5)


def test_handles_do_not_get_mixed_up(store: Store):
    parts = [make_masks(seed=1), make_masks(seed=2)]
    handles = [store.put(part) for part in parts]
    for handle, part in zip(reversed(handles), reversed(parts), strict=True):
        assert_same(load(handle), part)


def test_deleting_twice_is_no_error(store: Store):
    kept, handle = store.put(make_masks()), store.put(make_masks(num_tokens=3))
    store.delete(handle)
    store.delete(handle)
    assert_same(store.get(kept), make_masks())
    if isinstance(store, InlineStore):
        # The masks are in the handle, and go with it.
        assert len(store.get(handle)) == 3
    else:
        assert store.stat(handle) == Stat(there=False, num_bytes=0, num_tokens=0)


def test_a_store_closes_at_the_end_of_its_block(store: Store):
    with store as entered:
        assert entered is store
        handle = entered.put(make_masks())
    store.close()
    assert store not in OPEN
    with pytest.raises(ZeroDivisionError), open_store(handle["store"]):
        raise ZeroDivisionError
    assert not OPEN
    assert_same(load(handle), make_masks())
    # Reading closes what it opened.
    assert not OPEN


@pytest.mark.parametrize("url", ["s4://bucket", "inline", "", ":", "inlined:", None, 5, {"store": "inline:"}])
def test_a_url_of_no_known_store_is_refused_with_those_known(url):
    known = ", ".join(f"{scheme}:" for scheme in STORES)
    message = f"is not the URL of a known store: use one that begins with {known} or another scheme of fsspec$"
    with pytest.raises(InputError, match=message):
        open_store(url)
    with pytest.raises(DataError, match="not a handle of a known store"):
        load({"store": url})


def test_a_handle_whose_store_cannot_be_opened_is_refused():
    with pytest.raises(DataError, match=r"whose store cannot be opened: .*keeps nothing at any place"):
        load({"store": "inline:/tmp", "data": ""})


def test_the_inline_store_has_no_place():
    with pytest.raises(InputError, match="'inline:/tmp': the inline store is 'inline:', it keeps nothing"):
        open_store("inline:/tmp")


@pytest.mark.parametrize("method", ["get", "delete", "stat"])
def test_an_inline_handle_without_data_is_refused_by_every_method(method: str):
    garbled: dict[str, Any] = {"store": "inline:", "data": "###"}
    for handle in ({"store": "inline:"}, {"store": "inline:", "data": 5}, garbled):
        if method == "delete" and handle is garbled:
            # Nothing is to be deleted, and a long text is not decoded for that.
            InlineStore().delete(handle)
            continue
        with pytest.raises(DataError, match="data is not base64 text"):
            getattr(InlineStore(), method)(handle)


def test_a_stat_of_garbled_masks_is_refused():
    handle = InlineStore().put(make_masks())
    with pytest.raises(DataError, match="not a whole safetensors file"):
        InlineStore().stat({**handle, "data": handle["data"][:40]})


def test_a_store_without_all_methods_cannot_be_made():
    class Half(Store):
        def put(self, masks: RoutingMasks) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match="abstract method"):
        Half("half:")


def test_a_store_is_imported_when_it_is_named():
    program = (
        "import sys, router_replay.masks as masks\n"
        "name = 'router_replay.masks.stores.inline'\n"
        "before = name in sys.modules\nmasks.open_store('inline:')\nprint(before, name in sys.modules)\n"
        "for url in ('file:///r3', 'http://host:1', 'parts:', 'ray:'):\n    masks.open_store(url)\n"
        "print({'ray', 's3fs', 'aiohttp'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "set()"]


def test_a_view_is_put_without_what_surrounds_it(store: Store):
    """Rows that are a view of a larger table are written alone."""
    masks = make_masks()
    view = masks[2:]
    assert view.rows.untyped_storage().nbytes() == masks.rows.untyped_storage().nbytes()
    assert torch.equal(load(store.put(view)).rows, masks.rows[2:])


@pytest.mark.parametrize("handle", [{"store": "file:///x", "data": ""}, None, "inline:", {}])
@pytest.mark.parametrize("method", ["get", "stat", "delete"])
def test_the_inline_store_takes_its_own_handles_alone(handle: Any, method: str):
    with pytest.raises(DataError, match="not a handle of the store 'inline:'"):
        getattr(open_store("inline:"), method)(handle)
