"""What the nodes do to a loaded model of ComfyUI. This file alone needs ComfyUI's own modules."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_sampling import CONST, EPS, V_PREDICTION, ModelSamplingDiscrete
from comfy.samplers import KSAMPLER
from comfy.weight_adapter import WeightAdapterBase

from .adapter import Factors, Student
from .keys import fitted
from .rotation import turned
from .sampling import chosen, discrete_sigmas, flow_sigmas

_PREFIX = "diffusion_model."
_KINDS = {"epsilon": EPS, "v_prediction": V_PREDICTION}


class LoRaDPatch(WeightAdapterBase):
    """The angles of one layer, as a patch of ComfyUI.

    Args:
        A: (out, r).
        B: (r, inputs // 2).
    """

    name = "lorad"

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        self.loaded_keys: set[str] = set()
        self.weights = [A, B]

    def calculate_weight(
        self, weight: torch.Tensor, key: str, strength: float, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Turn a weight, or some rows of one, in place by `strength` times the angles."""
        # in place because ComfyUI drops the result where it asked for some rows only
        return weight.copy_(turned(weight, *self.weights, strength))


def with_angles(model: Any, layers: dict[str, Factors], strength: float, name: str) -> Any:
    """Return a clone of a model (a `ModelPatcher`) with an adapter that turns its weights when it is loaded.

    Raises:
        ValueError: the adapter is not for this model.
    """
    shapes = {
        key.removeprefix(_PREFIX): tuple(value.shape)
        for key, value in model.model.state_dict().items()
        if key.startswith(_PREFIX)
    }
    patches = {}
    for target, factors in fitted(layers, shapes, name):
        key = _PREFIX + target.key
        part = key if target.start is None else (key, (0, target.start, target.rows))
        patches[part] = LoRaDPatch(*factors)
    patched = model.clone()
    if len(taken := patched.add_patches(patches, strength)) != len(patches):
        raise ValueError(f"{name}: ComfyUI took {len(taken)} of {len(patches)} layers; please report this")
    return patched


def sample(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Predict the clean latent at every noise level, and add fresh noise to it for the next one.

    ComfyUI's own "lcm" does the same, but in some versions its first fresh noise on the CPU is the noise
    that it started from. Here the noise goes on where that ended, on the CPU: as in diffusers with a
    generator of this seed, and on every device alike.

    Args:
        model: what predicts the clean latent from noisy ones and their noise levels (batch,).
        x: noisy latents, (batch, ...).
        sigmas: noise levels, the last of them 0.
        extra_args: of the model; its "seed" is that of the noise.
        callback: is told of every step.
        disable: whether there is no progress bar; there is none here.
    """
    extra_args = extra_args or {}
    generator = torch.Generator().manual_seed(extra_args.get("seed") or 0)
    torch.randn(x.shape, generator=generator)  # what x was made of
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised
        if sigmas[i + 1] > 0:
            noise = torch.randn(x.shape, generator=generator).to(x)
            x = model.inner_model.inner_model.model_sampling.noise_scaling(sigmas[i + 1], noise, x)
    return x


def sampled_as(
    model: Any, student: Student | None, count: int = 0, alpha_T_squared: float | None = None
) -> tuple[Any, Any, torch.Tensor]:
    """Prepare a model for the steps of a student.

    Args:
        model: a `ModelPatcher`.
        student: its record; ``None`` for a student of one step that predicts what the model does.
        count: how many of its steps, 0 for all.
        alpha_T_squared: of the first step; ``None`` for the student's own.

    Returns:
        A clone of the model with the student's noise schedule, the sampler, and the sigmas (steps + 1,).

    Raises:
        ValueError: the model predicts something else than the student, has another kind of noise schedule, or
            takes no `alpha_T_squared` or not so many steps.
    """
    own = model.model.model_sampling
    flow = isinstance(own, CONST)
    if not flow and not (isinstance(own, EPS) and isinstance(own, ModelSamplingDiscrete)):
        raise ValueError("this model has another kind of noise schedule than the students of wadi")
    if student is None:
        student = Student(_predicted(own))
    if flow != (student.prediction == "flow_prediction"):
        raise ValueError(
            f"the student predicts {student.prediction}, and this model predicts {_predicted(own)}; load the "
            "checkpoint that it was distilled from"
        )
    if flow and alpha_T_squared is not None:
        raise ValueError("alpha_T_squared: this model is a flow, whose last alpha is 0; set it to 0")
    steps = chosen(student.steps, count, flow)
    sampler = KSAMPLER(sample)
    if flow:
        return model.clone(), sampler, flow_sigmas(steps)

    alpha_T_squared = student.alpha_T_squared if alpha_T_squared is None else alpha_T_squared
    table, sigmas = discrete_sigmas(own.sigmas, steps, alpha_T_squared)

    class Sampling(ModelSamplingDiscrete, _KINDS[student.prediction]):
        """The student's schedule and prediction, which ComfyUI does not detect in every checkpoint."""

    sampling = Sampling(model.model.model_config)
    sampling.set_sigmas(table)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched, sampler, sigmas


def _predicted(sampling: Any) -> str:
    if isinstance(sampling, CONST):
        return "flow_prediction"
    return "v_prediction" if isinstance(sampling, V_PREDICTION) else "epsilon"
