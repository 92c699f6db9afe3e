"""The small real world: emoji scenes, captions, a Stable Diffusion pipeline trained on them, and a judge.

A customer of the library like any other. What ships with the package is in ``assets``.
"""

from pathlib import Path

CONTROLNET_SCALE = 0.5
"""Conditioning scale for the shipped ControlNet on a one-step student: at 1 the images keep no better to
the edges and show the wrong object more often."""


def assets_folder() -> Path:
    """Folder of everything that ships: teacher, student, judge, reference statistics, prompts."""
    return Path(__file__).parent / "assets"


def teacher_folder() -> Path:
    """The shipped multi-step teacher, a StableDiffusionPipeline folder."""
    return assets_folder() / "teacher"


def student_folder() -> Path:
    """The shipped one-step student, a LoRaD adapter folder for the teacher."""
    return assets_folder() / "student"


def controlnet_folder() -> Path:
    """The shipped ControlNet of the teacher, steered by edges, a ControlNetModel folder."""
    return assets_folder() / "controlnet-canny"


def prompts_file() -> Path:
    """The shipped training prompts, one a line."""
    return assets_folder() / "prompts.txt"
