"""Teachers that are no diffusers folder: a file as Civitai has them, one with a LoRA, pickled weights."""

from wadi.teachers.convert import convert_weights
from wadi.teachers.prepare import prepare_teacher, teacher_digests

__all__ = ["convert_weights", "prepare_teacher", "teacher_digests"]
