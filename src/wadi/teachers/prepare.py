"""From what a user names as a teacher to a pipeline folder: a single file is converted, a LoRA is fused.

    prepare_teacher("model.safetensors", config="sdxl-folder", lora="style.safetensors")

The folder is kept in wadi's cache under a hash of the contents of all files, so this is done once. Parts that
are taken unchanged are links to the folder that the user named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from wadi.errors import WadiError, tell
from wadi.files import cache_folder, explain_os_errors, read_json, write_json
from wadi.identity import files_digest, model_digest
from wadi.onestep.arguments import finite_number
from wadi.onestep.components import first_line
from wadi.onestep.loading import check_hub_id, pipeline_folder
from wadi.onestep.saving import forget_origin
from wadi.onestep.student import STUDENT_FILE, TEACHER_FILE, FusedLoRA
from wadi.onestep.supported import UNUSED
from wadi.teachers.kinds import read_lora_header, read_model_header
from wadi.teachers.lora import fused_parts
from wadi.teachers.original import parts_in, usual_model, write_part

FORMAT = 2
"""Format number of the folders in the cache."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA that diffusers' scripts save in a folder."""
_DESCRIPTIONS = ("*.json", "*.txt", "*.model")


def prepare_teacher(
    name: str | os.PathLike,
    config: str | os.PathLike | None = None,
    lora: str | os.PathLike | None = None,
    lora_scale: float = 1.0,
) -> str:
    """Return the pipeline folder or hub id of a teacher, which is made first if a file or a LoRA is named.

    Args:
        name: pipeline folder, hub id, or a .safetensors file that holds a model.
        config: for a single file: a diffusers folder or hub id of the same kind of model. Its configurations
            and tokenizers are used, and its networks if the file lacks them. If ``None``, the configurations
            come from the hub, from the model that diffusers knows for this kind.
        lora: LoRA file to fuse, with the names of diffusers or of kohya's scripts.
        lora_scale: what the LoRA's change is multiplied by.

    Returns:
        `name` itself if there is nothing to do; otherwise a folder in the cache.

    Raises:
        WadiError: a file is missing, damaged, of another kind, or does not fit.
    """
    lora_scale = finite_number("--teacher-lora-scale", lora_scale)
    if lora is None and lora_scale != 1:
        raise WadiError("--teacher-lora-scale: is for a LoRA; name one with --teacher-lora, or omit it")
    file = Path(name)
    if not file.is_file():
        if config is not None:
            raise WadiError(
                f"--teacher-config {config}: is for a single file, and {name} is not one; omit it"
            )
        if lora is None:
            return os.fspath(name)
        source = pipeline_folder(name)
        if (source / STUDENT_FILE).is_file():
            raise WadiError(
                f"--teacher-lora {lora}: is fused into a teacher, but {name} is a student already; "
                "name the multi-step model, or omit the LoRA"
            )
    else:
        source = _configurations(file, config)
    lora = None if lora is None else _lora_file(lora)
    if lora is not None:
        read_lora_header(lora)
    facts = {
        "format": FORMAT,
        "source": model_digest(source),
        "file": files_digest(file) if file.is_file() else None,
        "lora": None if lora is None else files_digest(lora),
        "lora_scale": lora_scale,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder("teachers") / key
    if not _complete(folder):
        tell(f"{name}: is converted once to the diffusers folder {folder}")
        _make(folder, file if file.is_file() else None, source, lora, facts)
    return str(folder)


def teacher_digests(
    folder: str | os.PathLike,
    name: str | os.PathLike,
    config: str | os.PathLike | None = None,
    lora: str | os.PathLike | None = None,
) -> dict[str, str | None]:
    """Digests of what the options of a teacher name, by their names in `wadi distill`.

    Args:
        folder: what `prepare_teacher` made of these options; it holds the digests of a file and of a LoRA,
            which are not computed again.
        name: as in `prepare_teacher`, and so are the others.
        config: see there.
        lora: see there.

    Raises:
        WadiError: a folder is missing or cannot be read.
    """
    if config is None and lora is None and not Path(name).is_file():
        found = {"source": model_digest(name), "file": None, "lora": None}
    else:
        found = read_json(Path(folder) / TEACHER_FILE)["digests"]
    return {
        "pretrained_model_name_or_path": found["file"] or found["source"],
        "teacher_config": None if config is None else found["source"],
        "teacher_lora": found["lora"],
    }


def _lora_file(lora: str | os.PathLike) -> Path:
    path = Path(lora)
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    if path.is_dir():
        raise WadiError(
            f"--teacher-lora {lora}: holds no {LORA_FILE}; name the file of the LoRA, or convert one of "
            "another format with wadi convert"
        )
    if not path.is_file():
        raise WadiError(f"--teacher-lora {lora}: there is no such file; name the .safetensors file of a LoRA")
    return path


def _configurations(file: Path, config: str | os.PathLike | None) -> Path:
    """The diffusers folder whose configurations belong to a single file."""
    entries = read_model_header(file)
    if config is None:
        return _from_hub(file, usual_model(entries))
    if Path(config).is_file():
        raise WadiError(f"--teacher-config {config}: is a file; name a diffusers folder or a hub id")
    return pipeline_folder(config)


def _from_hub(file: Path, hub_id: str) -> Path:
    """Fetch the configurations and tokenizers of a model on the hub, without weights."""
    from huggingface_hub import snapshot_download

    check_hub_id(hub_id)
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_DESCRIPTIONS)))
        return pipeline_folder(folder)
    except WadiError:
        raise
    except Exception as error:  # every kind of failure of the hub
        raise WadiError(
            f"{file}: is a single file, which holds no configurations and no tokenizers, and those of "
            f"{hub_id} could not be fetched from the hub ({first_line(error)[:200]}); name a diffusers "
            "folder of the same kind of model with --teacher-config"
        ) from error


def _complete(folder: Path) -> bool:
    """Whether a folder of the cache is there, with every part that its links point to."""
    if not (folder / TEACHER_FILE).is_file():
        return False
    index = read_json(folder / "model_index.json")
    return all((folder / part).is_dir() for part, value in index.items() if _listed(part, value))


def _listed(part: str, value: object) -> bool:
    return isinstance(value, list) and value[0] is not None and part not in UNUSED


def _make(folder: Path, file: Path | None, source: Path, lora: Path | None, facts: dict[str, Any]) -> None:
    """Write a folder of the cache beside its place, and then rename it."""
    fused = None if lora is None else FusedLoRA(facts["lora"], facts["lora_scale"])
    with explain_os_errors(folder, "write the folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        with explain_os_errors(folder, "write the folder"):
            _fill(temporary, file, source)
            if lora is not None and fused is not None:
                # a folder that the user named is read there, so that messages name it
                _fuse(temporary, source if file is None else temporary, lora, fused.scale)
            told = None if fused is None else fused.as_json()
            write_json(temporary / TEACHER_FILE, {"lora": told, "digests": facts})
            if folder.exists() and not _complete(folder):
                shutil.rmtree(folder)  # its links point to a folder that was moved
            try:
                temporary.rename(folder)
            except OSError:  # another command has made the same folder meanwhile
                if not _complete(folder):
                    raise
        if not _complete(folder):
            raise WadiError(f"{folder}: could not be written completely; remove it and try again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, file: Path | None, source: Path) -> None:
    """The parts of a pipeline: those in the file are converted, the others are links to `source`."""
    found = {} if file is None else parts_in(file, source)
    index = read_json(source / "model_index.json")
    index = {part: [None, None] if part in UNUSED else value for part, value in index.items()}
    for part, value in index.items():
        if part in found:
            (folder / part).mkdir()
            shutil.copyfile(source / part / "config.json", folder / part / "config.json")
            write_part(part, found[part], file, source, folder / part)
        elif _listed(part, value):
            _link(source / part, folder / part)
    write_json(folder / "model_index.json", index)


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.absolute(), target_is_directory=True)
    except OSError:  # a file system or an account without links
        shutil.copytree(source, target)


def _fuse(folder: Path, read: Path, lora: Path, scale: float) -> None:
    """Replace the networks that a LoRA changes, in float32; they are read from the pipeline folder `read`."""
    for part, module in fused_parts(read, lora, scale).items():
        if (folder / part).is_symlink():
            (folder / part).unlink()
        else:
            shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, safe_serialization=True)
        forget_origin(folder / part)
