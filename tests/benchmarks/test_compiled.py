"""Gradients of one iteration against the equations in float64, run in every way there is."""

import pytest
import torch

from benchmarks.compiled import WAYS, exact, measured, relative_error
from tests.tiny import one_level_pipeline

ROUNDING = {"no": 1e-4, "bf16": 0.5}
"""Most relative error of a gradient: float32's 6e-8 and bfloat16's 4e-3, amplified by 1 / alpha_T = 14.6, by
a difference of two predictions and by some twenty layers. A gradient of another loss has an error of 1."""


def errors(device, precision, way):
    return {
        (when, role): relative_error(found[role], want)
        for when, trainer, found in measured(one_level_pipeline(), device, precision, way)
        for role, want in exact(trainer).items()
    }


def test_the_plain_iteration_is_the_equations():
    assert all(error < ROUNDING["no"] for error in errors("cpu", "no", "plain").values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_way_is_the_equations_to_rounding(precision, monkeypatch):
    """In float32 without TF32, whose own rounding of convolutions is a thousand times coarser."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = errors("cuda", precision, "plain")
    assert all(error < ROUNDING[precision] for error in plain.values())
    for way in WAYS.keys() - {"plain"}:
        found = errors("cuda", precision, way)
        assert all(found[key] < 3 * plain[key] for key in plain), way
