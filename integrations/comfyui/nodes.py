"""The nodes, as ComfyUI shows them."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from .adapter import Student, read_angles, read_student, weights_file

FOLDER = "lorad"
"""Folder of ComfyUI's models with the adapters; more of them can be named in extra_model_paths.yaml."""


def _paths() -> Any:
    """ComfyUI's list of model folders, which knows ours from then on."""
    import folder_paths  # a module of ComfyUI; the rest of the pack is tested without it

    if FOLDER not in folder_paths.folder_names_and_paths:
        # the method that other packs use too leaves the set of endings empty, which lists every file
        folder_paths.folder_names_and_paths[FOLDER] = ([], {".safetensors"})
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return folder_paths


class LoadLoRaD:
    """Turn the weights of a loaded model by a LoRaD adapter."""

    CATEGORY = "loaders/LoRaD"
    DESCRIPTION = (
        "Turns the weights of a loaded model by a LoRaD adapter of wadi. The strength multiplies the angles; "
        "several adapters add up. Put this node before other LoRA loaders."
    )
    RETURN_TYPES = ("MODEL", "LORAD_STUDENT")
    RETURN_NAMES = ("model", "student")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI: the inputs of the node."""
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": (
                    _paths().get_filename_list(FOLDER),
                    {"tooltip": "Adapters in models/lorad: folders as wadi writes them, or single files."},
                ),
                "strength": ("FLOAT", strength | {"tooltip": "What the angles are multiplied by."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, **_: Any) -> str:
        """See ComfyUI: other files are read again."""
        file = weights_file(_paths().get_full_path_or_raise(FOLDER, adapter))
        record = file.with_name("student.json")
        return " ".join(str(f.stat().st_mtime_ns) for f in (file, record) if f.is_file())

    def load(self, model: Any, adapter: str, strength: float) -> tuple[Any, Student | None]:
        """Return the model with its weights turned, and the record of the student if there is one.

        Raises:
            ValueError: the adapter cannot be read, or is not for this model.
        """
        from .model import with_angles

        path = _paths().get_full_path_or_raise(FOLDER, adapter)
        student = read_student(path)
        if strength == 0:
            return model, student
        return with_angles(model, read_angles(path), strength, adapter), student


class OneStepSampling:
    """Sample as a student does: its steps, its alpha_T and what it predicts."""

    CATEGORY = "sampling/custom_sampling/LoRaD"
    DESCRIPTION = (
        "The steps, the noise level at the first step and the prediction of a student. For SamplerCustom "
        "with cfg 1. Without a student it is one step of the model's own noise schedule."
    )
    RETURN_TYPES = ("MODEL", "SAMPLER", "SIGMAS")
    RETURN_NAMES = ("model", "sampler", "sigmas")
    FUNCTION = "prepare"
    _OWN: ClassVar[str] = "0: the student's own."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI: the inputs of the node."""
        alpha = {"default": 0.0, "min": 0.0, "max": 0.99, "step": 0.00001, "round": False}
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 0, "min": 0, "max": 64, "tooltip": cls._OWN}),
                "alpha_T_squared": ("FLOAT", alpha | {"tooltip": cls._OWN}),
            },
            "optional": {"student": ("LORAD_STUDENT", {"tooltip": "From Load LoRaD."})},
        }

    def prepare(
        self, model: Any, steps: int, alpha_T_squared: float, student: Student | None = None
    ) -> tuple[Any, Any, Any]:
        """Return the model with the student's noise schedule, the sampler, and the sigmas.

        Raises:
            ValueError: the model predicts something else than the student, or `steps` are more than it has.
        """
        from .model import sampled_as

        return sampled_as(model, student, steps, alpha_T_squared or None)


NODE_CLASS_MAPPINGS = {"LoadLoRaD": LoadLoRaD, "LoRaDOneStepSampling": OneStepSampling}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadLoRaD": "Load LoRaD", "LoRaDOneStepSampling": "One-step sampling"}
