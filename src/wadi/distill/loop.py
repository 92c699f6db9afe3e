"""The run around the steps: log, validate, save, and stop after Ctrl-C with a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

import torch

from wadi.backbones.condition import pick, repeat
from wadi.distill.config import DistillConfig
from wadi.distill.processes import any_process, together
from wadi.distill.regions import eager
from wadi.distill.trainer import Trainer
from wadi.distill.update import learning_rate_factor
from wadi.errors import WadiError
from wadi.files import explain_os_errors, replacing_file
from wadi.interrupt import catch_interrupt
from wadi.onestep import labelled_grid
from wadi.onestep.scheduler import STEP_COUNTS
from wadi.progress import progress


def train(trainer: Trainer) -> bool:
    """Train to `max_train_steps`; log, validate and save on the way.

    Returns:
        Whether the end was reached. After Ctrl-C it is False; the step was finished and saved.

    Raises:
        WadiError: `max_skipped_steps` steps in a row were not finite, or a file cannot be written.
        SystemExit: code 2, if that happened in another process, which prints the error.
    """
    config, start = trainer.config, time.monotonic() - trainer.seconds
    updates = config.run.max_train_steps
    bar = progress(total=updates, initial=trainer.global_step, desc="distilling", unit="step")
    alone, main = trainer.accelerator.num_processes == 1, trainer.accelerator.is_main_process
    with bar, catch_interrupt(alone, main) as interrupted:
        while trainer.global_step < updates:
            losses = trainer.step(trainer.global_step)
            trainer.global_step += 1
            bar.update()
            stop = any_process(interrupted.is_set(), trainer.hosts)
            end = trainer.global_step == updates
            save = _due(trainer, config.run.checkpointing_steps) or stop or end
            if _due(trainer, config.run.logging_steps) or save:
                trainer.seconds = time.monotonic() - start
                bar.set_postfix(log(trainer, losses))
            if _due(trainer, config.run.validation_steps) or (end and config.run.validation_steps):
                validate(trainer)
            if save:
                trainer.save_checkpoint()
            if stop:
                return end
    return True


def _due(trainer: Trainer, every: int) -> bool:
    return every > 0 and trainer.global_step % every == 0


def log(trainer: Trainer, losses: dict[str, torch.Tensor]) -> dict[str, str]:
    """Fetch the losses, check them, append them to metrics.jsonl. Only this waits for the device.

    Losses are means over the processes. A loss that is not finite, after a skipped update, is omitted.

    Returns:
        What the progress bar shows.

    Raises:
        WadiError: see `train`.
        SystemExit: see `train`.
    """
    with trainer.on_stream():
        values = trainer.accelerator.reduce(torch.stack(list(losses.values())), "mean").tolist()
        skipped, run = trainer.skipped.tolist()
    fetched = dict(zip(losses, values, strict=True))
    with together(trainer.hosts):
        _check_finite(trainer, fetched, run)
        _write_metrics(trainer, fetched, skipped)
    shown = {name: f"{fetched[name]:.4g}" for name in ("student_loss", "fake_loss")}
    return shown | ({"skipped": str(skipped)} if skipped else {})


def _write_metrics(trainer: Trainer, fetched: dict[str, float], skipped: int) -> None:
    config, step = trainer.config, trainer.global_step
    factor = learning_rate_factor(config, step - 1)
    row = {name: value for name, value in fetched.items() if math.isfinite(value)} | {
        "skipped_steps": skipped,
        "student_learning_rate": config.optimizer.student_learning_rate * factor,
        "fake_learning_rate": config.optimizer.fake_learning_rate * factor,
    }
    trainer.accelerator.log(row, step=step)
    if trainer.accelerator.is_main_process:
        row = {"step": step, **row, "seconds": round(trainer.seconds, 3)}
        if trainer.device.type == "cuda":
            row["allocated_gib"] = round(torch.cuda.max_memory_allocated(trainer.device) / 2**30, 2)
        append_metrics(Path(config.run.output_dir) / "metrics.jsonl", row)


def _check_finite(trainer: Trainer, losses: dict[str, float], run: int) -> None:
    """Raise after too many skipped steps in a row, or if an update was made with an infinite loss."""
    worst = next((name for name, value in losses.items() if not math.isfinite(value)), None)
    if run < trainer.config.optimizer.max_skipped_steps and (run or worst is None):
        return
    what = f"{worst} is {losses[worst]}" if worst else "gradients were not finite"
    raise WadiError(
        f"step {trainer.global_step}: {what}"
        + (f", {run} steps in a row were skipped" if run else "")
        + f"; this step was not saved, and the checkpoints in {trainer.config.run.output_dir} are good; "
        "lower the learning rates and start again"
    )


def validate(trainer: Trainer) -> None:
    """Write samples/step-N.png: a row per validation prompt, a column per seed, by the averaged student.

    A student of several steps has a row for each of the numbers of steps 1, 2 and 4 that it takes.

    Raises:
        WadiError: the file cannot be written.
        SystemExit: code 2, in the processes that do not write it.
    """
    if not trainer.config.run.validation_prompts:
        return
    main, latents = trainer.accelerator.is_main_process, []
    if trainer.config.run.shard_base:  # the processes compute together
        latents = _samples(trainer)
    with together(trainer.hosts):
        if main:
            _write_samples(trainer, latents or _samples(trainer))


def _samples(trainer: Trainer) -> list[torch.Tensor]:
    """The images x0 of each validation prompt, by the averaged student."""
    config, conditions = trainer.config, trainer.prompts.validation
    seeds, shape = config.run.validation_seeds, trainer.backbone.latent_shape
    steps, n = trainer.config.student.steps, len(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # as a pipeline draws it: each step's noise after that of the step before
    drawn = [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(steps)]
    noise = torch.stack(drawn, dim=1).to(trainer.device)
    # another number of samples would need another compilation
    uncompiled = eager() if config.run.compile else contextlib.nullcontext()
    with trainer.on_stream(), trainer.ema_weights(), torch.no_grad(), uncompiled:
        rollouts = [trainer.generator.rollout(count, noise[:, 1:count]) for count in _step_counts(config)]
        rows = [pick(conditions, slice(i, i + 1)) for i in range(len(config.run.validation_prompts))]
        return [
            trainer.generate(
                noise[:, 0], repeat({k: v.to(trainer.device) for k, v in row.items()}, n), rollout
            )
            for row in rows
            for rollout in rollouts
        ]


def _step_counts(config: DistillConfig) -> list[int]:
    """The numbers of steps in which sample grids show the student."""
    return [count for count in STEP_COUNTS if count <= config.student.steps]


def _write_samples(trainer: Trainer, latents: list[torch.Tensor]) -> None:
    config = trainer.config
    with trainer.on_stream():
        images = trainer.backbone.decode(torch.cat(latents))
    path = Path(config.run.output_dir) / "samples" / f"step-{trainer.global_step:06d}.png"
    with replacing_file(path) as temporary:
        seeds, n = config.run.validation_seeds, len(config.run.validation_seeds)
        counts = _step_counts(config)
        texts = [
            text if len(counts) == 1 else f"{text}: {count} step{'s' * (count > 1)}"
            for text in config.run.validation_prompts
            for count in counts
        ]
        rows = [(text, images[i * n : (i + 1) * n]) for i, text in enumerate(texts)]
        labelled_grid(rows, [f"seed {seed}" for seed in seeds]).save(temporary, format="PNG")


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Append one line to metrics.jsonl."""
    with explain_os_errors(path, "append to the file"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Delete the lines after `step` and a half-written last line, because a resumed run writes them again."""
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
