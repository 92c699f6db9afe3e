"""The terms of the student's objective, one file each."""

from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.terms.denoising import Denoising
from wadi.distill.terms.term import Batch, Term
from wadi.distill.terms.vsd import Vsd

__all__ = ["TERMS", "Batch", "Denoising", "Term", "Vsd", "terms_of"]


TERMS: tuple[type[Term], ...] = (Denoising,)
"""The terms beside the distillation gradient. The options of each are a group of `ObjectiveOptions` that has
the term's name and holds its weight."""


def terms_of(config: DistillConfig, schedule: Schedule, shape: tuple[int, ...]) -> list[Term]:
    """The distillation gradient, and the terms whose weight is not 0.

    Args:
        config: the options.
        schedule: the teacher's.
        shape: (C, H, W) of the latents.
    """
    chosen = [term for term in TERMS if getattr(config.objective, term.name).weight]
    return [term(config, schedule, shape) for term in (Vsd, *chosen)]
