"""The training of WaDi (arXiv 2603.08258), one step at a time. Random numbers are drawn before a step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from wadi import graph
from wadi.backbones import Backbone
from wadi.backbones.condition import Condition, pick
from wadi.distill import checkpoint
from wadi.distill.checks import check_network
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, Draws, StepInputs
from wadi.distill.fake import FakeModel
from wadi.distill.processes import hosts_group, spread, together
from wadi.distill.regions import compiling
from wadi.distill.roles import adapted_roles, trainable
from wadi.distill.scores import Scores, predictor
from wadi.distill.student import Student, student_times
from wadi.distill.terms import Batch, terms_of
from wadi.distill.update import Average, Update, count_skipped, learning_rate_factor
from wadi.errors import WadiError
from wadi.prompts import PromptEmbeddings


class Trainer:
    """Distils a backbone into a student of one step, or of a few.

        trainer = Trainer(config, backbone, prompts, accelerator)
        for step in range(100):
            losses = trainer.step(step)      # asynchronous on a GPU: nothing waits for the device
        average = trainer.ema_state()

    A trainer holds no global state and works on a CUDA stream of its own, so several trainers can share one
    GPU, one process and one backbone. `wadi.distill.loop.train` does a whole run, with its files.

    Args:
        config: the options.
        backbone: the loaded teacher, on the accelerator's device and in `config.run.dtype`.
        prompts: encoded prompts.
        accelerator: from `make_accelerator`.
        inputs: digests of the files that the options name; a checkpoint goes on only with the same ones.

    Raises:
        WadiError: the options do not fit the teacher or the device.
    """

    def __init__(
        self,
        config: DistillConfig,
        backbone: Backbone,
        prompts: PromptEmbeddings,
        accelerator: Accelerator,
        inputs: Mapping[str, str | None] | None = None,
    ) -> None:
        check_network(config, backbone)
        self.config, self.backbone, self.prompts, self.accelerator = config, backbone, prompts, accelerator
        self.fingerprint = config.fingerprint(inputs)
        self.device, self.hosts = accelerator.device, hosts_group(accelerator)
        self.schedule = backbone.schedule().to(self.device)
        self.predict = predictor(backbone, self.schedule)
        self.null = {name: tensor.to(self.device) for name, tensor in prompts.null.items()}

        with together(self.hosts):
            roles = adapted_roles(config, backbone, self.device)
        self.teacher, self.student, self.fake = roles.teacher, roles.student, roles.fake
        self.student_parameters, self.fake_parameters = trainable(roles.student), trainable(roles.fake)
        # another adapter to start from is fitted with rounding, which may differ
        spread([*self.student_parameters.values(), *self.fake_parameters.values()], accelerator)
        self._build_parts()

        self.global_step, self.seconds = 0, 0.0
        self.samples = config.optimizer.train_batch_size * config.optimizer.gradient_accumulation_steps
        self.batch = self.samples * accelerator.num_processes
        # one graph for each number of steps that the student may take
        self.stream, self.graphs = None, {}
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        elif config.run.cuda_graphs:
            raise WadiError("--cuda-graphs: needs a CUDA device; omit it here")

    def _build_parts(self) -> None:
        """Make the parts of a step around the three networks."""
        config, accelerator, schedule = self.config, self.accelerator, self.schedule
        shape = self.backbone.latent_shape
        own_end = self.backbone.schedule().ending_at(config.student.alpha_T_squared).to(self.device)
        times = student_times(config, self.backbone)
        self.generator = Student(own_end, self.predict, self.student, [t.to(self.device) for t in times])
        networks = self.teacher, self.fake
        guide = None if self.backbone.takes_guidance else self.backbone.guided
        self.scores = Scores(config, schedule, self.predict, *networks, self.null, shape, guide)
        self.terms = terms_of(config, schedule, shape)
        self.fake_model = FakeModel(config.fake, schedule, self.predict, self.fake, self.null, shape)
        student, fake = self.student_parameters, self.fake_parameters
        options = config.optimizer
        rates = options.student_learning_rate, options.fake_learning_rate
        self.student_update = Update(options, accelerator, student, rates[0])
        self.fake_update = Update(options, accelerator, fake, rates[1])
        self.average = Average(student, config.student.ema_decay)
        # steps with an update that was skipped, in all and in a row
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)

    # --- one step ---

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """Run step number `step` (from 0): draw its random numbers, set its rates, do one iteration.

        Returns:
            Losses and gradient norms, 0-dimensional tensors on the device; valid until the next step.
        """
        with self.on_stream(), compiling() if self.config.run.compile else contextlib.nullcontext():
            inputs = self.draw(step)
            self.set_step(step)
            if not self.config.run.cuda_graphs:
                return self.iteration(inputs)
            return self._replay(inputs)

    def _replay(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """Replay the graph of an iteration with inputs of these shapes; the first time, record it."""
        if inputs.steps not in self.graphs:
            static = copy.deepcopy(inputs)
            pool = next((recorded.pool() for _, recorded, _ in self.graphs.values()), None)
            work = graph.record(lambda: self.iteration(static), self.state_tensors(), self.stream, pool)
            self.graphs[inputs.steps] = static, *work
        static, recorded, losses = self.graphs[inputs.steps]
        for buffer, value in zip(static.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(value)
        recorded.replay()
        return losses

    def draw(self, step: int) -> StepInputs:
        """Draw this process's share of a step's random numbers, which depend on seed and step alone."""
        accelerator, n = self.accelerator, self.samples
        shared = accelerator.process_index, accelerator.num_processes
        draws = Draws(self.config.run.seed, step, self.device, *shared)
        return StepInputs(
            z=draws.normal("z", n, self.backbone.latent_shape),
            rollout=self.generator.draw(draws.of("rollout"), n, self.backbone.latent_shape),
            condition=self._draw_prompts(draws, n),
            place=self.scores.draw(draws.of("scores"), n),
            terms=tuple(term.draw(draws.of(term.name), n) for term in self.terms),
            fake=tuple(
                self.fake_model.draw(draws.of(f"fake/{update}"), n)
                for update in range(self.config.fake.updates)
            ),
        )

    def _draw_prompts(self, draws: Draws, n: int) -> Condition:
        """Conditions of n random prompts, copied to the device without waiting for it."""
        embeddings, pinned = self.prompts.embeddings, self.device.type == "cuda"
        indices = draws.prompts(n, len(embeddings))
        with together(self.hosts) if embeddings.waits(draws.step) else contextlib.nullcontext():
            chosen = embeddings.take(indices, pinned, draws.step)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in chosen.items()}

    def set_step(self, step: int) -> None:
        """Set the learning rates and the average's decay of a step."""
        factor = learning_rate_factor(self.config, step)
        for update in (self.student_update, self.fake_update):
            update.set_rate(factor)
        self.average.set_step(step)

    def iteration(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """One update of the student and its average, then `fake_updates` of the fake model.

        The iteration runs on the device alone. The host neither waits for it nor decides by its data, so a
        CUDA graph can hold it. An update whose gradients are not finite changes nothing except the loss scale
        and the count of skipped steps.
        """
        x0, losses = self.update_student(inputs)
        finite = losses["student_grad_norm"].isfinite()
        self.average.follow(finite)
        for drawn in inputs.fake:
            losses |= self.update_fake(x0, inputs.condition, drawn)
            finite = finite & losses["fake_grad_norm"].isfinite()
        count_skipped(self.skipped, finite, self.config.optimizer.max_skipped_steps)
        return losses

    def update_student(self, inputs: StepInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Update the student once; returns its images (n, C, H, W) without gradient, and the losses."""
        samples, losses = [], []
        for micro in self.student_update.micro_batches():
            condition = pick(inputs.condition, micro)
            x0 = self.generator.sample(inputs.z[micro], condition, pick(inputs.rollout, micro))
            place = self.scores.at(x0, pick(inputs.place, micro), condition)
            batch = Batch(x0, condition, place, self.scores)
            terms = {
                f"{term.name}_loss": (term(batch, pick(drawn, micro)), term.weight)
                for term, drawn in zip(self.terms, inputs.terms, strict=True)
            }
            losses.append(self.student_update.backward(terms))
            samples.append(x0.detach())
        norm = self.student_update.apply()
        return torch.cat(samples), _total(losses) | {"student_grad_norm": norm}

    def update_fake(self, x0: torch.Tensor, condition: Condition, drawn: Drawn) -> dict[str, torch.Tensor]:
        """Update the fake model once on the student's images; returns its loss."""
        losses = []
        for micro in self.fake_update.micro_batches():
            loss = self.fake_model.loss(x0, condition, drawn, micro)
            losses.append(self.fake_update.backward({"fake_loss": (loss, 1.0)}))
        norm = self.fake_update.apply()
        return _total(losses) | {"fake_grad_norm": norm}

    def generate(self, z: torch.Tensor, condition: Condition, rollout: Drawn | None = None) -> torch.Tensor:
        """The student's images x0 (N, C, H, W) float32; see `Student.sample`."""
        return self.generator.sample(z, condition, rollout)

    # --- the device ---

    def on_stream(self) -> contextlib.AbstractContextManager:
        """A context that works on this trainer's CUDA stream. On the CPU it does nothing."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        """Wait until the device has finished all steps."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Drop the recorded graphs: they hold the communicator of the processes, which ends after them."""
        self.synchronize()
        self.graphs.clear()

    # --- the average and checkpoints ---

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the student has its averaged weights, and the average those of the student."""
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    def _exchange_average(self) -> None:
        """Exchange the student's weights and their average, a tensor at a time for the memory's sake."""
        self.synchronize()
        for name, parameter in self.student_parameters.items():
            own, average = parameter.detach().clone(), self.average.tensors[name]
            parameter.data.copy_(average)
            average.copy_(own)
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def ema_state(self) -> dict[str, torch.Tensor]:
        """A copy of the student's averaged weights, float32, by parameter name."""
        self.synchronize()
        return {name: tensor.clone() for name, tensor in self.average.tensors.items()}

    def checkpoint_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint, by file and name. They are the live tensors, not copies."""
        return {
            "student": {name: p.data for name, p in self.student_parameters.items()},
            "fake": {name: p.data for name, p in self.fake_parameters.items()},
            "ema": self.average.tensors,
            "student_optimizer": self.student_update.moments(),
            "fake_optimizer": self.fake_update.moments(),
        }

    def state_tensors(self) -> list[torch.Tensor]:
        """Every tensor that an iteration changes. They are the live tensors, not copies."""
        groups = self.checkpoint_tensors().values()
        return [*(tensor for group in groups for tensor in group.values()), self.skipped]

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N of the run folder.

        Raises:
            WadiError: the state is not finite, or the folder cannot be written. Nothing half-written stays.
            SystemExit: code 2, in the processes that do not write it.
        """
        self.synchronize()
        with together(self.hosts):
            if self.accelerator.is_main_process:
                self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self.state_tensors()):
            raise WadiError(f"step {self.global_step}: weights are not finite; no checkpoint was written")
        scaler = self.accelerator.scaler
        state = {
            "config": self.fingerprint,
            "batch": self.batch,
            "seconds": self.seconds,
            "skipped": self.skipped.tolist(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        run, tensors = self.config.run, self.checkpoint_tensors()
        folder = Path(run.output_dir) / "checkpoints"
        checkpoint.save_checkpoint(folder, self.global_step, tensors, state, run.checkpoints_total_limit)

    def load_checkpoint(self, path: Path) -> None:
        """Load weights, average, optimizers and step from a checkpoint folder.

        Raises:
            WadiError: the checkpoint is damaged, or its options, samples per step or model are others.
        """
        groups, state = checkpoint.load_checkpoint(path, self.checkpoint_tensors(), self.fingerprint)
        if state["batch"] != self.batch:
            raise WadiError(
                f"{path}: was trained with {state['batch']} samples per step, not {self.batch}; choose "
                "--train-batch-size and the number of processes so that their product is that number"
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


def _total(losses: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums over the micro-batches, by name."""
    return {name: torch.stack([part[name] for part in losses]).sum() for name in losses[0]}
