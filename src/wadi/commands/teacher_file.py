"""The options of every command whose model may be a single file, or a model with a LoRA."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherFile:
    """Only if the model is a single file, or has a LoRA."""

    teacher_config: str | None = None
    """If the model is a single .safetensors file: a diffusers folder or hub id of the same kind of model. If
    omitted, the configurations are fetched from the hub."""
    teacher_lora: str | None = None
    """LoRA file that is fused into the model, as wadi distill does."""
    teacher_lora_scale: float = 1.0
    """Number that the change of the LoRA is multiplied by."""

    @property
    def inputs(self) -> tuple[str | None, str | None]:
        """What is read beside the model."""
        return self.teacher_config, self.teacher_lora

    def folder(self, name: str | os.PathLike) -> str:
        """The pipeline folder or hub id of the model `name`, which is converted first where necessary.

        Raises:
            WadiError: as `wadi.teachers.prepare_teacher`.
        """
        from wadi.teachers import prepare_teacher

        return prepare_teacher(name, self.teacher_config, self.teacher_lora, self.teacher_lora_scale)


DEFAULT = TeacherFile()
"""A folder or hub id, without a LoRA."""
