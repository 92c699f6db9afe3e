"""Noise schedules and samplers, for every kind of model."""

from wadi.diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving

__all__ = ["RectifiedFlow", "Schedule", "VariancePreserving"]
