"""The fused kernels against float64: on a GPU, and in Triton's interpreter where Triton is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wadi.lorad import kernels
from wadi.lorad.rotation import Factors, angles, rotate, rotated_linear, rotated_weight, widen
from wadi.lorad.small import SmallLinear, store_small

SHAPES = [(64, 64, 4), (70, 50, 24), (320, 320, 256), (1280, 5120, 256), (130, 258, 5), (3, 2, 1)]
# The turned weight is rounded to its dtype: half a unit of 24, 8 and 11 bits; 1e-5 and 3e-3 are asked for.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 5e-4}


def case(rows, columns, rank, dtype=torch.float32, device="cuda"):
    """W, A, B with angles of about one radian."""
    generator = torch.Generator(device).manual_seed(rows + columns + rank)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    return normal(rows, columns).to(dtype), normal(rows, rank) / rank**0.5, normal(rank, columns // 2)


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def test_the_eager_path_is_taken_where_there_is_no_kernel():
    weight, _, _ = case(4, 6, 2, device="cpu")
    assert not kernels.supports(weight, torch.float32)


INTERPRETED = """
import torch
from tests.lorad.test_kernels import case, relative_error
from wadi.lorad import kernels
from wadi.lorad.rotation import angle_gradient, angles, rotate, widen
from wadi.lorad.small import store_small

for shape in [(70, 50, 24), (3, 2, 1), (5, 2050, 2), (1, 4100, 1)]:
    weight, A, B = case(*shape, device="cpu")
    theta, grad = angles(A, B), torch.ones_like(weight).cumsum(1)
    for dtype in (torch.int8, torch.bfloat16, None):
        small, scale = (weight, None) if dtype is None else store_small(weight, dtype)
        wide = weight.double() if dtype is None else widen(small, scale, torch.float64)
        exact = rotate(wide, theta.double())
        turned, grad_theta = kernels._rotate_backward_cuda(small, theta, grad, True, scale, torch.float32)
        assert torch.equal(turned, kernels._rotate_cuda(small, theta, scale, torch.float32))
        assert turned.dtype == torch.float32
        assert relative_error(turned, exact) < 1e-6
        assert relative_error(grad_theta, angle_gradient(exact, grad.double())) < 1e-6
"""


def test_the_arithmetic_of_the_kernel_in_the_interpreter():
    """Rows that begin within a block, several blocks a row, one pair a row."""
    pytest.importorskip("triton")
    # the interpreter is chosen when the kernels are read
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    folder = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_what_is_supported():
    weight, _, _ = case(8, 6, 2)
    assert kernels.supports(weight, torch.float32)
    assert kernels.supports(weight.bfloat16(), torch.float32)
    assert not kernels.supports(weight.double(), torch.float32)
    assert not kernels.supports(weight, torch.float64)
    assert not kernels.supports(weight[:, :5], torch.float32)
    small, scale = store_small(weight, torch.int8)
    assert kernels.supports(small, torch.float32, scale)
    assert not kernels.supports(small, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rotation_against_float64(shape, dtype):
    weight, A, B = case(*shape, dtype)
    turned = kernels.rotate(weight, angles(A, B))
    reference = rotate(weight.double(), angles(A, B).double())
    assert turned.dtype == dtype
    assert relative_error(turned, reference) < TOLERANCE[dtype]
    norms = weight.double().norm(dim=1)
    torch.testing.assert_close(turned.double().norm(dim=1), norms, rtol=4 * TOLERANCE[dtype], atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradient_from_the_turned_weight_alone(shape, dtype):
    turned, _, _ = case(*shape, dtype)
    grad = torch.randn(turned.shape, device="cuda").to(dtype)
    exact = (
        turned.double()[:, 0::2] * grad.double()[:, 1::2] - turned.double()[:, 1::2] * grad.double()[:, 0::2]
    )
    for given in (grad, grad.float()):
        ours = kernels.angle_gradient(turned, given)
        assert ours.dtype == torch.float32
        assert relative_error(ours, exact) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradient_of_the_angles_against_float64(shape, dtype):
    weight, A, B = case(*shape, dtype)
    grad, theta = torch.randn_like(weight), angles(A, B)
    turned, grad_theta = kernels.rotate_backward(weight, theta, grad)
    exact = theta.double().requires_grad_()
    reference = rotate(weight.double(), exact)
    (expected,) = torch.autograd.grad(reference, exact, grad.double())
    assert relative_error(turned, reference.detach()) < TOLERANCE[dtype]
    assert grad_theta.dtype == torch.float32
    assert relative_error(grad_theta, expected) < 2e-6
    nothing, alone = kernels.rotate_backward(weight, theta, grad, with_weight=False)
    assert nothing is None
    assert torch.equal(alone, grad_theta)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.bfloat16], ids=str)
def test_a_small_weight_is_read_as_it_is(shape, dtype, stored):
    weight, A, B = case(*shape)
    (small, scale), theta = store_small(weight, stored), angles(A, B)
    exact = theta.double().requires_grad_()
    reference = rotate(widen(small, scale, torch.float64), exact)
    grad = torch.randn_like(weight)
    (expected,) = torch.autograd.grad(reference, exact, grad.double())
    turned, grad_theta = kernels.rotate_backward(small, theta, grad, scale=scale, dtype=dtype)
    assert turned.dtype == dtype
    # two kernels; in float32 their compilers contract products and sums differently
    forward = kernels.rotate(small, theta, scale, dtype)
    assert (
        relative_error(forward, turned.double()) < 1e-6
        if dtype == torch.float32
        else torch.equal(forward, turned)
    )
    assert relative_error(turned, reference.detach()) < TOLERANCE[dtype]
    assert relative_error(grad_theta, expected) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_captured_layer_on_a_small_weight(dtype):
    layer = SmallLinear(nn.Linear(64, 96, device="cuda").requires_grad_(False))
    _, A, B = case(96, 64, 8)
    x = torch.randn(40, 64, device="cuda", dtype=dtype)

    def step():
        return layer(x) + layer.linear(x, [Factors(A, B)])

    expected, graph = step(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_small_and_large_angles(size, dtype):
    weight, A, B = case(64, 64, 4, dtype)
    theta = size * angles(A, B)
    reference = rotate(weight.double(), theta.double())
    # 2 pi in float32 is wrong by 1.7e-7 a turn
    bound = TOLERANCE[dtype] + (2e-7 * size if dtype != torch.float32 else 0)
    assert relative_error(kernels.rotate(weight, theta), reference) < bound


@pytest.mark.gpu
def test_transposed_weight_and_two_adapters():
    weight, A, B = case(96, 64, 4)
    stored = weight.T.contiguous().T
    assert not stored.is_contiguous()
    _, C, D = case(96, 64, 7)
    turned = rotated_weight(stored, [Factors(A, B, 0.5), Factors(C, D, -2.0)])
    theta = 0.5 * A.double() @ B.double() - 2 * C.double() @ D.double()
    assert relative_error(turned, rotate(weight.double(), theta)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
def test_layer_against_float64_autograd(dtype, bound):
    weight, A, B = case(96, 64, 8, dtype)
    x = torch.randn(40, 64, device="cuda").to(dtype)
    bias = torch.randn(96, device="cuda").to(dtype)
    leaves = [x, weight, bias, A, B]
    grad = torch.randn(40, 96, device="cuda").to(dtype)

    def run(leaves, linear):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = linear(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    ours = run(leaves, lambda x, w, b, A, B: rotated_linear(x, w, b, [Factors(A, B, 0.5)]))
    exact = run(
        [leaf.double() for leaf in leaves],
        lambda x, w, b, A, B: nn.functional.linear(x, rotate(w, 0.5 * A @ B), b),
    )
    for mine, theirs in zip(ours, exact, strict=True):
        assert relative_error(mine, theirs) < bound


@pytest.mark.gpu
def test_compiles_without_a_graph_break():
    weight, A, B = case(96, 64, 8)
    A, B = A.requires_grad_(), B.requires_grad_()
    x = torch.randn(40, 64, device="cuda")

    def loss(x):
        return rotated_linear(x, weight, None, [Factors(A, B)]).square().sum()

    eager = torch.autograd.grad(loss(x), [A, B])
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), [A, B])
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_ops_follow_the_rules_of_custom_operators():
    weight, A, B = case(70, 50, 24)
    theta, grad = angles(A, B), torch.randn_like(weight)
    small, scale = store_small(weight, torch.int8)
    for given, options in ((weight, ()), (small, (scale, torch.bfloat16))):
        torch.library.opcheck(torch.ops.wadi.rotate.default, (given, theta, *options))
        for with_weight in (True, False):
            arguments = given, theta, grad, with_weight, *options
            torch.library.opcheck(torch.ops.wadi.rotate_backward.default, arguments)
