"""Merge teacher and adapter into what stock diffusers, ComfyUI and other programs load."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import nn

from wadi.errors import WadiError, tell
from wadi.files import save_tensors
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER, adapter_folder, as_list, merge_adapters
from wadi.onestep.arguments import finite_number, whole_number
from wadi.onestep.components import Dtype
from wadi.onestep.formats.changes import changes, difference_tensors
from wadi.onestep.formats.lora import (
    MAX_LOSS,
    Loss,
    approximated,
    check_loss,
    lora_tensors,
    own_factors,
)
from wadi.onestep.formats.metadata import metadata
from wadi.onestep.formats.names import adapter_name
from wadi.onestep.formats.single_file import single_file_tensors
from wadi.onestep.loading import load_pipeline
from wadi.onestep.pipeline import StudentPipeline
from wadi.onestep.saving import forget_origin
from wadi.onestep.student import Student, network_of
from wadi.outputs import Output

Format = Literal["diffusers", "single-file", "unet", "transformer", "lycoris-diff", "lora"]
FILE_FORMATS = ("single-file", "lycoris-diff", "lora")
"""Formats that are one file; the others are a folder."""
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def export_output(
    out: str | os.PathLike,
    format: Format,
    inputs: Sequence[str | os.PathLike | None],
    overwrite: bool,
) -> Output:
    """The rule for the folder or the .safetensors file that an export writes."""
    suffixes = (".safetensors",) if format in FILE_FORMATS else ()
    return Output(out, "export", inputs, overwrite, suffixes)


def export_pipeline(
    teacher: str | os.PathLike,
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    format: Format = "diffusers",
    rank: int | None = None,
    max_loss: float = MAX_LOSS,
    max_shard_size: str | None = None,
) -> Loss | None:
    """Merge a student into its teacher and write it for other programs, or nothing on failure.

    A folder of the format "diffusers" holds stock classes, and needs neither wadi nor peft:

        pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
        pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]

    A student of several steps takes more: ``num_inference_steps=4``. In float32 its images equal those of
    `StudentPipeline` bit for bit, except that most pipelines of flows draw the noise between two steps from
    torch's global generator. Merging computes in float32; weights that are written in half precision are
    rounded once. Give a ``torch_dtype`` for such a folder, because the libraries' defaults mix dtypes; with
    ``torch.float16`` the stock scheduler computes x0 in it too.

    Args:
        teacher: folder or hub id of the teacher's pipeline; its other components are written unchanged.
        adapter: folder or hub id of the student's adapter, or several, of which the others are stacked on it.
        out: where to write: a folder, new or empty, or a .safetensors file.
        dtype: dtype of the written weights; "auto" for that of the teacher's files.
        overwrite: replace the folder if the same function wrote it and nothing else is in it, or the file.
        format: what to write. "diffusers" is a pipeline folder, "unet" or "transformer" a folder of this part
            alone, "single-file" one file in the original layout, "lycoris-diff" a file of the differences of
            the weights, and "lora" a file of their factors.
        rank: of a LoRA. An adapter that is a LoRA keeps its own factors if ``None``; others need a rank.
        max_loss: the share of the squared change of the weights, from 0 to 1, that a LoRA may lose.
        max_shard_size: of the files in a folder, such as "5GB"; ``None`` for that of diffusers.

    Returns:
        What a LoRA of the given rank loses; ``None`` for all that is exact.

    Raises:
        WadiError: teacher or adapter cannot be loaded, they do not fit each other or the format, the LoRA
            loses too much, or the output may not or cannot be written.
    """
    _check_options(format, rank, max_loss, max_shard_size)
    adapters = as_list(adapter)
    output = export_output(out, format, (teacher, *adapters), overwrite)
    output.check()
    if format == "diffusers":
        StudentPipeline.from_pretrained(teacher, adapter, torch_dtype=dtype).write(output, max_shard_size)
        return None
    differences = format in ("lycoris-diff", "lora")
    pipeline = load_pipeline(teacher, torch.float32 if differences else dtype, _unused(format, adapters))
    _check_part(format, pipeline, teacher)
    student = merge_adapters(pipeline, adapters)
    if not differences:
        _tell_schedule(pipeline, student, adapters)
    if format in ("unet", "transformer"):
        _write_network(network_of(pipeline), student, output, max_shard_size)
        return None
    loss, written = None, None if dtype == "auto" else dtype
    if format == "single-file":
        tensors = single_file_tensors(pipeline)
    elif format == "lycoris-diff":
        tensors = difference_tensors(pipeline, written)
    else:
        tensors, loss = _lora(pipeline, adapters, rank, max_loss, written)
    header = metadata(pipeline, student, teacher, adapters)
    with output.writing() as temporary:
        save_tensors(temporary, tensors, header)
    return loss


def _check_options(format: Format, rank: int | None, max_loss: float, max_shard_size: str | None) -> None:
    if format not in get_args(Format):
        raise WadiError(f"--format {format}: must be one of {', '.join(get_args(Format))}")
    if rank is not None:
        whole_number("--rank", rank, 1)
    if not 0 <= finite_number("--max-loss", max_loss) <= 1:
        raise WadiError(f"--max-loss {max_loss}: must be from 0 to 1")
    if format != "lora" and (rank is not None or max_loss != MAX_LOSS):
        raise WadiError(
            f"--rank and --max-loss: are for --format lora, and nothing is lost by {format}; omit them"
        )
    if max_shard_size is None:
        return
    if format in FILE_FORMATS:
        raise WadiError(f"--max-shard-size: {format} is one file; omit the option")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", max_shard_size):
        raise WadiError(f"--max-shard-size {max_shard_size}: must be such as 500MB or 5GB")


def _unused(format: Format, adapters: Sequence[str | os.PathLike]) -> tuple[str, ...]:
    """The parts of the pipeline that a format has no use for; adapters may change a text encoder."""
    if format == "single-file":
        return ()
    changed = any((adapter_folder(one) / TEXT_ENCODER_FOLDER).is_dir() for one in adapters)
    if changed and format in ("unet", "transformer"):
        tell(f"--format {format}: an adapter also changes the text encoder, which is not written")
    return ("vae", *(_ENCODERS[1:] if changed else _ENCODERS))


def _check_part(format: Format, pipeline: DiffusionPipeline, teacher: str | os.PathLike) -> None:
    other = {"unet": "transformer", "transformer": "unet"}.get(format)
    if other is not None and not hasattr(pipeline, format):
        raise WadiError(f"--format {format}: {teacher} has a {other}; choose --format {other}")


def _tell_schedule(
    pipeline: DiffusionPipeline, student: Student | None, adapters: Sequence[str | os.PathLike]
) -> None:
    """Tell what other programs cannot know of a student from its weights alone."""
    if student is None:
        tell(f"{', '.join(map(os.fspath, adapters))}: nothing says that this is a student; check the images")
        return
    if student.alpha_T_squared is None:
        return
    own = float(pipeline.scheduler.alphas_cumprod[-1])  # flows have none, and their students no alpha
    if not math.isclose(own, student.alpha_T_squared, rel_tol=0.05):
        tell(
            f"the student was trained with alpha_T^2 {student.alpha_T_squared:.3g}, and programs take "
            f"{own:.3g} for this family; set the first sigma there to "
            f"{math.sqrt(1 / student.alpha_T_squared - 1):.6g}, or choose --format diffusers"
        )


def _write_network(
    network: nn.Module, student: Student | None, output: Output, max_shard_size: str | None
) -> None:
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with output.writing() as temporary:
        network.save_pretrained(temporary, safe_serialization=True, **sizes)
        forget_origin(temporary)
        if student is not None:
            student.write(temporary)


def _lora(
    pipeline: DiffusionPipeline,
    adapters: Sequence[str | os.PathLike],
    rank: int | None,
    max_loss: float,
    dtype: torch.dtype | None,
) -> tuple[dict[str, torch.Tensor], Loss | None]:
    loss, factors = None, None
    if rank is None and len(adapters) == 1:
        factors = own_factors(pipeline, adapters[0])
    if factors is None:
        if rank is None:
            raise WadiError(
                "--format lora: only one adapter that is a LoRA has factors of its own, and others are "
                "approximated; give --rank, such as --rank 64, or choose --format lycoris-diff, which loses "
                "nothing"
            )
        factors, loss = approximated(changes(pipeline), rank, dtype)
        check_loss(loss, max_loss)
    names = [adapter_name(pipeline, one.part, one.layer) for one in factors]
    return lora_tensors(factors, names, dtype), loss
