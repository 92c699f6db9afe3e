"""`wadi directions swap`: a student whose rows have the lengths, or the directions, of its teacher's rows."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import diffusers
import torch

from wadi.directions.change import with_norms_of
from wadi.directions.compare import layers_with_rows
from wadi.directions.weights import (
    WEIGHTS_NAME,
    AdaptedWeights,
    Weights,
    check_pair,
    network_folder,
    open_weights,
)
from wadi.errors import WadiError
from wadi.files import read_json, save_tensors, write_json
from wadi.onestep import Student, student_scheduler
from wadi.onestep.loading import pipeline_folder, run_part
from wadi.onestep.saving import copy_part, forget_origin
from wadi.onestep.scheduler import ONE_STEP, gives_sigmas
from wadi.onestep.supported import UNUSED, parts
from wadi.outputs import Output
from wadi.progress import progress

Part = Literal["norms", "directions"]

SHARD_BYTES = 2**30
"""Largest size of a written file in bytes, and so of what is in memory at a time."""


def swap_rows(
    teacher: str | os.PathLike,
    student: str | os.PathLike,
    take: Part,
    out_folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write the student's pipeline with the lengths, or the directions, of the teacher's rows.

    With ``take="norms"`` every row is w' |w| / |w'|, and with ``take="directions"`` it is w |w'| / |w|, where
    w is the teacher's row and w' the student's. Rows that are zero in either weight, and tensors without
    rows, stay the student's. The rest of the pipeline is copied from the student, or from the teacher if the
    student is a file or an adapter; with an adapter it gets the student's scheduler. Weights are read and
    written one after the other, in several files if they are larger than `SHARD_BYTES`.

    Args:
        teacher: pipeline folder or hub id; if the student is a pipeline, anything that `open_weights` reads.
        student: see `wadi.directions.weights.open_weights`.
        take: what is taken from the teacher.
        out_folder: folder to write, whole or not at all; it must be new or empty.
        base: base model of an adapter.
        dtype: dtype of the written weights of the network.
        overwrite: replace the folder if this function wrote it and nothing else is in it.

    Raises:
        WadiError: something cannot be read or written, or the architectures differ.
    """
    output = Output(out_folder, "directions swap", inputs=(teacher, student, base), overwrite=overwrite)
    output.check()
    teacher, student = (run_part(Path(name), "pipeline", "model_index.json") for name in (teacher, student))
    before = open_weights(teacher, base)
    after = open_weights(student, base, other=before)
    check_pair(before, after)
    path = Path(student)
    alone = path.exists() and not (path / "model_index.json").exists()  # a hub id is a pipeline's
    source = pipeline_folder(teacher if alone else student)
    part = network_folder(source).name
    with output.writing() as folder:
        _copy_pipeline(source, folder, part)
        if isinstance(after, AdaptedWeights):
            record = Student.read(after.folder)
            _set_steps(source, folder, record)
        else:
            record = Student.read(source)
        if record is not None:
            record.write(folder)
        _write_shards(folder / part, before, after, take, dtype)


def swapped(before: Weights, after: Weights, key: str, take: Part, with_rows: bool) -> torch.Tensor:
    """Compute one tensor of the result, in float32 or wider."""
    tensor = after.read(key)
    if not with_rows:
        return tensor
    if take == "norms":
        return with_norms_of(tensor, before.read(key))
    weight = before.read(key)
    zero = (tensor.flatten(1) == 0).all(1) | (weight.flatten(1) == 0).all(1)
    rows = with_norms_of(weight, tensor)
    rows[zero] = tensor[zero].to(rows)
    return rows


def _write_shards(folder: Path, before: Weights, after: Weights, take: Part, dtype: torch.dtype) -> None:
    shapes = after.shapes()
    with_rows = {f"{name}.weight" for name in layers_with_rows(shapes)}
    shards = list(_shards(shapes, dtype.itemsize))
    places = {}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    with progress(total=sum(sizes.values()), desc="weights", unit="", unit_scale=True, leave=False) as bar:
        for number, keys in enumerate(shards, 1):
            tensors = {}
            for key in keys:
                # copied, because what was read is a view of the whole file's pages
                tensor = swapped(before, after, key, take, key in with_rows)
                tensors[key] = tensor.to(dtype, copy=True)
                bar.update(sizes[key])
            stem, _, kind = WEIGHTS_NAME.partition(".")
            name = WEIGHTS_NAME if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{kind}"
            save_tensors(folder / name, tensors, {"format": "pt"})
            places.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        total = sum(sizes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{WEIGHTS_NAME}.index.json", index)


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    keys, held = [], 0
    for key, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if keys and held + size > SHARD_BYTES:
            yield keys
            keys, held = [], 0
        keys.append(key)
        held += size
    yield keys


def _copy_pipeline(source: Path, folder: Path, part: str) -> None:
    """Copy the parts of a pipeline that are needed to make images, without the weights of `part`."""
    index = read_json(source / "model_index.json")
    for name, _ in parts(source, index):
        if name == part:
            (folder / name).mkdir()
            shutil.copyfile(source / name / "config.json", folder / name / "config.json")
        else:
            copy_part(source / name, folder / name)
    without = {name: [None, None] for name in UNUSED if name in index}
    if "safety_checker" in index:
        without["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index | without)
    forget_origin(folder)


def _set_steps(source: Path, folder: Path, record: Student | None) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise WadiError(f"{file}: is missing; name a whole pipeline as the teacher")
    config = read_json(file)
    index = read_json(folder / "model_index.json")
    # an old file may not name its class
    own = (None, ONE_STEP) if record is None else (record.alpha_T_squared, record.steps)
    even = gives_sigmas(getattr(diffusers, index["_class_name"]))
    scheduler = student_scheduler({"_class_name": index["scheduler"][1], **config}, *own, even)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_json(folder / "model_index.json", index)
