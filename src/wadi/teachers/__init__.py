"""Teachers that are no diffusers folder: a single file as Civitai has them, and a LoRA that is fused."""

from wadi.teachers.prepare import prepare_teacher, teacher_digests

__all__ = ["prepare_teacher", "teacher_digests"]
