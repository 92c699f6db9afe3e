"""The training loop of WaDi (arXiv 2603.08258): one linear iteration, every random number drawn before it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from wadi.diffusion import Schedule
from wadi.distill import checkpoint
from wadi.distill.backbone import Backbone
from wadi.distill.checks import check_ranks, free_memory
from wadi.distill.condition import Condition, choose, concatenate, pick, repeat
from wadi.distill.config import DistillConfig
from wadi.distill.losses import (
    fake_loss,
    generator_loss,
    guided,
    interval_scale,
    normalized_vsd_gradient,
    vsd_gradient,
    without_block_means,
)
from wadi.distill.methods import method_config
from wadi.distill.processes import any_process, hosts_group, together
from wadi.distill.prompts import PromptEmbeddings
from wadi.distill.regions import check_compiler, compile_regions, compiling, eager
from wadi.distill.roles import Roles, build_roles, enable_gradient_checkpointing, trainable, view
from wadi.distill.trackers import check_tracker
from wadi.errors import WadiError
from wadi.files import explain_os_errors, replacing_file
from wadi.interrupt import catch_interrupt
from wadi.lorad.io import copy_adapter
from wadi.lorad.presets import fake_config, student_config
from wadi.onestep import labelled_grid
from wadi.onestep.adapters import adapter_folder
from wadi.progress import progress

WARMUP_ITERATIONS = 3
"""Eager iterations before a CUDA graph is recorded: they allocate what the recording may not."""


@dataclass(frozen=True)
class StepInputs:
    """Everything that is random or drawn from data in one step, on the device.

    n = train_batch_size x gradient_accumulation_steps, this process's share; u = fake_updates.
    """

    z: torch.Tensor  # (n, C, H, W) float32, the student's noise
    condition: Condition  # of n prompts, embeddings in the compute dtype
    t: torch.Tensor  # (n,) int64, of the distillation gradient
    noise: torch.Tensor  # (n, C, H, W) float32, to t
    fake_t: torch.Tensor  # (u, n) int64
    fake_noise: torch.Tensor  # (u, n, C, H, W) float32, to fake_t
    fake_null: torch.Tensor  # (u,) bool, whole batch on the empty prompt
    # for the denoising term: t (n,) int64 and noise (n, C, H, W) float32; or nothing
    denoising: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        """The fields, in order; the tensors of a dictionary one by one."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [t for value in values for t in (value.values() if isinstance(value, dict) else (value,))]

    def clone(self) -> StepInputs:
        """A copy that shares no memory."""
        return StepInputs(
            **{
                field.name: {name: tensor.clone() for name, tensor in value.items()}
                if isinstance(value := getattr(self, field.name), dict)
                else value.clone()
                for field in dataclasses.fields(self)
            }
        )


def make_accelerator(config: DistillConfig) -> Accelerator:
    """The Accelerator that a config asks for.

    Of mixed precision it brings the loss scaling that fp16 needs. Autocast stays off: the base itself is in
    the compute dtype.

    Raises:
        WadiError: the precision or the tracker cannot be used here.
    """
    check_tracker(config.report_to)
    try:
        return Accelerator(
            mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
            log_with=config.report_to,
            project_dir=config.output_dir,
            # the buffers are the frozen base's: alike on all processes, and they stay so
            kwargs_handlers=[
                AutocastKwargs(enabled=False),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except (ValueError, ImportError) as error:
        raise WadiError(f"--mixed-precision: {' '.join(str(error).split())}") from error


class Trainer:
    """Distils a backbone into a one-step student.

        trainer = Trainer(config, backbone, prompts, accelerator)
        for step in range(100):
            losses = trainer.step(step)      # asynchronous on a GPU: nothing waits for the device
        average = trainer.ema_state()

    Holds no global state and works on a CUDA stream of its own, so that several trainers can share one GPU,
    one process and one backbone.

    Args:
        config: the options.
        backbone: the loaded teacher, on the accelerator's device and in `config.dtype`.
        prompts: encoded prompts.
        accelerator: from `make_accelerator`.
        inputs: digests of the files that the options name; checkpoints are of these.
    """

    def __init__(
        self,
        config: DistillConfig,
        backbone: Backbone,
        prompts: PromptEmbeddings,
        accelerator: Accelerator,
        inputs: Mapping[str, str | None] | None = None,
    ) -> None:
        self.config, self.backbone, self.prompts, self.accelerator = config, backbone, prompts, accelerator
        self.fingerprint = config.fingerprint(inputs)
        self.device, self.hosts = accelerator.device, hosts_group(accelerator)
        self.schedule = Schedule.from_config(backbone.scheduler_config).to(self.device)
        self.student_schedule = self.schedule.ending_at(config.alpha_T_squared)
        # the last time at which the teacher is guided
        self.highest_guided = self.schedule.times(
            torch.tensor(config.guidance_max_timestep, dtype=torch.float64)
        )
        self.null = {name: tensor.to(self.device) for name, tensor in prompts.null.items()}

        roles = self._make_roles()
        self.student_parameters, self.fake_parameters = trainable(roles.student), trainable(roles.fake)
        self.fake_network = roles.fake  # past DDP
        self.student, self.fake = accelerator.prepare(roles.student, roles.fake)
        self.student_optimizer = self._adamw(self.student_parameters, config.student_learning_rate)
        self.fake_optimizer = self._adamw(self.fake_parameters, config.fake_learning_rate)
        self.ema = {name: p.detach().clone() for name, p in self.student_parameters.items()}
        self.ema_weight = torch.ones((), device=self.device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)  # steps in all, and in a row

        self.generator, self.prompt_generator = torch.Generator(self.device), torch.Generator()
        self.global_step, self.seconds = 0, 0.0
        self.batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.stream, self.graph = None, None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        elif config.cuda_graphs:
            raise WadiError("--cuda-graphs: needs a CUDA device; leave it out here")
        if config.cuda_graphs and self.hosts is not None:
            raise WadiError("--cuda-graphs: works in one process only; leave it out or start one process")

    def _make_roles(self) -> Roles:
        """Teacher, student and fake model as the options want them."""
        config, base = self.config, self.backbone.network
        student = student_config(base, config.student_rank)
        fake_layers = fake_config if config.fake_layers == "attention" else student_config
        fake = fake_layers(base, config.fake_rank)
        check_ranks(config, student, fake, base, free_memory(self.device))
        roles = build_roles(
            base,
            method_config(config.student_method, student),
            method_config(config.fake_method, fake),
            config.seed,
        )
        if config.student_adapter is not None:
            with together(self.hosts):
                try:
                    copy_adapter(roles.student, adapter_folder(config.student_adapter))
                except ValueError as error:
                    raise WadiError(f"--student-adapter: {error}") from error
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(roles.student)
            enable_gradient_checkpointing(roles.fake)
        self.teacher = roles.teacher
        if config.compile:
            check_compiler(self.device)
            self.teacher = view(roles.teacher)  # the backbone's own modules stay as they are
            for network in (self.teacher, roles.student, roles.fake):
                compile_regions(network)
        return roles

    # --- one step ---

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """Run step number `step` (from 0): draw its randomness, set its rates, do one iteration.

        Returns:
            Losses and gradient norms, 0-dimensional tensors on the device; valid until the next step.
        """
        with self.on_stream(), compiling() if self.config.compile else contextlib.nullcontext():
            inputs = self.draw(step)
            self._set_rates(step)
            if not self.config.cuda_graphs:
                return self.iteration(inputs)
            if self.graph is None:
                self._record(inputs)
            for buffer, value in zip(self.static_inputs.tensors(), inputs.tensors(), strict=True):
                buffer.copy_(value)
            self.graph.replay()
            return self.static_losses

    def draw(self, step: int) -> StepInputs:
        """This process's share of the step's randomness, which is of (seed, step) alone.

        Every process draws for the whole batch and keeps its share: N processes see what one would with N
        times the batch, no two see the same noise, and a resumed run draws the same, on however many.
        """
        config, schedule = self.config, self.schedule
        # 0: where the process's number once stood
        seeds = np.random.SeedSequence([config.seed, 0, step]).generate_state(2)
        self.generator.manual_seed(int(seeds[0]))
        self.prompt_generator.manual_seed(int(seeds[1]))
        own = config.train_batch_size * config.gradient_accumulation_steps
        first, n = self.accelerator.process_index * own, self.accelerator.num_processes * own
        share, u = slice(first, first + own), config.fake_updates
        shape, on_device = self.backbone.latent_shape, {"device": self.device, "generator": self.generator}

        def times(count: int, low: float, high: float) -> torch.Tensor:
            return schedule.sample_t(count, low, high, self.generator)

        # what an option adds is drawn last: the others keep their numbers
        return StepInputs(
            z=_keep(torch.randn(n, *shape, **on_device), share),
            condition=self._draw_prompts(n, share),
            t=_keep(times(n, config.min_timestep, config.max_timestep), share),
            noise=_keep(torch.randn(n, *shape, **on_device), share),
            fake_t=_keep(times(u * n, 0.0, 1.0).view(u, n), share, 1),
            fake_noise=_keep(torch.randn(u, n, *shape, **on_device), share, 1),
            fake_null=torch.rand(u, **on_device) < config.null_prompt_probability,
            denoising=self._draw_denoising(n, share) if config.denoising_weight else {},
        )

    def iteration(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """One update of the student and its average, then `fake_updates` of the fake model.

        Runs on the device alone, without a host branch on data or a synchronization, so that a CUDA graph can
        hold it. An update whose gradients are not finite changes nothing but the loss scale and the count.
        """
        x0, losses = self._update_student(inputs)
        finite = losses["student_grad_norm"].isfinite()
        self._update_ema(finite)
        for update in range(self.config.fake_updates):
            condition = choose(inputs.fake_null[update], self.null, inputs.condition)
            losses |= self._update_fake(x0, condition, inputs.fake_t[update], inputs.fake_noise[update])
            finite = finite & losses["fake_grad_norm"].isfinite()
        self._count_skipped(finite)
        return losses

    def generate(self, z: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The student's one step: x0 (N, C, H, W) float32 from z ~ N(0, I) and the condition of N prompts."""
        t = self.student_schedule.last.expand(len(z))
        return self.student_schedule.x0(self._predict(self.student, z, t, condition), z, t)

    def _predict(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """`Backbone.predict`; without gradients past DDP, as one process alone may ask for it."""
        if isinstance(network, DistributedDataParallel) and not torch.is_grad_enabled():
            network = network.module
        return self.backbone.predict(network, x_t, self.schedule.timestep(t), condition)

    def _update_student(self, inputs: StepInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, schedule = self.config, self.schedule
        samples, losses = [], []
        for micro, synchronize in self._micro_batches(self.student):
            t, noise = inputs.t[micro], inputs.noise[micro]
            condition = pick(inputs.condition, micro)
            with synchronize:
                x0 = self.generate(inputs.z[micro], condition)
                x0_teacher, x0_fake = self._scores(x0, noise, t, condition)
                if config.weighting == "normalized":
                    gradient = normalized_vsd_gradient(x0.detach(), x0_teacher, x0_fake)
                else:
                    gradient = vsd_gradient(x0_teacher, x0_fake, *schedule.levels(t))
                # 1/2 ||x0 - stopgrad(x0 - grad_x0)||^2
                terms = {"student_loss": (generator_loss(x0, gradient), 1.0)}
                if config.denoising_weight:
                    terms["denoising_loss"] = (
                        self._denoising_term(x0, inputs, micro),
                        config.denoising_weight,
                    )
                losses.append(self._backward(terms))
            samples.append(x0.detach())
        norm = self._optimize(self.student_optimizer, self.student_parameters)
        return torch.cat(samples), _total(losses) | {"student_grad_norm": norm}

    @torch.no_grad()
    def _scores(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided x0 of teacher and fake model at x_t, each (N, C, H, W) float32."""
        # p = p_null + s (p_cond - p_null), for teacher and fake model alike
        x_t = self.schedule.add_noise(x0, noise, t)
        x0_teacher = self._guided_x0(self.teacher, x_t, t, condition, self._teacher_scale(t))
        fake_scale = self.config.fake_guidance_scale
        return x0_teacher, self._guided_x0(self.fake_network, x_t, t, condition, fake_scale)

    def _denoising_term(self, x0: torch.Tensor, inputs: StepInputs, micro: slice) -> torch.Tensor:
        """1/2 ||x0 - x0_teacher||^2 of what is finer than blocks; the teacher's image is held fixed."""
        schedule = self.schedule
        t, noise = (inputs.denoising[name][micro] for name in ("t", "noise"))
        with torch.no_grad():
            x_t = schedule.add_noise(x0, noise, t)
            gradient = x0 - self._guided_x0(self.teacher, x_t, t, pick(inputs.condition, micro), 1.0)
        return generator_loss(x0, without_block_means(gradient))

    def _backward(self, terms: dict[str, tuple[torch.Tensor, float]]) -> dict[str, torch.Tensor]:
        """Backward of a micro-batch's weighted terms; returns each term's share in the step's mean."""
        count = self.config.gradient_accumulation_steps
        weighted = [loss if weight == 1 else weight * loss for loss, weight in terms.values()]
        self.accelerator.backward(sum(weighted[1:], weighted[0]) / count)
        return {name: loss.detach() / count for name, (loss, _) in terms.items()}

    def _update_fake(
        self, x0: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        config, schedule = self.config, self.schedule
        losses = []
        for micro, synchronize in self._micro_batches(self.fake):
            with synchronize:
                x_t = schedule.add_noise(x0[micro], noise[micro], t[micro])
                prediction = self._predict(self.fake, x_t, t[micro], pick(condition, micro))
                told = x0[micro], noise[micro], t[micro]
                loss = fake_loss(schedule, prediction, *told, config.fake_weighting)
                loss = loss / config.gradient_accumulation_steps
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        norm = self._optimize(self.fake_optimizer, self.fake_parameters)
        return {"fake_loss": torch.stack(losses).sum(), "fake_grad_norm": norm}

    def _teacher_scale(self, t: torch.Tensor) -> float | torch.Tensor:
        """Guidance of the teacher: one number, or (N, 1, 1, 1) where the timesteps (N,) differ in it."""
        config = self.config
        if config.guidance_max_timestep == 1:
            return config.guidance_scale
        scales = interval_scale(config.guidance_scale, config.guidance_scale_above, t, self.highest_guided)
        return scales.view(-1, 1, 1, 1)

    def _guided_x0(
        self,
        network: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        scale: float | torch.Tensor,
    ) -> torch.Tensor:
        """Guided x0: null prompt and condition in one call; a scale of 1 needs no null prompt.

        The host does not read a scale that is a tensor: that would wait for the device.
        """
        if not isinstance(scale, torch.Tensor) and scale == 1:
            prediction = self._predict(network, x_t, t, condition)
        else:
            both = concatenate([repeat(self.null, len(t)), condition])
            pair = self._predict(network, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
            prediction = guided(*pair.chunk(2), scale)
        return self.schedule.x0(prediction, x_t, t)

    def _micro_batches(
        self, network: torch.nn.Module
    ) -> Iterator[tuple[slice, contextlib.AbstractContextManager]]:
        """Slices of the step's batch, each with the context that exchanges gradients on the last one only."""
        size, count = self.config.train_batch_size, self.config.gradient_accumulation_steps
        for i in range(count):
            last = i == count - 1
            synchronize = contextlib.nullcontext() if last else self.accelerator.no_sync(network)
            yield slice(i * size, (i + 1) * size), synchronize

    def _optimize(
        self, optimizer: torch.optim.AdamW, parameters: dict[str, torch.nn.Parameter]
    ) -> torch.Tensor:
        """Unscale, clip, AdamW, clear; returns the gradient norm before clipping.

        Where the norm is not finite, fused AdamW's own mask leaves parameters, moments and step count as they
        were. The processes' gradients are averaged by then: all decide alike.
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.config.max_grad_norm)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = norm.isfinite().logical_not().float()
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _update_ema(self, finite: torch.Tensor) -> None:
        """ema += (1 - decay) (student - ema), where the student was updated."""
        average = list(self.ema.values())
        change = torch._foreach_sub(list(self.student_parameters.values()), average)
        torch._foreach_mul_(change, self.ema_weight * finite)
        torch._foreach_add_(average, change)

    def _count_skipped(self, finite: torch.Tensor) -> None:
        """Count a step with a skipped update; a run that is too long stays, until the host looks."""
        total, run = self.skipped
        skipped = finite.logical_not()
        too_long = run >= self.config.max_skipped_steps
        self.skipped.copy_(torch.stack([total + skipped, torch.where(skipped | too_long, run + skipped, 0)]))

    def _set_rates(self, step: int) -> None:
        factor = learning_rate_factor(self.config, step)
        rates = (
            (self.student_optimizer, self.config.student_learning_rate),
            (self.fake_optimizer, self.config.fake_learning_rate),
        )
        for optimizer, rate in rates:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor
        self.ema_weight.fill_(1 - min(self.config.ema_decay, (1 + step) / (10 + step)))

    def _adamw(self, parameters: dict[str, torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
        """Fused AdamW; on a GPU its step and rate live on the device, as a CUDA graph needs them."""
        config, on_gpu = self.config, self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=torch.tensor(rate, device=self.device) if on_gpu else rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
            capturable=on_gpu,
        )
        for p in (
            parameters.values()
        ):  # what AdamW's first step would create; a checkpoint or a graph needs it before
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return optimizer

    def _draw_prompts(self, count: int, share: slice) -> Condition:
        """A share of `count` random prompts, copied to the device without waiting."""
        embeddings = self.prompts.embeddings
        indices = torch.randint(len(embeddings), (count,), generator=self.prompt_generator)
        chosen = embeddings.take(indices[share], pin_memory=self.device.type == "cuda")
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in chosen.items()}

    def _draw_denoising(self, count: int, share: slice) -> dict[str, torch.Tensor]:
        """Timesteps and noise of a share of what the teacher cleans."""
        low, high = self.config.min_timestep, self.config.denoising_max_timestep
        t = self.schedule.sample_t(count, low, high, self.generator)
        shape = count, *self.backbone.latent_shape
        noise = torch.randn(shape, device=self.device, generator=self.generator)
        return {"t": _keep(t, share), "noise": _keep(noise, share)}

    # --- CUDA graph ---

    def on_stream(self) -> contextlib.AbstractContextManager:
        """Work on this trainer's CUDA stream; on the CPU, nothing."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        """Wait until the device has done all steps."""
        if self.stream is not None:
            self.stream.synchronize()

    def _record(self, inputs: StepInputs) -> None:
        """Record `iteration` as a CUDA graph over static inputs; weights and optimizers stay as they were."""
        self.static_inputs = inputs.clone()
        # off the card, where room may be short
        before = [tensor.to("cpu", copy=True) for tensor in self._state_tensors()]
        for _ in range(WARMUP_ITERATIONS):
            self.iteration(self.static_inputs)
        for tensor, value in zip(self._state_tensors(), before, strict=True):
            tensor.copy_(value)
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.static_losses = self.iteration(self.static_inputs)

    def _state_tensors(self) -> list[torch.Tensor]:
        """Everything that an iteration changes."""
        groups = self.checkpoint_tensors().values()
        return [*(tensor for group in groups for tensor in group.values()), self.skipped]

    # --- the run ---

    def train(self) -> bool:
        """Train to `max_train_steps`: log, validate and save on the way.

        Returns:
            Whether the end was reached; False after Ctrl-C, when the step was finished and saved.

        Raises:
            WadiError: `max_skipped_steps` steps in a row were not finite, or a file cannot be written.
            SystemExit: code 2, where that happened in another process, which tells.
        """
        config, start = self.config, time.monotonic() - self.seconds
        bar = progress(total=config.max_train_steps, initial=self.global_step, desc="distilling", unit="step")
        with bar, self._catch_interrupt() as interrupted:
            while self.global_step < config.max_train_steps:
                losses = self.step(self.global_step)
                self.global_step += 1
                bar.update()
                stop = any_process(interrupted.is_set(), self.hosts)
                end = self.global_step == config.max_train_steps
                if self._due(config.logging_steps) or self._due(config.checkpointing_steps) or stop or end:
                    self.seconds = time.monotonic() - start
                    bar.set_postfix(self._log(losses))
                if self._due(config.validation_steps) or (end and config.validation_steps):
                    self.validate()
                if self._due(config.checkpointing_steps) or stop or end:
                    self.save_checkpoint()
                if stop:
                    return end
        return True

    def _catch_interrupt(self) -> contextlib.AbstractContextManager[threading.Event]:
        return catch_interrupt(self.accelerator.num_processes == 1, self.accelerator.is_main_process)

    def _due(self, every: int) -> bool:
        return every > 0 and self.global_step % every == 0

    def _log(self, losses: dict[str, torch.Tensor]) -> dict[str, str]:
        """Fetch the losses (the only wait for the device), check them, append to metrics.jsonl.

        Losses are means over the processes; those that are not finite, of a skipped update, are left out.
        """
        with self.on_stream():
            values = self.accelerator.reduce(torch.stack(list(losses.values())), "mean").tolist()
            skipped, run = self.skipped.tolist()
        fetched = dict(zip(losses, values, strict=True))
        with together(self.hosts):
            self._check_finite(fetched, run)
            self._write_metrics(fetched, skipped)
        shown = {name: f"{fetched[name]:.4g}" for name in ("student_loss", "fake_loss")}
        return shown | ({"skipped": str(skipped)} if skipped else {})

    def _write_metrics(self, fetched: dict[str, float], skipped: int) -> None:
        step = self.global_step
        factor = learning_rate_factor(self.config, step - 1)
        row = {name: value for name, value in fetched.items() if math.isfinite(value)} | {
            "skipped_steps": skipped,
            "student_learning_rate": self.config.student_learning_rate * factor,
            "fake_learning_rate": self.config.fake_learning_rate * factor,
        }
        self.accelerator.log(row, step=step)
        if self.accelerator.is_main_process:
            row = {"step": step, **row, "seconds": round(self.seconds, 3)}
            append_metrics(Path(self.config.output_dir) / "metrics.jsonl", row)

    def _check_finite(self, losses: dict[str, float], run: int) -> None:
        """Raise after too long a run of skipped steps, or if a loss is not finite but its update was made."""
        worst = next((name for name, value in losses.items() if not math.isfinite(value)), None)
        if run < self.config.max_skipped_steps and (run or worst is None):
            return
        what = f"{worst} is {losses[worst]}" if worst else "gradients were not finite"
        raise WadiError(
            f"step {self.global_step}: {what}"
            + (f", {run} steps in a row were skipped" if run else "")
            + f"; nothing of it was saved, a checkpoint in {self.config.output_dir} is good; "
            "lower the learning rates and start again"
        )

    def validate(self) -> None:
        """Write samples/step-N.png: a row per validation prompt, a column per seed, by the EMA student.

        Raises:
            WadiError: the file cannot be written.
            SystemExit: code 2, in the processes that do not write it.
        """
        if not self.config.validation_prompts:
            return
        with together(self.hosts):
            if self.accelerator.is_main_process:
                self._write_samples()

    def _write_samples(self) -> None:
        seeds, conditions = self.config.validation_seeds, self.prompts.validation
        shape = self.backbone.latent_shape
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        # another number of samples would be compiled anew
        uncompiled = eager() if self.config.compile else contextlib.nullcontext()
        with self.on_stream(), self.ema_weights(), torch.no_grad(), uncompiled:
            z = noise.to(self.device)
            rows = [pick(conditions, slice(i, i + 1)) for i in range(len(self.config.validation_prompts))]
            latents = [
                self.generate(z, repeat({k: v.to(self.device) for k, v in row.items()}, len(z)))
                for row in rows
            ]
            pictures = self.backbone.decode(torch.cat(latents))
        path = Path(self.config.output_dir) / "samples" / f"step-{self.global_step:06d}.png"
        with replacing_file(path) as temporary:
            texts, n = self.config.validation_prompts, len(seeds)
            rows = [(text, pictures[i * n : (i + 1) * n]) for i, text in enumerate(texts)]
            labelled_grid(rows, [f"seed {seed}" for seed in seeds]).save(temporary, format="PNG")

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the student its averaged weights for the block, and its own back afterwards."""
        parameters = [p.data for p in self.student_parameters.values()]
        self.synchronize()
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, list(self.ema.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)
            if self.stream is not None:
                torch.cuda.synchronize(self.device)

    def ema_state(self) -> dict[str, torch.Tensor]:
        """A copy of the student's averaged adapter, float32, by parameter name."""
        self.synchronize()
        return {name: tensor.clone() for name, tensor in self.ema.items()}

    # --- checkpoints ---

    def checkpoint_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds, by file and name; live tensors, not copies."""
        return {
            "student": {name: p.data for name, p in self.student_parameters.items()},
            "fake": {name: p.data for name, p in self.fake_parameters.items()},
            "ema": self.ema,
            "student_optimizer": _moments(self.student_optimizer, self.student_parameters),
            "fake_optimizer": _moments(self.fake_optimizer, self.fake_parameters),
        }

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N of the run folder.

        Raises:
            WadiError: the state is not finite, or the folder cannot be written; nothing half-written stays.
            SystemExit: code 2, in the processes that do not write it.
        """
        self.synchronize()
        with together(self.hosts):
            if self.accelerator.is_main_process:
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self._state_tensors()):
            raise WadiError(f"step {self.global_step}: weights are not finite; no checkpoint was written")
        scaler = self.accelerator.scaler
        state = {
            "config": self.fingerprint,
            "batch": self.batch,
            "seconds": self.seconds,
            "skipped": self.skipped.tolist(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        folder, limit = Path(self.config.output_dir) / "checkpoints", self.config.checkpoints_total_limit
        checkpoint.save_checkpoint(folder, self.global_step, self.checkpoint_tensors(), state, limit)

    def load_checkpoint(self, path: Path) -> None:
        """Take weights, average, optimizers and step from a checkpoint folder.

        Raises:
            WadiError: damaged, of other options or another number of samples a step, or of another model.
        """
        groups, state = checkpoint.load_checkpoint(path, self.checkpoint_tensors(), self.fingerprint)
        if state["batch"] != self.batch:
            raise WadiError(
                f"{path}: was trained with {state['batch']} samples a step, not {self.batch}; choose "
                "--train-batch-size and the number of processes so that they share as many"
            )
        with self.on_stream():
            for name, tensors in self.checkpoint_tensors().items():
                for key, tensor in tensors.items():
                    tensor.copy_(groups[name][key])
            self.skipped.copy_(torch.tensor(state["skipped"]))
        self.synchronize()
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.global_step, self.seconds = state["step"], state["seconds"]


def _keep(whole: torch.Tensor, share: slice, dim: int = 0) -> torch.Tensor:
    """A share of one dimension, without the memory of the rest."""
    part = whole.narrow(dim, share.start, share.stop - share.start)
    return whole if part.shape == whole.shape else part.clone()


def learning_rate_factor(config: DistillConfig, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `lr_decay_fraction`; 1 in between."""
    warmup = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    decay_steps = config.lr_decay_fraction * config.max_train_steps
    decay = min(1.0, (config.max_train_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def _total(losses: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums over the micro-batches, by name."""
    return {name: torch.stack([part[name] for part in losses]).sum() for name in losses[0]}


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Append one line to metrics.jsonl."""
    with explain_os_errors(path, "append to the file"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one: a resumed run writes them again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            lines.append(line + "\n")
    with replacing_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _moments(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """AdamW's state by "<parameter>.<moment>"."""
    return {
        f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()
    }
