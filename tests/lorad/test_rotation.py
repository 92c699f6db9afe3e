"""The laws of rotation, and gradients against float64 autograd of the equations written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from wadi.lorad.rotation import (
    Factors,
    angle_gradient,
    angles,
    rotate,
    rotated_linear,
    rotated_weight,
    unrotate,
)

shapes = st.tuples(st.integers(1, 9), st.integers(2, 13))
seeds = st.integers(0, 2**31 - 1)


def naive_rotate(weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The equations of the paper, column by column, for plain autograd."""
    columns = list(weight.unbind(1))
    for i in range(theta.shape[1]):
        o, e = columns[2 * i], columns[2 * i + 1]
        cos, sin = theta[:, i].cos(), theta[:, i].sin()
        columns[2 * i], columns[2 * i + 1] = o * cos - e * sin, o * sin + e * cos
    return torch.stack(columns, dim=1)


def naive_linear(x, weight, bias, adapters):
    return F.linear(x, naive_rotate(weight, sum(a.scale * (a.A @ a.B) for a in adapters)), bias)


def random_case(seed, rows, columns, ranks=(3,), dtype=torch.float64, requires_grad=True, tokens=5):
    """Return x, weight, bias and one adapter per rank; the k-th has scale 1, 0.5, -1.5, ..."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(requires_grad)
        )

    scales = (1.0, 0.5, -1.5)
    adapters = [
        Factors(normal(rows, r), normal(r, columns // 2), s) for r, s in zip(ranks, scales, strict=False)
    ]
    return normal(tokens, columns), normal(rows, columns), normal(rows), adapters


@given(shapes, seeds, st.floats(0.01, 100.0))
def test_rows_keep_their_norm(shape, seed, size):
    _, weight, _, _ = random_case(seed, *shape, dtype=torch.float32, requires_grad=False)
    theta = torch.randn(shape[0], shape[1] // 2, generator=torch.Generator().manual_seed(seed)) * size
    turned = rotate(weight, theta)
    # one float32 rounding of sine, cosine, two products and a sum, each 2**-24
    torch.testing.assert_close(
        turned.double().norm(dim=1), weight.double().norm(dim=1), rtol=4 * 2**-24, atol=0
    )
    if shape[1] % 2:
        assert torch.equal(turned[:, -1], weight[:, -1])


@given(shapes, seeds)
def test_zero_is_the_identity_and_minus_theta_undoes_theta(shape, seed):
    _, weight, _, (adapter,) = random_case(seed, *shape, requires_grad=False)
    theta = angles(*adapter)
    assert torch.equal(rotate(weight, torch.zeros_like(theta)), weight)
    torch.testing.assert_close(unrotate(rotate(weight, theta), theta), weight, rtol=0, atol=1e-13)


@given(shapes, seeds)
def test_angles_of_adapters_add(shape, seed):
    _, weight, _, adapters = random_case(seed, *shape, ranks=(2, 3, 1), requires_grad=False)
    one_after_the_other = weight
    for adapter in adapters:
        one_after_the_other = rotated_weight(one_after_the_other, [adapter])
    torch.testing.assert_close(rotated_weight(weight, adapters), one_after_the_other, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        rotated_weight(weight, adapters), rotated_weight(weight, adapters[::-1]), rtol=0, atol=1e-12
    )


@given(shapes, seeds)
def test_rotation_is_the_equation(shape, seed):
    _, weight, _, (adapter,) = random_case(seed, *shape, requires_grad=False)
    theta = adapter.A @ adapter.B
    torch.testing.assert_close(rotate(weight, theta), naive_rotate(weight, theta), rtol=0, atol=1e-13)


@pytest.mark.parametrize("ranks", [(3,), (2, 1, 4)], ids=["one adapter", "three adapters"])
@pytest.mark.parametrize("columns", [6, 7], ids=["even", "odd"])
def test_gradients_of_the_layer(columns, ranks):
    x, weight, bias, adapters = random_case(0, 4, columns, ranks)
    inputs = [x, weight, bias, *(tensor for a in adapters for tensor in a[:2])]
    scales = [a.scale for a in adapters]

    def layer(x, weight, bias, *factors):
        return rotated_linear(x, weight, bias, list(map(Factors, factors[::2], factors[1::2], scales)))

    assert torch.autograd.gradcheck(layer, inputs)
    ours = torch.autograd.grad(rotated_linear(x, weight, bias, adapters).pow(3).sum(), inputs)
    naive = torch.autograd.grad(naive_linear(x, weight, bias, adapters).pow(3).sum(), inputs)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [6, 7], ids=["even", "odd"])
def test_gradients_of_the_weight_alone(columns):
    _, weight, _, adapters = random_case(1, 4, columns, (2, 1))
    inputs = [weight, *(tensor for a in adapters for tensor in a[:2])]
    scales = [a.scale for a in adapters]

    def turn(weight, *factors):
        return rotated_weight(weight, list(map(Factors, factors[::2], factors[1::2], scales)))

    assert torch.autograd.gradcheck(turn, inputs)


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "A", "B"])
def test_each_gradient_alone(trained):
    x, weight, bias, (adapter,) = random_case(2, 4, 6, requires_grad=False)
    tensors = {"x": x, "weight": weight, "bias": bias, "A": adapter.A, "B": adapter.B}
    tensors[trained].requires_grad_()
    (ours,) = torch.autograd.grad(rotated_linear(x, weight, bias, [adapter]).pow(3).sum(), tensors[trained])
    (naive,) = torch.autograd.grad(naive_linear(x, weight, bias, [adapter]).pow(3).sum(), tensors[trained])
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_second_derivatives():
    x, weight, _, adapters = random_case(3, 4, 7)

    def layer(x, A, B):
        return rotated_linear(x, weight, None, [Factors(A, B, 0.5)])

    assert torch.autograd.gradgradcheck(layer, [x, *adapters[0][:2]])


@given(shapes, seeds, st.sampled_from([(), (1,), (2, 3), (0,)]))
def test_no_grad_path_is_the_same_to_the_bit(shape, seed, batch):
    _, weight, bias, adapters = random_case(seed, *shape, ranks=(2, 1), dtype=torch.float32)
    x = torch.randn(*batch, shape[1], generator=torch.Generator().manual_seed(seed))
    with_graph = rotated_linear(x, weight, bias, adapters)
    with torch.no_grad():
        without_graph = rotated_linear(x, weight, bias, adapters)
    assert with_graph.requires_grad
    assert not without_graph.requires_grad
    assert torch.equal(with_graph, without_graph)
    with_graph.sum().backward()
    assert adapters[0].A.grad.shape == adapters[0].A.shape


def test_backward_keeps_only_x_w_a_b():
    x, weight, bias, adapters = random_case(4, 4, 6, (3, 2), dtype=torch.float32)
    weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotated_linear(x, weight, bias, adapters)
    allowed = [x, weight, *(tensor for a in adapters for tensor in a[:2])]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in allowed}


def test_x_is_not_kept_where_no_adapter_is_trained():
    x, weight, bias, (adapter,) = random_case(5, 4, 6, requires_grad=False)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotated_linear(x, weight, bias, [adapter])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (weight, adapter.A, adapter.B)}


@pytest.mark.parametrize("factor_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(base_dtype, factor_dtype):
    """Angles are never narrower than float32: only the finished weight is rounded, once."""
    x, weight, bias, _ = random_case(6, 8, 10, dtype=base_dtype)
    _, _, _, adapters = random_case(7, 8, 10, (3, 2), dtype=factor_dtype)
    wide = torch.promote_types(torch.float32, torch.promote_types(base_dtype, factor_dtype))
    exact = naive_rotate(weight.double(), sum(a.scale * (a.A.double() @ a.B.double()) for a in adapters))
    tolerance = 1e-12 if wide == torch.float64 else 1e-5
    theta = sum(angles(*a, dtype=wide) for a in adapters)
    torch.testing.assert_close(rotate(weight, theta), exact.to(wide), rtol=tolerance, atol=tolerance)
    turned = rotated_weight(weight, adapters)
    assert turned.dtype == base_dtype
    torch.testing.assert_close(turned, exact.to(base_dtype))

    out = rotated_linear(x, weight, bias, adapters)
    assert out.dtype == base_dtype
    assert torch.equal(out, F.linear(x, turned, bias))
    out.sum().backward()
    for tensor in (x, weight, bias, adapters[0].A, adapters[0].B):
        assert tensor.grad.dtype == tensor.dtype
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("region", ["forward", "forward and backward"])
def test_autocast_halves_the_product_and_not_the_angles(region):
    """bfloat16 would turn these angles, 0.05 rad, into a cosine of exactly 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    A = torch.full((16, 1), 0.05, requires_grad=True)
    B = torch.ones(1, 16, requires_grad=True)
    adapters = [Factors(A, B)]

    expected = torch.autograd.grad(rotated_linear(x, weight, None, adapters).pow(2).mean(), (A, B))
    with torch.autocast("cpu", torch.bfloat16):
        out = rotated_linear(x, weight, None, adapters)
        if region == "forward and backward":
            out.float().pow(2).mean().backward()
    if region == "forward":
        out.float().pow(2).mean().backward()

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), rotate(weight, angles(A, B)).bfloat16()))
    for tensor, grad in zip((A, B), expected, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, grad, rtol=0.05, atol=0.02 * grad.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(angles(A, B), torch.full((16, 16), 0.05), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: torch.cat([torch.zeros(1), w.flatten()])[1:].view(w.shape),
        lambda w: w.T.contiguous().T,
        lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
        lambda w: torch.cat([torch.zeros(len(w), 1), w], dim=1)[:, 1:],
    ],
    ids=["odd offset", "transposed", "wide rows", "odd stride and offset"],
)
@pytest.mark.parametrize("columns", [6, 7])
def test_any_memory_layout(view, columns):
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    theta = torch.randn(4, columns // 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view(weight), weight)
    assert torch.equal(rotate(view(weight), theta), rotate(weight, theta))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_equals_eager(dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, **kwargs):
        return torch.randn(*shape, generator=generator, device="cuda", **kwargs)

    weight, x = normal(64, 96).to(dtype), normal(32, 96).to(dtype).requires_grad_()
    adapters = [
        Factors(normal(64, 4).requires_grad_(), normal(4, 48).requires_grad_(), s) for s in (1.0, 0.5)
    ]
    leaves = [x, *(tensor for a in adapters for tensor in a[:2])]

    def step():
        out = rotated_linear(x, weight, None, adapters)
        return out, *torch.autograd.grad(out.float().pow(2).sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(normal(*leaf.shape))
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, eager)


def test_gradient_of_the_angles_by_autograd_of_the_equations():
    torch.manual_seed(0)
    for columns in (6, 7):
        weight = torch.randn(5, columns, dtype=torch.float64)
        theta = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        turned = naive_rotate(weight, theta)
        grad = torch.randn_like(turned)
        (expected,) = torch.autograd.grad(turned, theta, grad)
        torch.testing.assert_close(angle_gradient(turned.detach(), grad), expected)
