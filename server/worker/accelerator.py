"""What the worker asks of a device with memory of its own, and its one implementation: CUDA through torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kernels.select import compilations
from server.worker.graphs import Capture
from server.worker.memory import MemoryReading, Meter


class Accelerator(Meter, Protocol):
    """A device that computes beside the host."""

    def capture(self) -> Capture:
        """What records forwards; all that one records share their memory."""
        ...

    def num_compiled(self) -> int:
        """Kernels that were compiled since the first call."""
        ...


class CudaGraphs:
    """`Capture` by CUDA graphs in one pool of memory, which they may share because no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        except RuntimeError as error:
            raise RuntimeError(f"a forward cannot be captured ({error}); --enforce-eager does without") from error
        return graph.replay


class CudaAccelerator:
    """`Accelerator` on the current CUDA device."""

    def __init__(self) -> None:
        self._num_compiled = compilations()

    def read(self) -> MemoryReading:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return MemoryReading(total, free, held, reserved, torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def capture(self) -> Capture:
        return CudaGraphs()

    def num_compiled(self) -> int:
        return self._num_compiled()
