"""A guard under which nothing may wait for the device."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class RefuseWaiting(TorchDispatchMode):
    """Fails on operators whose result or shape waits for the device's values; `tolist` of a CPU tensor is not seen."""

    WAITS = (
        *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave", "equal", "is_nonzero"),
        *("bincount", "masked_scatter"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.refuse(f"aten::{name}")
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], list | tuple) else []
            masks = [each for each in indices if each is not None and str(each.dtype) == "torch.bool"]
            if masks:
                self.refuse(f"aten::{name} with a mask")
        return func(*args, **(kwargs or {}))

    def refuse(self, what: str) -> None:
        raise AssertionError(f"{what} waits for the device")
