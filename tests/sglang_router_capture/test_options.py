"""Flags and environment variables."""

from __future__ import annotations

import argparse

import pytest

from router_replay.errors import RouterReplayError
from sglang_router_capture import options
from sglang_router_capture.options import CaptureOptions


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (options.ENABLE_VARIABLE, options.FORMAT_VARIABLE, options.CODEC_VARIABLE):
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


def test_upstreams_flag_alone_keeps_its_format() -> None:
    assert _parse("--enable-return-routed-experts") == CaptureOptions("sglang", "auto")
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


def test_children_inherit_what_was_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (options.ENABLE_VARIABLE, options.FORMAT_VARIABLE, options.CODEC_VARIABLE):
        monkeypatch.setenv(name, "")
    CaptureOptions("sglang", "ordered").export()
    assert CaptureOptions.from_environment() == CaptureOptions("sglang", "ordered")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--router-capture-codec", "bitset"], "--router-capture-codec given without --enable-router-capture"),
        (["--router-capture-format", "masks"], "--router-capture-format given without --enable-router-capture"),
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
