"""The ledger against the installed SGLang, and against names that are not there."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from router_replay.errors import SeamError, UnsupportedError
from router_replay.masks import RoutingGeometry
from router_replay.upstream import Ledger, Seam
from sglang_router_capture import entry, hooks, live_refusals, refusals, seam_check
from sglang_router_capture.ledger import LEDGER
from sglang_router_capture.ledger.capturer import FUSED_SHARED_EXPERTS
from sglang_router_capture.options import CaptureOptions

ENTRY_MODULES = {"router_replay", "router_replay.errors"} | {
    "sglang_router_capture" + name for name in ("", ".entry", ".options", ".plugin", ".wrappers")
}
ENTRY_HOOKS = {path.removeprefix(LEDGER.prefix): hook for path, hook in entry.HOOKS.items()}
ALL_HOOKS = ENTRY_HOOKS | hooks.HOOKS
ALLOC = "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc"


def _ledger_of(seam: Seam) -> Ledger:
    return replace(LEDGER, seams=(seam,))


def _ours(hook: Callable[..., Any]) -> str:
    return f"{hook.__module__.removeprefix('sglang_router_capture.')}.{hook.__name__}"


def test_ledger_fits_the_installed_sglang() -> None:
    assert importlib.metadata.version("sglang") in LEDGER.tested
    seam_check.check()


def test_every_hooked_seam_has_its_hook() -> None:
    hooked = {seam.name: seam.use for seam in LEDGER.seams if seam.verb == "hooked"}
    assert hooked == {name: f"hooked by {_ours(hook)}" for name, (hook, _) in ALL_HOOKS.items()}
    assert not set(ENTRY_HOOKS) & set(hooks.HOOKS)


def test_every_hook_is_registered_where_the_installed_release_has_its_seam() -> None:
    assert seam_check.targets(ALL_HOOKS) == {f"sglang.srt.{name}": hook for name, hook in ALL_HOOKS.items()}


def test_hooks_take_what_an_upstream_may_add() -> None:
    """A parameter that a release adds with a default must not stop a server."""
    for hook, _ in ALL_HOOKS.values():
        kinds = {parameter.kind for parameter in inspect.signature(hook).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds, hook.__name__


def test_hooks_name_the_parameters_that_their_rows_do() -> None:
    for name, (hook, _) in ALL_HOOKS.items():
        by_name = set(LEDGER.seam(name).parameters or ()) - {"*"}
        assert by_name <= set(inspect.signature(hook).parameters), name


def test_what_the_recorder_overrides_has_the_rows_parameters() -> None:
    overridden = [seam for seam in LEDGER.seams if seam.verb in ("overridden", "answered") and seam.parameters]
    ours = {
        "log": importlib.import_module("sglang_router_capture.log"),
        "recorder": importlib.import_module("sglang_router_capture.recorder"),
        "staging": importlib.import_module("sglang_router_capture.staging"),
    }
    checked = []
    for seam in overridden:
        module, *path = seam.use.rpartition(" ")[2].split(".")
        if module in ours:
            method = pkgutil.resolve_name(f"{ours[module].__name__}:{'.'.join(path)}")
            names = tuple(inspect.signature(method).parameters)[1:]
            # By position, since that is how SGLang calls them.
            assert len(names) == len(seam.parameters), seam.name
            checked.append(path[-1])
    assert checked == ["on_forward_end", "get_topk", "capture", "map_device_tensors"]


def test_renamed_seam() -> None:
    seam = replace(LEDGER.seams[0], where="server_args.ServerArgs.add_flags")
    with pytest.raises(
        SeamError, match=r"sglang\.srt\.server_args\.ServerArgs\.add_flags: expected parameters \(parser\)"
    ):
        seam_check.check(_ledger_of(seam))


def test_changed_signature() -> None:
    seam = replace(LEDGER.seams[0], parameters=("parser", "more"))
    with pytest.raises(SeamError, match=r"expected parameters \(parser, more\), found parameters \(parser\)"):
        seam_check.check(_ledger_of(seam))


def test_seam_that_only_a_base_class_has() -> None:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    assert issubclass(TokenToKVPoolAllocator, BaseTokenToKVPoolAllocator)
    seam = replace(LEDGER.seam(ALLOC), where="mem_cache.allocator.token.TokenToKVPoolAllocator.available_size_of_base")
    BaseTokenToKVPoolAllocator.available_size_of_base = lambda self, need_size: None
    try:
        with pytest.raises(SeamError, match="found nothing of that name but what BaseTokenToKVPoolAllocator bequeaths"):
            seam_check.check(_ledger_of(seam))
    finally:
        del BaseTokenToKVPoolAllocator.available_size_of_base


def test_shared_experts_of_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SGLang leaves the number of fused shared experts depends on its release."""
    new = SimpleNamespace(shared_experts_config=SimpleNamespace(num_fused_shared_experts=2))
    assert hooks.capturer.num_fused_shared_experts(new) == 2
    # A renamed attribute must not pass for a model without shared experts.
    with pytest.raises(AttributeError, match="shared_experts_config"):
        hooks.capturer.num_fused_shared_experts(SimpleNamespace(num_fused_shared_experts=1))
    older = FUSED_SHARED_EXPERTS.paths("0.5.22")
    assert older == ("layers.moe.utils.install_shared_experts_fusion_decision",)
    monkeypatch.setattr(seam_check, "path_here", lambda seam: f"sglang.srt.{older[0]}")
    assert hooks.capturer.num_fused_shared_experts(SimpleNamespace(num_fused_shared_experts=1)) == 1
    assert hooks.capturer.num_fused_shared_experts(SimpleNamespace()) == 0


def test_a_process_that_captures_nothing_loads_no_ledger() -> None:
    script = (
        "import sys; from sglang_router_capture import plugin; sys.argv = ['sglang', '--model-path', 'x'];"
        " plugin.load(); print(sorted(name for name in sys.modules if name.split('.')[0] in"
        " ('sglang_router_capture', 'router_replay')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_ROUTER")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(sorted(ENTRY_MODULES))


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
    words = r"\n  sglang\.srt\.mem_cache\.allocator\.token\.TokenToKVPoolAllocator\.alloc: expected a hooked function"
    with pytest.raises(SeamError, match=words + ", found a function that is not"):
        seam_check.require_applied(applied)


SUPPORTED = {
    "pp_size": 1,
    "enable_dp_attention": True,
    "pp_async_batch_depth": 0,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "attn_cp_size": 1,
    "moe_a2a_backend": "none",
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
    "enable_hisparse": False,
    "hicache_host_memory_mode": "cache",
    "enable_hierarchical_cache": True,
    "use_ray": False,
    "is_embedding": False,
    "smg_grpc_mode": False,
    "enable_nvidia_megakernel": False,
    "enable_amd_monokernel": False,
    "dllm_algorithm": None,
}


def require_supported(fields: dict[str, Any], nodes: int = 1, store: str = "inline:") -> None:
    refusals.require_supported_config(SimpleNamespace(nnodes=nodes, **fields), CaptureOptions(store=store))


def test_default_configuration_is_supported() -> None:
    require_supported(SUPPORTED)


def test_stores_behind_several_nodes_are_refused() -> None:
    require_supported(SUPPORTED, nodes=2)
    require_supported(SUPPORTED, store="file:///r3")
    with pytest.raises(UnsupportedError, match="--router-capture-store file:///r3 cannot be used with --nnodes 2"):
        require_supported(SUPPORTED, nodes=2, store="file:///r3")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("pp_size", 2, "--pipeline-parallel-size"),
        ("pp_async_batch_depth", 1, "--pp-async-batch-depth"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm"),
        ("disaggregation_mode", "decode", "--disaggregation-mode"),
        ("attn_cp_size", 2, "attention context parallelism"),
        ("moe_a2a_backend", "deepep", "--moe-a2a-backend"),
        ("enable_two_batch_overlap", True, "--enable-two-batch-overlap"),
        ("enable_pdmux", True, "--enable-pdmux"),
        ("enable_hisparse", True, "--enable-hisparse"),
        ("hicache_host_memory_mode", "buffer_only", "--hicache-host-memory-mode"),
        ("use_ray", True, "--use-ray"),
        ("is_embedding", True, "--is-embedding"),
        ("smg_grpc_mode", True, "--smg-grpc-mode"),
        ("enable_nvidia_megakernel", True, "--enable-nvidia-megakernel"),
        ("enable_amd_monokernel", True, "--enable-amd-monokernel"),
        ("dllm_algorithm", "x", "--dllm-algorithm"),
    ],
)
def test_what_cannot_be_captured_is_refused(field: str, value: object, flag: str) -> None:
    with pytest.raises(UnsupportedError, match=flag):
        require_supported({**SUPPORTED, field: value})


@pytest.mark.parametrize("field", SUPPORTED)
def test_a_setting_that_sglang_no_longer_has(field: str) -> None:
    """It would otherwise end in an AttributeError, or pass for one that is off."""
    fields = {name: value for name, value in SUPPORTED.items() if name != field}
    with pytest.raises(SeamError, match=f"expected a setting '{field}', found none"):
        require_supported(fields)


def test_no_supported_value_of_the_installed_sglang_is_refused() -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    refusals.require_supported_config(resolving_view(ServerArgs(model_path="x")), CaptureOptions())


def test_a_pipeline_that_leaves_results_away_is_refused() -> None:
    from sglang.srt.environ import envs

    refusals.require_every_pass_to_return()
    with (
        envs.SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM.override(True),
        pytest.raises(UnsupportedError, match=r"SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM is on.*unset it"),
    ):
        refusals.require_every_pass_to_return()


def test_settings_of_a_pipeline_are_held_against_its_environment() -> None:
    """Before the server starts, and by whoever previews it; a server of one stage may have the variable."""
    from sglang.srt.environ import envs

    pipeline = {**SUPPORTED, "pp_size": 2, "enable_dp_attention": False}
    require_supported(pipeline)
    with envs.SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM.override(True):
        require_supported(SUPPORTED)
        with pytest.raises(UnsupportedError, match="SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM is on"):
            require_supported(pipeline)


def test_routers_by_hash_are_refused() -> None:
    from sglang.srt.layers.moe.hash_topk import HashTopK
    from torch import nn

    router = HashTopK.__new__(HashTopK)
    nn.Module.__init__(router)
    router.layer_id = 3
    geometry = RoutingGeometry(num_layers=4, moe_layers=(3,), num_experts=8, top_k=2)
    with pytest.raises(UnsupportedError, match=r"decoder layers \[3\] route by a hash"):
        live_refusals.require_reporting_routers(nn.Sequential(router), geometry.moe_layers)


def test_unknown_allocator_is_refused() -> None:
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    class Other(TokenToKVPoolAllocator):
        pass

    with pytest.raises(UnsupportedError, match="KV allocator Other"):
        live_refusals.require_supported_allocator(Other.__new__(Other))
    live_refusals.require_supported_allocator(TokenToKVPoolAllocator.__new__(TokenToKVPoolAllocator))
