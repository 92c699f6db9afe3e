"""Several processes act as one. If one of them fails, all learn of it, so that none waits for it forever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs

from wadi.distill.config import DistillConfig
from wadi.distill.trackers import check_tracker
from wadi.errors import WadiError

Hosts = torch.distributed.ProcessGroup | None
"""A group that exchanges data between CPUs, without waiting for a device. None for a single process."""


def make_accelerator(config: DistillConfig) -> Accelerator:
    """Make the Accelerator for a config.

    For fp16 it scales the losses. Autocast stays off, because the base itself is in the compute dtype.

    Raises:
        WadiError: the precision or the tracker cannot be used here.
    """
    check_tracker(config.run.report_to)
    try:
        return Accelerator(
            mixed_precision="fp16" if config.run.mixed_precision == "fp16" else "no",
            log_with=config.run.report_to,
            project_dir=config.run.output_dir,
            # the buffers are the frozen base's: alike on all processes, and they stay so
            kwargs_handlers=[
                AutocastKwargs(enabled=False),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except (ValueError, ImportError) as error:
        raise WadiError(f"--mixed-precision: {' '.join(str(error).split())}") from error


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
