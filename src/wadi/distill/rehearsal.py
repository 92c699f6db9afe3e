"""A training step on the meta device: what it allocates and computes, without values and without a GPU.

The trainer itself runs, with tensors that have shapes and no storage. A ledger sees every operation, so the
peak of the memory is counted and not fitted.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from wadi.backbones import Backbone
from wadi.backbones.condition import STATES, Condition
from wadi.backbones.outline import META, encoder_tokens, longest_condition
from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, StepInputs
from wadi.distill.sharding import gathered_together
from wadi.distill.trainer import Trainer

ENCODED_TOGETHER = 128
"""Prompts in a batch of the text encoders; see `PromptEncoder.encode`."""
DECODED_TOGETHER = 16
"""Images in a batch of the VAE; see `Backbone.decode`."""
GATHERED = 2
"""Modules of a spread base that are whole on a card at most: one that computes, and the next."""
_aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What a part of a step computes.

    Attributes:
        kernels: (floating-point operations, bytes read and written) of each kernel. Only matrix products,
            convolutions and attention have operations.
    """

    kernels: tuple[tuple[int, int], ...]

    @property
    def operations(self) -> int:
        """Floating-point operations of all kernels."""
        return sum(operations for operations, _ in self.kernels)


@dataclass(frozen=True)
class Rehearsal:
    """What was counted; memory is in bytes.

    Attributes:
        parameters: how many: of the frozen network, and what is trained of student and fake model.
        held: what the trainer holds throughout, by part.
        student: peak of an update of the student beyond what the trainer holds.
        fake: the same of an update of the fake model.
        validation: the same while the student makes the images of a sample grid, without the VAE.
        student_work: of an update of the student, one micro-batch.
        fake_work: of an update of the fake model, one micro-batch.
    """

    parameters: Mapping[str, int]
    held: Mapping[str, int]
    student: int
    fake: int
    validation: int
    student_work: Work
    fake_work: Work


@dataclass(frozen=True)
class _Layout:
    """What makes a tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _described(value: Any) -> Any:
    """The arguments of an operation as a key: tensors by their layouts."""
    if isinstance(value, torch.Tensor):
        return _layout(value)
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else (type(value), value)


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the work of all operations, while it is entered.

    The host reads no values: a number that it asks for is `answer`.
    """

    def __init__(self, answer: int = 1) -> None:
        super().__init__()
        self.answer, self.live, self.peak = answer, 0, 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}
        self._kernels: list[tuple[int, int]] = []
        # results of operations on the same shapes: working them out anew takes most of the time
        self._seen: dict[Any, tuple[Any, tuple[int, int]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return self.answer
        if func is _aten._to_copy.default and kwargs.get("device") == torch.device("cpu") and args[0].is_meta:
            return self._on_the_host(args[0], kwargs)
        if func.is_view or func._schema.is_mutable:
            return self._run(func, args, kwargs)[0]
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key not in self._seen:
            out, kernel = self._run(func, args, kwargs)
            inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_meta(x)}
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            if made and all(x.is_meta and x.untyped_storage()._cdata not in inputs for x in made):
                self._seen[key] = tree_map_only(torch.Tensor, _layout, out), kernel
            return out
        layouts, kernel = self._seen[key]
        out = tree_map_only(_Layout, _Layout.empty, layouts)
        self._kernels.append(kernel)
        self.hold(out)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[int, int]]:
        """The result of an operation, and its operations and bytes."""
        out, kernel = func(*args, **kwargs), (0, 0)
        if not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            operations = 0 if count is None else count(*args, **kwargs, out_val=out)
            kernel = operations, _bytes((args, kwargs, out))
            self._kernels.append(kernel)
        self.hold(out)
        return out, kernel

    def hold(self, tensors: Any) -> int:
        """Count tensors that exist already; returns their bytes."""
        before = self.live
        for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tree_leaves(tensors):
            if _is_meta(tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return self.live - before

    @contextlib.contextmanager
    def part(self) -> Iterator[SimpleNamespace]:
        """Count a part: afterwards `peak` is its peak beyond what was alive before, and `work` its work."""
        found, before = SimpleNamespace(peak=0, work=None), self.live
        self.peak, self._kernels = before, []
        yield found
        found.peak, found.work = self.peak - before, Work(tuple(self._kernels))

    def _on_the_host(self, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """A copy to the host: numbers are `answer`, and images stay where they are."""
        dtype = kwargs.get("dtype") or tensor.dtype
        if dtype.is_floating_point or tensor.numel() > DECODED_TOGETHER * ENCODED_TOGETHER:
            return tensor.detach()
        return torch.full(tensor.shape, self.answer, dtype=dtype)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self.live += storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key)), storage.nbytes()

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on the meta device be a fused kernel, as on a GPU.

    By itself that device would write the matrix of all pairs of tokens.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    try:
        yield
    finally:
        library._destroy()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the kernel that takes every mask and every size of a head."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class _OneProcess:
    """What a trainer asks of an `Accelerator`, for one process on the meta device."""

    device, num_processes, process_index, is_main_process, scaler = META, 1, 0, True, None

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class _Shapes:
    """What a step asks of `Draws`, as tensors without values."""

    def of(self, name: str) -> _Shapes:
        return self

    def normal(self, name: str, n: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(n, *shape, device=META)

    def times(self, name: str, n: int, schedule: Schedule, low: float, high: float) -> torch.Tensor:
        return schedule.times(torch.empty(n, device=META))

    def choice(self, name: str, count: int) -> int:
        return count - 1  # the longest roll-out of a student

    def chance(self, name: str, probability: float) -> torch.Tensor:
        return torch.empty((), dtype=torch.bool, device=META)


def rehearse(
    config: DistillConfig, backbone: Backbone, encoders: Mapping[str, nn.Module], processes: int = 1
) -> Rehearsal:
    """Run one update of the student, one of the fake model, and one row of a sample grid without values.

    Args:
        config: the options of the run.
        backbone: from `outline`.
        encoders: from `outlined_encoders`.
        processes: over which the base is spread, if the options want that.

    Raises:
        WadiError: an option does not fit the network.
    """
    short = config.replace(
        gradient_accumulation_steps=1,
        compile=False,
        cuda_graphs=False,
        shard_base=False,
        student_adapter=None,
    )
    n, seeds = config.optimizer.train_batch_size, max(1, len(config.run.validation_seeds))
    one = longest_condition(backbone, encoders, 1)
    ledger = Ledger(answer=one[STATES].shape[1])  # a host that asks for a number wants the length of a prompt
    ledger.hold(_tensors(backbone.network))
    with ledger, fused_attention():
        trainer = Trainer(short, backbone, SimpleNamespace(null=one), _OneProcess())
        for update in (trainer.student_update, trainer.fake_update):
            update.optimizer.step = lambda: None  # one fused kernel on a GPU, which allocates nothing
        held = _held(trainer, backbone)
        condition = longest_condition(backbone, encoders, n)
        inputs = _inputs(trainer, n, condition)
        with ledger.part() as student:
            x0, losses = trainer.update_student(inputs)
            trainer.average.follow(losses["student_grad_norm"].isfinite())
        with ledger.part() as fake:
            trainer.update_fake(x0, condition, inputs.fake[0])
        del x0, losses, inputs
        with ledger.part() as validation, torch.no_grad(), trainer.ema_weights():
            z = torch.empty(seeds, *backbone.latent_shape, device=META)
            rollout = trainer.generator.draw(_Shapes(), seeds, backbone.latent_shape)
            trainer.generate(z, longest_condition(backbone, encoders, seeds), rollout)
    parameters = {
        "network": sum(p.numel() for p in backbone.network.parameters()),
        "student": sum(p.numel() for p in trainer.student_parameters.values()),
        "fake": sum(p.numel() for p in trainer.fake_parameters.values()),
    }
    if config.run.shard_base:
        held |= _spread(held["frozen base"], backbone, processes)
    peaks = student.peak, fake.peak, validation.peak
    return Rehearsal(parameters, held, *peaks, student.work, fake.work)


def decoding(backbone: Backbone, images: int) -> int:
    """Bytes at most while the VAE decodes a sample grid, its weights included."""
    vae, ledger = backbone.pipeline.vae, Ledger()
    ledger.hold(_tensors(vae))
    latents = torch.empty(images, *backbone.latent_shape, device=META)
    backbone.pipeline.image_processor = SimpleNamespace(postprocess=lambda pixels, output_type: [])
    with ledger, fused_attention():
        backbone.decode(latents)
    return ledger.peak


@torch.no_grad()
def encoding(backbone: Backbone, encoders: Mapping[str, nn.Module]) -> int:
    """Bytes at most while one of the text encoders reads a batch of prompts, its weights included."""
    peaks = [0]
    for encoder in encoders.values():
        ledger = Ledger()
        ledger.hold(_tensors(encoder))
        tokens = encoder_tokens(backbone, encoder)
        with ledger, fused_attention():
            encoder(input_ids=torch.empty(ENCODED_TOGETHER, tokens, dtype=torch.int64, device=META))
        peaks.append(ledger.peak)
    return max(peaks)


def _held(trainer: Trainer, backbone: Backbone) -> dict[str, int]:
    """Bytes of what the trainer holds all the time, by part."""
    student, fake = trainer.student_parameters.values(), trainer.fake_parameters.values()
    updates = trainer.student_update, trainer.fake_update
    return {
        "frozen base": _bytes(list(_tensors(backbone.network))),
        "adapters": _bytes([*student, *fake]),
        "AdamW's moments": _bytes([update.moments() for update in updates]),
        "average": _bytes(trainer.average.tensors),
    }


def _spread(base: int, backbone: Backbone, processes: int) -> dict[str, int]:
    """Bytes of a spread base on one of the cards, by part."""
    largest = max(gathered_together(backbone.network, backbone.blocks).values())
    return {"frozen base": base // processes, "gathered blocks": GATHERED * largest}


def _inputs(trainer: Trainer, n: int, condition: Condition) -> StepInputs:
    draws = _Shapes()
    place: Drawn = trainer.scores.draw(draws, n)
    shape = trainer.backbone.latent_shape
    return StepInputs(
        z=draws.normal("z", n, shape),
        rollout=trainer.generator.draw(draws, n, shape),
        condition=condition,
        place=place,
        terms=tuple(term.draw(draws, n) for term in trainer.terms),
        fake=(trainer.fake_model.draw(draws, n),),
    )


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def _bytes(tensors: Any) -> int:
    """Bytes of the tensors in a structure."""
    return sum(
        math.prod(tensor.shape) * tensor.element_size()
        for tensor in tree_leaves(tensors)
        if isinstance(tensor, torch.Tensor)
    )
