"""The differences between a student and its teacher, layer by layer, without a second model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from wadi.errors import WadiError
from wadi.onestep.components import find_weights, name_in_module, read_tensor
from wadi.onestep.formats.names import adapter_name

PARTS = ("unet", "transformer", "text_encoder")
"""The parts of a pipeline that adapters change."""


class Change(NamedTuple):
    """The change of one tensor.

    Attributes:
        part: of the pipeline.
        layer: name of the layer in the part.
        parameter: "weight" or "bias".
        difference: the student's minus the teacher's, float32, of the tensor's shape.
        dtype: that the tensor has in the teacher's files.
    """

    part: str
    layer: str
    parameter: str
    difference: torch.Tensor
    dtype: torch.dtype


def changes(pipeline: DiffusionPipeline) -> Iterator[Change]:
    """Compare the networks of a pipeline with the files that it was loaded from, and yield what differs.

    Args:
        pipeline: loaded in float32 from a folder, with adapters merged.

    Raises:
        WadiError: a tensor changed that is neither a weight nor a bias of a layer.
    """
    for part in PARTS:
        module = getattr(pipeline, part, None)
        if module is None:
            continue
        source = Path(pipeline.name_or_path) / part
        found = find_weights(source, type(module).__module__.partition(".")[0])
        state = module.state_dict()
        for key, entry in (found.entries if found is not None else {}).items():
            if (name := name_in_module(key, state)) is None:
                continue
            before = read_tensor(entry)
            difference = state[name].detach() - before.to(state[name])
            if not difference.any():
                continue
            layer, _, parameter = name.rpartition(".")
            if parameter not in ("weight", "bias"):
                raise WadiError(
                    f"{source}: the adapter changes {name}, for which files of differences have no name; "
                    "choose --format diffusers"
                )
            yield Change(part, layer, parameter, difference, before.dtype)


def difference_tensors(pipeline: DiffusionPipeline, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All changes by the names of LyCORIS: ``<layer>.diff`` of weights and ``<layer>.diff_b`` of biases.

    Args:
        pipeline: see `changes`.
        dtype: of the tensors; ``None`` for that of the teacher's files.

    Raises:
        WadiError: as `changes`, or nothing changed.
    """
    ends = {"weight": "diff", "bias": "diff_b"}
    tensors = {
        f"{adapter_name(pipeline, one.part, one.layer)}.{ends[one.parameter]}": one.difference.to(
            dtype or one.dtype
        )
        for one in changes(pipeline)
    }
    if not tensors:
        raise WadiError("--format lycoris-diff: the adapter changes no weight; name a student's adapter")
    return tensors
