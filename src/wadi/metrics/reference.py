"""The reference set of an evaluation: its statistics, and the distances to it."""

from __future__ import annotations

import torch
from safetensors import safe_open

from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors
from wadi.images import image_files
from wadi.metrics.evaluate_config import EvaluateConfig
from wadi.metrics.extractors import SPACES, Extractor, extract
from wadi.metrics.frechet import feature_statistics, fewest_images, frechet_distance
from wadi.metrics.generation import image_batches
from wadi.metrics.precision_recall import NEIGHBOURS, precision_recall

REFERENCE_FEATURES = 10_000
"""Number of features of a reference that are kept for precision and recall, the first ones."""


def too_few(config: EvaluateConfig) -> str:
    """Why the Frechet distance is omitted, in one line; "" if it is not.

    Raises:
        WadiError: there are too few images even for precision and recall.
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


def load_reference(config: EvaluateConfig, extractor: Extractor) -> dict[str, torch.Tensor]:
    """Statistics of the reference set (`feature_statistics`), and its first features."""
    if config.reference.is_file():
        return _saved_reference(config)
    features = extract(
        extractor, image_batches(image_files(config.reference, below=True), config, "reference")
    )
    reference = feature_statistics(features) | {"features": features[:REFERENCE_FEATURES]}
    if config.save_reference is not None:
        with config.reference_output.writing() as temporary:
            save_tensors(temporary, reference, _made_how(config))
    return reference


def _reference_count(config: EvaluateConfig) -> int:
    if config.reference.is_file():
        return int(_saved_reference(config)["count"])
    return len(image_files(config.reference, below=True))


def _made_how(config: EvaluateConfig) -> dict[str, str]:
    return {"features": config.features, "resolution": str(config.resolution), "resize": config.resize}


def _saved_reference(config: EvaluateConfig) -> dict[str, torch.Tensor]:
    """Read a file of --save-reference, which must be made with the same options as this evaluation."""
    path, how = config.reference, _made_how(config)
    reference = load_tensors(path)
    if missing := sorted({"sum", "cov_sum", "count", "features"} - reference.keys()):
        raise WadiError(f"--reference {path}: lacks {', '.join(missing)}; make it with --save-reference")
    with safe_open(path, "pt") as file:
        made = file.metadata() or {}
    if wrong := [f"--{name} {made[name]}" for name in how if made.get(name, how[name]) != how[name]]:
        raise WadiError(f"--reference {path}: was made with {', '.join(wrong)}; give the same options here")
    if (width := reference["features"].shape[1]) != SPACES[config.features].width:
        raise WadiError(
            f"--reference {path}: has {width} features an image; give the --features with which it was made"
        )
    return reference


def distances(reference: dict[str, torch.Tensor], features: torch.Tensor) -> dict[str, float | int]:
    """Compare features with a reference; the Frechet distance is omitted if there are too few images.

    Args:
        reference: what `load_reference` returned.
        features: (N, D) of the images.
    """
    real = reference["features"]
    count = min(len(real), len(features), REFERENCE_FEATURES)
    precision, recall = precision_recall(real[:count], features[:count])
    figures: dict[str, float | int] = {"reference_samples": int(reference["count"])}
    if min(figures["reference_samples"], len(features)) >= fewest_images(features.shape[1]):
        figures["frechet_distance"] = frechet_distance(reference, feature_statistics(features))
    return figures | {"precision": precision, "recall": recall}
