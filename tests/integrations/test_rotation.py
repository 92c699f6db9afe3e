"""The mathematics of the nodes is that of wadi."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from integrations.comfyui.rotation import turned
from wadi.lorad.rotation import Factors, rotated_weight

SHAPES = st.sampled_from([(4, 6), (3, 7), (1, 2), (5, 3, 3, 3), (2, 4, 1, 1)])
STRENGTHS = st.floats(-2, 2)


def drawn(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    A, B = (
        torch.randn(shape[0], 2, generator=generator),
        torch.randn(2, weight[0].numel() // 2, generator=generator),
    )
    return weight.to(dtype), A, B


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 1000), STRENGTHS)
def test_it_is_the_rotation_of_the_library(shape, seed, strength):
    weight, A, B = drawn(shape, seed)
    expected = rotated_weight(weight.flatten(1), [Factors(A, B, strength)]).view(shape)
    torch.testing.assert_close(turned(weight, A, B, strength), expected, atol=3e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 1000), STRENGTHS, STRENGTHS)
def test_strengths_add_up(shape, seed, first, second):
    weight, A, B = drawn(shape, seed)
    one_after_the_other = turned(turned(weight, A, B, first), A, B, second)
    torch.testing.assert_close(one_after_the_other, turned(weight, A, B, first + second), atol=1e-5, rtol=0)
    back = turned(turned(weight, A, B, first), A, B, -first)
    torch.testing.assert_close(back, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_angles_are_computed_in_float32_at_least(dtype):
    weight, A, B = drawn((4, 6), 0, dtype)
    result = turned(weight, A.half(), B.half())
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    expected = turned(weight.double(), A.half().double(), B.half().double())
    torch.testing.assert_close(result.double(), expected, atol=3e-6, rtol=0)
