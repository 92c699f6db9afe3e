"""Compiled regions: the repeated blocks of a network, of which each kind is compiled once.

To compile a whole U-Net takes minutes. Its residual and transformer blocks take nearly all of the time of a
call, and blocks of equal shapes share one compiled graph. The rest of the network is not compiled.
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
"""Backend of `torch.compile`. Tests set one that generates no code."""

GRAPHS_PER_KIND = 64
"""Most graphs of one kind of block: batch sizes x resolutions, with and without gradients. Torch has 8."""


def compile_regions(network: torch.nn.Module, kinds: Collection[str]) -> int:
    """Compile the blocks of `network` in place. Blocks of one class and with equal shapes share a graph.

    Compilation happens at the first call, which must be within `compiling`. Names in the state dict do not
    change. Every batch size and resolution gets a graph of its own. A block that cannot be compiled as a
    whole is an error; it does not become slow silently.

    Args:
        network: a view made for this. Its modules stay compiled.
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

    Torch limits the number of graphs for each code object, and tries their guards one after the other.
    """
    plain = kind.forward
    own = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile one addition, so that a missing compiler shows before anything is written.

    Raises:
        WadiError: the compiler does not work here; the message says why.
    """
    with compiling():
        torch.compile(lambda x: x + 1, backend=BACKEND, fullgraph=True)(torch.zeros(1, device=device))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """The settings for calls of compiled regions.

    Common subexpressions of forward and backward are not merged. Backward computes angles and turned weights
    again from W, A and B, and merging would keep them in memory until then.

    Raises:
        WadiError: the compiler does not work here; the message says why.
    """
    limit = (
        "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    )  # torch < 2.7
    with dynamo_config.patch({limit: GRAPHS_PER_KIND}), functorch_config.patch(cse=False):
        try:
            yield
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WadiError(
                f"--compile: torch.compile does not work here ({reason}); omit the option"
            ) from error


def eager() -> contextlib.AbstractContextManager:
    """A context in which compiled blocks run without their compiled graphs, for calls that are rare."""
    return torch.compiler.set_stance("force_eager")
