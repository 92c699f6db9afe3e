"""Teacher, student and fake model as one network whose frozen base is spread over the processes (FSDP2).

Every process holds a part of each of the base's weights. A block's weights are gathered while it computes,
and freed after it. The adapters are small, so every process holds all of them.

The three roles share one set of modules here, because FSDP knows no views. What a pass computes depends on
the role: an attribute that all adapted layers read in their forward.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from wadi.lorad import LoRaDConfig, LoRaDLayer
from wadi.lorad.model import LoRaDModel

LARGE = 2**29
"""Bytes: a block with more is gathered in parts, because the next one is gathered while it computes."""

TEACHER, STUDENT, FAKE = "teacher", "student", "fake"
"""The roles. Two are the names of adapters too, and the teacher's is that of none."""


class ActiveRole:
    """The role in which a shared network computes; PEFT's layers take it as their list of active adapters.

    Outside of `as_role` there is none, and a pass of the network is an error: a default would let a
    recomputation in backward take the wrong adapter silently.
    """

    def __init__(self) -> None:
        self.role: str | None = None

    def __iter__(self) -> Iterator[str]:
        if self.role is None:
            raise RuntimeError("a network of several roles computes only within as_role")
        return iter((self.role,))

    @contextmanager
    def as_role(self, role: str | None) -> Iterator[None]:
        """A context in which the network has a role; it may be entered within another."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before


class RoleNetwork(nn.Module):
    """A shared network in one role. Its parameters are those of the role's adapter.

    Args:
        network: the shared network.
        active: what its layers read.
        role: of this one.
    """

    def __init__(self, network: nn.Module, active: ActiveRole, role: str) -> None:
        super().__init__()
        self.network, self.active, self.role = network, active, role

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes in this role."""
        with self.active.as_role(self.role):
            return self.network(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by the names that they have in a network with this adapter alone."""
        for name, parameter in self.network.named_parameters(*args, **kwargs):
            if name.endswith(f".{self.role}"):
                yield name.removesuffix(self.role) + "default", parameter


def shard(network: nn.Module, kinds: Collection[str], device: torch.device) -> nn.Module:
    """A copy of a frozen network whose weights are spread over all processes. Every process must call this.

    Only one block at a time is whole on the device.

    Args:
        network: on the CPU; it is left as it is, and its weights stay there.
        kinds: class names of the blocks; see `Backbone.blocks`.
        device: of this process.
    """
    copied = _with_own_parameters(network)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in gathered_together(copied, kinds):
        fully_shard(module, mesh=mesh)
    return copied


def _with_own_parameters(network: nn.Module) -> nn.Module:
    """A copy with Parameters of its own for the same values, so that they can move without the network's.

    Nothing else refers to them: a block that has been spread is freed before the next one moves.
    """
    own = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach()
        for tensor in chain(network.parameters(), network.buffers())
    }
    return copy.deepcopy(network, own)


def gathered_together(network: nn.Module, kinds: Collection[str]) -> dict[nn.Module, int]:
    """The modules whose weights are gathered together, and how many bytes these are.

    Each has the weights that no module before it has. A block above `LARGE` is gathered in parts, which are
    those of its modules that have modules of their own: an adapter reads the weight of a single layer past
    the layer's own forward, where it would be gathered.

    Args:
        network: without adapters.
        kinds: class names of the blocks.
    """
    found = [network]
    for block in (module for module in network.modules() if type(module).__name__ in kinds):
        found.append(block)
        if sum(p.nbytes for p in block.parameters()) > LARGE:
            parts = (part for part in block.children() if not isinstance(part, nn.ModuleList))
            found += (part for part in parts if any(True for _ in part.children()))
    sizes, seen = {}, set[nn.Parameter]()
    for module in reversed(found):
        new = set(module.parameters()) - seen
        sizes[module] = sum(p.nbytes for p in new)
        seen |= new
    return sizes


def share_roles(network: nn.Module, student: LoRaDConfig, fake: LoRaDConfig) -> list[RoleNetwork]:
    """Put two adapters, in float32, into a frozen network; it is then teacher, student and fake model."""
    tuner = LoRaDModel(network, {STUDENT: student, FAKE: fake}, STUDENT)
    tuner.inject_adapter(network, FAKE)
    active = ActiveRole()
    for module in network.modules():
        if isinstance(module, LoRaDLayer):
            module._active_adapter = active
    roles = [RoleNetwork(network, active, role) for role in (TEACHER, STUDENT, FAKE)]
    for parameter in chain.from_iterable(role.parameters() for role in roles):
        parameter.requires_grad_()  # PEFT lets one adapter alone train
    cast_training_params(network, torch.float32)
    return roles


def enable_shared_checkpointing(network: RoleNetwork) -> None:
    """Recompute the blocks of a shared network in backward, in the role that they had in forward.

    Backward may run outside of the role, in another one, or in a thread of autograd's own.
    """

    def run(module: nn.Module, *args: object) -> object:
        role = network.active.role

        def call(*args: object) -> object:
            with network.active.as_role(role):
                return module(*args)

        return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)

    network.network.enable_gradient_checkpointing(run)
