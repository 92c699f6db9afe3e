"""Find, read and merge the adapters of students and subjects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.lorad.io import check_finite
from wadi.onestep.components import first_line
from wadi.onestep.loading import check_hub_id, run_part
from wadi.onestep.student import Student, network_of, student_of
from wadi.torch_files import unsafe_message

TEXT_ENCODER_FOLDER = "text_encoder"
"""Sub-folder of an adapter folder with the adapter of the text encoder, if there is one."""
Adapters = str | os.PathLike | Sequence[str | os.PathLike] | None
"""No adapter, one, or several: folders or hub ids."""


def merge_adapters(pipeline: DiffusionPipeline, adapters: Adapters) -> Student | None:
    """Merge PEFT adapters into a pipeline's U-Net or transformer, and text encoder if they have one for it.

    They are merged one after the other. The order of LoRaD adapters does not matter, because their angles
    add. The order of other adapters does matter.

    Args:
        pipeline: a stock pipeline; its modules are changed in place.
        adapters: folder or hub id, or several. At most one may be a student's, and none if the pipeline is a
            student already. Adapters of subjects are always allowed.

    Returns:
        The student that the pipeline then is, or ``None`` if neither pipeline nor an adapter is a student.

    Raises:
        WadiError: there is no such adapter, it has numbers that are not finite, it is for another base model,
            or the pipeline is a student already.
    """
    folders = [adapter_folder(one) for one in as_list(adapters)]
    student = student_with(pipeline, folders)
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    for folder in folders:
        setattr(pipeline, name, _merge(getattr(pipeline, name), folder))
        if (folder / TEXT_ENCODER_FOLDER).is_dir():
            part = adapter_folder(folder / TEXT_ENCODER_FOLDER)
            pipeline.text_encoder = _merge(pipeline.text_encoder, part)
    return student


def student_with(pipeline: DiffusionPipeline, folders: Sequence[Path]) -> Student | None:
    """The student that a pipeline becomes when these adapters are merged; see `merge_adapters`.

    Raises:
        WadiError: a student's adapter is for another base model, or there is a student already.
    """
    student, whose = student_of(pipeline), pipeline.name_or_path or "the pipeline"
    for folder in folders:
        own = Student.read(folder)
        if own is None:
            continue
        if student is not None:
            raise WadiError(
                f"{folder}: is a student's adapter, but {whose} is a student already; omit one of the two"
            )
        own.check_fits(folder, network_of(pipeline), pipeline.scheduler, whose)
        own.tell_other_lora(folder, pipeline.name_or_path)
        student, whose = own, folder
    return student


def as_list(adapters: Adapters) -> list[str | os.PathLike]:
    """No adapter, one or several, as a list."""
    if adapters is None:
        return []
    return [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)


def adapter_folder(adapter: str | os.PathLike) -> Path:
    """Folder of a PEFT adapter. An adapter on the hub is downloaded to the hub's cache.

    Raises:
        WadiError: there is no such folder or hub id, one of its two files is missing, or it holds numbers
            that are not finite.
    """
    folder = Path(adapter)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        check_hub_id(os.fspath(adapter))
        try:
            folder = Path(snapshot_download(os.fspath(adapter), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise WadiError(f"{adapter}: could not fetch the adapter: {first_line(error)}") from error
    folder = run_part(folder, "adapter", CONFIG_NAME)
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise WadiError(unsafe_message(folder / WEIGHTS_NAME, folder))
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise WadiError(
                f"{folder}: is not the folder of a PEFT adapter, {file} is missing; name another folder"
            )
    try:
        check_finite(folder / SAFETENSORS_WEIGHTS_NAME)
    except ValueError as error:
        raise WadiError(str(error)) from error
    return folder


def _merge(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        # torch names the tensors of another shape in the lines after the first
        reason = "; ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise WadiError(f"{folder}: the adapter does not fit the model: {reason}") from error
    # PEFT only warns about weights that the file lacks
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if wrong := own ^ load_tensors(folder / SAFETENSORS_WEIGHTS_NAME).keys():
        raise WadiError(
            f"{folder}: the adapter does not fit the model: {len(wrong)} names of weights differ, such as "
            f"{min(wrong)}; name the model that it was made for"
        )
    try:
        return adapted.merge_and_unload()
    except ValueError as error:
        raise WadiError(f"{folder}: the adapter could not be merged: {error}") from error
