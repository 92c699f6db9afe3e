"""The rotation of `wadi.lorad.rotation`, fused for NVIDIA GPUs (Triton): the angles never leave the chip.

Each program forms a tile of ``Theta = A B`` in registers, turns the pairs of columns of the same tile of
``W`` and writes what is asked for: the turned weight, and in backward ``dL/dTheta`` as well. So a rotation
reads ``W`` once and writes ``W'`` once.

Precision: products and angles are accumulated in float32. The operands of ``A B`` are TensorFloat-32 (11
bits) where the weight itself has no more than that (float16, bfloat16), and three TensorFloat-32 products
that together are as good as float32 where it is float32. Sine and cosine of the half-precision weights are
the hardware's (absolute error 5e-7 after reduction to [-pi, pi]).

Used where `supports` says so; everything else, and every other device, takes the eager path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # a CPU build of torch comes without
    triton = None

_HALF = (torch.float16, torch.bfloat16)
_LIBRARY = torch.library.Library("wadi", "DEF")
_LIBRARY.define("rotate(Tensor weight, Tensor A, Tensor B) -> Tensor")
_LIBRARY.define(
    "rotate_backward(Tensor weight, Tensor A, Tensor B, Tensor grad, bool with_weight) -> (Tensor, Tensor)"
)


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


def supports(weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels turn this weight: on a GPU, an even fan-in, no operand wider than float32."""
    return (
        weight.is_cuda
        and weight.shape[1] % 2 == 0
        and weight.dtype in (*_HALF, torch.float32)
        and all(factor.dtype in (*_HALF, torch.float32) for factor in factors)
        and available()
    )


def rotate(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of columns of `weight` by ``Theta = A B``.

    Args:
        weight: (out, in), float16, bfloat16 or float32, in even, any strides.
        A: (out, r).
        B: (r, in // 2).

    Returns:
        (out, in), contiguous, the dtype of `weight`.
    """
    return torch.ops.wadi.rotate(weight, A.float(), B.float())


def rotate_backward(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, grad: torch.Tensor, with_weight: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Turn `weight` again, and give the gradient of the angles, ``dL/dTheta = g_e o' - g_o e'``.

    Args:
        weight: (out, in).
        A: (out, r).
        B: (r, in // 2).
        grad: (out, in), gradient for the turned weight.
        with_weight: whether the turned weight is wanted.

    Returns:
        The turned weight (out, in) in the dtype of `weight`, or None; dL/dTheta, (out, in // 2), float32.
    """
    turned, grad_theta = torch.ops.wadi.rotate_backward(weight, A.float(), B.float(), grad, with_weight)
    return (turned if with_weight else None), grad_theta


@torch.library.register_fake("wadi::rotate", lib=_LIBRARY)
def _rotate_fake(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.shape)


@torch.library.register_fake("wadi::rotate_backward", lib=_LIBRARY)
def _rotate_backward_fake(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, grad: torch.Tensor, with_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, columns = weight.shape
    turned = weight.new_empty(weight.shape if with_weight else (0,))
    return turned, weight.new_empty((out, columns // 2), dtype=torch.float32)


def _rotate_cuda(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    turned = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _launch(weight, A, B, turned, turned, turned, store_weight=True, store_grad=False)
    return turned


def _rotate_backward_cuda(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, grad: torch.Tensor, with_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, columns = weight.shape
    turned = torch.empty(weight.shape if with_weight else (0,), dtype=weight.dtype, device=weight.device)
    grad_theta = torch.empty((out, columns // 2), dtype=torch.float32, device=weight.device)
    _launch(weight, A, B, grad.contiguous(), turned, grad_theta, store_weight=with_weight, store_grad=True)
    return turned, grad_theta


_LIBRARY.impl("rotate", _rotate_cuda, "CUDA")
_LIBRARY.impl("rotate_backward", _rotate_backward_cuda, "CUDA")


def _launch(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    grad: torch.Tensor,
    turned: torch.Tensor,
    grad_theta: torch.Tensor,
    **stores: bool,
) -> None:
    rows, pairs, rank = weight.shape[0], weight.shape[1] // 2, A.shape[1]
    tile = _tile(rows, pairs, rank)
    grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(pairs, tile["PAIRS"]),)
    half = weight.dtype in _HALF
    with torch.cuda.device_of(weight):
        _rotate_kernel[grid](
            weight,
            A,
            B,
            grad,
            turned,
            grad_theta,
            rows,
            pairs,
            rank,
            *weight.stride(),
            *A.stride(),
            *B.stride(),
            STORE_WEIGHT=stores["store_weight"],
            STORE_GRAD=stores["store_grad"],
            PRECISION="tf32" if half else "tf32x3",
            HARDWARE_SINE=half,
            **tile,
        )


def _tile(rows: int, pairs: int, rank: int) -> dict[str, Any]:
    """Sizes of a program's tile: large ones share more of A and B, small ones keep every processor busy."""
    big = rows * pairs >= 128 * 64 * 132
    return {
        "ROWS": 128 if big else 64,
        "PAIRS": 64 if big else 32,
        "RANK": 32 if rank > 16 else 16,
        "num_warps": 8 if big else 4,
        "num_stages": 3,
    }


if triton is not None:

    @triton.jit
    def _rotate_kernel(
        weight_pointer,
        A_pointer,
        B_pointer,
        grad_pointer,
        turned_pointer,
        grad_theta_pointer,
        rows,
        pairs,
        rank: tl.constexpr,
        weight_row,
        weight_column,
        A_row,
        A_column,
        B_row,
        B_column,
        STORE_WEIGHT: tl.constexpr,
        STORE_GRAD: tl.constexpr,
        PRECISION: tl.constexpr,
        HARDWARE_SINE: tl.constexpr,
        ROWS: tl.constexpr,
        PAIRS: tl.constexpr,
        RANK: tl.constexpr,
    ):
        tiles = tl.cdiv(pairs, PAIRS)
        row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
        pair = (tl.program_id(0) % tiles) * PAIRS + tl.arange(0, PAIRS)
        column = (tl.program_id(0) % tiles) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
        wide_row = row[:, None].to(tl.int64)
        inside = (row < rows)[:, None] & (column < 2 * pairs)[None, :]
        # asked for first: it travels while the angles are computed
        weight = tl.load(
            weight_pointer + wide_row * weight_row + column[None, :] * weight_column, mask=inside, other=0.0
        ).to(tl.float32)

        theta = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
        for start in range(0, rank, RANK):
            k = start + tl.arange(0, RANK)
            a = tl.load(
                A_pointer + wide_row * A_row + k[None, :] * A_column,
                mask=(row < rows)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                B_pointer + k[:, None] * B_row + pair[None, :] * B_column,
                mask=(k < rank)[:, None] & (pair < pairs)[None, :],
                other=0.0,
            )
            theta = tl.dot(a, b, theta, input_precision=PRECISION)

        if HARDWARE_SINE:
            theta -= 6.283185307179586 * tl.floor(theta * 0.15915494309189535 + 0.5)
            cosine, sine = libdevice.fast_cosf(theta), libdevice.fast_sinf(theta)
        else:
            cosine, sine = tl.cos(theta), tl.sin(theta)
        odd, even = tl.split(tl.reshape(weight, (ROWS, PAIRS, 2)))
        turned_odd = odd * cosine - even * sine
        turned_even = odd * sine + even * cosine
        place = wide_row * (2 * pairs) + column[None, :]
        if STORE_WEIGHT:
            turned = tl.reshape(tl.join(turned_odd, turned_even), (ROWS, 2 * PAIRS))
            tl.store(turned_pointer + place, turned.to(turned_pointer.dtype.element_ty), mask=inside)
        if STORE_GRAD:
            grad = tl.load(grad_pointer + place, mask=inside, other=0.0).to(tl.float32)
            grad_odd, grad_even = tl.split(tl.reshape(grad, (ROWS, PAIRS, 2)))
            tl.store(
                grad_theta_pointer + wide_row * pairs + pair[None, :],
                grad_even * turned_odd - grad_odd * turned_even,
                mask=(row < rows)[:, None] & (pair < pairs)[None, :],
            )
