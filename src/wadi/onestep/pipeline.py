"""Any diffusers text-to-image pipeline, in one step."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, LCMScheduler, PixArtAlphaPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME_SAFE
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError

from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, replacing_folder, write_json
from wadi.onestep.fast import FastPath
from wadi.onestep.scheduler import Float32Step, one_step_scheduler

ONE_STEP_FILE = "one_step.json"
TEXT_ENCODER_FOLDER = "text_encoder"
"""Of an adapter folder: the adapter of the text encoder, where it has one."""
PIXART_TOKENS = 120
"""`max_sequence_length` of `PixArtAlphaPipeline`: what it pads and cuts to."""

Adapters = str | os.PathLike | Sequence[str | os.PathLike] | None
"""No adapter, one, or several: folders or hub ids."""


class OneStepPipeline:
    """A stock diffusers pipeline whose every call is one step: noise in, picture out.

        pipeline = OneStepPipeline.from_pretrained("runs/emoji/pipeline")
        images = pipeline("a big panda on a red background", seed=3, num_images_per_prompt=8)

    In float32 the images are, bit for bit, those of the stock pipeline called with ``num_inference_steps=1,
    guidance_scale=1.0`` and the same generators. In half precision x0 is still formed in float32.

    Args:
        pipeline: any loaded text-to-image pipeline with a `unet` or `transformer`. It is left as it is; the
            modules are shared.
        alpha_T_squared: see `one_step_scheduler`.

    Attributes:
        pipeline: the stock pipeline, with the one-step scheduler in place.
        fast: the fast path after `compile`, else ``None``.
    """

    def __init__(self, pipeline: DiffusionPipeline, alpha_T_squared: float | None = None) -> None:
        scheduler = one_step_scheduler(pipeline.scheduler, alpha_T_squared)
        self.pipeline = copy.copy(pipeline)
        self.pipeline.scheduler = Float32Step.from_config(scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.fast: FastPath | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter: Adapters = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        vae: str | os.PathLike | None = None,
        fast: bool = False,
    ) -> OneStepPipeline:
        """Load an exported pipeline, or a teacher with a student's adapter merged into it.

        Args:
            pretrained_model_name_or_path: folder or hub id of a diffusers pipeline.
            adapter: folder or hub id of a PEFT adapter of its U-Net or transformer, or several, such as a
                student's and a subject's: see `merge_adapters`. They are merged, so a step costs what the
                teacher's does. A student's `one_step.json`, if any, holds its own alpha_T^2.
            torch_dtype: dtype of all modules; float32 when ``None``, whatever the files hold.
            device: where to put the modules; ``None`` leaves them on the CPU.
            vae: folder or hub id of another autoencoder, such as a small and quick `AutoencoderTiny`
                ("madebyollin/taesd").
            fast: call `compile`.

        Raises:
            WadiError: something is missing, is not safetensors, or does not fit.
        """
        folders = [adapter_folder(one) for one in as_list(adapter)]
        own = {value for folder in folders if (value := read_alpha_T_squared(folder)) is not None}
        if len(own) > 1:
            raise WadiError(f"{folders[-1]}: adapters of students of different alpha_T^2 do not go together")
        pipeline = load_pipeline(pretrained_model_name_or_path, torch_dtype)
        merge_adapters(pipeline, folders)
        alpha_T_squared = own.pop() if own else None
        if vae is not None:
            pipeline.vae = load_vae(os.fspath(vae), pipeline, torch_dtype or torch.float32)
        if device is not None:
            pipeline.to(device)
        one_step = cls(pipeline, alpha_T_squared)
        return one_step.compile() if fast else one_step

    def compile(self, mode: str | None = None, batch_size: int | None = None) -> OneStepPipeline:
        """Make all later calls fast: compiled, captured as one CUDA graph, embeddings of prompts kept.

        Pictures of float32 differ from the plain ones by rounding (at most 1 of 255). The first call of each
        shape compiles and captures it (minutes for Stable Diffusion on a GPU, less where torch has it in its
        cache): `fast.warm_up` does so ahead, `fast.warmup_seconds` tells what it took. The U-Net and the VAE
        are changed in place; call `save_pretrained` before.

        Args:
            mode: "default", "max-autotune-no-cudagraphs" or "eager"; see `FastPath`. Without a GPU ``None``
                compiles nothing: only embeddings are kept and projections fused.
            batch_size: pictures made at once; ``None`` for those of a call.

        Returns:
            This pipeline.

        Raises:
            WadiError: not a Stable Diffusion pipeline, or its adapter is not merged.
        """
        self.fast = FastPath(self.pipeline, mode, batch_size)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make ``len(prompts) * num_images_per_prompt`` images, prompt by prompt.

        Args:
            prompt: one prompt or several.
            seed: image i starts from noise of its own generator, seeded ``seed + i``: it does not depend on
                how many are made at once. The generators are on the CPU: every device gets the same noise.
            generator: instead of `seed`, as in diffusers: one, or one per image.
            num_images_per_prompt: images of each prompt.
            height: pixels; the model's own when ``None``.
            width: pixels; the model's own when ``None``.
            output_type: "pil", "np" (N, height, width, 3 in [0, 1]), "pt" (N, 3, height, width) or "latent".
            guidance_scale: only 1.0: a one-step student has its guidance built in.
            negative_prompt: only ``None``, for the same reason.
            **kwargs: passed to the pipeline (a ControlNet's image, ...); none after `compile`.

        Returns:
            A list of PIL images, or one array or tensor.

        Raises:
            WadiError: guidance or more steps are asked for, or a prompt is longer than the tokenizer takes.
        """
        refuse_guidance(kwargs.pop("num_inference_steps", 1), guidance_scale, negative_prompt)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check_lengths(prompts if self.fast is None else self.fast.new_prompts(prompts))
        generator = _generators(seed, generator, len(prompts) * num_images_per_prompt)
        sides = {"height": height, "width": width}
        options = stock_arguments(self.pipeline) | kwargs
        if self.fast is not None:
            if options:
                raise WadiError(f"{', '.join(options)}: not known to the fast path; do without compile()")
            repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
            return self.fast(repeated, generator, **sides, output_type=output_type)
        return self.pipeline(
            prompt=prompt if isinstance(prompt, str) else prompts,
            num_inference_steps=1,
            guidance_scale=1.0,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            # image to image has no such arguments
            **{name: side for name, side in sides.items() if side is not None},
            **options,
        ).images

    def load_embedding(self, path: str | os.PathLike) -> str:
        """Teach the pipeline a word that was learned by textual inversion; returns it. See `load_embedding`.

        Raises:
            WadiError: as there, or `compile` came before, whose kept embeddings of prompts may lack the word.
        """
        if self.fast is not None:
            raise WadiError(f"{path}: load embeddings before compile()")
        return load_embedding(self.pipeline, path)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the whole pipeline as a folder of stock classes, whole or not at all.

        `StableDiffusionPipeline.from_pretrained(folder)` makes pictures of it without wadi.

        Raises:
            WadiError: the folder cannot be written, or `compile` has changed the modules.
        """
        if self.fast is not None:
            raise WadiError(f"{folder}: a compiled pipeline cannot be saved; save it before compile()")
        stock = copy.copy(self.pipeline)
        stock.scheduler = LCMScheduler.from_config(self.pipeline.scheduler.config)
        with replacing_folder(folder) as temporary:
            stock.save_pretrained(temporary, safe_serialization=True)
            forget_origin(temporary)

    def _check_lengths(self, prompts: list[str]) -> None:
        """The stock pipelines cut long prompts and go on; here that is a mistake to tell."""
        if not prompts:
            return
        tokenizer, limit = self.pipeline.tokenizer, prompt_limit(self.pipeline)
        for prompt in prompts:
            whole = prompt
            if isinstance(self.pipeline, TextualInversionLoaderMixin):
                whole = self.pipeline.maybe_convert_prompt(prompt, tokenizer)
            length = len(tokenizer(whole, truncation=False, verbose=False).input_ids)
            if length > limit:
                raise WadiError(
                    f"prompt: {prompt[:40]!r}... has {length} tokens and the model takes {limit}; shorten it"
                )


def refuse_guidance(
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: str | Sequence[str] | None = None,
) -> None:
    """Tell, in a sentence, that a one-step student cannot do what guidance and more steps are for.

    Its guidance was built in by distillation: it never saw an empty or a negative prompt beside its own, and
    what its two predictions differ by points nowhere (docs/uses/editing.md has what comes of forcing it).

    Args:
        num_inference_steps: only 1.
        guidance_scale: only 1.0.
        negative_prompt: only ``None``.

    Raises:
        WadiError: another value; it names the option, why, and what to do instead.
    """
    if num_inference_steps != 1:
        raise WadiError(
            f"num_inference_steps {num_inference_steps}: a one-step student takes 1 step, and knows no "
            "others; leave it away, or use the multi-step teacher"
        )
    if guidance_scale != 1.0:
        raise WadiError(
            f"guidance_scale {guidance_scale:g}: a one-step student cannot be guided, guidance was built in "
            "by distillation; leave it away (1.0), distil with another --guidance-scale, or use the "
            "multi-step teacher"
        )
    if negative_prompt is not None:
        raise WadiError(
            "negative_prompt: a one-step student cannot be guided away from anything, guidance was built "
            "in by distillation; say in the prompt what shall be there instead, or use the multi-step teacher"
        )


def _generators(
    seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None, images: int
) -> torch.Generator | Sequence[torch.Generator] | None:
    """What a call's `seed` and `generator` mean: for a seed, a generator on the CPU for each image."""
    if seed is None:
        return generator
    if generator is not None:
        raise WadiError("seed, generator: give one of the two")
    return [torch.Generator().manual_seed(seed + i) for i in range(images)]


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    without: Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a diffusers pipeline from a folder or the hub, all modules in one dtype, safetensors only.

    Args:
        pretrained_model_name_or_path: folder or hub id.
        torch_dtype: float32 when ``None`` (diffusers' own default mixes dtypes if files hold half precision).
            A dict gives each module its own, by name and "default".
        without: modules that are not loaded; names that the pipeline does not have are ignored.

    Raises:
        WadiError: there is no such folder or hub id, a sub-folder is missing, or a file is unreadable.
    """
    name = os.fspath(pretrained_model_name_or_path)
    left_out: dict[str, None] = {}
    if without:
        name = os.fspath(pipeline_folder(name))
        index = read_json(Path(name) / "model_index.json")
        left_out = {module: None for module in without if module in index}
    elif Path(name).exists():
        _check_pipeline_folder(Path(name))
    else:
        _check_hub_id(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(
                name, torch_dtype=torch_dtype or torch.float32, use_safetensors=True, **left_out
            )
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise WadiError(f"{name}: could not load the pipeline: {_first_line(error)}") from error


def merge_adapters(pipeline: DiffusionPipeline, adapters: Adapters) -> None:
    """Merge PEFT adapters into a pipeline's U-Net or transformer, and text encoder where one has that too.

    They are merged one after the other, each into what the ones before left. Of LoRaD adapters the order does
    not matter, because angles add; of others it does.

    Args:
        pipeline: a stock pipeline; its modules are changed in place.
        adapters: folder or hub id, or several.

    Raises:
        WadiError: no such adapter, or it does not fit the pipeline.
    """
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    for folder in [adapter_folder(one) for one in as_list(adapters)]:
        setattr(pipeline, name, _merge(getattr(pipeline, name), folder))
        if (folder / TEXT_ENCODER_FOLDER).is_dir():
            part = adapter_folder(folder / TEXT_ENCODER_FOLDER)
            pipeline.text_encoder = _merge(pipeline.text_encoder, part)


def as_list(adapters: Adapters) -> list[str | os.PathLike]:
    """Names of adapters, none, one or several, as a list."""
    if adapters is None:
        return []
    return [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)


def load_embedding(pipeline: DiffusionPipeline, path: str | os.PathLike) -> str:
    """Teach a pipeline a word of a file, with diffusers' `load_textual_inversion`.

    Args:
        pipeline: one with a CLIP text encoder.
        path: a safetensors file with one entry, (n, D) under the word's name, or a folder that holds
            `learned_embeds.safetensors`.

    Returns:
        The word.

    Raises:
        WadiError: no such file, not of this form or of another model, or the pipeline has the word already.
    """
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise WadiError(f"{path}: a {type(pipeline).__name__} cannot take a learned word")
    file = Path(path) / TEXT_INVERSION_NAME_SAFE if Path(path).is_dir() else Path(path)
    tensors = load_tensors(file)
    if len(tensors) != 1 or next(iter(tensors.values())).ndim not in (1, 2):
        raise WadiError(f"{file}: not one learned word; name a file that wadi invert or diffusers wrote")
    ((word, embedding),) = tensors.items()
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    if embedding.shape[-1] != width:
        raise WadiError(
            f"{file}: {word} has {embedding.shape[-1]} numbers and the model's words have {width}; it was "
            "learned on another model"
        )
    try:
        pipeline.load_textual_inversion({word: embedding})
    except ValueError as error:
        raise WadiError(f"{file}: {_first_line(error)}") from error
    return word


def load_for_steps(
    model: str | os.PathLike,
    adapter: Adapters = None,
    num_inference_steps: int = 1,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiffusionPipeline:
    """The stock pipeline for so many steps: the student's for one, the teacher's for several.

    Args:
        model: folder or hub id.
        adapter: folder or hub id of a student's adapter, merged; or of several adapters, of which the first
            is the student's.
        num_inference_steps: 1 sets the one-step scheduler. More are for a model without adapters; one with
            a subject's alone is loaded by `wadi.tasks.dreambooth.load_with_adapters`.
        torch_dtype: of all modules; float32 when ``None``.
        device: where it works.

    Raises:
        WadiError: an adapter and several steps; and as `load_pipeline` and `OneStepPipeline.from_pretrained`.
    """
    if (adapters := as_list(adapter)) and num_inference_steps != 1:
        raise WadiError(
            f"{adapters[0]}: a one-step student takes 1 step, not {num_inference_steps}; leave the adapter "
            "away for the multi-step teacher, or ask for 1 step"
        )
    if num_inference_steps == 1:
        return OneStepPipeline.from_pretrained(model, adapter, torch_dtype, device=device).pipeline
    return load_pipeline(model, torch_dtype).to(device)


def load_denoiser(pretrained_model_name_or_path: str | os.PathLike) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Load the U-Net or transformer of a diffusers pipeline alone, in float32, safetensors only.

    Args:
        pretrained_model_name_or_path: folder or hub id.

    Returns:
        The network, on the CPU, and the configuration of the pipeline's scheduler.

    Raises:
        WadiError: there is no such folder or hub id, it has neither network, or a file is unreadable.
    """
    name = os.fspath(pretrained_model_name_or_path)
    if Path(name).exists():
        _check_pipeline_folder(Path(name))
    else:
        _check_hub_id(name)
    try:
        index = DiffusionPipeline.load_config(name)
        part = "unet" if "unet" in index else "transformer"
        kind = getattr(diffusers, str(index.get(part, [None, None])[1]), None)
        if kind is None:
            raise WadiError(f"{name}: has neither a U-Net nor a transformer of diffusers")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            network = kind.from_pretrained(
                name, subfolder=part, torch_dtype=torch.float32, use_safetensors=True
            )
        return network.eval(), LCMScheduler.load_config(name, subfolder="scheduler")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise WadiError(f"{name}: could not load the network: {_first_line(error)}") from error


def pipeline_folder(name_or_path: str | os.PathLike) -> Path:
    """Folder of a pipeline: `name_or_path` itself, or a hub id's in the hub's cache, downloaded if need be.

    Raises:
        WadiError: no such folder or hub id, not a pipeline folder, or a missing sub-folder.
    """
    name = os.fspath(name_or_path)
    folder = Path(name)
    if not folder.exists():
        _check_hub_id(name)
        try:
            folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
        except Exception as error:  # every kind of failure of the hub
            raise WadiError(f"{name}: could not load the pipeline: {_first_line(error)}") from error
    _check_pipeline_folder(folder)
    return folder


def pipeline_class_name(folder: Path) -> str:
    """Class of the pipeline in a folder, as its model_index.json has it."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def prompt_limit(pipeline: DiffusionPipeline) -> int:
    """Most tokens of a prompt: the tokenizer's, and for PixArt-alpha never more than its 120."""
    limit = pipeline.tokenizer.model_max_length
    return min(limit, PIXART_TOKENS) if isinstance(pipeline, PixArtAlphaPipeline) else limit


def stock_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a call that make a stock pipeline draw the size that it is asked for."""
    return {"use_resolution_binning": False} if isinstance(pipeline, PixArtAlphaPipeline) else {}


def load_vae(name: str, pipeline: DiffusionPipeline, torch_dtype: torch.dtype) -> torch.nn.Module:
    """Load another autoencoder for a pipeline, as `AutoencoderTiny` ("madebyollin/taesd").

    Its own scaling factor says how latents are scaled before it decodes them, as in diffusers' pipelines.

    Args:
        name: folder or hub id of an `AutoencoderTiny` or `AutoencoderKL`.
        pipeline: whose latents it is to decode.
        torch_dtype: of its weights.

    Raises:
        WadiError: it cannot be loaded, is of another class, or its latents have another shape.
    """
    if not Path(name).is_dir():
        _check_hub_id(name)
    classes = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}
    try:
        kind = AutoencoderTiny.load_config(name).get("_class_name")
        if kind not in classes:
            raise WadiError(f"--vae {name}: is {kind}; use {' or '.join(classes)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            vae, info = classes[kind].from_pretrained(
                name, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WadiError(f"--vae {name}: could not load the autoencoder: {_first_line(error)}") from error
    if missing := info["missing_keys"]:  # diffusers only warns
        raise WadiError(f"--vae {name}: {len(missing)} weights are missing, as {min(missing)}; load it again")
    for what, own, other in (
        ("latent channels", pipeline.vae.config.latent_channels, vae.config.latent_channels),
        ("pixels a latent", pipeline.vae_scale_factor, 2 ** (len(vae.config.block_out_channels) - 1)),
    ):
        if own != other:
            raise WadiError(f"--vae {name}: has {other} {what} and the model needs {own}; name another")
    return vae.eval()


def write_alpha_T_squared(folder: str | os.PathLike, alpha_T_squared: float) -> None:
    """Keep a student's alpha_T^2 beside its adapter, in `one_step.json`."""
    write_json(Path(folder) / ONE_STEP_FILE, {"alpha_T_squared": alpha_T_squared})


def read_alpha_T_squared(folder: str | os.PathLike) -> float | None:
    """Read what `write_alpha_T_squared` wrote; ``None`` (the schedule's own) where there is no such file."""
    path = Path(folder) / ONE_STEP_FILE
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("alpha_T_squared"), float):
        raise WadiError(f'{path}: not of the form {{"alpha_T_squared": 0.0047}}; write it again or delete it')
    return value["alpha_T_squared"]


def _check_pipeline_folder(folder: Path) -> None:
    index = read_json(folder / "model_index.json") if folder.is_dir() else None
    if not isinstance(index, dict):
        raise WadiError(f"{folder}: not a diffusers pipeline folder; name one with a model_index.json")
    for name, value in index.items():
        wanted = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if wanted and not (folder / name).is_dir():
            raise WadiError(f"{folder}: its model_index.json lists {name!r}, but the sub-folder is missing")


def adapter_folder(adapter: str | os.PathLike) -> Path:
    """Folder of a PEFT adapter: itself, or a hub id's in the hub's cache, downloaded if need be.

    Raises:
        WadiError: no such folder or hub id, or one of its two files is missing.
    """
    folder = Path(adapter)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        _check_hub_id(os.fspath(adapter))
        try:
            folder = Path(snapshot_download(os.fspath(adapter), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise WadiError(f"{adapter}: could not fetch the adapter: {_first_line(error)}") from error
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise WadiError(f"{folder}: not a PEFT adapter folder, {file} is missing")
    return folder


def _check_hub_id(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise WadiError(f"{name}: no such folder, and not a hub id of the form owner/name")


def _merge(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise WadiError(f"{folder}: the adapter does not fit the model: {_first_line(error)}") from error
    # PEFT only warns about weights that the file lacks
    wrong = (
        get_peft_model_state_dict(adapted).keys() ^ load_tensors(folder / "adapter_model.safetensors").keys()
    )
    if wrong:
        raise WadiError(
            f"{folder}: the adapter does not fit the model: {len(wrong)} weights differ, as {min(wrong)}"
        )
    return adapted.merge_and_unload()


def forget_origin(folder: Path) -> None:
    """Remove the teacher's path on this machine from the configs that diffusers wrote."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
