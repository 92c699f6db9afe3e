"""Hashes of models and inputs. They depend on the content of the files, and not on where the files are.

Entries of JSON files about library versions and paths do not count (`_UNIMPORTANT`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from wadi.errors import WadiError
from wadi.files import explain_os_errors, read_json
from wadi.images import image_files
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER, adapter_folder
from wadi.onestep.loading import pipeline_folder
from wadi.onestep.student import STUDENT_FILE
from wadi.onestep.supported import UNUSED

_COUNTED = (".json", ".safetensors", ".txt", ".model")
"""Suffixes of the files of a pipeline: configurations, weights, vocabularies."""
_UNIMPORTANT = (
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "base_model_name_or_path",
    "peft_version",
)


def model_digest(name_or_path: str | os.PathLike) -> str:
    """SHA-256 of what decides a pipeline's images: its class, the files of its parts, and `student.json`.

    Args:
        name_or_path: folder, or hub id, which is downloaded if necessary.

    Raises:
        WadiError: there is no such pipeline, or a file cannot be read.
    """
    folder = pipeline_folder(name_or_path)
    index = read_json(folder / "model_index.json")
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    files = [
        file
        for part in sorted(parts)
        if part not in UNUSED
        for file in (folder / part).rglob("*")
        if file.suffix in _COUNTED and not file.name.startswith(".")
    ]
    return _digest(folder, [*files, folder / STUDENT_FILE], str(index.get("_class_name")))


def adapter_digest(name_or_path: str | os.PathLike) -> str:
    """SHA-256 of an adapter: its weights and configuration, `student.json`, and its text encoder's adapter.

    Args:
        name_or_path: folder, or hub id, which is downloaded if necessary.

    Raises:
        WadiError: there is no such adapter, or a file cannot be read.
    """
    folder = adapter_folder(name_or_path)
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STUDENT_FILE)
    return _digest(folder, [part / name for part in (folder, folder / TEXT_ENCODER_FOLDER) for name in names])


def files_digest(path: str | os.PathLike, below: bool = False) -> str:
    """SHA-256 of one file, or of the names and contents of the images in a folder.

    Args:
        path: file or folder.
        below: whether images in sub-folders count too.

    Raises:
        WadiError: a file cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return _digest(path, [path])
    return _digest(path, image_files(path, below))


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 of a list of texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def refuse_other_inputs(
    run: str | os.PathLike,
    started: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    options: Mapping[str, str],
) -> None:
    """Raise if a resumed run gets other inputs than it was started with.

    Args:
        run: folder of the run, for the message.
        started: the record of the run, with the digests of its inputs.
        inputs: the digests of the inputs that it gets now.
        options: by key of `inputs`, the option that names the input.

    Raises:
        WadiError: a digest differs; the message names the option.
    """
    if not isinstance(started, Mapping):
        raise WadiError(f"{run}: its record of the inputs is damaged; start a new run")
    for name, digest in inputs.items():
        if started.get(name) != digest:
            raise WadiError(
                f"--{options[name]}: its content is not what {run} was started with; name the run's own, or "
                "start a new run"
            )


def _digest(root: Path, files: Iterable[Path], first: str = "") -> str:
    """SHA-256 of `first`, and of the names and contents of those of `files` that exist, in order of names."""
    digest = hashlib.sha256(first.encode())
    for file in sorted(file for file in files if file.is_file()):
        name = file.relative_to(root).as_posix()
        content = _file_digest(file)
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with explain_os_errors(file, "read the file"):
        if file.suffix == ".json":
            return hashlib.sha256(_important(file.read_bytes())).hexdigest()
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _important(content: bytes) -> bytes:
    try:
        value: Any = json.loads(content)
    except ValueError:
        return content
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _UNIMPORTANT}
    return json.dumps(value, sort_keys=True).encode()
