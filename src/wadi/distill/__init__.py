"""Distillation of a diffusion model into a one-step generator by variational score distillation."""

from wadi.distill.backbone import UNetBackbone
from wadi.distill.config import PRESETS, DistillConfig
from wadi.distill.prompts import PromptEmbeddings, encode_prompts, read_prompts
from wadi.distill.run import distill
from wadi.distill.schedule import Schedule
from wadi.distill.trainer import StepInputs, Trainer, make_accelerator

__all__ = [
    "PRESETS",
    "DistillConfig",
    "PromptEmbeddings",
    "Schedule",
    "StepInputs",
    "Trainer",
    "UNetBackbone",
    "distill",
    "encode_prompts",
    "make_accelerator",
    "read_prompts",
]
