"""The options of DreamBooth, and how a resumed run gets its own options back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from wadi.errors import WadiError
from wadi.files import read_json
from wadi.onestep.arguments import check_seed, finite_number, whole_number

Config = TypeVar("Config", bound="DreamBoothConfig")

CONFIG_FILE = "config.json"
"""File of the run folder with the options."""
CHANGEABLE = (
    "output_dir",
    "checkpointing_steps",
    "resume",
    "student_adapter",
    "validation_prompts",
    "device",
)
"""Options that may differ when a run is resumed."""
INPUTS = {
    "pretrained_model_name_or_path": "pretrained-model-name-or-path",
    "instance_data_dir": "instance-data-dir",
    "prior_prompts": "prior-prompts",
}
"""Options that name files. A resumed run may name another path if the content is the same."""


@dataclass(frozen=True)
class DreamBoothConfig:
    """Teach a model a subject from a few images; options as in diffusers' train_dreambooth_lora.py.

    Raises:
        WadiError: a value is outside its range; the message names the option.
    """

    instance_data_dir: Path
    """Folder with 4 to 8 images of the subject."""
    output_dir: Path = Path("runs/dreambooth")
    """Run folder: adapter/ (PEFT), pipeline/ (the model with the adapter merged), before-after.png."""
    pretrained_model_name_or_path: str | None = None
    """Folder or hub id of the multi-step model, of any kind that wadi distils."""
    instance_prompt: str = "a zwx"
    """Prompt of the images: a word that means nothing yet, and the kind of the subject if it has one, such as
    "a zwx dog"."""
    class_prompt: str | None = None
    """Prompt for the kind of the subject, such as "a dog"."""
    prior_prompts: Path | None = None
    """File of prompts (.txt, one in each line), from which a prompt is drawn for each class image. It is
    given instead of --class-prompt, and keeps more of what the model knows."""
    num_class_images: int = 64
    """Number of class images, which the model makes before the training, so that it forgets nothing else."""
    prior_loss_weight: float = 1.0
    """Weight of the loss on class images; with 0 there are none."""
    guidance_scale: float | None = None
    """Guidance scale of the class images and of before-after.png; if not given, 7.5, or 2 for the built-in
    model."""
    num_inference_steps: int = 25
    """Number of denoising steps of the class images and of before-after.png."""
    method: Literal["lorad", "lora"] = "lorad"
    """Kind of the adapter that is trained."""
    layers: Literal["all", "cross-attention"] = "all"
    """Layers of the adapter: all linear layers that a student's adapter has, or only keys and values of the
    cross-attention, which read the prompt (Custom Diffusion, arXiv 2212.04488)."""
    rank: int = 8
    """Rank of the adapter."""
    train_text_encoder: bool = False
    """Also train an adapter, of the same kind and rank, of CLIP's text encoder."""
    learning_rate: float | None = None
    """Learning rate of AdamW; if not given, 1e-4, or for the built-in model the best one of our trials."""
    lr_decay_fraction: float = 0.5
    """Last fraction of the training over which the learning rate falls linearly to zero."""
    train_batch_size: int = 4
    """Images of the subject in each step; there are as many class images."""
    max_train_steps: int = 400
    """Number of updates."""
    max_grad_norm: float = 1.0
    """Norm to which the gradients are clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the frozen weights; the trained weights are always float32."""
    checkpointing_steps: int = 100
    """Steps between checkpoints; Ctrl-C saves a checkpoint too."""
    resume: bool = False
    """Resume the run in the run folder from its last checkpoint; its own options may be omitted."""
    student_adapter: str | None = None
    """Adapter of a one-step student of the model, with which before-after.png shows the subject too."""
    validation_prompts: tuple[str, ...] = ()
    """Rows of before-after.png; if not given, the instance prompt and the first class prompt."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on, such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        for name in ("instance_data_dir", "output_dir", "prior_prompts"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        counts = ("num_class_images", "num_inference_steps", "rank", "train_batch_size", "max_train_steps")
        for name in (*counts, "checkpointing_steps"):
            whole_number(f"--{_option(name)}", getattr(self, name), 1)
        check_seed(self.seed, self.num_class_images, "--seed")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise WadiError(f"--{_option(name)} {value}: must be a positive number")
        for name in ("prior_loss_weight", "guidance_scale"):
            if getattr(self, name) is not None:
                finite_number(f"--{_option(name)}", getattr(self, name), 0)
        if not 0 <= self.lr_decay_fraction <= 1:
            raise WadiError(f"--lr-decay-fraction {self.lr_decay_fraction}: must be between 0 and 1")
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise WadiError("--mixed-precision: fp16 needs a GPU; use no or bf16")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

    def fingerprint(self, inputs: Mapping[str, str | None] | None = None) -> str:
        """Hash of every option that decides the result: a checkpoint can be resumed only with the same hash.

        Args:
            inputs: digests of what the options in `INPUTS` name; their paths do not count.
        """
        names = [field.name for field in dataclasses.fields(DreamBoothConfig)]
        values = {name: str(getattr(self, name)) for name in names if name not in (*CHANGEABLE, *INPUTS)}
        values |= inputs or {}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def saved_options(config: Config) -> Config:
    """The options of the run in the run folder; those that may change are taken from `config`.

    Raises:
        WadiError: the folder is not a run, or an option was given that is not the run's own.
    """
    path = config.output_dir / CONFIG_FILE
    if not path.is_file():
        raise WadiError(f"{config.output_dir}: not a run of wadi dreambooth (no {CONFIG_FILE})")
    saved, values = read_json(path), {}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in (field.name for field in dataclasses.fields(DreamBoothConfig)):
        given, default = getattr(config, name), defaults[name]
        if name in CHANGEABLE or (name in INPUTS and given != default):
            continue
        if not isinstance(saved, dict) or name not in saved:
            raise WadiError(f"{path}: lacks {name}; start a new run")
        if given != default and str(given) != str(saved[name]):
            raise WadiError(
                f"--{_option(name)}: the run was started with {saved[name]}, it cannot go on with {given}; "
                "omit the option or start a new run"
            )
        values[name] = saved[name]
    return dataclasses.replace(config, **values)


def _option(name: str) -> str:
    return name.replace("_", "-")
