"""Teacher, student and fake model: three views of one frozen base.

Each view has its own modules and its own adapter, and all hold the same Parameter objects: the card carries
one base. Switching the active adapter of a single module instead would break plain gradient checkpointing,
whose recomputation in backward sees whatever adapter is active by then. A base that is spread over several
cards has no other way; see `wadi.distill.sharding`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
from diffusers.training_utils import cast_training_params
from peft import PeftConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from wadi.backbones import Backbone, fake_config, student_config
from wadi.backbones.storage import quantized_in_files
from wadi.distill.checks import check_ranks, free_memory
from wadi.distill.config import DistillConfig
from wadi.distill.methods import method_config
from wadi.distill.regions import check_compiler, compile_regions
from wadi.distill.sharding import STUDENT, enable_shared_checkpointing, shard, share_roles
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig
from wadi.lorad.io import copy_adapter
from wadi.lorad.layer import SHARED
from wadi.lorad.small import rounds_inputs, small_layers
from wadi.onestep.adapters import adapter_folder

Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass(frozen=True)
class Roles:
    """The three networks of variational score distillation, all on one frozen base."""

    teacher: torch.nn.Module
    student: torch.nn.Module
    fake: torch.nn.Module


def view(module: Module) -> Module:
    """Copy the modules of `module` but none of its parameters and buffers: both hold the same tensors.

    An adapter of one view cannot be merged, which would change all views; merge into a `copy.deepcopy` of it.
    """
    memo = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    for tensor in memo.values():
        setattr(tensor, SHARED, True)
    for layer in small_layers(module).values():
        state = getattr(layer, "quant_state", None)  # bitsandbytes has its scales beside the parameters
        memo[id(state)] = state
    return copy.deepcopy(module, memo)


def trainable(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name, in the order of the modules."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def build_roles(
    base: torch.nn.Module, student: PeftConfig | None, fake: PeftConfig | None, seed: int
) -> Roles:
    """Freeze `base` and put the student's and the fake model's adapters, in float32, on views of it.

    Args:
        base: the teacher's network, on its device and in the compute dtype.
        student, fake: configurations of the two adapters; None for a whole copy, all of it trained.
        seed: of the adapters' initialization; torch's own generators are left as they were.

    Raises:
        WadiError: the whole of a base is to be trained whose weights are stored small, or the base rounds
            the inputs of its layers too.
    """
    _check_small(base, None in (student, fake))
    base.requires_grad_(False).eval()
    views = []
    with _seeded(seed):
        for config in (student, fake):
            if config is None:
                views.append(copy.deepcopy(base).requires_grad_())
                continue
            network = inject_adapter_in_model(config, view(base))
            cast_training_params(network, torch.float32)
            views.append(network)
    return Roles(base, *views)


def build_sharded_roles(
    base: torch.nn.Module,
    student: LoRaDConfig,
    fake: LoRaDConfig,
    seed: int,
    blocks: Collection[str],
    device: torch.device,
) -> Roles:
    """`build_roles` on a copy of `base` that is spread over all processes. Every process must call this.

    Args:
        base: the teacher's network, on the CPU and in the compute dtype.
        student, fake, seed: see `build_roles`.
        blocks: see `shard`.
        device: of this process.
    """
    _check_small(base, whole=False)
    network = shard(base.requires_grad_(False).eval(), blocks, device)
    with _seeded(seed):
        roles = share_roles(network, student, fake)
    return Roles(*roles)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context with this seed on the CPU; afterwards torch's own generators are as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_small(base: torch.nn.Module, whole: bool) -> None:
    """Raise unless a base whose weights are stored small, if they are, can be what `build_roles` wants."""
    layers = small_layers(base)
    if whole and layers:
        raise WadiError(
            "--student-method, --fake-method: full trains the weights themselves, and those of this base are "
            "stored small; omit --base-precision, or train adapters"
        )
    if rounding := [name for name, layer in layers.items() if rounds_inputs(layer)]:
        raise WadiError(
            f"the teacher is quantized so that its layers round their inputs too (such as {rounding[0]}), "
            "and an untrained student would differ from it; name the model in full precision, with "
            "--base-precision int8 if the memory is too small"
        )


def enable_gradient_checkpointing(network: torch.nn.Module) -> None:
    """Recompute the blocks of a diffusers model in backward.

    The random state is not saved: the networks draw nothing, and reading it is forbidden inside a CUDA graph.
    """

    def run(module: torch.nn.Module, *args: object) -> object:
        return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)

    network.enable_gradient_checkpointing(run)


def adapted_roles(config: DistillConfig, backbone: Backbone, device: torch.device) -> Roles:
    """Teacher, student and fake model on the network of `backbone`, as the options want them.

    Raises:
        WadiError: a rank is too high for the network or the memory, the adapter to start from does not fit,
            the compiler does not work, or what is trained cannot be merged into the base.
    """
    base = backbone.network
    if config.student.method != "lorad" and quantized_in_files(base):
        raise WadiError(
            f"--student-method {config.student.method}: ends as a whole pipeline, and "
            f"{config.model.pretrained_model_name_or_path} is quantized; name the model in full precision"
        )
    if config.run.shard_base and quantized_in_files(base):
        raise WadiError(
            f"--shard-base: {config.model.pretrained_model_name_or_path} is quantized, and such weights "
            "cannot be spread; name the model in full precision, with --base-precision int8 to save memory"
        )
    student = student_config(base, config.student.rank)
    fake_layers = fake_config if config.fake.layers == "attention" else student_config
    fake = fake_layers(base, config.fake.rank)
    check_ranks(config, student, fake, base, free_memory(device))
    adapters = method_config(config.student.method, student), method_config(config.fake.method, fake)
    if config.run.shard_base:
        roles = build_sharded_roles(base, *adapters, config.run.seed, backbone.blocks, device)
    else:
        roles = build_roles(base, *adapters, config.run.seed)
    if config.student.adapter is not None:
        try:
            own = (roles.student.network, STUDENT) if config.run.shard_base else (roles.student, "default")
            copy_adapter(own[0], adapter_folder(config.student.adapter), own[1])
        except ValueError as error:
            raise WadiError(f"--student-adapter: {error}") from error
    if config.run.gradient_checkpointing:
        enable = enable_shared_checkpointing if config.run.shard_base else enable_gradient_checkpointing
        enable(roles.student)
        enable(roles.fake)
    if config.run.compile:
        check_compiler(device)
        roles = replace(roles, teacher=view(base))  # the backbone's own modules stay as they are
        for network in (roles.teacher, roles.student, roles.fake):
            compile_regions(network, backbone.blocks)
    return roles
