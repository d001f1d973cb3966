"""Settings of live routers: refused or made right when replay is attached, and looked at again by every binding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_router_replay.refusals import SETTINGS, check_config
from router_replay.errors import UnsupportedError

_JUDGED = tuple(dict.fromkeys(name for row in SETTINGS for name in (row.setting, *row.only_with)))


class UnfusedConfig:
    """A configuration with `moe_router_fusion` off for one router, everything else being the shared one's.

    All layers share one configuration, so it stays as it is. It is read through, not copied: what is set on it later
    (the coefficient of an auxiliary loss, say) must reach the router.
    """

    moe_router_fusion = False

    def __init__(self, shared: TransformerConfig) -> None:
        object.__setattr__(self, "shared", shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":
            raise AttributeError(name)
        return getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


class RouterSettings:
    """What replay makes of the settings of one attached model.

    The fused router computes its choice and gates in one kernel that never asks for replayed experts, so routers are
    un-fused. That un-fuses the auxiliary losses, too, whose formula is the same; their last bits are not.

    Args:
        configs: of the model chunks, also of those without routers: all ranks must refuse alike.
        routers: those that are to be replayed.

    Raises:
        UnsupportedError: a setting under which routes would be ignored or undone; nothing has been touched.
        SeamError: the installed Megatron-Core has no flag of a name that is checked here.
    """

    def __init__(self, configs: Iterable[TransformerConfig], routers: Iterable[TopKRouter]) -> None:
        self._routers = {router: router.config for router in routers}
        self._accepted: dict[int, tuple[TransformerConfig, list[Any]]] = {}
        for config in (*configs, *self._routers.values()):
            self._accept(config)

    def apply(self) -> None:
        """Un-fuse the routers that are fused, and say so once."""
        fused = [router for router, config in self._routers.items() if config.moe_router_fusion]
        changed = [router for router in fused if not isinstance(router.config, UnfusedConfig)]
        for router in changed:
            router.config = UnfusedConfig(self._routers[router])
        if changed:
            warnings.warn(
                f"replay runs {len(changed)} routers un-fused (moe_router_fusion is on, and the fused kernel never asks"
                " for replayed experts); the model's configuration stays as it is",
                stacklevel=2,
            )

    def check_now(self) -> None:
        """Look at the settings again; a few microseconds where nothing changed.

        Raises:
            UnsupportedError: as when attached, naming what has changed since.
        """
        for router, known in self._routers.items():
            config = router.config
            if config is not known and getattr(config, "shared", None) is not known:
                self._accept_now(config, self._accepted[id(known)][1])
                self._routers[router] = config
        for config, accepted in list(self._accepted.values()):
            self._accept_now(config, accepted)
        self.apply()

    def remove(self) -> None:
        """Give every router its own configuration back."""
        for router, config in self._routers.items():
            if isinstance(router.config, UnfusedConfig):
                router.config = config

    def _accept(self, config: TransformerConfig) -> None:
        if id(config) not in self._accepted:
            check_config(config)
            self._accepted[id(config)] = (config, _values(config))

    def _accept_now(self, config: TransformerConfig, before: list[Any]) -> None:
        values = _values(config)
        if values == before:
            self._accepted[id(config)] = (config, values)
            return
        try:
            check_config(config)
        except UnsupportedError as error:
            compared = zip(_JUDGED, before, values, strict=True)
            changes = ", ".join(f"{name} was {old!r}" for name, old, new in compared if old != new)
            raise UnsupportedError(f"{error}. It was changed after attach: {changes}") from None
        self._accepted[id(config)] = (config, values)


def _values(config: TransformerConfig) -> list[Any]:
    # Lists are copied, since one that is changed in place would equal itself.
    values = [getattr(config, name, None) for name in _JUDGED]
    return [list(value) if isinstance(value, list) else value for value in values]
