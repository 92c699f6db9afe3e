"""Checks of presets and ranks against the teacher, before memory is allocated for the training."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from wadi.backbones import Backbone
from wadi.diffusion.schedule import prediction_type
from wadi.distill.config import DistillConfig
from wadi.distill.presets import FITS, Fit
from wadi.errors import WadiError, tell
from wadi.lorad import LoRaDConfig
from wadi.onestep.arguments import own_size
from wadi.onestep.scheduler import fractions, student_scheduler


def check_preset_name(name: str) -> None:
    """Raise a WadiError unless `name` is a preset or "none"."""
    if name not in ("none", *FITS):
        raise WadiError(f"--preset: must be none or one of {', '.join(FITS)}, but is {name!r}")


def check_preset(config: DistillConfig, pipeline: DiffusionPipeline) -> None:
    """Refuse a preset for another kind of model. Warn about a preset for another resolution.

    Args:
        config: the options; `preset` is "none", or a key of `PRESETS`.
        pipeline: the teacher's. Its network and its scheduler are read.

    Raises:
        WadiError: the preset is for another class of pipeline or another prediction type, or the teacher has
            no one-step form with the student's alpha_T^2.
    """
    name, prediction = config.model.pretrained_model_name_or_path, prediction_type(pipeline.scheduler)
    alpha = config.student.alpha_T_squared
    if prediction == "v_prediction" and alpha is not None:
        tell(
            f"--alpha-T-squared {alpha}: is unusual for {name}, which predicts v and needs "
            "none; omit it unless you know that the student needs this value"
        )
    side = config.model.resolution or max(own_size(pipeline))
    if config.model.preset != "none":
        _compare(config, Fit(type(pipeline).__name__, prediction, side))
    # raises what is wrong with any of them
    student_scheduler(pipeline.scheduler, alpha, fractions(config.student.steps))


def _compare(config: DistillConfig, found: Fit) -> None:
    """Raise where a preset is for another kind of model, and tell where it is for another resolution."""
    name, preset = config.model.pretrained_model_name_or_path, config.model.preset
    wanted = FITS[preset]
    if (found.pipeline, found.prediction) != (wanted.pipeline, wanted.prediction):
        raise WadiError(
            f"--preset {preset}: is for a {wanted.pipeline} that predicts {wanted.prediction}, and "
            f"{name} is a {found.pipeline} that predicts {found.prediction}; use {_right_preset(found)}"
        )
    if found.resolution != wanted.resolution:
        nearest = _right_preset(found)
        better = FITS[nearest.split()[-1]].resolution != wanted.resolution
        tell(
            f"--preset {preset}: is for images of {wanted.resolution} pixels a side, and {name} makes "
            f"{found.resolution}; "
            + (f"the preset for that would be {nearest}" if better else "no preset is nearer")
        )


def check_sharding(config: DistillConfig, processes: int) -> None:
    """Raise a WadiError if the base is to be spread over the processes and cannot be."""
    run = config.run
    if not run.shard_base:
        return
    if processes == 1:
        raise WadiError(
            "--shard-base: spreads the base over several processes, and this is one; start them with "
            "accelerate launch, or give --no-shard-base"
        )
    moves = "weights that stay in one place, and those of a spread base do not"
    for option, given, why in (
        ("--cuda-graphs", run.cuda_graphs, f"a graph needs {moves}"),
        ("--compile", run.compile, f"compiled blocks need {moves}"),
        ("--base-precision nf4", run.base_precision == "nf4", "such weights cannot be spread; use int8"),
        ("--student-method", config.student.method != "lorad", "it trains LoRaD alone"),
        ("--fake-method", config.fake.method != "lorad", "it trains LoRaD alone"),
    ):
        if given:
            raise WadiError(f"--shard-base: does not go with {option}, because {why}; omit one of them")


def check_network(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse options that the teacher's kind of network has no use for.

    Raises:
        WadiError: guidance of the fake model, where the network takes the guidance as an input; CUDA graphs,
            where the host must wait for the device.
    """
    kind = type(backbone.pipeline).__name__
    if backbone.takes_guidance and config.fake.guidance_scale != 1:
        raise WadiError(
            f"--fake-guidance-scale: the network of this {kind} takes the guidance as an input, and the fake "
            "model is told what the student is told; omit the option"
        )
    if config.run.cuda_graphs and not backbone.capturable:
        raise WadiError(
            f"--cuda-graphs: the network of a {kind} must know how long each prompt is, for which the host "
            "waits; omit the option"
        )


def _right_preset(found: Fit) -> str:
    """The preset for such a teacher whose resolution is nearest, as a ratio."""
    alike = [
        name
        for name, fit in FITS.items()
        if (fit.pipeline, fit.prediction) == (found.pipeline, found.prediction)
    ]
    if not alike:
        return "no preset (--preset none)"
    return f"--preset {min(alike, key=lambda name: abs(math.log(FITS[name].resolution / found.resolution)))}"


# --- ranks ---

_FLOAT32 = 4  # bytes: what is trained is float32 always
_STUDENT_COPIES, _FAKE_COPIES = 5, 4
"""Numbers held for each trained number: itself, its gradient, AdamW's two moments, the student's average."""


def check_ranks(
    config: DistillConfig, student: LoRaDConfig, fake: LoRaDConfig, network: nn.Module, free: int
) -> None:
    """Raise if no layer can use a rank, or if what is trained does not fit the memory.

    Args:
        config: the options, for the methods and the messages.
        student: layers and ranks of the student's adapter.
        fake: those of the fake model's.
        network: the base of both, without adapters.
        free: bytes; see `free_memory`.

    Raises:
        WadiError: a rank is more than any of its layers can use, or adapters, gradients, AdamW's moments and
            the student's average need more than `free`.
    """
    needs = {}
    roles = (("student", student, _STUDENT_COPIES), ("fake", fake, _FAKE_COPIES))
    for who, adapter, copies in roles:
        method = getattr(config, who).method
        if method == "full":  # no adapter
            continue
        layers, turned = layer_sizes(network, adapter.target_modules).values(), method == "lorad"
        check_rank(f"--{who}-rank", adapter.r, layers, turned)
        numbers = sum(adapter.r * (out + _width(fan_in, turned)) for out, fan_in in layers)
        needs[f"--{who}-rank"] = _FLOAT32 * copies * numbers
    if (total := sum(needs.values())) > free:
        option = max(needs, key=lambda name: needs[name])
        raise WadiError(
            f"{option}: the adapters and their optimizers need {total / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free; give a lower rank"
        )


def check_rank(option: str, r: int, layers: Collection[tuple[int, int]], turned: bool = True) -> None:
    """Raise if no layer can use an adapter's rank.

    LoRaD's angles of a layer are a matrix (out, in // 2), and LoRA's change is a matrix (out, in). A rank
    above the smaller side adds no matrix that a smaller rank does not have.

    Args:
        option: that gave the rank, for the message.
        r: the rank.
        layers: (out, in) of the layers; see `layer_sizes`.
        turned: whether the adapter is LoRaD's.

    Raises:
        WadiError: the rank is less than 1, or more than any layer can use.
    """
    useful = max((min(out, _width(fan_in, turned)) for out, fan_in in layers), default=r)
    if not 1 <= r <= useful:
        raise WadiError(
            f"{option} {r}: must be at least 1, and at most {useful}, which is the most that a layer of this "
            "model can use"
        )


def layer_sizes(network: nn.Module, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the weights of layers, with a convolution's kernel flattened into `in`.

    Args:
        network: without adapters.
        names: of its layers; modules without a weight are not among the results.
    """
    layers = {name: network.get_submodule(name) for name in names}
    # a linear layer says its sizes; its weight may be packed
    return {
        name: (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (len(layer.weight), layer.weight[0].numel())
        for name, layer in layers.items()
        if getattr(layer, "weight", None) is not None
    }


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, or on this computer or container; on "meta", any number."""
    if device.type == "meta":
        return 2**63
    if device.type == "cuda":
        # what torch holds in reserve can be used as well
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return min(_available(), _container_limit())


def _available() -> int:
    """Memory that is free without swapping. All memory if the system does not tell what is in use."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**63


def _container_limit() -> int:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # none, or "max"
            continue
    return 2**63


def _width(fan_in: int, turned: bool) -> int:
    return fan_in // 2 if turned else fan_in
