"""Flags and environment variables."""

from __future__ import annotations

import argparse
import copy
import pickle
from types import SimpleNamespace

import pytest

from router_replay.errors import RouterReplayError
from sglang_router_capture import entry, options
from sglang_router_capture.options import CaptureOptions


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = (options.ENABLE_VARIABLE, options.FORMAT_VARIABLE, options.CODEC_VARIABLE, options.STORE_VARIABLE)
    for name in variables:
        monkeypatch.delenv(name, raising=False)


def _parse(*argv: str) -> CaptureOptions | None:
    parser = argparse.ArgumentParser()
    parser.add_argument(options.UPSTREAM_FLAG, action="store_true")
    options.add_arguments(parser)
    return options.from_arguments(parser.parse_args(argv))


def test_off_by_default() -> None:
    assert _parse() is None
    assert not options.asked_on_command_line(["--model-path", "x", "--port=1"])


def test_flags() -> None:
    assert _parse("--enable-router-capture") == CaptureOptions("masks", "auto")
    assert _parse("--enable-router-capture", "--router-capture-codec", "bitset") == CaptureOptions("masks", "bitset")
    assert _parse("--enable-router-capture", "--router-capture-format=sglang").needs_order


def test_a_store_is_chosen_by_url(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--enable-router-capture", "--router-capture-store", "file:///dev/shm/r3")
    assert _parse(*asked) == CaptureOptions(store="file:///dev/shm/r3")
    assert options.asked_on_command_line(["--router-capture-store=ray:"])
    monkeypatch.setenv(options.STORE_VARIABLE, "ray:")
    assert _parse("--enable-router-capture") == CaptureOptions(store="ray:")
    assert _parse(*asked) == CaptureOptions(store="file:///dev/shm/r3")
    with pytest.raises(RouterReplayError, match="sglang has its routes in the answer, and --router-capture-store ray:"):
        _parse("--enable-router-capture", "--router-capture-format=sglang")


def test_a_server_that_serves_its_masks_itself_has_an_address() -> None:
    def of(host: str, certificate: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(host=host, port=30000, ssl_certfile=certificate)

    own = CaptureOptions(store="http:")
    assert options.with_servers_url(own, of("127.0.0.1")) == CaptureOptions(store="http://127.0.0.1:30000")
    assert options.with_servers_url(own, of("h", "x.pem")) == CaptureOptions(store="https://h:30000")
    assert options.with_servers_url(own, of("fe80::1")) == CaptureOptions(store="http://[fe80::1]:30000")
    named = CaptureOptions(store="http://10.0.0.5:30000")
    assert options.with_servers_url(named, of("0.0.0.0")) == named
    for everywhere in ("", "0.0.0.0", "::"):
        with pytest.raises(RouterReplayError, match="say under which address trainers reach this server"):
            options.with_servers_url(own, of(everywhere))


def test_upstreams_flag_alone_is_left_to_the_settings() -> None:
    assert _parse("--enable-return-routed-experts") is None
    assert _parse("--enable-return-routed-experts", "--enable-router-capture") == CaptureOptions("masks", "auto")


@pytest.mark.parametrize("flag", ["--enable-router-capture", "--enable-return-routed-experts", "--enable-router"])
def test_flags_are_seen_before_they_are_parsed(flag: str) -> None:
    assert options.asked_on_command_line(["--model-path", "x", flag])


def test_environment_is_the_same_choice_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(options.ENABLE_VARIABLE, "1")
    monkeypatch.setenv(options.CODEC_VARIABLE, "bitset")
    assert CaptureOptions.from_environment() == CaptureOptions("masks", "bitset")
    assert _parse() == CaptureOptions("masks", "bitset")
    assert _parse("--router-capture-codec", "ordered") == CaptureOptions("masks", "ordered")


def test_a_command_line_without_our_flags() -> None:
    """Another program's parser, made of SGLang's flags before ours were declared."""
    assert options.from_arguments(argparse.Namespace(model_path="x")) is None


class _Settings:
    """Like SGLang's: plain attributes go with them to every process."""


def test_options_travel_with_the_settings_of_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry.wrappers, "apply", lambda hooks: None)
    one, other = _Settings(), _Settings()
    assert options.of(one) is None
    options.attach(one, entry.TravellingOptions("sglang", "ordered"))
    sent = options.of(one)
    for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        arrived = options.of(same)
        assert (arrived.format, arrived.codec, arrived.start) == ("sglang", "ordered", sent.start)
    assert options.of(other) is None
    assert CaptureOptions.from_environment() is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--router-capture-codec", "bitset"], "--router-capture-codec given without --enable-router-capture"),
        (["--router-capture-format", "masks"], "--router-capture-format given without --enable-router-capture"),
        (["--enable-router-capture", "--router-capture-codec", "zip"], "'zip' is unknown: choose one of auto, "),
        (
            ["--enable-router-capture", "--router-capture-format", "sglang", "--router-capture-codec", "bitset"],
            "which codec 'bitset' does not keep",
        ),
    ],
)
def test_choices_that_cannot_be(argv: list[str], words: str) -> None:
    with pytest.raises(RouterReplayError, match=words):
        _parse(*argv)


def test_unknown_value_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(options.ENABLE_VARIABLE, "1")
    monkeypatch.setenv(options.CODEC_VARIABLE, "zip")
    with pytest.raises(RouterReplayError, match="'zip' is unknown: choose one of auto, bitset, rank, ordered"):
        CaptureOptions.from_environment()
