"""Figures of rows and their null against brute force in float64 and against laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wadi.directions.change import (
    energies,
    energy_shares,
    null_energies,
    null_moments,
    row_changes,
    with_norms_of,
)


def random_pair(rows, n, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator)
    return weight, weight + size * torch.randn(rows, n, generator=generator)


def test_figures_are_those_of_the_definition():
    weight, target = random_pair(7, 30, size=0.5)
    changes, residual = row_changes(weight, target)
    for i, (w, w2) in enumerate(zip(weight.double().numpy(), target.double().numpy(), strict=True)):
        n, n2 = np.sqrt((w * w).sum()), np.sqrt((w2 * w2).sum())
        cosine = (w * w2).sum() / (n * n2)
        expected = (abs(n2 - n) / n, 1 - cosine, math.acos(cosine), np.sqrt(((w2 - w) ** 2).sum()) / n)
        assert [column[i].item() for column in changes] == pytest.approx(expected, rel=1e-12)
        assert residual[i].numpy() == pytest.approx(w2 / n2 - w / n, abs=1e-7)


def test_small_changes_do_not_cancel():
    weight = torch.zeros(1, 4, dtype=torch.float64)
    weight[0, 0] = 3.0
    angle = 1e-9
    target = 3.0 * torch.tensor([[math.cos(angle), math.sin(angle), 0, 0]], dtype=torch.float64)
    changes, _ = row_changes(weight, target)
    assert changes.angle.item() == pytest.approx(angle, rel=1e-9)
    assert changes.direction.item() == pytest.approx(angle**2 / 2, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_scaled_rows_change_length_alone(sign):
    weight, _ = random_pair(5, 8)
    changes, _ = row_changes(weight, sign * 2 * weight)
    assert changes.norm.tolist() == [1.0] * 5
    assert changes.angle.tolist() == pytest.approx([0 if sign > 0 else math.pi] * 5, abs=1e-7)


def test_rows_of_zeros_are_left_out():
    weight, target = random_pair(6, 8)
    weight[1], target[4] = 0, 0
    changes, residual = row_changes(weight, target)
    assert all(len(column) == 4 for column in changes)
    assert not residual[[1, 4]].any()
    kept = [0, 2, 3, 5]
    assert torch.equal(changes.norm, row_changes(weight[kept], target[kept])[0].norm)


@pytest.mark.parametrize("n", [2, 3, 8, 200])
@pytest.mark.parametrize("rho", [1e-4, 0.2, 1.3])
def test_null_is_the_integral_over_all_directions(n, rho):
    """By a fine midpoint sum over phi, whose density is sin(phi)^(n - 2)."""
    phi = (np.arange(400_000) + 0.5) * math.pi / 400_000
    mass = np.sin(phi) ** (n - 2)
    mass /= mass.sum()
    x, y = 1 + rho * np.cos(phi), rho * np.sin(phi)
    q, angle = np.hypot(x, y), np.arctan2(y, x)
    expected = {"norm": abs(q - 1), "direction": 2 * np.sin(angle / 2) ** 2, "angle": angle}
    null = null_moments(torch.full((3,), rho, dtype=torch.float64), n)
    for name, values in expected.items():
        mean = (values * mass).sum()
        assert null[name].mean == pytest.approx(mean, rel=1e-5)
        assert null[name].std == pytest.approx(math.sqrt(((values - mean) ** 2 * mass).sum()), rel=1e-4)


def test_isotropic_changes_meet_their_null():
    weight, target = random_pair(20_000, 24, size=0.3)
    changes, _ = row_changes(weight, target)
    for name, (mean, std) in null_moments(changes.size, 24).items():
        found = getattr(changes, name)
        assert found.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(len(found)))
        assert found.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_energies_are_squared_singular_values(shape, scale):
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    expected = np.linalg.svd(residual.double().numpy(), compute_uv=False) ** 2
    assert energies(residual).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6 * expected[0])


def test_shares_of_energy():
    shares = energy_shares(
        torch.tensor([6.0, 3, 1, 0], dtype=torch.float64), torch.tensor([0, 0.25, 0.3, 0.5, 1])
    )
    assert shares.tolist() == pytest.approx([0, 0.6, 0.66, 0.9, 1.0], abs=1e-7)
    assert energy_shares(energies(torch.zeros(3, 4)), torch.tensor([0.3])) is None


@given(rank=st.integers(1, 5), rows=st.integers(6, 12), n=st.integers(6, 12), seed=st.integers(0, 99))
def test_a_matrix_of_rank_k_has_all_energy_in_k(rank, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    share = torch.tensor([rank / min(rows, n)], dtype=torch.float64)
    assert energy_shares(energies(residual), share).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(700, 700), (320, 1500), (1500, 320)])
def test_a_small_matrix_stands_for_a_large_one_in_the_null(shape):
    generator = torch.Generator().manual_seed(1)
    lengths = 0.1 + torch.rand(shape[0], dtype=torch.float64, generator=generator)
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    whole = drawn / drawn.norm(dim=1, keepdim=True) * lengths[:, None]
    shares = torch.tensor([0.1, 0.3, 0.6])
    found = energy_shares(null_energies(lengths, shape), shares)
    assert found.numpy() == pytest.approx(energy_shares(energies(whole), shares).numpy(), abs=6e-3)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 2, 2)])
def test_norms_of_another(shape):
    weight, other = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    weight[1], other[2] = 0, 0
    swapped = with_norms_of(weight, other)
    assert swapped.shape == weight.shape
    kept = [0, 3, 4]
    assert torch.allclose(swapped.flatten(1).norm(dim=1)[kept], other.flatten(1).norm(dim=1)[kept])
    assert row_changes(weight[kept].flatten(1), swapped[kept].flatten(1))[0].angle.max() < 1e-6
    assert torch.equal(swapped[[1, 2]], weight[[1, 2]])
