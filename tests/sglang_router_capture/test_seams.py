"""The ledger against the installed SGLang, and against names that are not there."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from router_replay.errors import SeamError, UnsupportedError
from sglang_router_capture import hooks, refusals, seam_check
from sglang_router_capture.ledger import SEAMS


def test_ledger_fits_the_installed_sglang() -> None:
    seam_check.check()


def test_every_hooked_seam_has_its_hook() -> None:
    assert {seam.path for seam in SEAMS if seam.hooked} == set(hooks.HOOKS)


def test_renamed_seam() -> None:
    seam = replace(SEAMS[0], path="server_args.ServerArgs.add_flags")
    with pytest.raises(
        SeamError, match=r"sglang\.srt\.server_args\.ServerArgs\.add_flags: expected parameters \(parser\)"
    ):
        seam_check.check((seam,))


def test_changed_signature() -> None:
    seam = replace(SEAMS[0], parameters=("parser", "more"))
    with pytest.raises(SeamError, match=r"expected parameters \(parser, more\), found parameters \(parser\)"):
        seam_check.check((seam,))


def test_seam_that_only_a_base_class_has() -> None:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    assert issubclass(TokenToKVPoolAllocator, BaseTokenToKVPoolAllocator)
    seam = replace(
        next(seam for seam in SEAMS if seam.path == "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc"),
        path="mem_cache.allocator.token.TokenToKVPoolAllocator.available_size_of_base",
    )
    BaseTokenToKVPoolAllocator.available_size_of_base = lambda self, need_size: None
    try:
        with pytest.raises(SeamError, match="found nothing of that name but what BaseTokenToKVPoolAllocator bequeaths"):
            seam_check.check((seam,))
    finally:
        del BaseTokenToKVPoolAllocator.available_size_of_base


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Callable[..., Any], str]]:
    """All hooks in place, until the test ends."""
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    for path, (hook, kind) in hooks.HOOKS.items():
        target = f"sglang.srt.{path}"
        wrapped = _wrap_fn(pkgutil.resolve_name(target), hook, HookType[kind])
        # Another plugin's hook around ours hides nothing.
        monkeypatch.setattr(target, _wrap_fn(wrapped, lambda result, *args, **kwargs: None, HookType.AFTER))
    return hooks.HOOKS


def test_hooks_that_sglang_applied(applied: dict[str, tuple[Callable[..., Any], str]]) -> None:
    seam_check.require_applied(applied)


def test_hook_that_sglang_did_not_apply(
    applied: dict[str, tuple[Callable[..., Any], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    # Hooked by someone, but not by us.
    stock = TokenToKVPoolAllocator.alloc.__wrapped__.__wrapped__
    other = _wrap_fn(stock, lambda result, *args, **kwargs: None, HookType.AFTER)
    monkeypatch.setattr(TokenToKVPoolAllocator, "alloc", other)
    with pytest.raises(SeamError, match=r"TokenToKVPoolAllocator\.alloc: .* did not apply the hook"):
        seam_check.require_applied(applied)


SUPPORTED = {
    "pp_size": 1,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "attn_dp_size": 1,
    "attn_cp_size": 1,
    "moe_a2a_backend": "none",
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
    "enable_hisparse": False,
    "dllm_algorithm": None,
}


def test_default_configuration_is_supported() -> None:
    refusals.require_supported_config(SimpleNamespace(**SUPPORTED))


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("pp_size", 2, "--pipeline-parallel-size"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm"),
        ("disaggregation_mode", "decode", "--disaggregation-mode"),
        ("attn_dp_size", 2, "attention data parallelism"),
        ("attn_cp_size", 2, "attention context parallelism"),
        ("moe_a2a_backend", "deepep", "--moe-a2a-backend"),
        ("enable_two_batch_overlap", True, "--enable-two-batch-overlap"),
        ("enable_pdmux", True, "--enable-pdmux"),
        ("enable_hisparse", True, "--enable-hisparse"),
        ("dllm_algorithm", "x", "--dllm-algorithm"),
    ],
)
def test_what_cannot_be_captured_is_refused(field: str, value: object, flag: str) -> None:
    with pytest.raises(UnsupportedError, match=flag):
        refusals.require_supported_config(SimpleNamespace(**{**SUPPORTED, field: value}))


def test_streams_that_cut_the_masks_off_are_refused() -> None:
    refusals.require_whole_answers(SimpleNamespace(incremental_streaming_output=False))
    with pytest.raises(UnsupportedError, match=r"--incremental-streaming-output.*-format sglang"):
        refusals.require_whole_answers(SimpleNamespace(incremental_streaming_output=True))


def test_unknown_allocator_is_refused() -> None:
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    class Other(TokenToKVPoolAllocator):
        pass

    with pytest.raises(UnsupportedError, match="KV allocator Other"):
        refusals.require_supported_allocator(Other.__new__(Other))
    refusals.require_supported_allocator(TokenToKVPoolAllocator.__new__(TokenToKVPoolAllocator))
