"""The mathematics of LoRaD (WaDi, arXiv 2603.08258): the rows of a weight turned, pair by pair of columns.

Read the columns ``2i`` and ``2i + 1`` of a weight ``W`` (out, in) as one complex number ``o + i e``. LoRaD
turns it by the angle ``Theta = scale * A B`` with ``A`` (out, r) and ``B`` (r, in // 2):

    o' + i e' = (o + i e) exp(i Theta)        that is   o' = o cos Theta - e sin Theta
                                                        e' = o sin Theta + e cos Theta

So the norm of every row stays what it was, ``Theta = 0`` changes nothing, ``-Theta`` undoes ``Theta``, and
the angles of several adapters on one weight add up. An odd fan-in leaves the last column as it is.

With ``g`` the gradient of the loss for the turned weight, backward needs only ``W``, ``A`` and ``B`` again:

    dL/dTheta = g_e o' - g_o e'                 dL/dW = g turned by -Theta
    dL/dA = scale dL/dTheta B^T                 dL/dB = scale A^T dL/dTheta

Angles, sine, cosine and rotation are computed in float32, or in float64 if an operand is float64, whatever
the dtypes of base and adapter and whatever `torch.autocast` says; only the finished weight is rounded to the
compute dtype. (TF32, where the user allows it, applies to the product ``A B`` as to any other.)

A frozen weight may be stored small, as ``W = Q s`` with ``Q`` in few bits and ``s`` one number a row (see
`wadi.lorad.small`). It is widened here, for as long as it is used; backward keeps ``Q`` and ``s``, and widens
again.

This is the eager statement. On an NVIDIA GPU `rotated_weight` and `rotated_linear` use the fused kernels of
`wadi.lorad.kernels`, which compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from wadi.lorad import kernels


class Factors(NamedTuple):
    """The angles of one adapter on one weight, factored: ``Theta = scale * A B``."""

    A: torch.Tensor  # (out, r)
    B: torch.Tensor  # (r, in // 2)
    scale: float = 1.0


def angles(
    A: torch.Tensor, B: torch.Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``scale * A B`` in radians, (out, in // 2), in `dtype` or in that of A or B if that is wider."""
    wide = _wide_dtype(A, B, dtype)
    A = A.to(wide)
    with _without_autocast(A.device.type):
        return (A if scale == 1.0 else A * scale) @ B.to(wide)


def widen(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight that a small one stands for, rounded once.

    Args:
        weight: (out, in), int8 or any floating dtype.
        scale: (out, 1), what each row is multiplied by, float32.
        dtype: of the result; the product is computed in float32, or in float64 if this is float64.

    Returns:
        (out, in), without a graph.
    """
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # one kernel, and nothing of the weight's size besides its result
    return torch.mul(weight.detach(), scale.detach().to(_wide_dtype(dtype)), out=wide)


def rotate(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of columns of `weight` by `theta`.

    Args:
        weight: (out, in), any floating dtype.
        theta: radians, (out, in // 2).

    Returns:
        The turned weight, (out, in), float32 or wider, differentiable.
    """
    wide = _wide_dtype(weight, theta)
    theta = theta.to(wide)
    turn, pairs = torch.polar(torch.ones_like(theta), theta), _as_complex(weight, wide)
    # in place unless autograd watches: a buffer of the weight's size less
    turned = turn * pairs if torch.is_grad_enabled() else turn.mul_(pairs)
    return _as_real(turned, weight)


def unrotate(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`: turn by ``-theta``."""
    return rotate(weight, -theta)


def rotated_weight(weight: torch.Tensor, adapters: Sequence[Factors]) -> torch.Tensor:
    """Turn `weight` by the sum of the angles of `adapters`; keeps only W, A, B for backward.

    Args:
        weight: (out, in), any floating dtype.
        adapters: one or more, their shapes matching `weight`.

    Returns:
        (out, in) in the dtype of `weight`.
    """
    factors = [tensor for adapter in adapters for tensor in adapter[:2]]
    if _needs_graph(weight, *factors):
        return _RotatedWeight.apply(weight, tuple(adapter.scale for adapter in adapters), *factors)
    return _rotated(weight, _total_angles(adapters, weight.dtype)).to(weight.dtype)


def angle_gradient(turned: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``dL/dTheta = g_e o' - g_o e'``.

    Args:
        turned: (out, in), the turned weight.
        grad: (out, in), its gradient.

    Returns:
        (out, in // 2), float32 or wider.
    """
    wide = _wide_dtype(turned, grad)
    if grad.dtype in (turned.dtype, torch.float32) and kernels.supports(turned, wide):
        return kernels.angle_gradient(turned, grad)
    paired = turned.shape[1] - turned.shape[1] % 2
    turned, grad = turned.to(wide), grad.to(wide)
    gradient = grad[:, 1:paired:2] * turned[:, 0:paired:2]
    return gradient.addcmul_(grad[:, 0:paired:2], turned[:, 1:paired:2], value=-1)


def rotated_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    adapters: Sequence[Factors],
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x W'^T + bias`` with W' the turned weight; keeps only x, W, A, B for backward.

    The matrix products run in the dtype `torch.nn.functional.linear` would choose for `weight`: its own, or
    that of the surrounding `torch.autocast` region. A weight that is stored small, which has no dtype to
    compute in, takes that of `x` in place of its own.

    Args:
        x: (..., in).
        weight: (out, in), any floating dtype. Of a frozen weight that is stored small also int8, with its
            `scale`; or a function that returns it widened, which is called again in backward.
        bias: (out,) or None.
        adapters: their shapes matching `weight`; none, for the weight as it is.
        scale: (out, 1) float32, what each row of a small weight is multiplied by.

    Returns:
        (..., out) in the compute dtype.
    """
    small = scale is not None or not isinstance(weight, torch.Tensor)
    dtype = _compute_dtype(x if small else weight)
    factors = [tensor for adapter in adapters for tensor in adapter[:2]]
    if _needs_graph(x, None if small else weight, bias, *factors):
        scales = tuple(adapter.scale for adapter in adapters)
        return _RotatedLinear.apply(x, weight, scale, bias, dtype, scales, *factors)
    return _linear(x, _Turn(_read(weight), scale, adapters, dtype).weight(), bias, dtype)


class _RotatedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scales: tuple[float, ...], *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, *factors)
        ctx.scales = scales
        return _rotated(weight, _total_angles(_pack(factors, scales), weight.dtype)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *factors = ctx.saved_tensors
        adapters = _pack(factors, ctx.scales)
        needs_weight, _, *needs_factors = ctx.needs_input_grad
        turn = _Turn(weight, None, adapters, weight.dtype)
        _, grad_theta = turn.with_gradient(grad, with_weight=False)
        grad_weight = turn.undone(grad) if needs_weight else None
        return grad_weight, None, *_factor_gradients(grad_theta, adapters, needs_factors)


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | Callable[[], torch.Tensor],
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        _, needs_weight, _, _, _, _, *needs_factors = ctx.needs_input_grad
        # never the widened weight: what is read from elsewhere is read again
        ctx.read = None if isinstance(weight, torch.Tensor) else weight
        kept = weight if ctx.read is None else None
        needs_x = needs_weight or any(needs_factors)
        ctx.save_for_backward(x if needs_x else None, kept, row_scale, *factors)
        ctx.dtype, ctx.scales, ctx.x_dtype = dtype, scales, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        turn = _Turn(_read(weight), row_scale, _pack(factors, scales), dtype)
        return _linear(x, turn.weight(), bias, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, row_scale, *factors = ctx.saved_tensors
        adapters = _pack(factors, ctx.scales)
        needs_x, needs_weight, _, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
        turn = _Turn(_read(weight if ctx.read is None else ctx.read), row_scale, adapters, ctx.dtype)

        grad_x = grad_weight = grad_bias = turned = None
        grad_factors: Sequence[torch.Tensor | None] = [None] * len(factors)
        with _without_autocast(grad.device.type):
            if needs_bias:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
            if x is not None:
                flat_x = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                grad_turned = grad.reshape(-1, grad.shape[-1]).T @ flat_x
                turned, grad_theta = turn.with_gradient(grad_turned, with_weight=needs_x)
                grad_weight = turn.undone(grad_turned) if needs_weight else None
                grad_factors = _factor_gradients(grad_theta, adapters, needs_factors)
            if needs_x:
                turned = turn.weight() if turned is None else turned
                grad_x = (grad @ turned.to(ctx.dtype)).to(ctx.x_dtype)
        return grad_x, grad_weight, None, grad_bias, None, None, *grad_factors


class _Turn:
    """What is asked of one turned weight, from the kernels or eagerly; no graph.

    Args:
        weight: (out, in).
        scale: (out, 1) of a weight that is stored small, else None.
        adapters: that turn it; none, for the weight as it is.
        dtype: that a small weight is widened to.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        adapters: Sequence[Factors],
        dtype: torch.dtype,
    ) -> None:
        self.original, self.scale = weight, scale
        self.dtype = weight.dtype if scale is None else dtype
        self.theta = _total_angles(adapters, weight.dtype) if adapters else None

    def weight(self) -> torch.Tensor:
        """The turned weight, (out, in)."""
        if self.theta is None:
            return _wide_weight(self.original, self.scale, self.dtype)
        return _rotated(self.original, self.theta, self.scale, self.dtype)

    def with_gradient(
        self, grad: torch.Tensor, with_weight: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The turned weight and, from its gradient (out, in), dL/dTheta (out, in // 2)."""
        if kernels.supports(self.original, self.theta.dtype, self.scale):
            given = self.original, self.theta, grad, with_weight
            return kernels.rotate_backward(*given, self.scale, self.dtype)
        turned = rotate(_wide_weight(self.original, self.scale, self.theta.dtype), self.theta)
        return turned, angle_gradient(turned, grad.to(turned.dtype))

    def undone(self, grad: torch.Tensor) -> torch.Tensor:
        """dL/dW, (out, in): the gradient of the turned weight turned back."""
        return unrotate(grad.to(self.theta.dtype), self.theta).to(self.original.dtype)


def _factor_gradients(
    grad_theta: torch.Tensor, adapters: Sequence[Factors], needs_factors: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of every A and B, each in its dtype, from that of the sum of angles (out, in // 2)."""
    grad_factors: list[torch.Tensor | None] = [None] * len(needs_factors)
    with _without_autocast(grad_theta.device.type):
        for i, (A, B, scale) in enumerate(adapters):
            scaled = grad_theta if scale == 1.0 else grad_theta * scale
            if needs_factors[2 * i]:
                grad_factors[2 * i] = (scaled @ B.to(scaled.dtype).T).to(A.dtype)
            if needs_factors[2 * i + 1]:
                grad_factors[2 * i + 1] = (A.to(scaled.dtype).T @ scaled).to(B.dtype)
    return grad_factors


def _rotated(
    weight: torch.Tensor,
    theta: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The turned weight, from the kernels in `dtype`, eagerly in float32 or wider; no graph."""
    if kernels.supports(weight, theta.dtype, scale):
        return kernels.rotate(weight, theta, scale, dtype)
    return rotate(_wide_weight(weight, scale, theta.dtype), theta)


def _wide_weight(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return weight if scale is None else widen(weight, scale, dtype)


def _read(weight: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight().detach()


def _linear(
    x: torch.Tensor, rotated: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return F.linear(x.to(dtype), rotated.to(dtype), None if bias is None else bias.to(dtype))


def _total_angles(adapters: Sequence[Factors], dtype: torch.dtype) -> torch.Tensor:
    dtype = _wide_dtype(dtype)
    theta = angles(*adapters[0], dtype)
    for adapter in adapters[1:]:
        theta = theta + angles(*adapter, dtype)
    return theta


def _pack(factors: Sequence[torch.Tensor], scales: Sequence[float]) -> list[Factors]:
    return [Factors(A, B, scale) for A, B, scale in zip(factors[::2], factors[1::2], scales, strict=True)]


def _as_complex(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View paired columns as complex numbers, (out, in // 2); copies only what cannot be viewed."""
    weight = weight.to(dtype)
    rows, columns = weight.shape
    if columns % 2:
        weight = weight[:, :-1]
    pairs = weight.contiguous().view(rows, columns // 2, 2)
    if not torch.compiler.is_compiling() and pairs.storage_offset() % 2:  # the compiler cannot trace offsets
        pairs = pairs.clone()
    return torch.view_as_complex(pairs)


def _as_real(turned: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Lay complex pairs out as columns again, (out, in), with the column of `weight` that has no partner."""
    real = torch.view_as_real(turned).flatten(1)
    if weight.shape[1] % 2:
        return torch.cat((real, weight[:, -1:].to(real.dtype)), dim=1)
    return real


def _wide_dtype(*operands: torch.Tensor | torch.dtype) -> torch.dtype:
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype if isinstance(operand, torch.Tensor) else operand)
    return dtype


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `F.linear` would multiply by `weight` here; autocast leaves float64 alone."""
    device_type = weight.device.type
    if weight.dtype != torch.float64 and _is_autocast(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _is_autocast(device_type: str) -> bool:
    # the compiler of torch 2.11 cannot trace the first question, and never meets a device without autocast
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Keep matrix products in the dtype of their operands: autocast would halve the precision of angles."""
    if _is_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _needs_graph(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
