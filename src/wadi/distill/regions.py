"""Compiled regions: the blocks of which a network has many, each kind compiled once.

Compiling a whole U-Net takes minutes; its residual and transformer blocks are nearly all of its time, and
blocks of equal shapes share one compiled graph. What lies between them runs as usual.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterator
from functools import cache

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config

from wadi.errors import WadiError

BACKEND: str | Callable = "inductor"
"""Backend of `torch.compile`; for tests, which can do without code generation."""

GRAPHS_PER_KIND = 64
"""Batch sizes x resolutions x with and without gradients of one kind of block; torch stops after 8."""


def compile_regions(network: torch.nn.Module, kinds: Collection[str]) -> int:
    """Compile the blocks of `network` in place, a kind (class and shapes of the parameters) at a time.

    Nothing is compiled before the first call; call the network within `compiling`. Names in the state dict
    stay as they are. Every batch size and resolution gets a graph of its own. A block that cannot be compiled
    as a whole is an error, not silently slow.

    Args:
        network: a view of its own; a caller's own modules would stay compiled.
        kinds: class names of the blocks; see `Backbone.blocks`.

    Returns:
        How many blocks it has.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    for block in blocks:
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
        block.forward = types.MethodType(_compiled_forward(type(block), shapes, BACKEND), block)
    return len(blocks)


@cache
def _compiled_forward(kind: type, shapes: tuple, backend: str | Callable) -> Callable:
    """`kind.forward`, compiled, with a code object of its own.

    By code object torch limits the number of graphs, and tries the guards of one after the other.
    """
    plain = kind.forward
    own = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile one addition: what is missing should show before anything is written.

    Raises:
        WadiError: the compiler does not work here; the message says why.
    """
    with compiling():
        torch.compile(lambda x: x + 1, backend=BACKEND, fullgraph=True)(torch.zeros(1, device=device))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Settings under which compiled regions are called.

    - Without common subexpressions between forward and backward, which recomputes angles and turned weight
      from W, A and B: merged, they would be kept for it.
    - A region is smaller than a bucket of DDP; its gradients need no splitting of the graph.

    Raises:
        WadiError: the compiler does not work here; the message says why.
    """
    limit = (
        "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    )  # torch < 2.7
    with (
        dynamo_config.patch({limit: GRAPHS_PER_KIND, "optimize_ddp": False}),
        functorch_config.patch(cse=False),
    ):
        try:
            yield
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WadiError(
                f"--compile: torch.compile does not work here ({reason}); leave it out"
            ) from error


def eager() -> contextlib.AbstractContextManager:
    """Call the blocks of compiled networks as they were: for what is too rare to pay for its compilation."""
    return torch.compiler.set_stance("force_eager")
