"""The ledger's rows of how plugins are loaded and hooks applied, and what is read of that."""

from __future__ import annotations

from router_replay.upstream import Seam

_STABLE = "never: this is the interface that a capturer stands in for"

SEAMS = (
    Seam(
        "plugins.hook_registry.HookRegistry.register",
        ("target", "hook", "hook_type"),
        "called by plugin.load",
        "it is the seam on which all hooks stand",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.AFTER",
        None,
        "read by plugin.load",
        "a hook after a function sees what that returned",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.AROUND",
        None,
        "read by plugin.load",
        "a hook around a function decides whether that runs",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.BEFORE",
        None,
        "read by plugin.load",
        "a hook before a function sees what that is about to change",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookRegistry._apply_target",
        ("target", "hooks"),
        "called by wrappers.apply",
        "most hooks are applied once a process knows that routes are wanted, when the registry is done with a name",
        "SGLang hands its settings to plugins",
    ),
    Seam(
        "plugins.hook_registry.HookSource",
        None,
        "called by wrappers.apply",
        "the log says whose hooks they are",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry._wrap_fn",
        ("original_fn", "hook", "hook_type"),
        "relied on by wrappers.not_in_place",
        "its wrappers hold the hook, which is how we see that ours were applied",
        "SGLang says which plugin's hooks it applied",
    ),
)

ATTRIBUTES = ()
