"""The rotation of `wadi.lorad.rotation`, fused for NVIDIA GPUs (Triton): what follows ``Theta = A B``.

One kernel reads ``W`` and ``Theta`` and writes the turned weight; in backward one reads the gradient too and
writes ``dL/dTheta`` as well. Sine, cosine and the complex product stay in registers, in float32; for weights
of half precision sine and cosine are the hardware's (absolute error 5e-7, far below the rounding of the
weight). The product ``A B`` of one layer is left to cuBLAS. Of many layers at once it is formed in the kernel
(`rotate_together`): one launch, in which small layers fill the device together and no angle is ever written.

Used where `supports` says so; everything else, and every other device, takes the eager path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # a CPU build of torch comes without
    triton = None

_HALF = (torch.float16, torch.bfloat16)
_BLOCK = 1024
_ALIGNED = 16
"""Sizes and addresses that `rotate_together` takes are multiples of it, so that loads are wide."""
_SIDE = 64
_TILE = {"ROWS": 128, "PAIRS": 64, "RANKS": 32, "num_warps": 8, "num_stages": 3}
_LIBRARY = torch.library.Library("wadi", "DEF")
_LIBRARY.define("rotate(Tensor weight, Tensor theta) -> Tensor")
_LIBRARY.define(
    "rotate_backward(Tensor weight, Tensor theta, Tensor grad, bool with_weight) -> (Tensor, Tensor)"
)
_LIBRARY.define("angle_gradient(Tensor turned, Tensor grad) -> Tensor")


@torch.compiler.assume_constant_result
@cache
def available() -> bool:
    """Whether there are an NVIDIA GPU of compute capability 8.0 or later and Triton."""
    return (
        triton is not None
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 8
    )


def supports(weight: torch.Tensor, theta_dtype: torch.dtype) -> bool:
    """Whether the kernels turn this weight: on a GPU, an even fan-in, nothing wider than float32."""
    return (
        weight.is_cuda
        and weight.shape[1] % 2 == 0
        and weight.dtype in (*_HALF, torch.float32)
        and theta_dtype == torch.float32
        and available()
    )


def rotate(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of columns of `weight` by `theta`.

    Args:
        weight: (out, in), float16, bfloat16 or float32, in even.
        theta: radians, (out, in // 2), float32.

    Returns:
        (out, in), contiguous, the dtype of `weight`.
    """
    return torch.ops.wadi.rotate(weight, theta)


def rotate_backward(
    weight: torch.Tensor, theta: torch.Tensor, grad: torch.Tensor, with_weight: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Turn `weight` again, and give the gradient of the angles, ``dL/dTheta = g_e o' - g_o e'``.

    Args:
        weight: (out, in).
        theta: radians, (out, in // 2), float32.
        grad: (out, in), gradient of the turned weight.
        with_weight: whether the turned weight is wanted.

    Returns:
        The turned weight (out, in) in the dtype of `weight`, or None; dL/dTheta, (out, in // 2), float32.
    """
    turned, grad_theta = torch.ops.wadi.rotate_backward(weight, theta, grad, with_weight)
    return (turned if with_weight else None), grad_theta


def angle_gradient(turned: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the angles, ``g_e o' - g_o e'``, from the turned weight and its gradient.

    Args:
        turned: (out, in), in even.
        grad: (out, in).

    Returns:
        (out, in // 2), float32.
    """
    return torch.ops.wadi.angle_gradient(turned, grad)


class Work(NamedTuple):
    """One layer of `rotate_together`."""

    weight: torch.Tensor  # (out, in)
    A: torch.Tensor  # (out, r) float32
    B: torch.Tensor  # (r, in // 2) float32
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, pairs of columns, rank."""
        return self.A.shape[0], self.B.shape[1], self.A.shape[1]


def supports_together(works: Sequence[Work]) -> bool:
    """Whether `rotate_together` takes these layers.

    That is: on one GPU, of one dtype, contiguous, sizes and addresses aligned, TF32 allowed for the products;
    and if a CUDA graph is being captured, seen before, since their table cannot be copied to the device then.
    """
    first = works[0].weight
    return (
        torch.backends.cuda.matmul.allow_tf32
        and all(
            supports(weight, torch.float32)
            and (weight.device, weight.dtype) == (first.device, first.dtype)
            and A.dtype == B.dtype == torch.float32
            and all(x.is_contiguous() and x.data_ptr() % _ALIGNED == 0 for x in (weight, A, B))
            for weight, A, B, _ in works
        )
        and all(size % _ALIGNED == 0 for work in works for size in work.shape)
        and (not torch.cuda.is_current_stream_capturing() or _key(works) in _tables)
    )


def rotate_together(works: Sequence[Work]) -> list[torch.Tensor]:
    """Turn many weights in one launch, products ``A B`` in TF32; see `supports_together`.

    Returns:
        (out, in) each, the dtype of the weights, all in one storage.
    """
    first = works[0].weight
    table = _table(works)
    turned = torch.empty(sum(w.weight.numel() for w in works), dtype=first.dtype, device=first.device)
    transposed = torch.empty(sum(w.B.numel() for w in works), device=first.device)
    with torch.cuda.device_of(first):
        _transpose_together_kernel[(len(table.layer_of_part),)](
            table.layers, table.layer_of_part, transposed, SIDE=_SIDE, num_warps=4
        )
        _rotate_together_kernel[(len(table.layer_of_tile),)](
            table.layers,
            table.scales,
            table.layer_of_tile,
            transposed,
            turned,
            HARDWARE_SINE=first.dtype in _HALF,
            **_TILE,
        )
    parts = turned.split([work.weight.numel() for work in works])
    return [part.view(work.weight.shape) for part, work in zip(parts, works, strict=True)]


class _Table(NamedTuple):
    """What the kernel reads of the layers, on the device."""

    layers: torch.Tensor  # (n, 10) int64: see `_table`
    scales: torch.Tensor  # (n,) float32
    layer_of_tile: torch.Tensor  # (tiles of W',) int32
    layer_of_part: torch.Tensor  # (tiles of B,) int32


_tables: dict[tuple, _Table] = {}
"""By addresses and shapes, for good: a CUDA graph may read them at any replay. 0.1 MB for SD 1.5."""


def _key(works: Sequence[Work]) -> tuple:
    addresses = (tuple(x.data_ptr() for x in work[:3]) for work in works)
    return (
        works[0].weight.device,
        *((*a, *w.shape, w.scale) for a, w in zip(addresses, works, strict=True)),
    )


def _table(works: Sequence[Work]) -> _Table:
    key = _key(works)
    if key not in _tables:
        layers, layer_of_tile, layer_of_part, place, place_of_B = [], [], [], 0, 0
        for i, work in enumerate(works):
            rows, pairs, rank = work.shape
            addresses = (work.A.data_ptr(), work.B.data_ptr(), work.weight.data_ptr())
            first = len(layer_of_tile), len(layer_of_part)
            layers.append([*addresses, place, place_of_B, rows, pairs, rank, *first])
            layer_of_tile += [i] * _tiles(rows, _TILE["ROWS"], pairs, _TILE["PAIRS"])
            layer_of_part += [i] * _tiles(rank, _SIDE, pairs, _SIDE)
            place, place_of_B = place + work.weight.numel(), place_of_B + work.B.numel()
        with works[0].weight.device:
            _tables[key] = _Table(
                torch.tensor(layers),
                torch.tensor([work.scale for work in works], dtype=torch.float32),
                torch.tensor(layer_of_tile, dtype=torch.int32),
                torch.tensor(layer_of_part, dtype=torch.int32),
            )
    return _tables[key]


def _tiles(rows: int, high: int, columns: int, wide: int) -> int:
    return -(-rows // high) * -(-columns // wide)


@torch.library.register_fake("wadi::rotate", lib=_LIBRARY)
def _rotate_fake(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.shape)


@torch.library.register_fake("wadi::rotate_backward", lib=_LIBRARY)
def _rotate_backward_fake(
    weight: torch.Tensor, theta: torch.Tensor, grad: torch.Tensor, with_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(weight.shape if with_weight else (0,)), theta.new_empty(theta.shape)


@torch.library.register_fake("wadi::angle_gradient", lib=_LIBRARY)
def _angle_gradient_fake(turned: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return turned.new_empty((turned.shape[0], turned.shape[1] // 2), dtype=torch.float32)


def _rotate_cuda(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    turned = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _launch(weight, theta, turned, turned, turned, store_weight=True, store_grad=False)
    return turned


def _rotate_backward_cuda(
    weight: torch.Tensor, theta: torch.Tensor, grad: torch.Tensor, with_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.empty(weight.shape if with_weight else (0,), dtype=weight.dtype, device=weight.device)
    grad_theta = torch.empty(theta.shape, dtype=torch.float32, device=weight.device)
    _launch(weight, theta, grad, turned, grad_theta, store_weight=with_weight, store_grad=True)
    return turned, grad_theta


def _angle_gradient_cuda(turned: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    rows, columns = turned.shape
    grad_theta = torch.empty((rows, columns // 2), dtype=torch.float32, device=turned.device)
    pairs = grad_theta.numel()
    with torch.cuda.device_of(turned):
        _angle_gradient_kernel[(triton.cdiv(pairs, _BLOCK),)](
            turned.contiguous(), grad.contiguous(), grad_theta, pairs, BLOCK=_BLOCK, num_warps=4
        )
    return grad_theta


_LIBRARY.impl("angle_gradient", _angle_gradient_cuda, "CUDA")
_LIBRARY.impl("rotate", _rotate_cuda, "CUDA")
_LIBRARY.impl("rotate_backward", _rotate_backward_cuda, "CUDA")


def _launch(
    weight: torch.Tensor,
    theta: torch.Tensor,
    grad: torch.Tensor,
    turned: torch.Tensor,
    grad_theta: torch.Tensor,
    store_weight: bool,
    store_grad: bool,
) -> None:
    pairs = theta.numel()
    with torch.cuda.device_of(weight):
        _rotate_kernel[(triton.cdiv(pairs, _BLOCK),)](
            weight.contiguous(),
            theta.contiguous(),
            grad.contiguous(),
            turned,
            grad_theta,
            pairs,
            STORE_WEIGHT=store_weight,
            STORE_GRAD=store_grad,
            HARDWARE_SINE=weight.dtype in _HALF,
            BLOCK=_BLOCK,
            num_warps=4,
        )


if triton is not None:

    @triton.jit
    def _rotate_kernel(
        weight_pointer,
        theta_pointer,
        grad_pointer,
        turned_pointer,
        grad_theta_pointer,
        pairs,
        STORE_WEIGHT: tl.constexpr,
        STORE_GRAD: tl.constexpr,
        HARDWARE_SINE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        start = tl.program_id(0).to(tl.int64) * BLOCK
        pair = start + tl.arange(0, BLOCK)
        column = 2 * start + tl.arange(0, 2 * BLOCK)
        theta = tl.load(theta_pointer + pair, mask=pair < pairs, other=0.0)
        weight = tl.load(weight_pointer + column, mask=column < 2 * pairs, other=0.0).to(tl.float32)
        if HARDWARE_SINE:
            # to [-pi, pi], where the hardware's error is bounded
            theta -= 6.283185307179586 * tl.floor(theta * 0.15915494309189535 + 0.5)
            cosine, sine = libdevice.fast_cosf(theta), libdevice.fast_sinf(theta)
        else:
            cosine, sine = tl.cos(theta), tl.sin(theta)
        odd, even = tl.split(tl.reshape(weight, (BLOCK, 2)))
        turned_odd = odd * cosine - even * sine
        turned_even = odd * sine + even * cosine
        if STORE_WEIGHT:
            turned = tl.reshape(tl.join(turned_odd, turned_even), (2 * BLOCK,))
            tl.store(
                turned_pointer + column, turned.to(turned_pointer.dtype.element_ty), mask=column < 2 * pairs
            )
        if STORE_GRAD:
            grad = tl.load(grad_pointer + column, mask=column < 2 * pairs, other=0.0).to(tl.float32)
            grad_odd, grad_even = tl.split(tl.reshape(grad, (BLOCK, 2)))
            grad_theta = grad_even * turned_odd - grad_odd * turned_even
            tl.store(grad_theta_pointer + pair, grad_theta, mask=pair < pairs)

    @triton.jit
    def _angle_gradient_kernel(turned_pointer, grad_pointer, grad_theta_pointer, pairs, BLOCK: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * BLOCK
        pair = start + tl.arange(0, BLOCK)
        column = 2 * start + tl.arange(0, 2 * BLOCK)
        turned = tl.load(turned_pointer + column, mask=column < 2 * pairs, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + column, mask=column < 2 * pairs, other=0.0).to(tl.float32)
        turned_odd, turned_even = tl.split(tl.reshape(turned, (BLOCK, 2)))
        grad_odd, grad_even = tl.split(tl.reshape(grad, (BLOCK, 2)))
        grad_theta = grad_even * turned_odd - grad_odd * turned_even
        tl.store(grad_theta_pointer + pair, grad_theta, mask=pair < pairs)

    @triton.jit
    def _transpose_together_kernel(
        layers_pointer, layer_of_part_pointer, transposed_pointer, SIDE: tl.constexpr
    ):
        # the tensor cores take TF32 only with the summed dimension contiguous, and B has it across
        entry = layers_pointer + 10 * tl.load(layer_of_part_pointer + tl.program_id(0))
        B = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
        transposed_pointer += tl.multiple_of(tl.load(entry + 4), 16)
        pairs = tl.multiple_of(tl.load(entry + 6).to(tl.int32), 16)
        rank = tl.multiple_of(tl.load(entry + 7).to(tl.int32), 16)
        part = tl.program_id(0) - tl.load(entry + 9).to(tl.int32)

        across = tl.cdiv(pairs, SIDE)
        k = (part // across) * SIDE + tl.arange(0, SIDE)
        pair = (part % across) * SIDE + tl.arange(0, SIDE)
        b = tl.load(
            B + k[:, None] * pairs + pair[None, :], mask=(k < rank)[:, None] & (pair < pairs)[None, :]
        )
        tl.store(
            transposed_pointer + pair[:, None] * rank + k[None, :],
            tl.trans(b),
            mask=(pair < pairs)[:, None] & (k < rank)[None, :],
        )

    @triton.jit
    def _rotate_together_kernel(
        layers_pointer,
        scales_pointer,
        layer_of_tile_pointer,
        transposed_pointer,
        turned_pointer,
        HARDWARE_SINE: tl.constexpr,
        ROWS: tl.constexpr,
        PAIRS: tl.constexpr,
        RANKS: tl.constexpr,
    ):
        layer = tl.load(layer_of_tile_pointer + tl.program_id(0))
        entry = layers_pointer + 10 * layer
        A = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
        weight_type: tl.constexpr = tl.pointer_type(turned_pointer.dtype.element_ty)
        weight_pointer = tl.multiple_of(tl.load(entry + 2).to(weight_type), 16)
        turned_pointer += tl.multiple_of(tl.load(entry + 3), 16)
        transposed_pointer += tl.multiple_of(tl.load(entry + 4), 16)
        rows = tl.load(entry + 5).to(tl.int32)
        pairs = tl.multiple_of(tl.load(entry + 6).to(tl.int32), 16)
        rank = tl.multiple_of(tl.load(entry + 7).to(tl.int32), 16)
        tile = tl.program_id(0) - tl.load(entry + 8).to(tl.int32)

        across = tl.cdiv(pairs, PAIRS)
        row = (tile // across) * ROWS + tl.arange(0, ROWS)
        pair = (tile % across) * PAIRS + tl.arange(0, PAIRS)
        theta = tl.zeros((ROWS, PAIRS), tl.float32)
        for first in range(0, rank, RANKS):
            k = first + tl.arange(0, RANKS)
            a = tl.load(
                A + row[:, None] * rank + k[None, :],
                mask=(row < rows)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                transposed_pointer + pair[:, None] * rank + k[None, :],
                mask=(pair < pairs)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            theta = tl.dot(a, tl.trans(b), theta, input_precision="tf32")
        theta *= tl.load(scales_pointer + layer)
        if HARDWARE_SINE:
            theta -= 6.283185307179586 * tl.floor(theta * 0.15915494309189535 + 0.5)
            cosine, sine = libdevice.fast_cosf(theta), libdevice.fast_sinf(theta)
        else:
            cosine, sine = tl.cos(theta), tl.sin(theta)

        column = (tile % across) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
        place = row[:, None].to(tl.int64) * (2 * pairs) + column[None, :]
        inside = (row < rows)[:, None] & (column < 2 * pairs)[None, :]
        weight = tl.load(weight_pointer + place, mask=inside, other=0.0).to(tl.float32)
        odd, even = tl.split(tl.reshape(weight, (ROWS, PAIRS, 2)))
        turned = tl.join(odd * cosine - even * sine, odd * sine + even * cosine)
        turned = tl.reshape(turned, (ROWS, 2 * PAIRS)).to(turned_pointer.dtype.element_ty)
        tl.store(turned_pointer + place, turned, mask=inside)
