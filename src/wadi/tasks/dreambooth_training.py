"""The training of DreamBooth (Ruiz et al., arXiv 2208.12242): the loss, what is trained, and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from wadi.backbones.condition import Condition, pick
from wadi.distill.checkpoint import load_checkpoint, save_checkpoint
from wadi.distill.checks import check_rank, layer_sizes
from wadi.distill.methods import method_config
from wadi.distill.roles import trainable
from wadi.errors import WadiError
from wadi.files import save_tensors
from wadi.interrupt import catch_interrupt
from wadi.lorad import LoRaDConfig
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER
from wadi.onestep.student import network_of
from wadi.progress import progress
from wadi.tasks.dreambooth_config import DreamBoothConfig

WORD_LAYERS = ("attn2.to_k", "attn2.to_v")
"""Keys and values of the cross-attention, in U-Nets and in PixArt's transformer."""
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""All linear layers of CLIP's text encoder."""
_TEXT_ENCODER = LoRaDConfig(target_modules=TEXT_ENCODER_LAYERS)
LEARNING_RATE = 1e-4
"""Learning rate if none is given, as in diffusers' train_dreambooth_lora.py."""


@dataclass(frozen=True)
class Data:
    """Clean latents (N, C, H, W) float32, scaled as the model has them, and a prompt for each."""

    latents: torch.Tensor
    prompts: tuple[str, ...]


def dreambooth_loss(
    prediction: torch.Tensor, target: torch.Tensor, instances: int, prior_loss_weight: float
) -> torch.Tensor:
    """The mean of |p - target|^2 over images of the subject, plus its weighted mean over class images.

    Args:
        prediction: p, (N, C, H, W) float32.
        target: (N, C, H, W) float32, the noise or the velocity, as the model predicts.
        instances: number of images of the subject, which come first; the others, if any, are class images.
        prior_loss_weight: weight of the class images (arXiv 2208.12242, eq. 2).
    """
    loss = F.mse_loss(prediction[:instances], target[:instances])
    if instances < len(prediction):
        loss = loss + prior_loss_weight * F.mse_loss(prediction[instances:], target[instances:])
    return loss


class DreamBooth:
    """The training of one subject.

    Args:
        config: the options.
        pipeline: the whole stock pipeline; the adapter is put into its denoiser.
        instance_images: images of the subject, of any size; what does not fit is cut off on both sides.
        class_images: class images; there may be none.
        class_prompts: a prompt for each class image.
        inputs: digests of the files that the options name; a checkpoint fits only the same files.

    Attributes:
        network: the denoiser with the adapter, a `PeftModel`.
        text_encoder: CLIP's text encoder with its adapter, or None if it is not trained.
        parameters: what is trained, by name.
        global_step: number of updates so far.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        pipeline: DiffusionPipeline,
        instance_images: Sequence[Image.Image],
        class_images: Sequence[Image.Image],
        class_prompts: Sequence[str],
        inputs: Mapping[str, str | None] | None = None,
    ) -> None:
        self.config, self.global_step, self.fingerprint = config, 0, config.fingerprint(inputs)
        self.backbone: Backbone = BACKBONES[type(pipeline).__name__](pipeline, config.device)
        self.schedule = self.backbone.schedule().to(config.device)
        pipeline.vae.requires_grad_(False).float()
        self.instances = Data(
            self.backbone.encode_images(instance_images),
            (config.instance_prompt,) * len(instance_images),
        )
        self.priors = None
        if class_images:
            self.priors = Data(self.backbone.encode_images(class_images), tuple(class_prompts))
        known = self.instances.prompts + (() if self.priors is None else self.priors.prompts)
        self.prompts = list(dict.fromkeys(known))
        # a frozen text encoder encodes every prompt once
        self.conditions = {} if config.train_text_encoder else self.backbone.encode(self.prompts)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.network = _adapted(self.backbone.network, _layers(config, pipeline), config)
            self.text_encoder: PeftModel | None = None
            if config.train_text_encoder:
                _check_text_encoder(pipeline)
                encoder = pipeline.text_encoder.to(config.device).requires_grad_(False).eval()
                self.text_encoder = _adapted(encoder, _TEXT_ENCODER, config)
        self.parameters = trainable(self.network)
        if self.text_encoder is not None:
            named = trainable(self.text_encoder).items()
            self.parameters |= {f"text_encoder.{name}": p for name, p in named}
        self.learning_rate = LEARNING_RATE if config.learning_rate is None else config.learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters.values(), self.learning_rate)
        for p in self.parameters.values():  # what the first step would create; a checkpoint is loaded into it
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros(()), **moments}

    def step(self, step: int) -> torch.Tensor:
        """Do one update, whose randomness depends on (seed, step) alone; returns the loss, 0-dimensional."""
        config, device = self.config, self.backbone.device
        x0, prompts, noise, t = self._draw(step)
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        x_t = self.schedule.add_noise(x0, noise, t)
        time = self.schedule.timestep(t)
        prediction = self.backbone.predict(self.network, x_t, time, self._condition(prompts))
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
        """Train until `max_train_steps`, and save checkpoints if `checkpoints` names a folder.

        Returns:
            Whether the end was reached. After Ctrl-C the step is finished and saved, and it is False.

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
        """Write `folder`/step-N with adapter, optimizer and step; an older checkpoint is removed."""
        save_checkpoint(folder, self.global_step, self._tensors(), {"config": self.fingerprint}, limit=1)

    def load_checkpoint(self, path: Path) -> None:
        """Read adapter, optimizer and step from a checkpoint.

        Raises:
            WadiError: the checkpoint is damaged, or of a run with other options.
        """
        own = self._tensors()
        groups, state = load_checkpoint(path, own, self.fingerprint)
        for group, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(groups[group][name])
        self.global_step = state["step"]

    def save(self, folder: Path) -> None:
        """Write the adapters of denoiser and text encoder into an existing folder, as PEFT does."""
        name = self.config.pretrained_model_name_or_path
        save_peft(self.network, folder, None if Path(name).exists() else name)
        if self.text_encoder is not None:
            save_peft(self.text_encoder, folder / TEXT_ENCODER_FOLDER)

    def _draw(self, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        """x0 (N, C, H, W), N prompts, noise and timesteps (N,), on the CPU; the subject comes first."""
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

    def _condition(self, prompts: Sequence[str]) -> Condition:
        device = self.backbone.device
        if self.text_encoder is None:
            chosen = pick(self.conditions, [self.prompts.index(prompt) for prompt in prompts])
            return {name: tensor.to(device) for name, tensor in chosen.items()}
        tokenizer = self.backbone.pipeline.tokenizer
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options).input_ids
        return {"encoder_hidden_states": self.text_encoder(input_ids=ids.to(device))[0]}

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds; live tensors, not copies."""
        state = self.optimizer.state
        return {
            "adapter": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": {f"{n}.{key}": x for n, p in self.parameters.items() for key, x in state[p].items()},
        }


def check_trainable(config: DreamBoothConfig, pipeline: DiffusionPipeline) -> None:
    """Refuse layers, a text encoder or a rank that cannot be trained, before images are made.

    Raises:
        WadiError: the pipeline has no such layers, its text encoder cannot be trained, or no layer can use
            the rank.
    """
    _check_rank(network_of(pipeline), _layers(config, pipeline), config)
    if config.train_text_encoder:
        _check_text_encoder(pipeline)
        _check_rank(pipeline.text_encoder, _TEXT_ENCODER, config)


def _layers(config: DreamBoothConfig, pipeline: DiffusionPipeline) -> LoRaDConfig:
    layers = student_config(network_of(pipeline))
    if config.layers == "all":
        return layers
    kept = [name for name in layers.target_modules if name.endswith(WORD_LAYERS)]
    if not kept:
        raise WadiError(
            f"--layers cross-attention: a {type(pipeline).__name__} has no cross-attention layers; use all"
        )
    return dataclasses.replace(layers, target_modules=kept)


def _check_text_encoder(pipeline: DiffusionPipeline) -> None:
    if len(BACKBONES[type(pipeline).__name__].text_class.parts) > 1:
        raise WadiError(
            f"--train-text-encoder: a {type(pipeline).__name__} has several text encoders, which cannot "
            "be trained; omit the option"
        )
    if not isinstance(pipeline.text_encoder, CLIPTextModel):
        kind = type(pipeline.text_encoder).__name__
        raise WadiError(
            f"--train-text-encoder: the text encoder is a {kind}, and only CLIP's can be trained; "
            "omit the option"
        )


def _check_rank(network: torch.nn.Module, like: LoRaDConfig, config: DreamBoothConfig) -> None:
    named = [name for name, _ in network.named_modules() if name.endswith(tuple(like.target_modules))]
    check_rank("--rank", config.rank, layer_sizes(network, named).values(), config.method == "lorad")


def _adapted(network: torch.nn.Module, like: LoRaDConfig, config: DreamBoothConfig) -> PeftModel:
    """Put a trainable float32 adapter on the layers of `like`, with the method and rank of the options."""
    _check_rank(network, like, config)
    adapter = method_config(config.method, dataclasses.replace(like, r=config.rank))
    model = get_peft_model(network, adapter)
    cast_training_params(model, torch.float32)
    return model


def save_peft(model: PeftModel, folder: Path, base_model: str | None = None) -> None:
    """Write an adapter of any kind as PEFT does, with the hub id of its model but no path of this machine."""
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base_model, True
    save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict(model), {"format": "pt"})
    config.save_pretrained(str(folder))
