"""Many students trained as one network with a batch for each: what experiments/ablation.py does on a GPU.

Students with adapters differ in their Linear layers alone, so all of them go through convolutions, norms and
attention as one batch, and an adapted layer multiplies every student's samples by that student's own weight:

    x (K n, ..., in), W' (K, out, in)  ->  y[k] = x[k] W'[k]^T + bias

Each student keeps its `Trainer`, with its own parameters, optimizers, average, rates and randomness; what is
trained is what each would train alone, rounding aside (tests/experiments/test_stacked.py). Five students as
one did 30 updates of 64 samples a second on one H100, twelve on streams of their own 29 on one H200; they
were not timed on one card.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

import torch
from torch import nn

from wadi.backbones.condition import Condition, choose, concatenate
from wadi.distill import DistillConfig, StepInputs, Trainer
from wadi.distill.fake import fake_loss
from wadi.distill.roles import view
from wadi.distill.scores import Scores, interval_scale
from wadi.distill.student import Student
from wadi.distill.terms import Batch
from wadi.distill.terms.term import generator_loss
from wadi.distill.update import count_skipped
from wadi.graph import record
from wadi.lorad import rotation
from wadi.lorad.small import SmallLinear

# --- the weights of K adapters of one kind and size on one layer, (K, out, in) ---


class _Turned(torch.autograd.Function):
    """`rotation.rotate` of one weight by K angles at once: W is repeated as rows (K out, in)."""

    @staticmethod
    def forward(ctx, repeated: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        turned = rotation._rotated(repeated, torch.bmm(A, B).flatten(0, 1))
        ctx.save_for_backward(turned, A, B)
        return turned.unflatten(0, A.shape[:2])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        turned, A, B = ctx.saved_tensors
        theta = rotation.angle_gradient(turned, grad.flatten(0, 1).contiguous()).unflatten(0, A.shape[:2])
        # dL/dA = dL/dTheta B^T, dL/dB = A^T dL/dTheta
        return None, torch.bmm(theta, B.mT), torch.bmm(A.mT, theta)


def _lorad(layer: Adapted, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return _Turned.apply(layer.repeated, A, B)


def _lora(layer: Adapted, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    # W' = W + B A: alpha is r, see wadi.distill.methods
    return torch.baddbmm(layer.repeated.unflatten(0, (len(A), -1)), B, A)


KINDS: dict[str, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = {
    "lorad": ((".lorad_A.default", ".lorad_B.default"), _lorad),
    "lora": ((".lora_A.default.weight", ".lora_B.default.weight"), _lora),
}
"""Of each method the names of a layer's parameters behind the layer's, and what makes weights of them."""


class Adapted(nn.Module):
    """The adapters of students of one method and size on one layer.

    Args:
        weight: (out, in), the frozen base's.
        method: one of `KINDS`.
        parameters: of each student, the layer's parameters in the order of `KINDS`. They come to lie in one
            tensor each, (K, ...), of which they are parts.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        method: str,
        parameters: Sequence[Sequence[nn.Parameter]],
    ) -> None:
        super().__init__()
        self.repeated = weight.detach().repeat(len(parameters), 1)
        self.weights = KINDS[method][1]
        self.stacks: list[torch.Tensor] = []
        self.parts: list[tuple[nn.Parameter, ...]] = list(zip(*parameters, strict=True))
        for parts in self.parts:
            stack = torch.stack([part.detach() for part in parts]).requires_grad_()
            for part, own in zip(parts, stack.detach(), strict=True):
                part.data = own
            self.stacks.append(stack)

    def forward(self) -> torch.Tensor:
        """(K, out, in)."""
        return self.weights(self, *self.stacks)

    def take_gradients(self) -> None:
        """Give every student's parameter its part of the gradient."""
        for stack, parts in zip(self.stacks, self.parts, strict=True):
            for part, own in zip(parts, stack.grad, strict=True):
                part.grad = own
            stack.grad = None


class StackedLinear(nn.Module):
    """A Linear layer with a weight for each of K students, whose samples lie one after the other.

    Args:
        base: the frozen layer.
        groups: adapters of all students, in order.
        samples: n, of each student; a batch of 2 K n holds all students' samples twice (guidance).
    """

    def __init__(self, base: nn.Linear, groups: Sequence[Adapted], samples: int) -> None:
        super().__init__()
        self.base, self.groups, self.samples = base, nn.ModuleList(groups), samples
        self.count = sum(len(group.parts[0]) for group in groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(K n, ..., in) or (2 K n, ..., in) to (..., out)."""
        weights = [group() for group in self.groups]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        times = len(x) // (self.count * self.samples)
        own = x.reshape(times, self.count, -1, x.shape[-1])
        y = torch.bmm(own[0], weight.mT) if times == 1 else torch.matmul(own, weight.mT)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.base.bias is None else y + self.base.bias


def stacked(trainers: Sequence[Trainer], part: str) -> nn.Module:
    """A view of the frozen base with the adapters of all trainers' students, or fake models, on it.

    Args:
        trainers: of one teacher, layers and batch size; those of one method and rank that stand side by side
            share their kernels.
        part: "student" or "fake".
    """
    base, samples = trainers[0].backbone.network, trainers[0].config.optimizer.train_batch_size
    network, first = view(base), getattr(trainers[0].config, part).method
    suffix = KINDS[first][0][0]
    names = [name for name in getattr(trainers[0], f"{part}_parameters") if name.endswith(suffix)]
    kinds = [(getattr(t.config, part).method, getattr(t.config, part).rank) for t in trainers]
    runs = [[t for _, t in run] for _, run in groupby(zip(kinds, trainers, strict=True), lambda kt: kt[0])]
    for name in names:
        layer = name.removesuffix(suffix)
        linear = base.get_submodule(layer)
        groups = [_adapted(linear, layer, run, part) for run in runs]
        network.set_submodule(layer, StackedLinear(linear, groups, samples))
    return network


def _adapted(linear: nn.Linear, layer: str, trainers: Sequence[Trainer], part: str) -> Adapted:
    method = getattr(trainers[0].config, part).method
    parameters = [
        [getattr(trainer, f"{part}_parameters")[layer + suffix] for suffix in KINDS[method][0]]
        for trainer in trainers
    ]
    weight = linear.wide_weight() if isinstance(linear, SmallLinear) else linear.weight
    return Adapted(weight, method, parameters)


# --- the training ---


def stack_key(config: DistillConfig) -> Hashable | None:
    """Students with equal keys can be trained as one; None: this one cannot."""
    own, plain = config.values(), DistillConfig().values()
    if "full" in (config.student.method, config.fake.method):  # convolutions of their own
        return None
    if any(own[name] != plain[name] for name in NOT_STACKED):
        return None
    guided_fake = config.fake.guidance_scale != 1
    return config.fake.layers, config.fake.updates, guided_fake, config.optimizer.train_batch_size


NOT_STACKED = (
    "student_steps",
    "denoising_weight",
    "gradient_accumulation_steps",
    "weighting",
    "fake_weighting",
)
"""Options that a `Stack` knows at their defaults only."""


class StackedScores(Scores):
    """Scores of all trainers' images at once, each student's with its own guidance.

    Args:
        trainers: in the order of their samples.
        fake: their fake models as one network.
    """

    def __init__(self, trainers: Sequence[Trainer], fake: nn.Module) -> None:
        first = trainers[0]
        networks, shape = (first.teacher, fake), first.backbone.latent_shape
        super().__init__(first.config, first.schedule, first.predict, *networks, first.null, shape)
        self.samples, self.device = first.config.optimizer.train_batch_size, first.device
        configs = [trainer.config for trainer in trainers]
        self.guidance = self._each([config.objective.guidance_scale for config in configs])
        self.above = self._each([config.objective.guidance_scale_above for config in configs])
        self.highest = self._each([float(trainer.scores.highest_guided) for trainer in trainers])
        self.fake_is_guided = any(config.fake.guidance_scale != 1 for config in configs)
        self.fake_guidance = self._each([config.fake.guidance_scale for config in configs])

    def _each(self, values: Sequence[float]) -> torch.Tensor:
        """(K n,) from one of each student."""
        values = torch.tensor(values, dtype=torch.float32, device=self.device)
        return values.repeat_interleave(self.samples)

    def teacher(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """See `Scores.teacher`."""
        scale = interval_scale(self.guidance, self.above, t, self.highest).view(-1, 1, 1, 1)
        return self._guided(self.teacher_network, x_t, t, condition, scale)

    def fake(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """See `Scores.fake`."""
        scale = self.fake_guidance.view(-1, 1, 1, 1) if self.fake_is_guided else 1.0
        return self._guided(self.fake_network, x_t, t, condition, scale)


class Stack:
    """K trainers whose students are trained as one network.

        stack = Stack(trainers)
        for step in range(800):
            losses = stack.step(step)        # of each trainer

    Args:
        trainers: with equal `stack_key`s. They are used up: from here on they are to be stepped here only,
            and judged as always.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = sorted(trainers, key=lambda t: (t.config.student.method, t.config.student.rank))
        first = self.trainers[0]
        self.schedule, self.predict = first.schedule, first.predict
        (self.vsd,) = first.terms  # `stack_key` refuses the others
        self.student, self.fake = stacked(self.trainers, "student"), stacked(self.trainers, "fake")
        self.generator = Student(first.generator.schedule, first.predict, self.student, first.generator.times)
        self.scores = StackedScores(self.trainers, self.fake)
        self.samples = first.config.optimizer.train_batch_size
        self.stream, self.graph = first.stream, None
        for trainer in self.trainers:
            trainer.stream = self.stream
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(first.device))

    def step(self, step: int) -> list[tuple[Trainer, dict[str, torch.Tensor]]]:
        """One update of every student: `Trainer.step` of each, and what it returns."""
        first = self.trainers[0]
        with first.on_stream():
            inputs = [trainer.draw(step) for trainer in self.trainers]
            for trainer in self.trainers:
                trainer.set_step(step)
            if not first.config.run.cuda_graphs:
                return list(zip(self.trainers, self.iteration(inputs), strict=True))
            if self.graph is None:
                self.static = copy.deepcopy(inputs)
                state = [tensor for trainer in self.trainers for tensor in trainer.state_tensors()]
                self.graph, self.losses = record(lambda: self.iteration(self.static), state, self.stream)
            for static, drawn in zip(self.static, inputs, strict=True):
                for buffer, value in zip(static.tensors(), drawn.tensors(), strict=True):
                    buffer.copy_(value)
            self.graph.replay()
            return list(zip(self.trainers, self.losses, strict=True))

    def iteration(self, inputs: list[StepInputs]) -> list[dict[str, torch.Tensor]]:
        """`Trainer.iteration` for every trainer, whose options `stack_key` lets through."""
        x0, losses = self._update_students(inputs)
        for update in range(self.trainers[0].config.fake.updates):
            for found, more in zip(losses, self._update_fakes(x0, inputs, update), strict=True):
                found |= more
        for trainer, found in zip(self.trainers, losses, strict=True):
            finite = found["student_grad_norm"].isfinite() & found["fake_grad_norm"].isfinite()
            count_skipped(trainer.skipped, finite, trainer.config.optimizer.max_skipped_steps)
        return losses

    def _update_students(
        self, inputs: list[StepInputs]
    ) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        condition = concatenate([each.condition for each in inputs])
        x0 = self.generator.sample(torch.cat([each.z for each in inputs]), condition)
        place = self.scores.at(x0, concatenate([each.place for each in inputs]), condition)
        gradient = self.vsd.gradient(Batch(x0, condition, place, self.scores))
        parts = zip(x0.split(self.samples), gradient.split(self.samples), strict=True)
        losses = self._backward(self.student, [generator_loss(*part) for part in parts])
        found = []
        for trainer, loss in zip(self.trainers, losses, strict=True):
            norm = trainer.student_update.apply()
            trainer.average.follow(norm.isfinite())
            found.append({"student_loss": loss, "student_grad_norm": norm})
        return x0.detach(), found

    def _update_fakes(
        self, x0: torch.Tensor, inputs: list[StepInputs], update: int
    ) -> list[dict[str, torch.Tensor]]:
        drawn = [each.fake[update] for each in inputs]
        told = [
            choose(own["null"], trainer.null, each.condition)
            for trainer, own, each in zip(self.trainers, drawn, inputs, strict=True)
        ]
        t, noise = (torch.cat([own[name] for own in drawn]) for name in ("t", "noise"))
        x_t = self.schedule.add_noise(x0, noise, t)
        prediction = self.predict(self.fake, x_t, t, concatenate(told))
        parts = zip(*(each.split(self.samples) for each in (prediction, x0, noise, t)), strict=True)
        losses = [fake_loss(self.schedule, *part, "alpha_squared") for part in parts]
        losses = self._backward(self.fake, losses)
        return [
            {"fake_loss": loss, "fake_grad_norm": trainer.fake_update.apply()}
            for trainer, loss in zip(self.trainers, losses, strict=True)
        ]

    @staticmethod
    def _backward(network: nn.Module, losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give every student's parameters the gradient of its own loss."""
        sum(losses[1:], losses[0]).backward()
        for module in network.modules():
            if isinstance(module, Adapted):
                module.take_gradients()
        return [loss.detach() for loss in losses]
