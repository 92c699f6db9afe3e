"""CUDA graphs: record work on a GPU once, and replay it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

WARMUP_RUNS = 3
"""Runs before the recording. They compile, choose algorithms and allocate; a recording must not."""

Result = TypeVar("Result")


def record(
    work: Callable[[], Result],
    state: Sequence[torch.Tensor] = (),
    stream: torch.cuda.Stream | None = None,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record what `work` launches on the current CUDA device.

    Args:
        work: reads and writes tensors that stay in place, and never waits for the device.
        state: tensors that `work` changes. They get their old values back before the recording. The
            copies are on the CPU, because memory on the GPU may be short.
        stream: the stream to record on; a new one if None.
        pool: memory pool that several graphs share, from `torch.cuda.graph_pool_handle`.

    Returns:
        The graph, and the result of `work`. Every `replay` writes new values to the same tensors.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = [tensor.to("cpu", copy=True) for tensor in state]
        for _ in range(WARMUP_RUNS):
            work()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # of this thread: another one may encode prompts meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result
