"""One iteration of WaDi's training, against the same iteration as it is usually written.

    python benchmarks/iteration.py                      # SD 1.5's configuration, random weights, a GPU
    python benchmarks/iteration.py --compile            # a row more: the trainer with compiled blocks
    python benchmarks/iteration.py --model pixart-256 --batch-sizes 4
    python benchmarks/iteration.py --model tiny --batch-sizes 2 --device cpu   # a smoke test

The plain statement holds three separate networks, adapts student and fake model by forward hooks that compute
every adapted layer twice (see adapters.py), and evaluates the guided predictions of teacher and fake model in
four calls. Both do the same arithmetic: one update of the student, one of the fake model, the average, the
same batch, ranks, precision and optimizer. "Networks alone" is what no implementation can leave out: the
calls of the three networks, and backward to activations and to the weights that are adapted; no adapter,
loss, average or optimizer. Medians in one process; memory is the allocator's peak with everything that the
iteration needs on the card.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from diffusers import DDIMScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from adapters import Clock, HookAdapter, header
from published import make_network

from wadi.backbones import Backbone, PixArtBackbone, UNetBackbone, fake_config, student_config
from wadi.backbones.condition import Condition, concatenate, pick
from wadi.distill import DistillConfig, Trainer, make_accelerator
from wadi.distill.fake import fake_loss
from wadi.distill.regions import compile_regions, compiling
from wadi.distill.roles import enable_gradient_checkpointing, view
from wadi.distill.scores import guided
from wadi.distill.terms.term import generator_loss
from wadi.distill.terms.vsd import vsd_gradient
from wadi.graph import record
from wadi.prompts import PromptEmbeddings
from wadi.prompts.cache import Embeddings

RANKS = {"sd15": (256, 32), "pixart-256": (128, 32), "tiny": (4, 2)}
PROMPTS = 64
FAKE_GUIDANCE_SCALE = 1.5
"""The paper's: the fake model predicts with and without the prompt, as the teacher does."""
CHAIN = 3
"""Iterations between two waits for the device: training never waits within."""


@dataclass
class Options:
    """Time one training iteration, ours and a plain one."""

    model: Literal["sd15", "pixart-256", "tiny"] = "sd15"
    """Configuration of the network; its weights are random."""
    batch_sizes: tuple[int, ...] = (4, 16)
    """Latents an iteration."""
    gradient_checkpointing: tuple[bool, ...] = (False, True)
    """Without and with recomputation in backward."""
    repeats: int = 6
    """Timed runs of three iterations; the median counts."""
    only: tuple[str, ...] = ()
    """Rows beside "plain" to measure; all if not given."""
    compile: bool = False
    """Also time the trainer with compiled blocks (on a GPU, in a CUDA graph)."""
    seconds: float = 12.0
    """Stop repeating a case after this long."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    out: Path | None = None
    """JSON file for the figures."""


def new_backbone(options: Options) -> Backbone:
    """A network of random bfloat16 weights on the device, with Stable Diffusion's schedule."""
    torch.manual_seed(0)
    pixart = options.model == "pixart-256"
    with torch.device(options.device):
        network = make_network(options.model)
    network.to(torch.bfloat16)
    pipeline = SimpleNamespace(
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        tokenizer=SimpleNamespace(model_max_length=77),
        vae_scale_factor=8,
        **{"transformer" if pixart else "unet": network},
    )
    return (PixArtBackbone if pixart else UNetBackbone)(pipeline, options.device)


def random_conditions(options: Options, network: nn.Module) -> Condition:
    """Embeddings of as many prompts as the benchmark has."""
    if options.model != "pixart-256":
        states = torch.randn(PROMPTS, 77, network.config.cross_attention_dim, dtype=torch.bfloat16)
        return {"encoder_hidden_states": states}
    return {
        "encoder_hidden_states": torch.randn(PROMPTS, 120, network.config.caption_channels).bfloat16(),
        "encoder_attention_mask": torch.ones(PROMPTS, 120, dtype=torch.bool),
    }


def ours(
    options: Options,
    batch: int,
    checkpointing: bool,
    compiled: bool = False,
    cuda_graphs: bool = False,
    micro_batches: int = 1,
) -> Callable[[], object]:
    """The project's trainer, a step at a time."""
    student_rank, fake_rank = RANKS[options.model]
    config = DistillConfig.of(
        train_batch_size=batch // micro_batches,
        gradient_accumulation_steps=micro_batches,
        student_rank=student_rank,
        fake_rank=fake_rank,
        mixed_precision="bf16",
        allow_tf32=True,
        gradient_checkpointing=checkpointing,
        compile=compiled,
        cuda_graphs=cuda_graphs,
        fake_guidance_scale=FAKE_GUIDANCE_SCALE,
    )
    backbone = new_backbone(options)
    conditions = random_conditions(options, backbone.network)
    prompts = PromptEmbeddings(Embeddings([conditions]), pick(conditions, slice(1)), {})
    trainer = Trainer(config, backbone, prompts, make_accelerator(config))
    steps = iter(range(1_000_000))
    return lambda: trainer.step(next(steps))


class Plain:
    """The iteration as it is usually written."""

    def __init__(self, options: Options, batch: int, checkpointing: bool) -> None:
        self.device = torch.device(options.device)
        self.batch, self.config = batch, DistillConfig()
        self.backbone = new_backbone(options)
        self.schedule = self.backbone.schedule().to(self.device)
        self.teacher = self.backbone.network
        student_rank, fake_rank = RANKS[options.model]
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
        self.shape = (batch, *self.backbone.latent_shape)
        conditions = random_conditions(options, self.teacher)
        self.conditions = {name: value.to(self.device) for name, value in conditions.items()}

    def _hooked(self, config) -> tuple[nn.Module, nn.ModuleList]:
        network = copy.deepcopy(self.teacher)
        layers = [module for name, module in network.named_modules() if name in set(config.target_modules)]
        return network, nn.ModuleList([HookAdapter(layer, config.r) for layer in layers])

    def guided(
        self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition, scale: float
    ) -> torch.Tensor:
        """Two calls: without and with the prompt."""
        null = pick(self.conditions, torch.zeros(self.batch, dtype=torch.int64, device=self.device))
        without = self.backbone.predict(network, x, t, null)
        return guided(without, self.backbone.predict(network, x, t, condition), scale)

    def __call__(self) -> None:
        """One update of the student, its average, one update of the fake model."""
        device, config, schedule = self.device, self.config, self.schedule
        condition = pick(self.conditions, torch.randint(PROMPTS, (self.batch,), device=device))
        z, noise, fake_noise = (torch.randn(self.shape, device=device) for _ in range(3))
        last = torch.full((self.batch,), 999, device=device)
        x0 = schedule.x0(self.backbone.predict(self.student, z, last, condition), z, last)
        with torch.no_grad():
            t = torch.randint(20, 981, (self.batch,), device=device)
            x_t = schedule.add_noise(x0, noise, t)
            teacher = self.guided(self.teacher, x_t, t, condition, config.objective.guidance_scale)
            fake = self.guided(self.fake, x_t, t, condition, FAKE_GUIDANCE_SCALE)
            difference = schedule.x0(fake, x_t, t) - schedule.x0(teacher, x_t, t)
            gradient = vsd_gradient(difference, *schedule.levels(t))
        generator_loss(x0, gradient).backward()
        self.update(0, self.student_hooks)
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.student_hooks.parameters(), strict=True):
                average.lerp_(parameter, 1 - config.student.ema_decay)
        t = torch.randint(0, 1000, (self.batch,), device=device)
        x_t = schedule.add_noise(x0.detach(), fake_noise, t)
        prediction = self.backbone.predict(self.fake, x_t, t, condition)
        told = x0.detach(), fake_noise, t
        fake_loss(schedule, prediction, *told, config.fake.weighting).backward()
        self.update(1, self.fake_hooks)

    def update(self, which: int, hooks: nn.ModuleList) -> None:
        """Clip, AdamW, clear."""
        torch.nn.utils.clip_grad_norm_(hooks.parameters(), 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)


class Networks:
    """The networks' own part of the iteration, as fast as the trainer runs them: the floor of its time.

    LoRaD's gradient by an angle is made of the gradient by the weight, so the weights of the adapted layers
    have gradients; nothing is turned, and nothing else is computed.
    """

    def __init__(self, options: Options, batch: int, checkpointing: bool, compiled: bool = False) -> None:
        self.backbone, self.compiled, self.graph = new_backbone(options), compiled, None
        device, teacher = torch.device(options.device), self.backbone.network
        student_rank, fake_rank = RANKS[options.model]
        self.teacher = view(teacher)
        self.student = self._trained(student_config(teacher, student_rank), checkpointing)
        self.fake = self._trained(fake_config(teacher, fake_rank), checkpointing)
        if compiled:
            for network in (self.teacher, self.student, self.fake):
                compile_regions(network, self.backbone.blocks)
        conditions = random_conditions(options, teacher)
        self.condition = {name: value[:batch].to(device) for name, value in conditions.items()}
        self.x = torch.randn(batch, *self.backbone.latent_shape, device=device)
        self.t = torch.full((batch,), 500, device=device)
        self.cuda = device.type == "cuda"

    def _trained(self, config, checkpointing: bool) -> nn.Module:
        network = copy.deepcopy(self.backbone.network).requires_grad_(False)
        if checkpointing:
            enable_gradient_checkpointing(network.train())
        names = set(config.target_modules)
        for name, module in network.named_modules():
            if name in names:
                module.weight.requires_grad_()
        return network

    def networks(self) -> None:
        """Student and back, teacher and fake model with and without the prompt, fake model and back."""
        both = concatenate([self.condition, self.condition])
        prediction = self.backbone.predict(self.student, self.x, self.t, self.condition)
        with torch.no_grad():
            for network in (self.teacher, self.fake):
                self.backbone.predict(network, self.x.repeat(2, 1, 1, 1), self.t.repeat(2), both)
        prediction.backward(self.x)
        self.backbone.predict(self.fake, self.x, self.t, self.condition).backward(self.x)
        for network in (self.student, self.fake):
            network.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        """One iteration; in a CUDA graph where there is a GPU."""
        with compiling() if self.compiled else contextlib.nullcontext():
            if not self.cuda:
                self.networks()
                return
            if self.graph is None:
                self.graph, _ = record(self.networks)
            self.graph.replay()


def measure(options: Options, make: Callable, batch: int, checkpointing: bool) -> dict:
    """Milliseconds and peak memory of one iteration, or that it does not fit, and seconds of the first.

    Memory is counted from the first iteration on, because replaying a graph allocates nothing; "reserved" is
    what the allocator took from the card.
    """
    clock = Clock(options)
    try:
        call = make(options, batch, checkpointing)
        if clock.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        clock.wait()
        warmup, first = time.perf_counter() - start, clock.peaks()
        milliseconds, _ = clock(lambda: [call() for _ in range(CHAIN)])
        peak, reserved = map(max, zip(first, clock.peaks(), strict=True))
    except torch.OutOfMemoryError:
        nan = float("nan")
        return {"ms": nan, "peak_gib": nan, "reserved_gib": nan, "warmup_s": nan}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return {"ms": milliseconds / CHAIN, "peak_gib": peak, "reserved_gib": reserved, "warmup_s": warmup}


def main(options: Options) -> None:
    """Measure everything and print the table."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    head = header(options)
    print(head, flush=True)
    rows, makers = [], {"plain": Plain, "ours": ours}
    makers["networks alone"] = Networks
    cuda = torch.device(options.device).type == "cuda"
    if cuda:
        makers["ours, CUDA graph"] = partial(ours, cuda_graphs=True)
        makers["ours, CUDA graph, in two parts"] = partial(ours, cuda_graphs=True, micro_batches=2)
    if options.compile:
        compiled = partial(ours, compiled=True, cuda_graphs=cuda)
        makers["ours, compiled"] = compiled
        makers["ours, compiled, in two parts"] = partial(compiled, micro_batches=2)
        makers["networks alone, compiled"] = partial(Networks, compiled=True)
    if options.only:
        makers = {name: make for name, make in makers.items() if name in ("plain", *options.only)}
    print(
        "| batch | checkpointing | iteration | ms | throughput | peak, GiB | memory | reserved, GiB "
        "| first iteration, s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for checkpointing in options.gradient_checkpointing:
        for batch in options.batch_sizes:
            row = {"batch_size": batch, "gradient_checkpointing": checkpointing}
            for name, make in makers.items():
                if "in two parts" in name and batch % 2:
                    continue
                row[name] = figures = measure(options, make, batch, checkpointing)
                print(
                    f"| {batch} | {'yes' if checkpointing else 'no'} | {name} | {figures['ms']:.0f} | "
                    f"{row['plain']['ms'] / figures['ms']:.2f} x | {figures['peak_gib']:.1f} | "
                    f"{figures['peak_gib'] / row['plain']['peak_gib']:.2f} x | "
                    f"{figures['reserved_gib']:.1f} | {figures['warmup_s']:.1f} |",
                    flush=True,
                )
            rows.append(row)
    if options.out is not None:
        options.out.write_text(json.dumps({"header": head, "options": str(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
