"""Stands in for `sgl_kernel`'s compiled operators, which need libcuda to load.

`sgl_kernel` imports a top-level module of this name when its own library cannot load; on the CPU engine no operator of
it is called. Upstream's own route capture pins its host buffer with cudaHostRegister, which has nothing to do here.
"""

import torch


class _CudaRuntime:
    def cudaHostRegister(self, *args: object) -> int:
        return 0

    def cudaHostUnregister(self, *args: object) -> int:
        return 0


if not torch.cuda.is_available():
    torch.cuda.cudart = _CudaRuntime
