"""Teacher pairs: noise, a prompt, and the picture that the guided teacher makes of both.

They are made before the first step and kept on the device. No checkpoint holds them: they are of the options
and the prompts alone, and a resumed run makes the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator

from wadi.distill.cache import Embeddings
from wadi.distill.condition import Condition
from wadi.distill.config import DistillConfig
from wadi.distill.processes import Hosts, together
from wadi.distill.schedule import Schedule
from wadi.errors import WadiError
from wadi.progress import progress

Predict = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
"""What the guided teacher predicts for latents (N, C, H, W), timesteps (N,) and N prompts; float32."""

NUMBERS_AT_ONCE = 2**18
"""In the latents of one batch of the teacher: 16 pictures of Stable Diffusion. No option that may differ when
a run is resumed decides it, as the last bits of a picture depend on its batch."""


@dataclass(frozen=True)
class TeacherPairs:
    """N pairs; latents on the device, in float32 or float16."""

    z: torch.Tensor  # (N, C, H, W), the noise as it is stored is what the teacher started from
    x0: torch.Tensor  # (N, C, H, W)
    prompts: torch.Tensor  # (N,) int64 on the CPU, numbers of training prompts


def check_steps(steps: int, schedule: Schedule) -> None:
    """Raise a WadiError if DDIM has more steps than the schedule timesteps."""
    count = schedule.num_train_timesteps
    if steps > count:
        raise WadiError(f"--teacher-sampling-steps: must not exceed the teacher's {count} timesteps")


def teacher_pairs(
    config: DistillConfig,
    predict: Predict,
    schedule: Schedule,
    embeddings: Embeddings,
    shape: tuple[int, int, int],
    accelerator: Accelerator,
    hosts: Hosts,
) -> TeacherPairs:
    """The pairs that a config asks for, made by all processes together and the same bits in each.

    Args:
        config: the options.
        predict: the guided teacher.
        schedule: the teacher's, on the device.
        embeddings: the training prompts.
        shape: (C, H, W) of the latents.
        accelerator, hosts: of the training.
    """
    # float16 takes half the memory, and has smaller errors than a teacher in half precision
    dtype = torch.float32 if config.mixed_precision == "no" else torch.float16
    with together(hosts):
        drawn = draw_pairs(
            config.teacher_samples, len(embeddings), shape, config.seed, accelerator.device, dtype
        )
        process = accelerator.process_index, accelerator.num_processes
        steps, show = config.teacher_sampling_steps, accelerator.is_main_process
        pairs = sample_pairs(predict, schedule, embeddings, *drawn, steps, process, show)
    return replace(pairs, x0=accelerator.reduce(pairs.x0, "sum"))


def sample_pairs(
    predict: Predict,
    schedule: Schedule,
    embeddings: Embeddings,
    z: torch.Tensor,
    prompts: torch.Tensor,
    steps: int,
    process: tuple[int, int] = (0, 1),
    show: bool = True,
) -> TeacherPairs:
    """Make the teacher's pictures by deterministic DDIM (arXiv 2010.02502) from z at the last timestep.

    Args:
        predict: the guided teacher.
        schedule: the teacher's, on the device.
        embeddings: the training prompts.
        z: noise (N, C, H, W) on the device, in the dtype of the pairs.
        prompts: (N,) int64 on the CPU.
        steps: of DDIM.
        process: number of this process, and how many there are. Each makes its share of the batches and
            leaves the pictures of the others zero: the sum over the processes are all.
        show: a progress bar.
    """
    x0, size = torch.zeros_like(z), max(1, NUMBERS_AT_ONCE // z[0].numel())
    own = range(process[0] * size, len(z), process[1] * size)
    with torch.no_grad(), progress(total=len(z), disable=not show, unit="pair", desc="teacher pairs") as bar:
        for start in own:
            batch = slice(start, start + size)
            condition = {
                name: tensor.to(z.device) for name, tensor in embeddings.take(prompts[batch]).items()
            }
            x0[batch] = ddim(predict, schedule, z[batch].float(), condition, steps).to(x0.dtype)
            if z.device.type == "cuda":
                torch.cuda.current_stream(z.device).synchronize()  # the bar tells what is done
            bar.update(min(len(z), start + process[1] * size) - start)
    return TeacherPairs(z, x0, prompts)


def draw_pairs(
    count: int, prompts: int, shape: tuple[int, int, int], seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (count, *shape) and numbers (count,) of `prompts` prompts, which are of the seed alone."""
    # a training step has [seed, 0, step]
    seeds = np.random.SeedSequence([seed, 1]).generate_state(2)
    noise = torch.Generator(device).manual_seed(int(seeds[0]))
    order = torch.Generator().manual_seed(int(seeds[1]))
    z = torch.randn(count, *shape, device=device, generator=noise).to(dtype)
    return z, torch.randint(prompts, (count,), generator=order)


def ddim(
    predict: Predict, schedule: Schedule, z: torch.Tensor, condition: Condition, steps: int
) -> torch.Tensor:
    """x0 (N, C, H, W) float32 by so many deterministic steps from z, at timesteps that end with the last."""
    x_t, timesteps = z, schedule.sampling_timesteps(steps)
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((len(z),), now, device=z.device)
        prediction = predict(x_t, t, condition)
        x0 = schedule.x0(prediction, x_t, t)
        if after is None:
            return x0
        x_t = schedule.add_noise(x0, schedule.epsilon(prediction, x_t, t), torch.full_like(t, after))
    raise AssertionError("at least one step")
