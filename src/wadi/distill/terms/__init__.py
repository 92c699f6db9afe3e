"""The terms of the student's objective, one file each."""

from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.terms.denoising import Denoising
from wadi.distill.terms.term import Batch, Term
from wadi.distill.terms.vsd import Vsd

__all__ = ["Batch", "Denoising", "Term", "Vsd", "terms_of"]


def terms_of(config: DistillConfig, schedule: Schedule, shape: tuple[int, ...]) -> list[Term]:
    """The terms that the options ask for.

    Args:
        config: the options.
        schedule: the teacher's.
        shape: (C, H, W) of the latents.
    """
    terms: list[Term] = [Vsd(config)]
    if config.denoising_weight:
        terms.append(Denoising(config, schedule, shape))
    return terms
