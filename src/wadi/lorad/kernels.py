"""The rotation of `wadi.lorad.rotation`, fused for NVIDIA GPUs (Triton): what follows ``Theta = A B``.

One kernel reads ``W`` and ``Theta`` and writes the turned weight; in backward one reads the gradient too and
writes ``dL/dTheta`` as well. Sine, cosine and the complex product stay in registers, in float32; for weights
of half precision sine and cosine are the hardware's (absolute error 5e-7, far below the rounding of the
weight). The product ``A B`` is left to cuBLAS. A weight that is stored small (int8 with one scale a row) is
read as it is, and widened in registers.

Used where `supports` says so; everything else, and every other device, takes the eager path.
"""

from __future__ import annotations

from functools import cache

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # a CPU build of torch comes without
    triton = None

_HALF = (torch.float16, torch.bfloat16)
_BLOCK = 1024
_LIBRARY = torch.library.Library("wadi", "DEF")
_LIBRARY.define("rotate(Tensor weight, Tensor theta, Tensor? scale=None, ScalarType? dtype=None) -> Tensor")
_LIBRARY.define(
    "rotate_backward(Tensor weight, Tensor theta, Tensor grad, bool with_weight, "
    "Tensor? scale=None, ScalarType? dtype=None) -> (Tensor, Tensor)"
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


def supports(weight: torch.Tensor, theta_dtype: torch.dtype, scale: torch.Tensor | None = None) -> bool:
    """Whether the kernels turn this weight: on a GPU, an even fan-in, nothing wider than float32.

    A weight of integers has a scale. What is on the meta device is counted as a GPU would allocate it.
    """
    known = (*_HALF, torch.float32) if scale is None else (*_HALF, torch.float32, torch.int8)
    return (
        (weight.is_cuda or weight.is_meta)
        and weight.shape[1] % 2 == 0
        and weight.dtype in known
        and theta_dtype == torch.float32
        and (weight.is_meta or available())
    )


def rotate(
    weight: torch.Tensor,
    theta: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Turn the pairs of columns of `weight` by `theta`.

    Args:
        weight: (out, in), float16, bfloat16 or float32, in even; with a scale also int8.
        theta: radians, (out, in // 2), float32.
        scale: (out, 1) float32, what each row is multiplied by; None for 1.
        dtype: of the result; that of `weight` when None.

    Returns:
        (out, in), contiguous.
    """
    return torch.ops.wadi.rotate(weight, theta, scale, dtype)


def rotate_backward(
    weight: torch.Tensor,
    theta: torch.Tensor,
    grad: torch.Tensor,
    with_weight: bool = True,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Turn `weight` again, and give the gradient of the angles, ``dL/dTheta = g_e o' - g_o e'``.

    Args:
        weight: (out, in).
        theta: radians, (out, in // 2), float32.
        grad: (out, in), gradient of the turned weight.
        with_weight: whether the turned weight is wanted.
        scale: as of `rotate`.
        dtype: as of `rotate`.

    Returns:
        The turned weight (out, in), as of `rotate`, or None; dL/dTheta, (out, in // 2), float32.
    """
    turned, grad_theta = torch.ops.wadi.rotate_backward(weight, theta, grad, with_weight, scale, dtype)
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


@torch.library.register_fake("wadi::rotate", lib=_LIBRARY)
def _rotate_fake(
    weight: torch.Tensor,
    theta: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.register_fake("wadi::rotate_backward", lib=_LIBRARY)
def _rotate_backward_fake(
    weight: torch.Tensor,
    theta: torch.Tensor,
    grad: torch.Tensor,
    with_weight: bool,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = weight.new_empty(weight.shape if with_weight else (0,), dtype=dtype)
    return turned, theta.new_empty(theta.shape)


@torch.library.register_fake("wadi::angle_gradient", lib=_LIBRARY)
def _angle_gradient_fake(turned: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return turned.new_empty((turned.shape[0], turned.shape[1] // 2), dtype=torch.float32)


def _rotate_cuda(
    weight: torch.Tensor,
    theta: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    turned = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    _launch(weight, theta, scale, turned, turned, turned, store_weight=True, store_grad=False)
    return turned


def _rotate_backward_cuda(
    weight: torch.Tensor,
    theta: torch.Tensor,
    grad: torch.Tensor,
    with_weight: bool,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = weight.shape if with_weight else (0,)
    turned = torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
    grad_theta = torch.empty(theta.shape, dtype=torch.float32, device=weight.device)
    _launch(weight, theta, scale, grad, turned, grad_theta, store_weight=with_weight, store_grad=True)
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
    scale: torch.Tensor | None,
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
            theta if scale is None else scale.contiguous(),
            grad.contiguous(),
            turned,
            grad_theta,
            pairs,
            theta.shape[1],
            SCALED=scale is not None,
            STORE_WEIGHT=store_weight,
            STORE_GRAD=store_grad,
            HARDWARE_SINE=turned.dtype in _HALF,
            BLOCK=_BLOCK,
            num_warps=4,
        )


if triton is not None:

    @triton.jit
    def _rotate_kernel(
        weight_pointer,
        theta_pointer,
        scale_pointer,
        grad_pointer,
        turned_pointer,
        grad_theta_pointer,
        pairs,
        pairs_a_row,
        SCALED: tl.constexpr,
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
        if SCALED:
            # the wide division once a program, that of every pair in 32 bits
            first = start // pairs_a_row
            ahead = (start - first * pairs_a_row).to(tl.int32) + tl.arange(0, BLOCK)
            scale = tl.load(scale_pointer + first + ahead // pairs_a_row, mask=pair < pairs, other=0.0)
            odd, even = odd * scale, even * scale
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
