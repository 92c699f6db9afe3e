"""Updates of weights: AdamW with clipping, the moving average, and skipped steps.

Nothing here waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from wadi.distill.config import DistillConfig, OptimizerOptions
from wadi.distill.processes import average


class Update:
    """Gradients and AdamW of one network's trained parameters.

    Args:
        options: batches and AdamW.
        accelerator: scales losses.
        parameters: what is trained of the network, float32, by name.
        rate: the highest learning rate.
    """

    def __init__(
        self,
        options: OptimizerOptions,
        accelerator: Accelerator,
        parameters: dict[str, torch.nn.Parameter],
        rate: float,
    ) -> None:
        self.options, self.accelerator = options, accelerator
        self.parameters, self.rate = parameters, rate
        self.optimizer = _adamw(options, list(parameters.values()), rate, accelerator.device)

    def set_rate(self, factor: float) -> None:
        """Set the learning rate to a fraction of its highest. A recorded graph follows it."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.rate * factor)
            else:
                group["lr"] = self.rate * factor

    def micro_batches(self) -> Iterator[slice]:
        """Slices of the step's batch."""
        size, count = self.options.train_batch_size, self.options.gradient_accumulation_steps
        return (slice(i * size, (i + 1) * size) for i in range(count))

    def backward(self, losses: dict[str, tuple[torch.Tensor, float]]) -> dict[str, torch.Tensor]:
        """Add the gradient of a micro-batch's losses, each with its weight.

        Returns:
            The share of each loss in the mean of the step, without its weight.
        """
        count = self.options.gradient_accumulation_steps
        weighted = [loss if weight == 1 else weight * loss for loss, weight in losses.values()]
        self.accelerator.backward(sum(weighted[1:], weighted[0]) / count)
        return {name: loss.detach() / count for name, (loss, _) in losses.items()}

    def apply(self) -> torch.Tensor:
        """Average over the processes, unscale, clip, AdamW, clear; returns the norm before clipping.

        Where the norm is not finite, fused AdamW's own mask leaves parameters, moments and step count as they
        were. The processes' gradients are averaged by then, so all processes decide alike.
        """
        scaler, optimizer = self.accelerator.scaler, self.optimizer
        average([p.grad for p in self.parameters.values() if p.grad is not None], self.accelerator)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = norm.isfinite().logical_not().float()
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state by "<parameter>.<moment>"; live tensors, not copies."""
        state = self.optimizer.state
        return {f"{name}.{key}": x for name, p in self.parameters.items() for key, x in state[p].items()}


class Average:
    """The moving average of the student's weights, which is what ships.

    Args:
        parameters: what is averaged, by name.
        decay: the highest decay. The decay of step n is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        self._weight = torch.ones((), device=next(iter(parameters.values())).device)

    def set_step(self, step: int) -> None:
        """Set the decay of a step. A recorded graph follows it."""
        self._weight.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def follow(self, finite: torch.Tensor) -> None:
        """average += (1 - decay) (weights - average), where the 0-dimensional `finite` is true."""
        average = list(self.tensors.values())
        change = torch._foreach_sub(list(self.parameters.values()), average)
        torch._foreach_mul_(change, self._weight * finite)
        torch._foreach_add_(average, change)


def count_skipped(counts: torch.Tensor, finite: torch.Tensor, limit: int) -> None:
    """Count a step as skipped unless its updates were all `finite`.

    Args:
        counts: (2,) int64, skipped steps in total and in a row. They are changed in place.
        finite: 0-dimensional bool.
        limit: this many skipped steps in a row are too many. The count then stays until the host reads it.
    """
    total, run = counts
    skipped = finite.logical_not()
    too_long = run >= limit
    counts.copy_(torch.stack([total + skipped, torch.where(skipped | too_long, run + skipped, 0)]))


def learning_rate_factor(config: DistillConfig, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `lr_decay_fraction`; 1 in between."""
    options, steps = config.optimizer, config.run.max_train_steps
    warmup = min(1.0, (step + 1) / options.lr_warmup_steps) if options.lr_warmup_steps else 1.0
    decay_steps = options.lr_decay_fraction * steps
    decay = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def _adamw(
    options: OptimizerOptions, parameters: list[torch.nn.Parameter], rate: float, device: torch.device
) -> torch.optim.AdamW:
    """Fused AdamW. On a GPU its step and rate are tensors on the device, as a CUDA graph needs them."""
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(rate, device=device) if on_gpu else rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=device.type in ("cpu", "cuda"),
        capturable=on_gpu,
    )
    for p in parameters:  # what AdamW's first step would create; a checkpoint or a graph needs it before
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer
