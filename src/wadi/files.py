"""Write files completely or not at all, and weights only as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from wadi.errors import WadiError


@contextmanager
def explain_os_errors(path: str | os.PathLike, doing: str) -> Iterator[None]:
    """Turn an ``OSError`` (full disk, no permission, no such folder) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise WadiError(f"{path}: could not {doing}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise WadiError(f"{path}: could not {doing}: {error}") from error


def cache_folder(name: str) -> Path:
    """Folder `name` in `WADI_CACHE`, or in `wadi` in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("WADI_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wadi"
    return base / name


@contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it onto `path` when the block succeeds."""
    path = Path(path)
    with explain_os_errors(path, "write the file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 `text`, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; paths are written as text."""
    write_text(path, json.dumps(value, indent=2, default=os.fspath) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        WadiError: the file is missing, unreadable, or not JSON.
    """
    with explain_os_errors(path, "read the file"):
        content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:  # not JSON, or not text
        raise WadiError(f"{path}: not valid JSON ({error}); write it again or name another file") from error


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as temporary:
        temporary.touch()  # with the mode that the umask gives; safetensors would make it 0600
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(contiguous, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)


def load_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file, on the CPU.

    Raises:
        WadiError: the file is missing or is not safetensors.
    """
    with explain_os_errors(path, "read the safetensors file"):
        return safetensors.torch.load_file(path)
