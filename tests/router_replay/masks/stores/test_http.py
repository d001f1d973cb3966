"""The HTTP store and the server's side of it: keys, faults on the way, ranges, and what is refused."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import DataError, InputError, StoreError
from router_replay.masks import Stat, from_bytes, load, open_store
from router_replay.masks.stores import http as http_store
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.http import API_KEY_VARIABLE, HttpStore
from router_replay.masks.stores.served import ROUTE, ServedDirectory, server_url
from tests.router_replay.masks.stores.masks_server import MasksServer, serving
from tests.router_replay.masks.test_container import assert_same, make_masks


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_store, "_WAIT_SECONDS", (0.01, 0.01))
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MasksServer]:
    with serving(f"file://{tmp_path}/store") as running:
        yield running


def ask(server: MasksServer, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_the_key_comes_from_the_environment_or_the_caller_and_is_in_no_handle(
    server: MasksServer, monkeypatch: pytest.MonkeyPatch
):
    handle = server.served.put(make_masks())
    server.api_key = "hidden"
    with pytest.raises(
        StoreError, match=rf"refuses a request without an API key \(status 401\): set {API_KEY_VARIABLE}"
    ):
        load(handle)
    with pytest.raises(StoreError, match="refuses this API key") as caught:
        HttpStore(server.url, api_key="wr0ng").delete(handle)
    assert "wr0ng" not in str(caught.value)
    # A key that is refused is not tried again.
    assert len(server.requests) == 2
    assert_same(HttpStore(server.url, api_key="hidden").get(handle), make_masks())
    monkeypatch.setenv(API_KEY_VARIABLE, "hidden")
    assert_same(load(handle), make_masks())
    assert open_store(server.url).stat(handle).there
    assert "hidden" not in json.dumps(handle)


@pytest.mark.parametrize("fault", [502, 503, 504, "cut", "hang"])
def test_a_fault_that_passes_is_tried_again(server: MasksServer, fault: int | str):
    handle = server.served.put(make_masks(num_tokens=100))
    store = HttpStore(server.url, timeout_s=0.5)
    server.faults = [fault, fault]
    assert_same(store.get(handle), make_masks(num_tokens=100))
    server.faults = [fault]
    # There is nothing to cut in an answer without a body.
    assert store.stat(handle) == Stat(True, handle["num_bytes"], 100)
    server.faults = [fault]
    store.delete(handle)
    assert not server.served.stat(handle).there


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_fault_that_stays_is_an_error(server: MasksServer, fault: int | str):
    handle = server.served.put(make_masks(num_tokens=100))
    server.faults = [fault] * 3
    with pytest.raises(StoreError, match=rf"does not answer GET {ROUTE}{handle['id']}: (status 503|IncompleteRead)"):
        load(handle)
    assert len(server.requests) == 3
    assert_same(load(handle), make_masks(num_tokens=100))


@pytest.mark.parametrize("status", [301, 302, 307, 308, 405, 500])
def test_no_redirect_is_followed_and_no_other_status_tried_again(server: MasksServer, status: int):
    handle = server.served.put(make_masks())
    server.faults = [status]
    with pytest.raises(StoreError, match=f"status {status}"):
        HttpStore(server.url, api_key="hidden").get(handle)
    assert [path for _, path, _ in server.requests] == [ROUTE + handle["id"]]


def test_a_server_that_is_gone_is_an_error(server: MasksServer):
    handle = server.served.put(make_masks())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    moved = {**handle, "store": nobody}
    for call in (HttpStore(nobody).get, HttpStore(nobody).stat, HttpStore(nobody).delete, load):
        with pytest.raises(StoreError, match=r"does not answer .*ConnectionRefusedError"):
            call(moved)


def test_a_server_without_the_route_has_nothing(server: MasksServer):
    handle = server.served.put(make_masks())
    with pytest.raises(DataError, match="nothing is behind"):
        load({**handle, "store": f"{server.url}/elsewhere"})


def test_only_the_server_writes(server: MasksServer):
    store = open_store(server.url)
    for call in (store.prepare, lambda: store.put(make_masks())):
        with pytest.raises(InputError, match="server there"):
            call()
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    ["http://", "http:host", "http:///path", "http://id:key@host", "http://host?key=1", "http://id@host", "ftp://h"],
)
def test_what_is_no_servers_url_is_refused(url: str, tmp_path: Path):
    with pytest.raises(InputError):
        HttpStore(url)
    with pytest.raises(InputError):
        ServedDirectory(url, DirectoryStore(f"file://{tmp_path}"))


def test_a_servers_url_is_one_with_and_without_a_slash():
    assert server_url("http://host:30000/") == server_url("http://host:30000") == "http://host:30000"
    assert server_url("https://[::1]:30000/prefix/") == "https://[::1]:30000/prefix"


# --- the server's side ----------------------------------------------------------------------------------------------


def test_get_head_and_delete_answer_as_http_says(server: MasksServer):
    handle = server.served.put(make_masks())
    path = ROUTE + handle["id"]
    status, headers, body = ask(server, "GET", path)
    assert (status, headers["Content-Type"], headers["Accept-Ranges"]) == (200, "application/octet-stream", "bytes")
    assert_same(from_bytes(body), make_masks())
    status, headers, body = ask(server, "HEAD", path)
    assert (status, int(headers["Content-Length"]), body) == (200, handle["num_bytes"], b"")
    status, headers, _ = ask(server, "POST", path)
    assert (status, headers["Allow"]) == (405, "GET, HEAD, DELETE")
    assert [ask(server, "DELETE", path)[0] for _ in range(2)] == [204, 204]
    assert [ask(server, method, path)[0] for method in ("GET", "HEAD")] == [404, 404]


@pytest.mark.parametrize(
    "name", ["", "x", "../secret", "%2e%2e/secret", "..%2fsecret", "{id}.safetensors", "{id}/", "{id}%00"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_no_name_leads_out_of_the_directory(server: MasksServer, tmp_path: Path, method: str, name: str):
    handle = server.served.put(make_masks())
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "store" / "x.safetensors").write_bytes(b"secret")
    path = ROUTE + name.format(id=handle["id"])
    status, _, body = ask(server, method, path)
    assert (status, body) == (404, b"")
    assert server.served.respond(method, name.format(id=handle["id"])).status == 404
    assert server.served.stat(handle).there and (tmp_path / "secret.safetensors").exists()
    assert (tmp_path / "store" / "x.safetensors").exists()


SPANS = st.one_of(st.none(), st.integers(0, 2000))


@given(SPANS, SPANS)
def test_a_range_gives_what_http_says(ranged: tuple[ServedDirectory, str, bytes], first: int | None, last: int | None):
    served, entry_id, data = ranged
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    answer = served.respond("GET", entry_id, header)
    if first is None and last is None:
        assert (answer.status, answer.body) == (200, data)
        return
    begin, end = (
        (max(len(data) - (last or 0), 0), len(data))
        if first is None
        else (first, (last if last is not None else 9999) + 1)
    )
    expected = data[begin:end]
    if not expected:
        assert (answer.status, answer.headers, answer.body) == (416, {"Content-Range": f"bytes */{len(data)}"}, b"")
    elif expected == data:
        assert (answer.status, answer.body) == (200, data)
    else:
        assert (answer.status, answer.body) == (206, expected)
        assert answer.headers["Content-Range"] == f"bytes {begin}-{begin + len(expected) - 1}/{len(data)}"
        assert answer.headers["Content-Length"] == str(len(expected))
    head = served.respond("HEAD", entry_id, header)
    assert (head.status, head.headers, head.body) == (answer.status, answer.headers, b"")


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedDirectory, str, bytes]:
    directory = DirectoryStore(f"file://{tmp_path_factory.mktemp('ranged')}")
    handle = directory.put(make_masks())
    served = ServedDirectory("http://host", directory)
    return served, handle["id"], served.respond("GET", handle["id"]).body


@pytest.mark.parametrize("header", ["bytes=0-1,3-4", "rows=0-1", "bytes", "bytes=-", "bytes=a-b", "", "bytes=1-x"])
def test_a_range_that_is_not_known_gives_all(ranged: tuple[ServedDirectory, str, bytes], header: str):
    served, entry_id, data = ranged
    assert (served.respond("GET", entry_id, header).status, served.respond("GET", entry_id, header).body) == (200, data)


def test_a_file_that_goes_while_it_is_asked_for_is_not_there(server: MasksServer, monkeypatch: pytest.MonkeyPatch):
    handle = server.served.put(make_masks())
    monkeypatch.setattr(server.served.directory, "size", lambda entry_id: handle["num_bytes"])
    server.served.delete(handle)
    assert server.served.respond("GET", handle["id"]).status == 404


def test_requests_in_flight_do_not_wait_for_a_slow_one(server: MasksServer):
    handle = server.served.put(make_masks())
    server.faults = ["hang"]
    slow = threading.Thread(target=ask, args=(server, "HEAD", ROUTE + handle["id"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda arguments: None)
        slow.start()
        while server.faults:
            time.sleep(0.01)
        assert_same(load(handle), make_masks())
        slow.join()
