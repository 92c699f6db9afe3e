"""The emoji world: scenes of emoji, their captions, a small Stable Diffusion pipeline, and a judge.

Everything here is small enough to be trained in minutes. It uses the library as any other program would. What
comes with the package is in ``assets``.
"""

from pathlib import Path

CONTROLNET_SCALE = 0.5
"""Conditioning scale of the built-in ControlNet on a one-step student. At 1 the images follow the edges no
better, and show the wrong object more often."""
GUIDANCE_SCALE = 2.0
"""Guidance scale of the built-in teacher at which its Frechet distance is lowest."""
STEPS = 25
"""Denoising steps of the built-in teacher."""


def assets_folder() -> Path:
    """Folder of everything that comes with wadi: teacher, student, judge, reference statistics, prompts."""
    return Path(__file__).parent / "assets"


def teacher_folder() -> Path:
    """The built-in multi-step teacher, a StableDiffusionPipeline folder."""
    return assets_folder() / "teacher"


def student_folder() -> Path:
    """The built-in one-step student, a LoRaD adapter folder for the teacher."""
    return assets_folder() / "student"


def controlnet_folder() -> Path:
    """The built-in ControlNet of the teacher, a ControlNetModel folder; it is steered by edges."""
    return assets_folder() / "controlnet-canny"


def prompts_file() -> Path:
    """The built-in training prompts, one in each line."""
    return assets_folder() / "prompts.txt"
