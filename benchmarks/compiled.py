"""Does a compiled iteration compute what it should: its gradients against the plain one's and float64's.

    python benchmarks/compiled.py                      # on a GPU; the whole table
    python benchmarks/compiled.py --device cpu         # needs a C++ compiler, takes minutes

Trained weights cannot tell: Adam's first steps are the signs of the gradients, so the rounding of an entry
that is nearly zero becomes a whole step. Here every way of running one iteration starts from the same weights
and the same draws, and its gradients (before clipping) are compared with those of the equations in float64,
written out in this file:

    error = ||g - g_float64|| / ||g_float64||      over the parameters of the student, or of the fake model

A way is right if its error is about that of the plain iteration of the same precision. "start" is the
first iteration, where student and fake model equal the teacher; "later" has random angles in both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import tyro
from diffusers import StableDiffusionPipeline

from wadi import emoji
from wadi.backbones import UNetBackbone
from wadi.backbones.condition import Condition, concatenate, repeat
from wadi.distill import DistillConfig, Trainer, make_accelerator, regions
from wadi.onestep import load_pipeline
from wadi.prompts import encode_prompts

PROMPTS = ["a panda", "a red apple on a blue background", "a cat left of a dog", "a big rocket"]

WAYS: dict[str, dict] = {
    "plain": {},
    "graph": {"cuda_graphs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "compiled, transformer blocks": {"compile": True, "regions": ("BasicTransformerBlock",)},
    "compiled, residual blocks": {"compile": True, "regions": ("ResnetBlock2D",)},
    "compiled, without code generation": {"compile": True, "backend": "aot_eager"},
    "compiled, checkpointing": {"compile": True, "gradient_checkpointing": True},
    "compiled, graph": {"compile": True, "cuda_graphs": True},
    "compiled, graph, checkpointing": {"compile": True, "cuda_graphs": True, "gradient_checkpointing": True},
    "compiled, graph, two micro-batches": {
        "compile": True,
        "cuda_graphs": True,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
}
"""Options of `DistillConfig`, and what is compiled, and by which backend."""

Gradients = dict[str, torch.Tensor]
"""One vector, float64 on the CPU, for the student and one for the fake model."""


@dataclasses.dataclass
class Options:
    """What is measured."""

    device: str = "cuda"
    """Where the iterations run."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Which rows."""

    precisions: tuple[str, ...] = ("no", "bf16")
    """Of the frozen base."""

    tf32: bool = False
    """Let float32 convolutions and matrix products round to TF32, which is coarser than what is compared."""

    out: Path | None = None
    """A JSON file to write."""


def make_trainer(pipeline: StableDiffusionPipeline, device: str, precision: str, way: str) -> Trainer:
    """A trainer that runs an iteration of a pipeline in one of `WAYS`."""
    changes = {"train_batch_size": 4} | WAYS[way]
    for name in ("regions", "backend"):
        changes.pop(name, None)
    config = DistillConfig.of(
        mixed_precision=precision,
        student_rank=8,
        fake_rank=8,
        fake_layers="student",
        fake_weighting="alpha_squared",
        guidance_scale=2.0,
        fake_guidance_scale=1.0,
        null_prompt_probability=0.0,
        max_grad_norm=1e9,
        **changes,
    )
    accelerator = make_accelerator(config)
    torch.nn.Module.to(pipeline.unet, config.run.dtype)
    backbone = UNetBackbone(pipeline, torch.device(device))
    return Trainer(config, backbone, encode_prompts(backbone.text, PROMPTS, []), accelerator)


def set_angles(trainer: Trainer) -> None:
    """Random factors A in student and fake model, the same on every machine; angles of some 0.1 rad."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in [*trainer.student_parameters.items(), *trainer.fake_parameters.items()]:
            if "lorad_A" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def measured(
    pipeline: StableDiffusionPipeline, device: str, precision: str, way: str
) -> Iterator[tuple[str, Trainer, Gradients]]:
    """When, at which weights, and the gradients of iteration 0 as the trainer's optimizers would see them."""
    kinds, backend = WAYS[way].get("regions", UNetBackbone.blocks), WAYS[way].get("backend", "inductor")
    torch._dynamo.reset()
    regions._compiled_forward.cache_clear()
    with mock.patch.object(UNetBackbone, "blocks", kinds), mock.patch.object(regions, "BACKEND", backend):
        trainer = make_trainer(pipeline, device, precision, way)
        updates = {"student": trainer.student_update, "fake": trainer.fake_update}
        buffers = {
            role: [torch.zeros_like(p) for p in update.parameters.values()]
            for role, update in updates.items()
        }

        def keep(role: str) -> torch.Tensor:
            own = [p.grad for p in updates[role].parameters.values()]
            torch._foreach_copy_(buffers[role], own)
            updates[role].optimizer.zero_grad(set_to_none=True)
            return torch.stack(torch._foreach_norm(own)).norm()

        for role, update in updates.items():  # no update: the weights stay
            update.apply = partial(keep, role)
        for when in ("start", "later"):
            if when == "later":
                set_angles(trainer)
            trainer.step(0)
            trainer.synchronize()
            found = {role: torch.cat([b.flatten().double().cpu() for b in buffers[role]]) for role in buffers}
            yield when, trainer, found


def exact(trainer: Trainer) -> Gradients:
    """The equations of one iteration in float64 on the CPU, at the trainer's weights and draws."""
    inputs = trainer.draw(0)
    trainer.synchronize()
    student, fake, teacher = (
        copy.deepcopy(network).to("cpu", torch.float64)
        for network in (trainer.student, trainer.fake, trainer.teacher)
    )
    for network in (student, fake, teacher):
        for module in network.modules():  # blocks as they were before they were compiled
            module.__dict__.pop("forward", None)
    alphas = trainer.schedule.alphas.double().cpu()
    draws = inputs.z, inputs.place["noise"], inputs.fake[0]["noise"]
    z, noise, fake_noise = (x.double().cpu() for x in draws)
    condition = {name: x.double().cpu() for name, x in inputs.condition.items()}
    null = repeat({name: x.double().cpu() for name, x in trainer.null.items()}, len(z))

    def predict(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, c: Condition) -> torch.Tensor:
        return network(x, t, encoder_hidden_states=c["encoder_hidden_states"]).sample

    def levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = alphas[t].view(-1, 1, 1, 1)
        return alpha, (1 - alpha**2).sqrt()

    T = torch.full((len(z),), len(alphas) - 1)
    alpha, sigma = levels(T)
    x0 = (z - sigma * predict(student, z, T, condition)) / alpha
    t = inputs.place["t"].cpu()
    alpha, sigma = levels(t)
    x_t = (alpha * x0 + sigma * noise).detach()
    with torch.no_grad():
        both = predict(teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), concatenate([null, condition]))
        p_null, p_cond = both.chunk(2)
        eps_teacher = p_null + trainer.config.objective.guidance_scale * (p_cond - p_null)
        eps_fake = predict(fake, x_t, t, condition)
        direction = sigma**2 * (eps_teacher - eps_fake)
    loss = (x0 * direction).sum() / x0.numel()
    names = list(trainer.student_parameters)
    own = dict(student.named_parameters())
    student_gradient = torch.autograd.grad(loss, [own[name] for name in names])

    t = inputs.fake[0]["t"].cpu()
    alpha, sigma = levels(t)
    x_t = alpha * x0.detach() + sigma * fake_noise
    loss = (alpha**2 * (predict(fake, x_t, t, condition) - fake_noise) ** 2).mean()
    own = dict(fake.named_parameters())
    fake_gradient = torch.autograd.grad(loss, [own[name] for name in trainer.fake_parameters])
    return {
        role: torch.cat([g.flatten() for g in parts])
        for role, parts in (("student", student_gradient), ("fake", fake_gradient))
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


def main(options: Options) -> None:
    """Print the table; write it as JSON."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    rows = []
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}: relative error to float64\n")
    print(f"{'':36}{'base':>6}{'':>8}{'student':>11}{'fake':>11}")
    for precision in options.precisions:
        for way in options.ways:
            if options.device == "cpu" and WAYS[way].get("cuda_graphs"):
                continue
            for when, trainer, found in measured(
                load_pipeline(emoji.teacher_folder()), options.device, precision, way
            ):
                expected = exact(trainer)
                row = {role: relative_error(found[role], expected[role]) for role in expected}
                rows.append({"way": way, "base": precision, "when": when, **row})
                print(f"{way:36}{precision:>6}{when:>8}{row['student']:11.2e}{row['fake']:11.2e}", flush=True)
    if options.out is not None:
        result = {
            "model": options.model,
            "device": device,
            "torch": torch.__version__,
            "tf32": options.tf32,
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
