"""What the header of an exported file says about the student in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub.repocard import metadata_load
from peft.utils import CONFIG_NAME

from wadi._version import __version__
from wadi.files import read_json
from wadi.onestep.adapters import adapter_folder
from wadi.onestep.student import Student, network_of

_ARCHITECTURES = {
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-v3",
    "FluxPipeline": "flux-1",
}
"""The names of the ModelSpec standard, which A1111, Forge, ComfyUI and the hub show."""


def metadata(
    pipeline: DiffusionPipeline,
    student: Student | None,
    teacher: str | os.PathLike,
    adapters: list[str | os.PathLike],
) -> dict[str, str]:
    """The header of a file, in the words of the ModelSpec standard and of wadi.

    Args:
        pipeline: that is exported.
        student: that it is.
        teacher: folder or hub id of the multi-step model, for an adapter that does not name its own.
        adapters: folders or hub ids of the student's adapter and of others; of folders only the name is told.

    Returns:
        Key -> text. The licence is that of the model card of the adapter or of the teacher, and is omitted
        where neither says one.
    """
    names = [_name(adapter) for adapter in adapters]
    folders = [adapter_folder(adapter) for adapter in adapters]
    base = _name(read_json(folders[0] / CONFIG_NAME).get("base_model_name_or_path") or teacher)
    steps = 1 if student is None else len(student.steps)
    config = pipeline.scheduler.config
    facts = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": f"{' + '.join(names)}, a student of {base}",
        "modelspec.usage_hint": f"steps {steps}, cfg 1, sampler lcm",
        "modelspec.implementation": "diffusers",
        "wadi.version": __version__,
        "wadi.steps": str(steps),
        "wadi.teacher": base,
        "wadi.adapters": json.dumps(names),
    }
    if (architecture := _architecture(pipeline)) is not None:
        facts["modelspec.architecture"] = architecture
    if (prediction := config.get("prediction_type")) is not None:
        facts["modelspec.prediction_type"] = {"v_prediction": "v"}.get(prediction, prediction)
    if student is not None:
        facts["wadi.student"] = json.dumps(dataclasses.asdict(student))
    if (licence := _licence([*folders, Path(pipeline.name_or_path)])) is not None:
        facts["modelspec.license"] = licence
    return facts


def _name(model: str | os.PathLike) -> str:
    """A hub id as it is. A path of this machine is not told, only the name of the folder or of the run."""
    name = os.fspath(model)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name):
        return name
    path = Path(os.path.abspath(name))
    return path.parent.name if path.name in ("adapter", "pipeline") else path.name


def _architecture(pipeline: DiffusionPipeline) -> str | None:
    kind = type(pipeline).__name__
    if kind != "StableDiffusionPipeline":
        return _ARCHITECTURES.get(kind)
    v = pipeline.scheduler.config.prediction_type == "v_prediction"
    second = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    return {768: "stable-diffusion-v1", 1024: second}.get(network_of(pipeline).config.cross_attention_dim)


def _licence(folders: list[Path]) -> str | None:
    """The licence that the first model card with one names."""
    for folder in folders:
        card = folder / "README.md"
        try:
            found = (metadata_load(card) or {}).get("license") if card.is_file() else None
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # a text that is no card
            found = None
        if found is not None:
            return str(found)
    return None
