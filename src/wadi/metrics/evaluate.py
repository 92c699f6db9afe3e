"""`wadi evaluate`: the field's zero-shot protocol, from captions to figures, each step written down.

Pictures of a fixed choice of captions are generated (over processes, resumable, the noise of a caption its
own whatever the batch), resized as stated, and compared with a reference set: Frechet distance, improved
precision and recall (k = 3), CLIP score, and how different several pictures of one caption are.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import torchmetrics
import transformers
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open

from wadi._version import __version__
from wadi.device import chosen_device
from wadi.errors import WadiError, tell
from wadi.files import load_tensors, read_json, replacing_file, save_tensors, write_json
from wadi.identity import adapter_digest, files_digest, model_digest
from wadi.images import image_files, open_picture
from wadi.metrics.captions import Chosen, choose_captions
from wadi.metrics.diversity import spread
from wadi.metrics.extractors import SPACES, Clip, Extractor, extract
from wadi.metrics.frechet import feature_statistics, fewest_images, frechet_distance
from wadi.metrics.precision_recall import NEIGHBOURS, precision_recall
from wadi.onestep.arguments import SEEDS, check_seed, finite_number, whole_number
from wadi.outputs import Output
from wadi.progress import progress

RESULT_FILE, SETTINGS_FILE, PICTURES = "result.json", "settings.json", "pictures"
LARGEST_RESOLUTION = 8192
"""Pixels; a larger side would fill the memory."""
REFERENCE_FEATURES = 10_000
"""Features that are kept of a reference for precision and recall, the first ones."""

MADE_BY = (
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "resolution",
    "resize",
    "spread_samples",
    "dtype",
)
"""Options that images depend on, beside the content of the model and of its adapter."""

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Generate pictures of captions and compare them with a reference set."""

    captions: Path
    """COCO's annotations (.json), or .txt, .jsonl, .csv, .tsv, .json, .parquet."""
    out: Path
    """Folder for pictures, settings and result; pictures that are there are not made again."""
    model: str
    """Exported pipeline, teacher of --adapter, or multi-step pipeline: folder or hub id."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    reference: Path | None = None
    """Folder of real images, or statistics that --save-reference wrote; no distances without it. The Frechet
    distance needs 4096 images on each side (emoji: 256); of fewer it is omitted."""
    save_reference: Path | None = None
    """Write the statistics of the reference folder here (.safetensors), to spare the next run its reading."""
    caption_column: str = "caption"
    """Key or column of the caption in tables."""
    num_samples: int = 30_000
    """Captions, a picture each."""
    choice_seed: int = 0
    """Seed of the choice among the captions."""
    num_inference_steps: int = 1
    """Denoising steps; 1 uses the one-step scheduler."""
    guidance_scale: float = 1.0
    """Guidance of a multi-step pipeline."""
    seed: int = 0
    """Seed of the first picture; the next ones follow."""
    resolution: int | None = None
    """Side in pixels to which pictures are resized before they are saved and compared, 256 for COCO; as they
    are made if not given. Reference pictures are cropped to a square, then resized alike."""
    resize: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Filter of Pillow that resizes, antialiased."""
    features: str = "inception"
    """Feature space of the distances, of `SPACES`: Inception as in published figures, or another one."""
    clip_model: str | None = None
    """Folder or hub id of a CLIPModel for the CLIP score, such as laion/CLIP-ViT-g-14-laion2B-s12B-b42K."""
    spread_prompts: int = 0
    """Captions of which several pictures are made, to see how different they are; the first chosen ones."""
    spread_samples: int = 8
    """Pictures of each of these."""
    batch_size: int = 8
    """Pictures at a time; does not change their noise."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks."""
    device: str | None = None
    """Such as cpu or cuda:1; of several processes each has its own."""
    overwrite: bool = False
    """Replace the file of --save-reference if there is one already. The folder is gone on with always."""


@dataclass(frozen=True)
class Task:
    """One picture to make."""

    file: str
    caption: str
    seed: int


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Generate what is missing, measure, and write the result; returns its figures.

    Of several processes (`accelerate launch -m wadi evaluate ...`) each makes its share of the pictures, and
    the first one measures.

    A Frechet distance of too few images is omitted, which is told before anything is generated.

    Raises:
        WadiError: an input cannot be read, the folder holds pictures of other settings, or the images are too
            few for every figure that the reference is for.
    """
    _check(config)
    omitted = _too_few(config)
    chosen = choose_captions(config.captions, config.num_samples, config.choice_seed, config.caption_column)
    state = PartialState(cpu=not torch.cuda.is_available())  # else it would not see processes on the CPU
    if state.is_main_process:
        if omitted:
            tell(omitted)
        _open_folder(config, chosen)
    state.wait_for_everyone()
    tasks = _tasks(config, chosen)
    _generate(config, tasks[state.process_index :: state.num_processes], state)
    state.wait_for_everyone()
    return measure(config, chosen) if state.is_main_process else {}


def measure(config: EvaluateConfig, chosen: Chosen) -> dict[str, Any]:
    """Figures of the pictures in the folder, written to result.json with all that repeats them."""
    device = chosen_device(config.device)
    tasks = _tasks(config, chosen)
    singles, several = tasks[: config.num_samples], tasks[config.num_samples :]
    figures: dict[str, Any] = {"samples": len(singles)}
    clip = Clip(config.clip_model, device) if config.clip_model else None
    extractor = SPACES[config.features].load(device) if config.reference or not clip else None
    folder = config.out / PICTURES
    if config.reference is not None:
        reference = _reference(config, extractor)
        features = extract(extractor, _batches([folder / t.file for t in singles], config, "features"))
        figures |= _distances(reference, features)
    if clip is not None:
        batches = _batches([folder / task.file for task in singles], config, "CLIP score")
        parts = (
            clip.score(batch, [task.caption for task in singles[first : first + len(batch)]])
            for first, batch in zip(range(0, len(singles), config.batch_size), batches, strict=True)
        )
        figures["clip_score"] = torch.cat(list(parts)).double().mean().item()
    if several:
        embed = clip.embed if clip else extractor
        features = extract(embed, _batches([folder / task.file for task in several], config, "spread"))
        figures["spread"] = spread(features.unflatten(0, (config.spread_prompts, config.spread_samples)))
    made_by = {"made_by": read_json(config.out / SETTINGS_FILE)}
    write_json(
        config.out / RESULT_FILE,
        {"figures": figures, **_settings(config, chosen), **made_by, **_versions(device)},
    )
    return figures


def _check(config: EvaluateConfig) -> None:
    if config.num_samples < 1 or config.batch_size < 1 or config.spread_samples < 2:
        raise WadiError("--num-samples, --batch-size: must be at least 1, --spread-samples at least 2")
    if config.resolution is not None:
        whole_number("--resolution", config.resolution, 1, LARGEST_RESOLUTION + 1)
    finite_number("--guidance-scale", config.guidance_scale)
    whole_number("--num-inference-steps", config.num_inference_steps, 1)
    check_seed(config.seed, config.num_samples + config.spread_prompts * config.spread_samples, "--seed")
    whole_number("--choice-seed", config.choice_seed, 0, SEEDS)
    if not 0 <= config.spread_prompts <= config.num_samples:
        raise WadiError(f"--spread-prompts {config.spread_prompts}: must be between 0 and --num-samples")
    if config.adapter is not None and config.num_inference_steps != 1:
        raise WadiError(
            f"--num-inference-steps {config.num_inference_steps}: the student of --adapter takes one step"
        )
    if config.features not in SPACES:
        raise WadiError(f"--features {config.features}: must be one of {', '.join(SPACES)}")
    if config.reference is None and config.clip_model is None and not config.spread_prompts:
        raise WadiError("nothing to measure: give --reference, --clip-model or --spread-prompts")
    if config.reference is not None and not config.reference.exists():
        raise WadiError(f"--reference {config.reference}: no such file or folder")
    _check_outputs(config)


def _output(config: EvaluateConfig) -> Output:
    inputs = (config.captions, config.model, config.adapter, config.reference, config.clip_model)
    return Output(config.out, "evaluate", inputs, resume=True)


def _reference_output(config: EvaluateConfig) -> Output:
    inputs, kind = (config.captions, config.reference), (".safetensors",)
    return Output(
        config.save_reference or "", "evaluate", inputs, config.overwrite, kind, option="--save-reference"
    )


def _check_outputs(config: EvaluateConfig) -> None:
    _output(config).check()
    if config.save_reference is not None:
        _reference_output(config).check()
    if config.reference is not None and config.reference.resolve() in config.out.resolve().parents:
        raise WadiError(
            f"--out {config.out}: is in {config.reference}, and its images would be taken for real ones; "
            "name another folder"
        )


def _too_few(config: EvaluateConfig) -> str:
    """Why the Frechet distance is omitted, in one line; nothing if it is not.

    Raises:
        WadiError: precision and recall, which need fewest, have too few images.
    """
    if config.reference is None:
        return ""
    generated, real = config.num_samples, _reference_count(config)
    given = f"--num-samples is {generated}, --reference holds {real}"
    fewest = fewest_images(SPACES[config.features].width)
    if min(generated, real) <= NEIGHBOURS:
        raise WadiError(
            f"--num-samples, --reference: precision and recall need at least {NEIGHBOURS + 1} images on each "
            f"side, and a Frechet distance {fewest}, but {given}"
        )
    if min(generated, real) >= fewest:
        return ""
    return f"the Frechet distance is omitted, because it needs at least {fewest} images on each side; {given}"


def _tasks(config: EvaluateConfig, chosen: Chosen) -> list[Task]:
    """A picture of each caption, then the pictures of which the spread is taken."""
    tasks = [Task(f"{i:06d}.png", caption, config.seed + i) for i, caption in enumerate(chosen.captions)]
    first = config.seed + len(tasks)
    for i, caption in enumerate(chosen.captions[: config.spread_prompts]):
        for k in range(config.spread_samples):
            seed = first + i * config.spread_samples + k
            tasks.append(Task(f"spread-{i:06d}-{k:03d}.png", caption, seed))
    return tasks


def _settings(config: EvaluateConfig, chosen: Chosen) -> dict[str, Any]:
    options = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items()}
    hashes = {"captions_sha256": chosen.file_sha256, "choice_sha256": chosen.choice_sha256}
    if config.reference is not None:
        hashes["reference_sha256"] = files_digest(config.reference, below=True)
    return {"options": options, **hashes}


def _open_folder(config: EvaluateConfig, chosen: Chosen) -> None:
    """Write settings.json, or see that the pictures which are there were made with the same."""
    _output(config).open()
    # by content: the same model may have moved, and another one may lie at the same path
    settings = {
        "model": model_digest(config.model),
        "adapter": None if config.adapter is None else adapter_digest(config.adapter),
        **{name: asdict(config)[name] for name in MADE_BY},
        "choice_sha256": chosen.choice_sha256,
    }
    path = config.out / SETTINGS_FILE
    if path.exists():
        found = read_json(path)
        if found != settings:
            different = [k for k in settings if not isinstance(found, dict) or found.get(k) != settings[k]]
            raise WadiError(
                f"{path}: the images there were made with other settings ({', '.join(different)}); "
                "name another --out"
            )
        return
    if (config.out / PICTURES).exists():
        raise WadiError(f"{config.out}: has pictures without {SETTINGS_FILE}; name another --out")
    write_json(path, settings)


def _generate(config: EvaluateConfig, tasks: Sequence[Task], state: PartialState) -> None:
    from wadi.onestep.loading import guidance_arguments, stock_arguments
    from wadi.onestep.output import tell_odd_output
    from wadi.onestep.pipeline import load_for_steps

    folder = config.out / PICTURES
    missing = [task for task in tasks if not (folder / task.file).exists()]
    if not missing:
        return
    pipeline = load_for_steps(
        config.model,
        config.adapter,
        config.num_inference_steps,
        getattr(torch, config.dtype),
        config.device or str(state.device),
    )
    pipeline.set_progress_bar_config(disable=True)
    bar = progress(total=len(tasks), initial=len(tasks) - len(missing), desc="images", unit="image")
    with bar, torch.no_grad():
        for first in range(0, len(missing), config.batch_size):
            part = missing[first : first + config.batch_size]
            made = pipeline(
                [task.caption for task in part],
                num_inference_steps=config.num_inference_steps,
                generator=[torch.Generator().manual_seed(task.seed) for task in part],
                **stock_arguments(pipeline),
                **guidance_arguments(pipeline, config.guidance_scale),
            )
            tell_odd_output(made, [task.file for task in part])
            for task, image in zip(part, made.images, strict=True):
                with replacing_file(folder / task.file) as temporary:
                    _resized(image, config).save(temporary, format="PNG")
            bar.update(len(part))


def _resized(image: Image.Image, config: EvaluateConfig) -> Image.Image:
    """The largest square in the middle, at the resolution of the protocol."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    if config.resolution in (None, side):
        return image
    return image.resize((config.resolution, config.resolution), FILTERS[config.resize])


def _batches(files: Sequence[Path], config: EvaluateConfig, what: str) -> Iterator[torch.Tensor]:
    """Pictures (N, 3, H, W) uint8 from files, cropped and resized."""
    starts = range(0, len(files), config.batch_size)
    for first in progress(starts, desc=what, unit="batch", leave=False):
        pictures = []
        for file in files[first : first + config.batch_size]:
            array = np.asarray(_resized(open_picture(file), config))
            pictures.append(torch.from_numpy(array.copy()).permute(2, 0, 1))
        if len({picture.shape for picture in pictures}) > 1:
            raise WadiError(f"{files[first].parent}: pictures of several sizes; give --resolution")
        yield torch.stack(pictures)


def _reference(config: EvaluateConfig, extractor: Extractor) -> dict[str, torch.Tensor]:
    """Sums of the features, and the first of them."""
    if config.reference.is_file():
        return _saved_reference(config)
    features = extract(extractor, _batches(image_files(config.reference, below=True), config, "reference"))
    reference = feature_statistics(features) | {"features": features[:REFERENCE_FEATURES]}
    if config.save_reference is not None:
        with _reference_output(config).writing() as temporary:
            save_tensors(temporary, reference, _made_how(config))
    return reference


def _reference_count(config: EvaluateConfig) -> int:
    if config.reference.is_file():
        return int(_saved_reference(config)["count"])
    return len(image_files(config.reference, below=True))


def _made_how(config: EvaluateConfig) -> dict[str, str]:
    return {"features": config.features, "resolution": str(config.resolution), "resize": config.resize}


def _saved_reference(config: EvaluateConfig) -> dict[str, torch.Tensor]:
    """What --save-reference wrote, if it was made as this evaluation is."""
    path, how = config.reference, _made_how(config)
    reference = load_tensors(path)
    if missing := sorted({"sum", "cov_sum", "count", "features"} - reference.keys()):
        raise WadiError(f"--reference {path}: lacks {', '.join(missing)}; make it with --save-reference")
    with safe_open(path, "pt") as file:
        made = file.metadata() or {}
    if wrong := [f"--{name} {made[name]}" for name in how if made.get(name, how[name]) != how[name]]:
        raise WadiError(f"--reference {path}: was made with {', '.join(wrong)}; give the same here")
    if (width := reference["features"].shape[1]) != SPACES[config.features].width:
        raise WadiError(
            f"--reference {path}: has {width} features an image; give the --features that made it"
        )
    return reference


def _distances(reference: dict[str, torch.Tensor], features: torch.Tensor) -> dict[str, float | int]:
    real = reference["features"]
    count = min(len(real), len(features), REFERENCE_FEATURES)
    precision, recall = precision_recall(real[:count], features[:count])
    figures: dict[str, float | int] = {"reference_samples": int(reference["count"])}
    if min(figures["reference_samples"], len(features)) >= fewest_images(features.shape[1]):
        figures["frechet_distance"] = frechet_distance(reference, feature_statistics(features))
    return figures | {"precision": precision, "recall": recall}


def _versions(device: str) -> dict[str, str]:
    modules = (torch, torchmetrics, diffusers, transformers)
    on_gpu = str(device).startswith("cuda")
    return {
        "wadi": __version__,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
    }
