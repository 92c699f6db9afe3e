"""Load pipelines and their parts from a folder or from the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    ZImagePipeline,
)
from transformers import PreTrainedTokenizerBase

from wadi.errors import WadiError, tell
from wadi.files import read_json
from wadi.onestep.components import Dtype, find_weights, first_line, load_module, widest_dtype
from wadi.onestep.student import STUDENT_FILE
from wadi.onestep.supported import UNUSED, check_parts, networks
from wadi.torch_files import TORCH_SUFFIXES, UNSAFE, unsafe_message

PART_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
"""Files to fetch from the hub for a single network."""

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""Names of tokenizers in pipelines. Each belongs to the text encoder of the same number."""


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    torch_dtype: Dtype | dict[str, Dtype] | None = None,
    without: Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a diffusers pipeline from a folder or the hub, from safetensors, and check every weight.

    Files of a variant such as fp16 are taken if there are no plain ones. A safety checker and its parts are
    not loaded. Tokenizers are limited to the number of positions of their text encoder.

    Args:
        pretrained_model_name_or_path: folder, hub id, or a run folder of `wadi distill` (for its pipeline).
        torch_dtype: dtype of all modules, "auto" for that of each module's files, or a dict of dtypes by
            module name and "default"; float32 when ``None``.
        without: modules that are not loaded; unknown names are ignored.

    Raises:
        WadiError: there is no such folder or hub id, wadi cannot use the model (see `check_parts`), or a file
            or a weight is missing, unreadable or does not fit (see `load_module`).
    """
    folder = pipeline_folder(pretrained_model_name_or_path)
    index = read_json(folder / "model_index.json")
    dtypes = torch_dtype if isinstance(torch_dtype, dict) else {"default": torch_dtype or torch.float32}
    passed: dict[str, Any] = {part: None for part in (*UNUSED, *without) if part in index}
    if "safety_checker" in index:
        passed["requires_safety_checker"] = False
    _check_tokenizers(folder, index)
    for part, kind in networks(folder, index).items():
        if part not in passed:
            passed[part] = load_module(kind, folder / part, dtypes.get(part, dtypes["default"]))
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, **passed)
    except Exception as error:  # a broken folder fails in many ways
        raise WadiError(f"{folder}: could not load the pipeline: {first_line(error)}") from error
    for name in TOKENIZERS:
        encoder = folder / name.replace("tokenizer", "text_encoder")
        _bound_tokenizer(getattr(pipeline, name, None), encoder)
    if hasattr(pipeline, "tokenizer_max_length"):  # Stable Diffusion 3 keeps a copy
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length
    return pipeline


def load_denoiser(pretrained_model_name_or_path: str | os.PathLike) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Load only the U-Net or transformer of a diffusers pipeline, in float32, from safetensors only.

    Args:
        pretrained_model_name_or_path: folder, hub id, or a run folder of `wadi distill` (for its pipeline).

    Returns:
        The network on the CPU, and the configuration of the pipeline's scheduler.

    Raises:
        WadiError: as `load_pipeline`.
    """
    folder = pipeline_folder(pretrained_model_name_or_path)
    index = read_json(folder / "model_index.json")
    part = "unet" if "unet" in index else "transformer"
    kind = networks(folder, index).get(part)
    if kind is None:
        raise WadiError(f"{folder}: has neither a U-Net nor a transformer of diffusers; name another model")
    try:
        name = index["scheduler"][1]
        scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    except Exception as error:  # a broken folder fails in many ways
        raise WadiError(f"{folder}: could not load the scheduler: {first_line(error)}") from error
    return load_module(kind, folder / part, torch.float32), {**scheduler.config, "_class_name": name}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the U-Net or transformer in the files of a pipeline folder; float32 if it has none."""
    found = (find_weights(folder / part) for part in ("unet", "transformer"))
    return next((widest_dtype(weights) for weights in found if weights is not None), torch.float32)


def pipeline_folder(name_or_path: str | os.PathLike) -> Path:
    """Folder of a pipeline: `name_or_path` itself, a run's `pipeline/`, or the download of a hub id.

    Raises:
        WadiError: there is no such folder or hub id, it is not a pipeline folder (the message says what it is
            and what to do), or wadi cannot use the pipeline (see `check_parts`).
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_file():
        raise WadiError(_of_one_file(path))
    folder = path if path.is_dir() else _download(name)
    if not (folder / "model_index.json").exists():
        folder = run_part(folder, "pipeline", "model_index.json")
    if not (folder / "model_index.json").exists():
        raise WadiError(_no_pipeline(folder))
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise WadiError(f"{folder / 'model_index.json'}: does not describe a pipeline; fetch the file again")
    check_parts(folder, index)
    return folder


def run_part(folder: Path, part: str, file: str) -> Path:
    """The `pipeline` or the `adapter` of a run, if `folder` is the folder of a run; otherwise `folder`.

    Args:
        folder: the folder that the user named.
        part: the sub-folder of a run.
        file: a file that this sub-folder has when it is complete.
    """
    if (folder / file).exists() or not (folder / part / file).is_file():
        return folder
    tell(f"{folder}: is the folder of a run; its {part} is used ({folder / part})")
    return folder / part


def pipeline_class_name(folder: Path) -> str:
    """Class name of the pipeline in a folder, from its model_index.json."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def call_default(kind: type[DiffusionPipeline], argument: str) -> Any:
    """The default of an argument of a pipeline's call; ``None`` if the call has no such argument."""
    found = inspect.signature(kind.__call__).parameters.get(argument)
    return None if found is None else found.default


def _around(pipeline: DiffusionPipeline) -> int:
    """Tokens that the pipeline writes around a prompt, which count against its limit."""
    tokenizer = pipeline.tokenizer
    if isinstance(pipeline, SanaPipeline):  # keeps two less than it says; one is the first token of the text
        return 2 - tokenizer.num_special_tokens_to_add()
    if isinstance(pipeline, QwenImagePipeline):
        template = tokenizer(pipeline.prompt_template_encode.format("")).input_ids
        return len(template) - pipeline.prompt_template_encode_start_idx
    if isinstance(pipeline, (Flux2KleinPipeline, ZImagePipeline)):
        thinking = isinstance(pipeline, ZImagePipeline)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return len(tokenizer(text).input_ids)
    return 0


def prompt_reader(pipeline: DiffusionPipeline) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer that decides whether a prompt is too long, and the largest number of its tokens.

    If a pipeline has a length of its own (`max_sequence_length`), its last text encoder reads the whole
    prompt: the T5 of Stable Diffusion 3 reads 256 tokens, its CLIPs only the first 77, and diffusers prints
    what they cut. Otherwise all text encoders read the same tokens, and the smallest limit decides (SDXL).
    What the pipeline writes around a prompt counts too.
    """
    found = [t for name in TOKENIZERS if (t := getattr(pipeline, name, None)) is not None]
    own = call_default(type(pipeline), "max_sequence_length")
    if own is None:
        return found[0], min(tokenizer.model_max_length for tokenizer in found)
    return found[-1], min(found[-1].model_max_length, own) - _around(pipeline)


def stock_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Arguments that make a stock pipeline keep the size that a call asks for."""
    binned = call_default(type(pipeline), "use_resolution_binning") is not None
    return {"use_resolution_binning": False} if binned else {}


def guidance_arguments(pipeline: DiffusionPipeline, scale: float = 1.0) -> dict[str, Any]:
    """Arguments of a call that guide a stock pipeline by p_null + scale (p_prompt - p_null).

    Pipelines count differently: no guidance, which is a scale of 1, is 1 for most and 0 for Z-Image, and has
    another name in Qwen-Image. A network that takes the guidance as an input (FLUX.1 dev) is told the scale;
    1, which stands for a student's call, leaves it at the pipeline's own default, as in training.

    Args:
        pipeline: of a teacher or a student.
        scale: as `wadi distill --guidance-scale`.
    """
    network = getattr(pipeline, "transformer", None)
    if isinstance(pipeline, FluxPipeline) and network is not None and network.config.guidance_embeds:
        return {} if scale == 1 else {"guidance_scale": scale}
    if isinstance(pipeline, ZImagePipeline):
        return {"guidance_scale": scale - 1}
    if isinstance(pipeline, (FluxPipeline, QwenImagePipeline)):
        negative = " " if isinstance(pipeline, QwenImagePipeline) else ""
        return {"true_cfg_scale": scale} | ({} if scale == 1 else {"negative_prompt": negative})
    return {"guidance_scale": scale}


def load_vae(name: str, pipeline: DiffusionPipeline, torch_dtype: torch.dtype) -> torch.nn.Module:
    """Load another autoencoder for a pipeline, such as the `AutoencoderTiny` "madebyollin/taesd".

    Latents are scaled by its own scaling factor before it decodes them, as in diffusers' pipelines.

    Args:
        name: folder or hub id of an `AutoencoderTiny` or `AutoencoderKL`.
        pipeline: the pipeline whose latents it decodes.
        torch_dtype: dtype of its weights.

    Raises:
        WadiError: the autoencoder cannot be loaded, is of another class, or has latents of another shape; or
            this kind of pipeline takes no other one.
    """
    if isinstance(pipeline, (QwenImagePipeline, Flux2KleinPipeline)):
        raise WadiError(
            f"--vae {name}: a {type(pipeline).__name__} takes no autoencoder but its own; omit the option"
        )
    folder = part_folder(name, "autoencoder")
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in ("AutoencoderTiny", "AutoencoderKL"):
        raise WadiError(f"--vae {name}: its class is {kind}; use AutoencoderTiny or AutoencoderKL")
    vae = load_module(getattr(diffusers, kind), folder, torch_dtype)
    channels = vae.config.latent_channels
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    if isinstance(vae, AutoencoderTiny):
        pixels = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    for what, own, other in (
        ("latent channels", pipeline.vae.config.latent_channels, channels),
        ("pixels a latent", pipeline.vae_scale_factor, pixels),
    ):
        if own != other:
            raise WadiError(f"--vae {name}: has {other} {what}, but the model needs {own}; name another")
    return vae


def part_folder(name: str | os.PathLike, what: str, patterns: Sequence[str] = PART_FILES) -> Path:
    """Folder of a single network, such as a ControlNet: `name` itself, or the download of a hub id.

    Args:
        name: folder or hub id.
        what: the kind of network, for messages.
        patterns: patterns of the files that are fetched from the hub.

    Raises:
        WadiError: there is no such folder or hub id.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise WadiError(f"{path}: is one file; name the folder of the {what}, with config.json and weights")
    from huggingface_hub import snapshot_download

    name = os.fspath(name)
    check_hub_id(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # every kind of failure of the hub
        raise WadiError(_not_fetched(name, error)) from error


def check_hub_id(name: str) -> None:
    """Raise a WadiError unless `name` has the form of a hub id. Call it for a name that is not a folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise WadiError(
            f"{name}: no such folder, and not a hub id of the form owner/name; name one of the two"
        )


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    check_hub_id(name)
    unused = dict.fromkeys(UNUSED)
    try:
        try:
            folder = Path(DiffusionPipeline.download(name, use_safetensors=True, **unused))
        except (OSError, ValueError) as error:
            if "safetensors" not in str(error):
                raise
            folder = Path(DiffusionPipeline.download(name, use_safetensors=True, variant="fp16", **unused))
        with contextlib.suppress(EntryNotFoundError):  # a teacher has none
            hf_hub_download(name, STUDENT_FILE)
        return folder
    except Exception as error:  # every kind of failure of the hub
        raise WadiError(_not_fetched(name, error)) from error


def _not_fetched(name: str, error: Exception) -> str:
    if "safetensors" in str(error):
        return (
            f"{name}: has no safetensors weights on the hub; fetch it with hf download {name} --local-dir "
            "FOLDER, and convert it with wadi convert FOLDER --out NEW_FOLDER"
        )
    return (
        f"{name}: there is no such folder, and it could not be fetched from the hub: {first_line(error)} "
        "Without a network, name the folder of a model that is on this machine"
    )


def _of_one_file(path: Path) -> str:
    if path.suffix == ".safetensors":
        return (
            f"{path}: is one file, and a folder is needed here; wadi generate --model {path} converts such a "
            "file, and prints the folder"
        )
    return unsafe_message(path) if path.suffix.lower() in UNSAFE else f"{path}: is one file; name a folder"


def _no_pipeline(folder: Path) -> str:
    """The message about a folder without a model_index.json: what it is, and what to do."""
    said = f"{folder}: is not a diffusers pipeline folder"
    if not any(folder.iterdir()):
        return f"{said}, because it is empty; name one with a model_index.json"
    if (folder / "adapter_config.json").is_file():
        return f"{said}, but the folder of an adapter; name it as --adapter, and its pipeline as --model"
    if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        return (
            f"{said}, but a run that has no pipeline/ yet; resume it with "
            f"wadi distill --resume-from-checkpoint {folder}"
        )
    parent = folder.absolute().parent
    if (parent / "model_index.json").is_file():
        return f"{said}, but a part of one; name {parent}"
    if below := sorted(folder.glob("*/model_index.json")):
        return f"{said}, but it holds {len(below)} of them; name one, such as {below[0].parent}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *TORCH_SUFFIXES))
    if (folder / "config.json").is_file():
        return f"{said}, but the folder of one network; name one with a model_index.json"
    if files:
        return f"{said}. {_of_one_file(files[0])}"
    return f"{said}; name one with a model_index.json"


def _check_tokenizers(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a tokenizer without vocabulary (transformers would invent one) or without its packages."""
    for part in (name for name in TOKENIZERS if name in index):
        names = {path.name for path in (folder / part).iterdir()}
        whole = "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
        model = next((name for name in names if name.endswith((".model", ".spm"))), None)
        if not whole and model is None:
            raise WadiError(
                f"{folder / part}: holds no vocabulary (tokenizer.json, or vocab.json and merges.txt, or "
                "spiece.model); fetch the folder again"
            )
        needed = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if not whole and needed:
            raise WadiError(
                f"{folder / part / str(model)}: needs the packages sentencepiece and protobuf; "
                "pip install sentencepiece protobuf"
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _bound_tokenizer(tokenizer: Any, encoder: Path) -> None:
    """Limit the tokenizer to the positions of its text encoder, because its own files may have no limit."""
    file = encoder / "config.json"
    config = read_json(file) if tokenizer is not None and file.is_file() else {}
    if positions := config.get("max_position_embeddings"):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if (words := config.get("vocab_size")) and len(tokenizer) > words:
        raise WadiError(
            f"{encoder}: has embeddings of {words} tokens, but its tokenizer knows {len(tokenizer)}; the two "
            "are from different models, so fetch the folder again"
        )
