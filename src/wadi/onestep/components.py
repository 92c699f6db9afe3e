"""Find the weight files of a pipeline's networks, and load a network with a check of every weight."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors, read_json
from wadi.torch_files import UNSAFE, unsafe_message

Module = TypeVar("Module", bound=torch.nn.Module)
Dtype = torch.dtype | Literal["auto"]
"""What weights are loaded in; "auto" is the dtype of their files."""
_WIDTHS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""First part of the names of weight files, by the library of the network's class."""

PREFERRED_VARIANTS = ("fp32", "fp16", "bf16")
"""Order in which variants are tried if there are no plain files."""

HARMLESS = re.compile(
    r"(^|\.)position_ids$"  # a buffer that older libraries saved
    r"|^caption_projection\.y_embedding$"  # of PixArt until diffusers 0.24, used by no forward
)
"""Keys that a file may have although its network does not."""

OTHER_HALF = re.compile(
    r"^(vision_model|visual_projection|text_projection|logit_scale|decoder|lm_head)(\.|$)"
)
"""The same for a text encoder: keys of the other parts of a whole CLIP or T5."""

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention layers of autoencoders until diffusers 0.17 -> their names today."""

_LEGACY_CLASSES = {"Transformer2DModel"}  # diffusers knows what they are called now
_CLIP_PREFIX = "text_model."


class Entry(NamedTuple):
    """The place of a tensor in a file, with its shape and dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles(NamedTuple):
    """The safetensors files of a network.

    Attributes:
        files: one, or several shards.
        index: says which shard holds which weight; ``None`` for a single file.
        variant: such as "fp16"; ``None`` for plain names.
        entries: what the files hold, by key.
    """

    files: tuple[Path, ...]
    index: Path | None
    variant: str | None
    entries: dict[str, Entry]


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """List the tensors of safetensors files by key, without reading them.

    Raises:
        WadiError: a file is missing, empty, incomplete or not safetensors, or no file holds a tensor.
    """
    entries, files = {}, list(files)
    for file in files:
        if file.suffix.lower() in UNSAFE:
            raise WadiError(unsafe_message(file))
        with explain_os_errors(file, "read the safetensors file"), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no dictionary
                part = opened.get_slice(key)
                entries[key] = Entry(file, key, tuple(part.get_shape()), part.get_dtype())
    if not entries:
        raise WadiError(f"{files[0]}: holds no tensors; fetch it again or name another file")
    return entries


def read_tensor(entry: Entry) -> torch.Tensor:
    """Read the tensor of an entry, unchanged, to the CPU."""
    with explain_os_errors(entry.file, "read the safetensors file"), safe_open(entry.file, "pt") as opened:
        return opened.get_tensor(entry.key)


def find_weights(folder: Path, library: str = "diffusers") -> WeightFiles | None:
    """Find the weight files in the folder of a network: plain ones, or else those of a variant such as fp16.

    Args:
        folder: the folder of one network, such as `unet/` of a pipeline.
        library: "diffusers" or "transformers", which use different file names.

    Returns:
        The files, or ``None`` if there are no safetensors files with these names.

    Raises:
        WadiError: a file cannot be read, a shard is missing, or shards lack what their index names.
    """
    stem = STEMS[library]
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    pattern = re.compile(rf"{re.escape(stem)}\.(?:safetensors\.index\.)?([^.]+)\.(?:safetensors|json)")
    found = {match[1] for name in names if (match := pattern.fullmatch(name))} - {"index", "safetensors"}
    usual = [variant for variant in PREFERRED_VARIANTS if variant in found]
    for variant in (None, *usual, *sorted(found - set(usual))):
        infix = "" if variant is None else f".{variant}"
        single, index = f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"
        if index in names and (library == "diffusers" or single not in names):  # as the library itself
            return _sharded(folder / index, variant)
        if single in names:
            files = (folder / single,)
            return WeightFiles(files, None, variant, read_headers(files))
    return None


def _sharded(index: Path, variant: str | None) -> WeightFiles:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WadiError(f"{index}: has no weight_map of keys to files; fetch the folder again")
    files = tuple(index.parent / name for name in sorted(set(places.values())))
    if absent := [file.name for file in files if not file.is_file()]:
        raise WadiError(
            f"{index}: names {len(files)} files, of which {len(absent)} are missing, such as {absent[0]}; "
            "fetch the folder again"
        )
    entries = read_headers(files)
    if missing := places.keys() - entries.keys():
        raise WadiError(f"{index}: names {min(missing)}, which its file does not hold; fetch it again")
    return WeightFiles(files, index, variant, entries)


def load_module(kind: type[Module], folder: str | os.PathLike, torch_dtype: Dtype) -> Module:
    """Load one network of diffusers or transformers from safetensors, and check that every weight is there.

    The libraries initialise missing weights at random and skip unknown ones. Here both are errors, except for
    `HARMLESS` keys.

    Args:
        kind: the class of the network.
        folder: holds config.json and the weights, with plain names or those of a variant such as fp16.
        torch_dtype: dtype of the loaded weights; "auto" for that of the files.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        WadiError: the folder or a file is missing, or a weight is missing, unknown, of another shape or not
            finite.
    """
    folder = Path(folder)
    library = kind.__module__.partition(".")[0]
    _check_config(kind, folder)
    weights = find_weights(folder, library)
    if weights is None:
        raise WadiError(_without_weights(kind, folder, library))
    if weights.variant not in (None, *PREFERRED_VARIANTS):
        tell(f"{folder}: has no plain weights; wadi loads the variant {weights.variant!r}")
    if torch_dtype == "auto":
        torch_dtype = widest_dtype(weights)
    try:
        with quiet():
            module, info = kind.from_pretrained(
                folder,
                torch_dtype=torch_dtype,
                variant=weights.variant,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a broken folder fails in many ways
        if reshaped := _reshaped(kind, folder, weights):
            raise WadiError(
                f"{folder}: weights of another shape than its config.json says: {len(reshaped)}, such as "
                f"{reshaped[0]}; fetch the folder again or name another"
            ) from error
        raise WadiError(f"{folder}: could not load the {kind.__name__}: {first_line(error)}") from error
    _check_complete(info, weights, folder, library)
    _check_finite(module, folder)
    return module.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the libraries' warning about `torch_dtype`, the only name that all their versions know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        yield


def first_line(error: Exception) -> str:
    """First line of an error's message, or the name of its class if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def widest_dtype(weights: WeightFiles) -> torch.dtype:
    """The widest floating dtype in files; float32 if they hold none of 16 or 32 bits."""
    held = {entry.dtype for entry in weights.entries.values()}
    return next((dtype for name, dtype in _WIDTHS.items() if name in held), torch.float32)


def _check_config(kind: type[torch.nn.Module], folder: Path) -> None:
    if not folder.is_dir():
        raise WadiError(f"{folder}: there is no such folder; name the folder of a {kind.__name__}")
    if not (folder / "config.json").is_file():
        raise WadiError(
            f"{folder}: holds no config.json, and so no {kind.__name__}; fetch the folder again or name "
            "another"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise WadiError(f"{folder / 'config.json'}: is not a configuration; fetch the file again")
    own = config.get("_class_name", kind.__name__)
    if own != kind.__name__ and own not in _LEGACY_CLASSES:
        raise WadiError(f"{folder}: holds a {own}, but a {kind.__name__} is needed; name another folder")


def _without_weights(kind: type[torch.nn.Module], folder: Path, library: str) -> str:
    names, wanted = sorted(path.name for path in folder.iterdir()), f"{STEMS[library]}.safetensors"
    if unsafe := [name for name in names if name.endswith(UNSAFE)]:
        whole = folder.parent if (folder.parent / "model_index.json").is_file() else folder
        return unsafe_message(folder / unsafe[0], whole)
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"{folder}: holds {others[0]}, but no {wanted}; give the file this name or name another folder"
    return f"{folder}: holds no weights, {wanted} is missing; fetch the folder again"


def empty_module(kind: type[torch.nn.Module], folder: Path) -> torch.nn.Module:
    """The network that the config.json of a folder describes, on the meta device.

    Raises:
        Exception: whatever the library raises for a configuration that it cannot read.
    """
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            return kind.from_config(read_json(folder / "config.json"))
        return kind(kind.config_class.from_pretrained(folder))


def _reshaped(kind: type[torch.nn.Module], folder: Path, weights: WeightFiles) -> list[str]:
    """Keys of tensors whose shape differs from that in the network that config.json describes."""
    try:
        module = empty_module(kind, folder)
    except Exception:  # the configuration is wrong, and the library's own error says so
        return []
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return sorted(
        key
        for key, entry in weights.entries.items()
        if (name := name_in_module(key, shapes)) is not None and shapes[name] != entry.shape
    )


def _check_complete(info: dict[str, Any], weights: WeightFiles, folder: Path, library: str) -> None:
    where = weights.files[0] if len(weights.files) == 1 else folder
    unexpected = [
        key
        for key in info["unexpected_keys"]
        if not HARMLESS.search(key) and not (library == "transformers" and OTHER_HALF.search(key))
    ]
    groups = {
        "missing": sorted(info["missing_keys"]),
        "that its config.json does not describe": sorted(unexpected),
    }
    wrong = [f"weights {what}: {len(keys)}, such as {keys[0]}" for what, keys in groups.items() if keys]
    if wrong:
        raise WadiError(f"{where}: {'; '.join(wrong)}; fetch the folder again or name another")


def _check_finite(module: torch.nn.Module, folder: Path) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
            continue
        if is_traceable_wrapper_subclass(tensor):  # quantized by torchao
            tensor = tensor.dequantize()
        # this reads once and allocates nothing; NaN becomes a bound
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise WadiError(
                f"{folder}: its weights are not all finite in {tensor.dtype}, such as {name}; fetch the "
                "folder again, or choose another dtype"
            )


def name_in_module(key: str, names: Iterable[str]) -> str | None:
    """The network's name for the weight `key` of a file, or ``None`` if the network has no such weight.

    Names differ in the prefix of CLIP, which transformers 5 dropped, and in old autoencoders.
    """
    renamed = re.sub(rf"\.({'|'.join(OLD_NAMES)})\.", lambda match: f".{OLD_NAMES[match[1]]}.", key)
    for name in (key, key.removeprefix(_CLIP_PREFIX), f"{_CLIP_PREFIX}{key}", renamed):
        if name in names:
            return name
    return None
