"""A new subject from a few images: DreamBooth (Ruiz et al., arXiv 2208.12242) with a LoRaD or LoRA adapter.

The denoiser learns, by its own denoising loss, that the instance prompt ("a zwx dog") shows the subject. So
that it forgets nothing else, every batch also holds as many class images, which the model itself painted
before the training (prior preservation, eq. 2 of the paper):

    L = mean |p(x_t, t, c) - target|^2 + weight mean |p(x'_t', t', c') - target'|^2

with (x, c) an instance image and its prompt, (x', c') a class image and its own, and the target the noise
or the velocity, as the model predicts. The adapter stacks on a one-step student: LoRaD angles add.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from transformers import CLIPTextModel

from wadi.backbones import BACKBONES, Backbone, student_config
from wadi.backbones.condition import Condition, concatenate, pick
from wadi.diffusion import Schedule
from wadi.distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from wadi.distill.checks import check_rank, layer_sizes
from wadi.distill.methods import method_config
from wadi.distill.prompts import Prompt, check_length, read_prompts
from wadi.distill.roles import trainable
from wadi.errors import WadiError
from wadi.files import (
    read_json,
    replacing_file,
    save_tensors,
    write_json,
)
from wadi.identity import files_digest, model_digest, refuse_other_inputs
from wadi.images import image_files, open_picture
from wadi.interrupt import catch_interrupt
from wadi.lorad import LoRaDConfig
from wadi.onestep import OneStepPipeline, labelled_grid, load_pipeline
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER, adapter_folder, merge_adapters, student_with
from wadi.onestep.arguments import check_seed, seeded
from wadi.onestep.loading import prompt_limit, stock_arguments
from wadi.onestep.saving import save_pipeline
from wadi.onestep.student import check_teacher, network_of
from wadi.outputs import Output
from wadi.progress import progress

WORD_LAYERS = ("attn2.to_k", "attn2.to_v")
"""Keys and values of the cross-attention, in U-Nets and in PixArt's transformer."""
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""All linear layers of CLIP's text encoder."""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE = 1e-4
"""Where none is given, as in diffusers' train_dreambooth_lora.py."""
GUIDANCE_SCALE = 7.5
"""Guidance scale of the model's own images where none is given, as in diffusers."""
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
"""Options that name files. A resumed run takes another path of the same content."""
INPUTS_FILE = "inputs.json"
"""File of the run folder with digests of what these options name."""
GENERATED_AT_ONCE = 8
"""Class images at a time; decides their last bits, so it is not an option."""


@dataclass(frozen=True)
class DreamBoothConfig:
    """Teach a model a subject from a few images; options as in diffusers' train_dreambooth_lora.py.

    Raises:
        WadiError: a value is outside its range; the message names the option.
    """

    instance_data_dir: Path
    """Folder of 4 to 8 images of the subject."""
    output_dir: Path = Path("runs/dreambooth")
    """Run folder: adapter/ (PEFT), pipeline/ (the model with the adapter merged), before-after.png."""
    pretrained_model_name_or_path: str | None = None
    """Multi-step model: a Stable Diffusion or PixArt-alpha folder, or a hub id."""
    instance_prompt: str = "a zwx"
    """Names the subject by a word that means nothing yet, and its kind if there is one: "a zwx dog"."""
    class_prompt: str | None = None
    """What the subject is one of: "a dog"."""
    prior_prompts: Path | None = None
    """Instead of class_prompt: many prompts (.txt, one a line), from which as many as class images are
    drawn. Keeps more of what the model knows."""
    num_class_images: int = 64
    """Class images, which the model paints before the training."""
    prior_loss_weight: float = 1.0
    """Weight of the class images; 0 leaves them out."""
    guidance_scale: float | None = None
    """Guidance scale of the class images and of before-after.png: 7.5, or 2 for the built-in model."""
    num_inference_steps: int = 25
    """Steps of the same images."""
    method: Literal["lorad", "lora"] = "lorad"
    """Adapter that is trained."""
    layers: Literal["all", "cross-attention"] = "all"
    """Layers of the adapter: all linear ones that a student's has; or keys and values of the cross-attention,
    which is where the model meets the words (Custom Diffusion, arXiv 2212.04488)."""
    rank: int = 8
    """Rank of the adapter."""
    train_text_encoder: bool = False
    """Also train an adapter, of the same kind and rank, of CLIP's text encoder."""
    learning_rate: float | None = None
    """Learning rate of AdamW: 1e-4 if not given, for the built-in model what suits it."""
    lr_decay_fraction: float = 0.5
    """Last fraction of the training over which the learning rate falls linearly to zero."""
    train_batch_size: int = 4
    """Instance images a step, and as many class images."""
    max_train_steps: int = 400
    """Updates."""
    max_grad_norm: float = 1.0
    """Norm to which the gradients are clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the frozen weights; what is trained is float32 always."""
    checkpointing_steps: int = 100
    """Steps between checkpoints; Ctrl-C saves one too."""
    resume: bool = False
    """Go on with the run in the run folder, from its last checkpoint, with its options, which are omitted."""
    student_adapter: str | None = None
    """Adapter of a one-step student of the model, on which before-after.png also shows the subject."""
    validation_prompts: tuple[str, ...] = ()
    """Rows of before-after.png; the instance prompt and the first class prompt if not given."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""

    def __post_init__(self) -> None:
        for name in ("instance_data_dir", "output_dir", "prior_prompts"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        at_least_1 = ("num_class_images", "num_inference_steps", "rank", "train_batch_size")
        for name in (*at_least_1, "max_train_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise WadiError(f"--{_option(name)}: must be at least 1, but is {getattr(self, name)}")
        check_seed(self.seed, self.num_class_images, "--seed")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise WadiError(f"--{_option(name)}: must be a positive number, but is {value}")
        for name in ("prior_loss_weight", "guidance_scale"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise WadiError(f"--{_option(name)}: must be zero or more, but is {getattr(self, name)}")
        if not 0 <= self.lr_decay_fraction <= 1:
            raise WadiError(f"--lr-decay-fraction: must be between 0 and 1, but is {self.lr_decay_fraction}")
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise WadiError("--mixed-precision: fp16 needs a GPU; use no or bf16")

    def fingerprint(self, inputs: Mapping[str, str | None] | None = None) -> str:
        """Hash of every option that decides the numbers: a checkpoint goes on only under the same one.

        Args:
            inputs: digests of what the options in `INPUTS` name; their paths do not count.
        """
        names = [field.name for field in dataclasses.fields(DreamBoothConfig)]
        values = {name: str(getattr(self, name)) for name in names if name not in (*CHANGEABLE, *INPUTS)}
        values |= inputs or {}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Data:
    """Clean latents (N, C, H, W) float32, scaled as the model sees them, and a prompt for each."""

    latents: torch.Tensor
    prompts: tuple[str, ...]


def dreambooth_loss(
    prediction: torch.Tensor, target: torch.Tensor, instances: int, prior_loss_weight: float
) -> torch.Tensor:
    """mean |p - target|^2 of the first `instances` samples, plus the weighted one of the class images.

    Args:
        prediction: (N, C, H, W) float32.
        target: as `prediction`.
        instances: how many of the N are of the subject; the others, if any, are class images.
        prior_loss_weight: of the class images (arXiv 2208.12242, eq. 2).
    """
    loss = F.mse_loss(prediction[:instances], target[:instances])
    if instances < len(prediction):
        loss = loss + prior_loss_weight * F.mse_loss(prediction[instances:], target[instances:])
    return loss


def dreambooth(config: DreamBoothConfig) -> Path:
    """Teach a subject; write adapter/, pipeline/ and before-after.png into the run folder.

    Returns:
        The run folder.

    Raises:
        WadiError: a mistake of the user or failure of the surroundings, in one line.
        SystemExit: code 130, after Ctrl-C; the run can be resumed.
    """
    config, checkpoint = resolve(config)
    run = config.output_dir
    pictures = read_pictures(config.instance_data_dir)
    inputs = _digests(config)
    if (run / INPUTS_FILE).exists():
        refuse_other_inputs(run, read_json(run / INPUTS_FILE), inputs, INPUTS)
    pipeline = _load(config)
    priors = class_prompts(config)
    _check_lengths(config, priors, pipeline)
    if not (run / "config.json").exists():
        run_output(config).open()
    write_json(run / INPUTS_FILE, inputs)
    write_json(run / "config.json", _as_json(config))
    painted = class_pictures(pipeline, priors, config, run / "class")
    training = DreamBooth(config, pipeline, pictures, painted, priors, inputs)
    if checkpoint is not None:
        training.load_checkpoint(checkpoint)
    if not training.train(run / "checkpoints"):
        print(f"Saved. Go on with: wadi dreambooth {config.instance_data_dir} --out {run} --resume")
        raise SystemExit(130)
    training.save(run)
    rows = config.validation_prompts or (config.instance_prompt, *priors[:1])
    picture = before_after(config, run / "adapter", rows)
    with replacing_file(run / "before-after.png") as temporary:
        picture.save(temporary, format="PNG")
    return run


class DreamBooth:
    """The training of one subject.

    Args:
        config: the options.
        pipeline: the whole stock pipeline; the adapter is put into its denoiser.
        instance_pictures: of the subject, of any sizes: the centre is cut out.
        class_pictures: of `class_prompts`, which may be none.
        class_prompts: one for each class image.
        inputs: digests of the files that the options name; checkpoints are of these.

    Attributes:
        network: the denoiser with the adapter, a `PeftModel`.
        text_encoder: CLIP's text encoder with its adapter, or None if it is not trained.
        global_step: updates done.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        pipeline: DiffusionPipeline,
        instance_pictures: Sequence[Image.Image],
        class_pictures: Sequence[Image.Image],
        class_prompts: Sequence[str],
        inputs: Mapping[str, str | None] | None = None,
    ) -> None:
        self.config, self.global_step, self.fingerprint = config, 0, config.fingerprint(inputs)
        self.backbone: Backbone = BACKBONES[type(pipeline).__name__](pipeline, config.device)
        self.schedule = Schedule.from_config(pipeline.scheduler).to(config.device)
        pipeline.vae.requires_grad_(False).float()
        self.instances = Data(
            self.backbone.encode_images(instance_pictures),
            (config.instance_prompt,) * len(instance_pictures),
        )
        self.priors = None
        if class_pictures:
            self.priors = Data(self.backbone.encode_images(class_pictures), tuple(class_prompts))
        self.conditions = {} if config.train_text_encoder else self._encode()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            layers = student_config(self.backbone.network)
            if config.layers == "cross-attention":
                kept = [name for name in layers.target_modules if name.endswith(WORD_LAYERS)]
                layers = dataclasses.replace(layers, target_modules=kept)
            self.network = _adapted(self.backbone.network, layers, config)
            self.text_encoder: PeftModel | None = None
            if config.train_text_encoder:
                self.text_encoder = self._adapted_text_encoder(pipeline)
        self.parameters = trainable(self.network)
        if self.text_encoder is not None:
            named = trainable(self.text_encoder).items()
            self.parameters |= {f"text_encoder.{name}": p for name, p in named}
        self.learning_rate = LEARNING_RATE if config.learning_rate is None else config.learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters.values(), self.learning_rate)

    def step(self, step: int) -> torch.Tensor:
        """One update, with randomness of (seed, step) alone; returns the loss, 0-dimensional."""
        config, device = self.config, self.backbone.device
        x0, prompts, noise, t = self._draw(step)
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        x_t = self.schedule.add_noise(x0, noise, t)
        told = self.schedule.timestep(t)
        prediction = self.backbone.predict(self.network, x_t, told, self._condition(prompts))
        target = self.schedule.target(x0, noise, t)
        loss = dreambooth_loss(prediction, target, config.train_batch_size, config.prior_loss_weight)
        loss.backward()
        left = (config.max_train_steps - step) / config.max_train_steps
        factor = min(1.0, left / config.lr_decay_fraction) if config.lr_decay_fraction else 1.0
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, checkpoints: Path | None = None) -> bool:
        """Train to `max_train_steps`, saving on the way if `checkpoints` names a folder.

        Returns:
            Whether the end was reached; False after Ctrl-C, when the step was finished and saved.

        Raises:
            WadiError: the loss was not finite, or a file cannot be written.
        """
        config = self.config
        bar = progress(total=config.max_train_steps, initial=self.global_step, unit="step", desc="subject")
        with bar, catch_interrupt() as interrupted:
            while self.global_step < config.max_train_steps:
                loss = self.step(self.global_step)
                self.global_step += 1
                bar.update()
                due = self.global_step % config.checkpointing_steps == 0 or interrupted.is_set()
                end = self.global_step == config.max_train_steps
                if due or end:
                    if not loss.isfinite():
                        raise WadiError(f"step {self.global_step}: the loss is {loss}; lower --learning-rate")
                    bar.set_postfix(loss=f"{loss:.4f}")
                    if checkpoints is not None:
                        self.save_checkpoint(checkpoints)
                if interrupted.is_set() and not end:
                    return False
        return True

    def save_checkpoint(self, folder: Path) -> None:
        """Write `folder`/step-N with adapter, optimizer and step; the one before goes."""
        state = {"config": self.fingerprint}
        save_checkpoint(folder, self.global_step, self._tensors(), state, limit=1)

    def load_checkpoint(self, path: Path) -> None:
        """Take adapter, optimizer and step from a checkpoint.

        Raises:
            WadiError: it is damaged, or of a run with other options.
        """
        groups, state = load_checkpoint(path, self._tensors(), self.fingerprint)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(groups["adapter"][name])
        self.global_step = state["step"]
        for name, p in self.parameters.items():
            moments = ("exp_avg", "exp_avg_sq")
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.global_step)),
                **{key: groups["optimizer"][f"{name}.{key}"].to(p.device) for key in moments},
            }

    def save(self, run: Path) -> None:
        """Write `run`/adapter (PEFT) and `run`/pipeline (the model with the adapter merged, diffusers)."""
        with part(run, "adapter").writing() as temporary:
            name = self.config.pretrained_model_name_or_path
            save_peft(self.network, temporary, None if Path(name).exists() else name)
            if self.text_encoder is not None:
                save_peft(self.text_encoder, temporary / TEXT_ENCODER_FOLDER)
        merged = load_with_adapters(self.config.pretrained_model_name_or_path, [run / "adapter"])
        with part(run, "pipeline").writing() as temporary:
            save_pipeline(merged, temporary)

    def _draw(self, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        """x0 (N, C, H, W), N prompts, noise and timesteps (N,), on the CPU: instances first, then priors."""
        size = self.config.train_batch_size
        seed = np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        latents, prompts = [], []
        for data in (self.instances, self.priors):
            if data is not None:
                index = torch.randint(len(data.latents), (size,), generator=generator)
                latents.append(data.latents[index])
                prompts += [data.prompts[i] for i in index]
        x0 = torch.cat(latents)
        noise = torch.randn(x0.shape, generator=generator)
        t = self.schedule.sample_t(len(x0), 0.0, 1.0, generator)
        return x0, prompts, noise, t

    def _encode(self) -> dict[str, Condition]:
        """What the frozen text encoder gives for each prompt, (1, ...)."""
        prompts = self.instances.prompts + (() if self.priors is None else self.priors.prompts)
        unique = list(dict.fromkeys(prompts))
        condition = self.backbone.text.encode(unique)
        return {prompt: pick(condition, slice(i, i + 1)) for i, prompt in enumerate(unique)}

    def _condition(self, prompts: Sequence[str]) -> Condition:
        device = self.backbone.device
        if self.text_encoder is None:
            condition = concatenate([self.conditions[prompt] for prompt in prompts])
            return {name: tensor.to(device) for name, tensor in condition.items()}
        tokenizer = self.backbone.pipeline.tokenizer
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options).input_ids
        return {"encoder_hidden_states": self.text_encoder(input_ids=ids.to(device))[0]}

    def _adapted_text_encoder(self, pipeline: DiffusionPipeline) -> PeftModel:
        if len(self.backbone.text.parts) > 1:
            raise WadiError(
                f"--train-text-encoder: a {type(pipeline).__name__} has several text encoders, which cannot "
                "be trained; omit the option"
            )
        if not isinstance(pipeline.text_encoder, CLIPTextModel):
            kind = type(pipeline.text_encoder).__name__
            raise WadiError(f"--train-text-encoder: the text encoder is a {kind}, only CLIP's can be trained")
        encoder = pipeline.text_encoder.to(self.config.device).requires_grad_(False).eval()
        return _adapted(encoder, LoRaDConfig(target_modules=TEXT_ENCODER_LAYERS), self.config)

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        moments = {}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {})
            for key in ("exp_avg", "exp_avg_sq"):
                moments[f"{name}.{key}"] = state.get(key, torch.zeros_like(p))
        return {"adapter": {k: p.detach() for k, p in self.parameters.items()}, "optimizer": moments}


def _adapted(network: torch.nn.Module, like: LoRaDConfig, config: DreamBoothConfig) -> PeftModel:
    """The network with a trainable float32 adapter of the method and rank, on the layers of `like`."""
    named = [name for name, _ in network.named_modules() if name.endswith(tuple(like.target_modules))]
    check_rank("--rank", config.rank, layer_sizes(network, named).values(), config.method == "lorad")
    adapter = method_config(config.method, dataclasses.replace(like, r=config.rank))
    model = get_peft_model(network, adapter)
    cast_training_params(model, torch.float32)
    return model


def save_peft(model: PeftModel, folder: Path, base_model: str | None = None) -> None:
    """Write an adapter of any kind as PEFT does, with its model's hub id but no path of this machine."""
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base_model, True
    save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict(model), {"format": "pt"})
    config.save_pretrained(str(folder))


def read_pictures(folder: Path) -> list[Image.Image]:
    """All images in a folder, by name, RGB, as `open_picture` reads them.

    Raises:
        WadiError: no such folder, no image in it, or a file that is not one.
    """
    return [open_picture(path) for path in image_files(folder)]


def class_prompts(config: DreamBoothConfig) -> list[str]:
    """The prompt of each class image.

    Raises:
        WadiError: prior preservation without a prompt.
    """
    if not config.prior_loss_weight:
        return []
    if config.prior_prompts is not None:
        known = list(dict.fromkeys(prompt.text for prompt in read_prompts(str(config.prior_prompts))))
        order = np.random.default_rng([config.seed, 1]).permutation(len(known))
        return [known[order[i % len(known)]] for i in range(config.num_class_images)]
    if config.class_prompt is None:
        raise WadiError(
            '--class-prompt: say what the subject is one of, such as "a dog", for prior preservation; '
            "or name --prior-prompts, or set --prior-loss-weight 0"
        )
    return [config.class_prompt] * config.num_class_images


@torch.no_grad()
def class_pictures(
    pipeline: DiffusionPipeline, prompts: Sequence[str], config: DreamBoothConfig, folder: Path
) -> list[Image.Image]:
    """What the model itself paints for each prompt, image i from seed + i; kept in `folder` as PNG.

    A folder that already holds them, by a run with the same options, is read instead.
    """
    names = [f"{i:04d}.png" for i in range(len(prompts))]
    if prompts and not (folder / names[-1]).is_file():
        with part(folder.parent, folder.name).writing() as temporary:
            starts = range(0, len(prompts), GENERATED_AT_ONCE)
            for first in progress(starts, desc="class images", unit="batch"):
                chunk = list(prompts[first : first + GENERATED_AT_ONCE])
                images = _paint(pipeline, chunk, config, config.seed + first)
                for name, image in zip(names[first:], images, strict=False):
                    image.save(temporary / name)
    return [open_picture(folder / name) for name in names]


def _paint(
    pipeline: DiffusionPipeline, prompts: list[str], config: DreamBoothConfig, seed: int
) -> list[Image.Image]:
    return pipeline(
        prompts,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale,
        generator=seeded(seed, len(prompts)),
        **stock_arguments(pipeline),
    ).images


def load_with_adapters(
    model: str | os.PathLike,
    adapters: Sequence[str | Path],
    torch_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> DiffusionPipeline:
    """The multi-step pipeline of `model` with adapters merged in the order given.

    Raises:
        WadiError: something is missing or does not fit.
    """
    pipeline = load_pipeline(model, torch_dtype)
    merge_adapters(pipeline, adapters)
    return pipeline.to(device)


def before_after(config: DreamBoothConfig, adapter: Path, prompts: Sequence[str]) -> Image.Image:
    """A row for each prompt: the model before and after, and likewise the student if one is named.

    Two images of each, from the noise of `seed` and `seed` + 1.
    """
    model, columns, headings = config.pretrained_model_name_or_path, [], []
    dtype = DTYPES[config.mixed_precision]
    steps = f"{config.num_inference_steps} steps"
    for name, adapters in ((f"before, {steps}", []), (f"after, {steps}", [adapter])):
        pipeline = load_with_adapters(model, adapters, dtype, config.device)
        pipeline.set_progress_bar_config(disable=True)
        columns.append([_paint(pipeline, [prompt] * 2, config, config.seed) for prompt in prompts])
        headings += [name, ""]
    if config.student_adapter is not None:
        for name, more in (("student before, 1 step", []), ("student after, 1 step", [adapter])):
            adapters = [config.student_adapter, *more]
            student = OneStepPipeline.from_pretrained(model, adapters, dtype, config.device)
            pictures = [student(p, seed=config.seed, num_images_per_prompt=2) for p in prompts]
            columns.append(pictures)
            headings += [name, ""]
    rows = [
        (prompt, [image for column in columns for image in column[row]]) for row, prompt in enumerate(prompts)
    ]
    return labelled_grid(rows, headings)


def run_output(config: DreamBoothConfig) -> Output:
    """The rule for the run folder of a new run."""
    model, student = config.pretrained_model_name_or_path, config.student_adapter
    inputs = (config.instance_data_dir, model, config.prior_prompts, student)
    return Output(config.output_dir, "dreambooth", inputs, instead="go on with --resume")


def part(run: Path, name: str) -> Output:
    """A folder in a run folder: one that the run wrote is replaced when it goes on."""
    return Output(run / name, "dreambooth", overwrite=True)


def resolve(config: DreamBoothConfig) -> tuple[DreamBoothConfig, Path | None]:
    """Check the run folder; where a run is resumed, find its checkpoint.

    Returns:
        The config with absolute paths, and the checkpoint to go on from, if any.

    Raises:
        WadiError: no model is named, the folder is in use, or there is no run with these options to resume.
    """
    if config.pretrained_model_name_or_path is None:
        raise WadiError("--pretrained-model-name-or-path: is required")
    run = config.output_dir
    if not config.resume:
        run_output(config).check()
        return config, None
    for name in ("adapter", "pipeline", "class"):
        part(run, name).check()
    return _saved_options(config), latest_checkpoint(run / "checkpoints")


def _saved_options(config: DreamBoothConfig) -> DreamBoothConfig:
    """Those of the run in the run folder; what may change is taken from `config`."""
    path = config.output_dir / "config.json"
    if not path.is_file():
        raise WadiError(f"{config.output_dir}: not a run of wadi dreambooth (no config.json)")
    saved, values = read_json(path), {}
    for field in dataclasses.fields(DreamBoothConfig):
        given = getattr(config, field.name)
        if field.name in CHANGEABLE or (field.name in INPUTS and given != field.default):
            continue
        if not isinstance(saved, dict) or field.name not in saved:
            raise WadiError(f"{path}: lacks {field.name}; start a new run")
        if given != field.default and str(given) != str(saved[field.name]):
            raise WadiError(
                f"--{_option(field.name)}: the run was started with {saved[field.name]}, it cannot go on "
                f"with {given}; leave the option away or start a new run"
            )
        values[field.name] = saved[field.name]
    return dataclasses.replace(config, **values)


def _digests(config: DreamBoothConfig) -> dict[str, str | None]:
    """What the options in `INPUTS` name, by content."""
    prompts = config.prior_prompts
    return {
        "pretrained_model_name_or_path": model_digest(config.pretrained_model_name_or_path),
        "instance_data_dir": files_digest(config.instance_data_dir),
        "prior_prompts": None if prompts is None else files_digest(prompts),
    }


def _load(config: DreamBoothConfig) -> DiffusionPipeline:
    pipeline = load_pipeline(config.pretrained_model_name_or_path, DTYPES[config.mixed_precision])
    name = type(pipeline).__name__
    if name not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise WadiError(f"{config.pretrained_model_name_or_path}: holds a {name}; name one of {known}")
    check_teacher(config.pretrained_model_name_or_path, pipeline.scheduler, network_of(pipeline))
    if config.student_adapter is not None:
        student_with(pipeline, [adapter_folder(config.student_adapter)])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config.device)


def _check_lengths(config: DreamBoothConfig, priors: list[str], pipeline: DiffusionPipeline) -> None:
    sources = {"--instance-prompt": [config.instance_prompt], "--class-prompt": priors}
    if config.prior_prompts is not None:
        sources[str(config.prior_prompts)] = sources.pop("--class-prompt")
    sources["--validation-prompts"] = list(config.validation_prompts)
    for source, texts in sources.items():
        if texts:
            prompts = [Prompt(text, line) for line, text in enumerate(texts, 1)]
            check_length(prompts, pipeline.tokenizer, source, limit=prompt_limit(pipeline))


def _as_json(config: DreamBoothConfig) -> dict[str, object]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def _option(name: str) -> str:
    return name.replace("_", "-")
