"""A wrapper is put in once, taken out with its last user, and never takes out what others put around it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from router_replay.errors import SeamError
from router_replay.upstream import Ledger, Patch, Seam

PLACES = ("function", "Class.method")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A name of an upstream with a plain function, and a class with a static method."""
    module = ModuleType("some_upstream")

    def function(number: int) -> list[int]:
        return [number]

    class Class:
        @staticmethod
        def method(number: int) -> list[int]:
            return [number]

    module.function, module.Class = function, Class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    owner = module if request.param == "function" else Class
    return SimpleNamespace(owner=owner, name=request.param.rpartition(".")[2], path=request.param)


@pytest.fixture
def patch(place: SimpleNamespace) -> Patch:
    row = Seam(place.path, ("number",), "wrapped by here.marked", "it is what is wrapped", "never")
    ledger = Ledger("some-upstream", "Upstream", "some_upstream.", "this", ("1",), (), "do without", (row,))
    return Patch(ledger, place.path, _marking("ours"))


def _marking(mark: object) -> Callable:
    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: int) -> list:
            return [mark, *function(*args)]

        return wrapper

    return wrap


def _there(place: SimpleNamespace) -> object:
    return vars(place.owner)[place.name]


def _call(place: SimpleNamespace) -> list:
    return getattr(place.owner, place.name)(7)


def _others_wrap(place: SimpleNamespace) -> object:
    """As somebody does who knows nothing of us; returns what he puts back later."""
    there = _there(place)
    theirs = _marking("theirs")(getattr(place.owner, place.name))
    setattr(place.owner, place.name, staticmethod(theirs) if inspect.isclass(place.owner) else theirs)
    return there


def test_in_and_out(place, patch):
    original = _there(place)
    with patch:
        assert _call(place) == ["ours", 7]
    assert _there(place) is original
    patch.remove()
    assert _there(place) is original


def test_it_stays_until_its_last_user_has_gone(place, patch):
    original = _there(place)
    patch.apply()
    patch.apply()
    assert _call(place) == ["ours", 7]
    patch.remove()
    assert _call(place) == ["ours", 7]
    patch.remove()
    assert _there(place) is original


def test_what_others_put_around_it_stays_and_ours_is_not_put_in_twice(place, patch):
    patch.apply()
    _others_wrap(place)
    theirs = _there(place)
    for _ in range(2):
        patch.remove()
        assert _there(place) is theirs and _call(place) == ["theirs", "ours", 7]
        patch.apply()
        assert _there(place) is theirs and _call(place) == ["theirs", "ours", 7]


def test_others_take_theirs_out_while_ours_is_not_needed(place, patch):
    original = _there(place)
    patch.apply()
    put_back = _others_wrap(place)
    patch.remove()
    setattr(place.owner, place.name, put_back)
    assert _call(place) == ["ours", 7]
    with patch:
        assert _call(place) == ["ours", 7]
    assert _there(place) is original


def test_others_put_the_original_back_over_ours(place, patch):
    original = _there(place)
    patch.apply()
    _others_wrap(place)
    patch.remove()
    setattr(place.owner, place.name, original)
    with patch:
        assert _call(place) == ["ours", 7]
    assert _there(place) is original


def test_what_others_put_in_before_is_put_back(place, patch):
    _others_wrap(place)
    theirs = _there(place)
    with patch:
        assert _call(place) == ["ours", "theirs", 7]
    assert _there(place) is theirs


def test_a_name_that_does_not_fit_is_refused_and_left_alone(place, patch):
    def other(count: int) -> list[int]:
        return [count]

    there = staticmethod(other) if inspect.isclass(place.owner) else other
    setattr(place.owner, place.name, there)
    with pytest.raises(SeamError, match=r"expected parameters \(number\), found parameters \(count\)"):
        patch.apply()
    patch.remove()
    assert _there(place) is there
