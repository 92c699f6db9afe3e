"""`wadi evaluate`: the usual zero-shot protocol, from captions to figures, with every step written down.

Images of a fixed choice of captions are made (by several processes, and resumable; the noise of an image does
not depend on the batch), resized as the options say, and compared with a reference set: Frechet distance,
improved precision and recall (k = 3), CLIP score, and the diversity of several images of one caption.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import diffusers
import torch
import torchmetrics
import transformers
from accelerate import PartialState

from wadi._version import __version__
from wadi.device import chosen_device
from wadi.errors import tell
from wadi.files import read_json, write_json
from wadi.identity import files_digest
from wadi.metrics.captions import Chosen, choose_captions
from wadi.metrics.diversity import spread
from wadi.metrics.evaluate_config import EvaluateConfig
from wadi.metrics.extractors import SPACES, Clip, extract
from wadi.metrics.generation import PICTURES, SETTINGS_FILE, generate, image_batches, open_folder, tasks_of
from wadi.metrics.reference import distances, load_reference, too_few

RESULT_FILE = "result.json"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Make the images that are missing, measure, and write the result; returns its figures.

    If there are several processes (`accelerate launch -m wadi evaluate ...`), each makes a share of the
    images, and the first one measures. A Frechet distance of too few images is omitted, with a warning before
    anything is made.

    Raises:
        WadiError: an input cannot be read, the folder holds images of other settings, or there are too few
            images even for precision and recall.
    """
    config.check()
    omitted = too_few(config)
    chosen = choose_captions(config.captions, config.num_samples, config.choice_seed, config.caption_column)
    state = PartialState(
        cpu=not torch.cuda.is_available()
    )  # without cpu it would not see processes on the CPU
    if state.is_main_process:
        if omitted:
            tell(omitted)
        open_folder(config, chosen)
    state.wait_for_everyone()
    tasks = tasks_of(config, chosen)
    generate(config, tasks[state.process_index :: state.num_processes], state)
    state.wait_for_everyone()
    return measure(config, chosen) if state.is_main_process else {}


def measure(config: EvaluateConfig, chosen: Chosen) -> dict[str, Any]:
    """Measure the images in the folder, and write result.json with the figures and all settings."""
    device = chosen_device(config.device)
    tasks = tasks_of(config, chosen)
    singles, several = tasks[: config.num_samples], tasks[config.num_samples :]
    figures: dict[str, Any] = {"samples": len(singles)}
    clip = Clip(config.clip_model, device) if config.clip_model else None
    extractor = SPACES[config.features].load(device) if config.reference or not clip else None
    folder = config.out / PICTURES
    if config.reference is not None:
        reference = load_reference(config, extractor)
        features = extract(extractor, image_batches([folder / t.file for t in singles], config, "features"))
        figures |= distances(reference, features)
    if clip is not None:
        batches = image_batches([folder / task.file for task in singles], config, "CLIP score")
        parts = (
            clip.score(batch, [task.caption for task in singles[first : first + len(batch)]])
            for first, batch in zip(range(0, len(singles), config.batch_size), batches, strict=True)
        )
        figures["clip_score"] = torch.cat(list(parts)).double().mean().item()
    if several:
        embed = clip.embed if clip else extractor
        features = extract(embed, image_batches([folder / task.file for task in several], config, "spread"))
        figures["spread"] = spread(features.unflatten(0, (config.spread_prompts, config.spread_samples)))
    made_by = {"made_by": read_json(config.out / SETTINGS_FILE)}
    write_json(
        config.out / RESULT_FILE,
        {"figures": figures, **_settings(config, chosen), **made_by, **_versions(device)},
    )
    return figures


def _settings(config: EvaluateConfig, chosen: Chosen) -> dict[str, Any]:
    hashes = {"captions_sha256": chosen.file_sha256, "choice_sha256": chosen.choice_sha256}
    if config.reference is not None:
        hashes["reference_sha256"] = files_digest(config.reference, below=True)
    return {"options": asdict(config), **hashes}


def _versions(device: str) -> dict[str, str]:
    modules = (torch, torchmetrics, diffusers, transformers)
    on_gpu = str(device).startswith("cuda")
    return {
        "wadi": __version__,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
    }
