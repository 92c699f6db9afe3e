"""Several processes act as one. If one of them fails, all learn of it, so that none waits for it forever.

What is trained is the same in all processes: it starts as process 0 has it, and every update takes the mean
of the gradients. A CUDA graph can hold that, which it cannot do with DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from wadi.distill.checks import check_sharding
from wadi.distill.config import DistillConfig
from wadi.distill.trackers import check_tracker
from wadi.errors import WadiError

SENT_TOGETHER = 2**24
"""Numbers, at least, of the tensors that are sent together: 64 MiB."""

Hosts = torch.distributed.ProcessGroup | None
"""A group that exchanges data between CPUs, without waiting for a device. None for a single process."""


def make_accelerator(config: DistillConfig) -> Accelerator:
    """Make the Accelerator for a config.

    For fp16 it scales the losses. There is no autocast, because the base itself is in the compute dtype.

    Raises:
        WadiError: the precision or the tracker cannot be used here, or the base cannot be spread.
    """
    check_tracker(config.run.report_to)
    try:
        accelerator = Accelerator(
            mixed_precision="fp16" if config.run.mixed_precision == "fp16" else "no",
            log_with=config.run.report_to,
            project_dir=config.run.output_dir,
        )
    except (ValueError, ImportError) as error:
        raise WadiError(f"--mixed-precision: {' '.join(str(error).split())}") from error
    check_sharding(config, accelerator.num_processes)
    return accelerator


@torch.no_grad()
def average(tensors: Sequence[torch.Tensor], accelerator: Accelerator) -> None:
    """Replace tensors by their means over all processes. Every process must call this."""
    if accelerator.num_processes == 1:
        return
    for group in _groups(tensors):
        flat = torch.cat([tensor.flatten() for tensor in group]) / accelerator.num_processes
        torch.distributed.all_reduce(flat)
        _copy_to(group, flat)


@torch.no_grad()
def spread(tensors: Sequence[torch.Tensor], accelerator: Accelerator) -> None:
    """Replace tensors by those of process 0. Every process must call this."""
    if accelerator.num_processes == 1:
        return
    for group in _groups(tensors):
        flat = torch.cat([tensor.flatten() for tensor in group])
        torch.distributed.broadcast(flat, 0)
        _copy_to(group, flat)


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that are sent together: one by one they would take long, and all at once much memory."""
    group: list[torch.Tensor] = []
    numbers = 0
    for tensor in tensors:
        group.append(tensor)
        numbers += tensor.numel()
        if numbers >= SENT_TOGETHER:
            yield group
            group, numbers = [], 0
    if group:
        yield group


def _copy_to(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


def hosts_group(accelerator: Accelerator) -> Hosts:
    """The group of the CPUs of all processes. Every process must call this."""
    return torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def any_process(flag: bool, hosts: Hosts) -> bool:
    """Whether the flag is set in any process. Every process must call this."""
    return flag if hosts is None else -_lowest(-int(flag), hosts) > 0


@contextmanager
def together(hosts: Hosts) -> Iterator[None]:
    """Continue after the block only if no process failed in it. Every process must enter it.

    The block must not exchange data with other processes, because they would wait for one that has failed.

    Raises:
        BaseException: the error of the block, in the first process that has one.
        SystemExit: code 2, in all others.
    """
    if hosts is None:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    own, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first = _lowest(processes if error is None else own, hosts)
    if error is not None and first == own:
        raise error
    if first < processes:
        raise SystemExit(2)


def _lowest(value: int, hosts: torch.distributed.ProcessGroup) -> int:
    lowest = torch.tensor(value)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=hosts)
    return int(lowest)
