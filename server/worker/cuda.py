"""What needs a CUDA device and nothing else: the recording of a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CudaCapture:
    """`graphs.Capture` by CUDA graphs that share one pool of memory: their forwards never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay
