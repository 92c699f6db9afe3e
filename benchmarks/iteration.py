"""One iteration of WaDi's training, against the same iteration as it is usually written.

    python benchmarks/iteration.py                      # SD 1.5's configuration, random weights, a GPU
    python benchmarks/iteration.py --size tiny --batch-sizes 2 --device cpu   # a smoke test

The plain statement holds three separate networks, adapts student and fake model by forward hooks that compute
every adapted layer twice (see adapters.py), and evaluates the guided predictions of teacher and fake model in
four calls. Both do the same arithmetic: one update of the student, one of the fake model, the average, the
same batch, ranks, precision and optimizer. Medians in one process; memory is the allocator's peak with
everything that the iteration needs on the card.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from adapters import CONFIGS, Clock, HookAdapter, header

from wadi.distill import DistillConfig, Trainer, UNetBackbone, make_accelerator
from wadi.distill.losses import fake_loss, generator_loss, guided, vsd_gradient
from wadi.distill.prompts import PromptEmbeddings
from wadi.distill.roles import enable_gradient_checkpointing
from wadi.distill.schedule import Schedule
from wadi.lorad.presets import fake_config, student_config

RANKS = {"sd15": (256, 32), "tiny": (4, 2)}


@dataclass
class Options:
    """Time one training iteration, ours and a plain one."""

    size: Literal["sd15", "tiny"] = "sd15"
    """Configuration of the U-Net; its weights are random."""
    batch_sizes: tuple[int, ...] = (4, 16)
    """Latents an iteration."""
    gradient_checkpointing: tuple[bool, ...] = (False, True)
    """Without and with recomputation in backward."""
    repeats: int = 6
    """Timed iterations; the median counts."""
    seconds: float = 12.0
    """Stop repeating a case after this long."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    out: Path | None = None
    """JSON file for the figures."""


def new_network(options: Options) -> UNet2DConditionModel:
    """A U-Net of random bfloat16 weights on the device."""
    torch.manual_seed(0)
    with torch.device(options.device):
        return UNet2DConditionModel(**CONFIGS[options.size]).to(torch.bfloat16).eval().requires_grad_(False)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def ours(options: Options, batch: int, checkpointing: bool) -> Callable[[], object]:
    """The project's trainer, a step at a time; prompts are drawn from 64 random embeddings."""
    student_rank, fake_rank = RANKS[options.size]
    config = DistillConfig(
        train_batch_size=batch,
        student_rank=student_rank,
        fake_rank=fake_rank,
        mixed_precision="bf16",
        allow_tf32=True,
        gradient_checkpointing=checkpointing,
        null_prompt_probability=0.0,
    )
    network = new_network(options)
    pipeline = SimpleNamespace(unet=network, scheduler=new_scheduler())
    width = network.config.cross_attention_dim
    states = torch.randn(64, 77, width, dtype=torch.bfloat16)
    prompts = PromptEmbeddings(states, states[:1], states[:0])
    trainer = Trainer(config, UNetBackbone(pipeline, options.device), prompts, make_accelerator(config))
    steps = iter(range(1_000_000))
    return lambda: trainer.step(next(steps))


class Plain:
    """The iteration as it is usually written."""

    def __init__(self, options: Options, batch: int, checkpointing: bool) -> None:
        self.device = torch.device(options.device)
        self.batch, self.config = batch, DistillConfig()
        self.schedule = Schedule.from_config(new_scheduler().config).to(self.device)
        self.teacher = new_network(options)
        student_rank, fake_rank = RANKS[options.size]
        self.student, self.student_hooks = self._hooked(student_config(self.teacher, student_rank))
        self.fake, self.fake_hooks = self._hooked(fake_config(self.teacher, fake_rank))
        if checkpointing:
            for network in (self.student, self.fake):
                enable_gradient_checkpointing(network.train())
        self.optimizers = [
            torch.optim.AdamW(hooks.parameters(), lr=1e-4, fused=True)
            for hooks in (self.student_hooks, self.fake_hooks)
        ]
        self.ema = [parameter.detach().clone() for parameter in self.student_hooks.parameters()]
        size, width = self.teacher.config.sample_size, self.teacher.config.cross_attention_dim
        self.shape = (batch, 4, size, size)
        self.states = torch.randn(64, 77, width, device=self.device, dtype=torch.bfloat16)

    def _hooked(self, config) -> tuple[nn.Module, nn.ModuleList]:
        network = copy.deepcopy(self.teacher)
        layers = [module for name, module in network.named_modules() if name in set(config.target_modules)]
        return network, nn.ModuleList([HookAdapter(layer, config.r) for layer in layers])

    def predict(self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor):
        """Noise prediction, float32."""
        return network(x.bfloat16(), t, states, return_dict=False)[0].float()

    def guided(
        self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, scale: float
    ):
        """Two calls: without and with the prompt."""
        null = self.predict(network, x, t, self.states[:1].expand_as(states))
        return guided(null, self.predict(network, x, t, states), scale)

    def __call__(self) -> None:
        """One update of the student, its average, one update of the fake model."""
        device, config, schedule = self.device, self.config, self.schedule
        states = self.states[torch.randint(64, (self.batch,), device=device)]
        z, noise, fake_noise = (torch.randn(self.shape, device=device) for _ in range(3))
        last = torch.full((self.batch,), 999, device=device)
        x0 = schedule.one_step(self.predict(self.student, z, last, states), z)
        with torch.no_grad():
            t = torch.randint(20, 981, (self.batch,), device=device)
            x_t = schedule.add_noise(x0, noise, t)
            teacher = self.guided(self.teacher, x_t, t, states, config.guidance_scale)
            fake = self.guided(self.fake, x_t, t, states, config.fake_guidance_scale)
            gradient = vsd_gradient(teacher, fake, schedule.sigma(t))
        generator_loss(x0, gradient).backward()
        self.update(0, self.student_hooks)
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.student_hooks.parameters(), strict=True):
                average.lerp_(parameter, 1 - config.ema_decay)
        t = torch.randint(0, 1000, (self.batch,), device=device)
        prediction = self.predict(self.fake, schedule.add_noise(x0.detach(), fake_noise, t), t, states)
        fake_loss(prediction, fake_noise, schedule.alpha(t) ** 2).backward()
        self.update(1, self.fake_hooks)

    def update(self, which: int, hooks: nn.ModuleList) -> None:
        """Clip, AdamW, clear."""
        torch.nn.utils.clip_grad_norm_(hooks.parameters(), 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)


def measure(options: Options, make: Callable, batch: int, checkpointing: bool) -> dict:
    """Milliseconds and peak memory of one iteration, or that it does not fit."""
    clock = Clock(options)
    try:
        milliseconds, peak = clock(make(options, batch, checkpointing))
    except torch.OutOfMemoryError:
        return {"ms": float("nan"), "peak_gib": float("inf")}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return {"ms": milliseconds, "peak_gib": peak}


def main(options: Options) -> None:
    """Measure everything and print the table."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    head = header(options)
    print(head, flush=True)
    rows = []
    print(
        "| batch | checkpointing | plain, ms | ours, ms | throughput | plain, GiB | ours, GiB | memory |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for checkpointing in options.gradient_checkpointing:
        for batch in options.batch_sizes:
            plain, mine = (measure(options, make, batch, checkpointing) for make in (Plain, ours))
            rows.append(
                {"batch_size": batch, "gradient_checkpointing": checkpointing, "plain": plain, "ours": mine}
            )
            print(
                f"| {batch} | {'yes' if checkpointing else 'no'} | {plain['ms']:.0f} | {mine['ms']:.0f} | "
                f"{plain['ms'] / mine['ms']:.2f} x | {plain['peak_gib']:.1f} | {mine['peak_gib']:.1f} | "
                f"{mine['peak_gib'] / plain['peak_gib']:.2f} x |",
                flush=True,
            )
    if options.out is not None:
        options.out.write_text(json.dumps({"header": head, "options": str(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
