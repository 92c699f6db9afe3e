"""Write the weights of `torch.save` files as safetensors, without unpickling them."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from wadi.errors import WadiError, tell
from wadi.files import read_json, save_tensors, write_json
from wadi.outputs import Output
from wadi.torch_files import TORCH_SUFFIXES, read_torch_file

_NO_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states)")
"""Beginnings of the names of files that belong to a training, not to a network."""
_INDEX = re.compile(r"\.bin(\.index(\.[^.]+)?\.json)$")
"""The end of the name of an index, which says which shard holds which weight."""


@dataclass
class Converted:
    """What a conversion wrote.

    Attributes:
        files: the written safetensors files, by name below the folder.
        tensors: number of tensors in them.
    """

    files: list[str] = field(default_factory=list)
    tensors: int = 0


def convert_weights(source: str | os.PathLike, out: str | os.PathLike, overwrite: bool = False) -> Converted:
    """Write a folder, or a file, with safetensors in place of files that can run code when they are read.

    In a folder, ``*.bin``, ``*.ckpt``, ``*.pt`` and ``*.pth`` files are converted, also shards and their
    index. They get the names that diffusers, transformers and PEFT look for. A file whose safetensors file is
    there already is omitted, and so are files of a training, such as ``optimizer.bin``. Others are copied.

    Args:
        source: a folder, such as that of a pipeline or of one network; or one file.
        out: the folder to write, new or empty; or a .safetensors file.
        overwrite: replace the folder if the same function wrote it and nothing else is in it, or the file.

    Raises:
        WadiError: there is nothing to convert, a file cannot be read (see `read_torch_file`), or the output
            may not or cannot be written.
    """
    source = Path(source)
    if not source.exists():
        raise WadiError(f"{source}: there is no such folder or file; name one on this machine")
    suffixes = () if source.is_dir() else (".safetensors",)
    output, made = Output(out, "convert", (source,), overwrite, suffixes), Converted()
    output.check()
    if source.is_dir():
        found = [name for _, _, names in os.walk(source, followlinks=True) for name in names]
        if not any(map(_is_pickle, found)):
            raise WadiError(
                f"{source}: holds no {', '.join(TORCH_SUFFIXES)} file; nothing is to be converted"
            )
        with output.writing() as folder:
            copy = functools.partial(_copy, source=source, made=made)
            shutil.copytree(source, folder, copy_function=copy, dirs_exist_ok=True)
    else:
        with output.writing() as file:
            made.tensors = _write(source, file)
            made.files.append(Path(out).name)
    return made


def _copy(name: str, target: str, source: Path, made: Converted) -> str:
    """Convert or copy one file of a folder."""
    file, place = Path(name), Path(target)
    if not _is_pickle(file.name) and not _INDEX.search(file.name):
        return shutil.copy2(file, place)
    if _NO_WEIGHTS.match(file.name):
        tell(f"{file}: belongs to a training, not to a network; it is omitted")
        return target
    new = _new_name(file.name)
    if file.with_name(new).exists():
        tell(f"{file}: is omitted, because {new} is beside it")
    elif _INDEX.search(file.name):
        _write_index(file, place.with_name(new))
    elif place.with_name(new).exists():
        raise WadiError(
            f"{file}: there are two files of this name with other suffixes; move one of them away"
        )
    else:
        made.tensors += _write(file, place.with_name(new))
        made.files.append(file.with_name(new).relative_to(source).as_posix())
    return target


def _is_pickle(name: str) -> bool:
    return Path(name).suffix.lower() in TORCH_SUFFIXES


def _new_name(name: str) -> str:
    """The name of a file as safetensors: transformers calls weights `model` there, not `pytorch_model`."""
    new = _INDEX.sub(r".safetensors\1", name)
    new = new if new != name else f"{Path(name).stem}.safetensors"
    return re.sub(r"^pytorch_model(?=[.-])", "model", new)


def _write(file: Path, target: Path) -> int:
    """Write the tensors of a file; returns their number."""
    entries, beside = read_torch_file(file)
    tensors, places = {}, set()
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor):
            beside.append(name)
            continue
        place = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share their numbers
        shared = place in places
        tensors[name] = value.clone(memory_format=torch.contiguous_format) if shared else value
        places.add(place)
    if beside:
        more = f" and {len(beside) - 3} more" if len(beside) > 3 else ""
        tell(f"{file}: only weights are written; omitted: {', '.join(beside[:3])}{more}")
    save_tensors(target, tensors, {"format": "pt"})
    return len(tensors)


def _write_index(file: Path, target: Path) -> None:
    index = read_json(file)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise WadiError(f"{file}: has no weight_map of keys to files; fetch the folder again")
    places = {key: _new_name(str(shard)) for key, shard in index["weight_map"].items()}
    write_json(target, {**index, "weight_map": places})
