"""What is wrong with a student's pictures: one prediction of the teacher at little noise, and where it helps.

    python experiments/grain.py                                   # the built-in student; two cores, 5 minutes
    python experiments/grain.py --adapter runs/mine/adapter --out mine.json
    python experiments/evidence.py                                # then: the table of docs/evidence.md

Noise of a low timestep is added to the student's latents, and the unguided teacher says what they were
before it came. The change is applied whole, or only what of it is finer, or coarser, than squares of latent
pixels; the judge reads the pictures before and after. The captions are those of the selection set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro
from diffusers import DiffusionPipeline
from tqdm import tqdm

from wadi.diffusion import Schedule
from wadi.distill.terms.denoising import without_block_means
from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import Caption, stated
from wadi.emoji.evaluate import evaluation_captions, free_attributes
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.onestep.fast import to_bytes
from wadi.onestep.pipeline import load_for_steps

PARTS = ("the student's own", "cleaned", "cleaned, fine part only", "cleaned, coarse part only")
"""Rows of the table."""


@dataclass
class Options:
    """Clean a student's pictures with its teacher, and let the judge read them before and after."""

    adapter: Path | None = None
    """The student's adapter; the built-in one if not given."""
    samples: int = 2000
    """Captions of the selection set."""
    timestep: int = 30
    """Of the noise that is added, of 1000."""
    block_size: int = 4
    """Side of the squares of latent pixels between fine and coarse."""
    batch_size: int = 50
    """Pictures made at once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where they are made."""
    out: Path = Path("docs/results/ablation/grain.json")
    """Figures."""


def cleaned(teacher: DiffusionPipeline, x0: torch.Tensor, noise: torch.Tensor, text: torch.Tensor, t: int):
    """What the unguided teacher takes for x0 where there are x0 (N, C, H, W) and noise of timestep t."""
    schedule, times = Schedule.from_config(teacher.scheduler).to(x0.device), torch.tensor([t])
    x_t = schedule.add_noise(x0, noise, times)
    return schedule.x0(teacher.unet(x_t, t, text).sample, x_t, times)


@torch.no_grad()
def pictures(
    student: DiffusionPipeline, teacher: DiffusionPipeline, texts: list[str], first: int, options: Options
) -> list[torch.Tensor]:
    """(N, 3, 64, 64) uint8 for each of ``PARTS``; picture i has seed `first` + i."""
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(texts))]
    made = student(
        texts, num_inference_steps=1, guidance_scale=1.0, generator=seeds, output_type="latent"
    ).images
    text = teacher.encode_prompt(texts, options.device, 1, False)[0]
    noise = torch.stack([torch.randn(made.shape[1:], generator=seed) for seed in seeds]).to(made)
    change = cleaned(teacher, made, noise, text, options.timestep) - made
    fine = without_block_means(change, options.block_size)
    parts = (torch.zeros_like(change), change, fine, change - fine)
    decoded = (teacher.vae.decode((made + part) / teacher.vae.config.scaling_factor).sample for part in parts)
    return [to_bytes(each).permute(0, 3, 1, 2).cpu() for each in decoded]


def figures(readings: Sequence[Reading], captions: Sequence[Caption]) -> list[dict]:
    """A row for each of ``PARTS``: share right; of the student's wrong pictures those mended, of its right
    ones those kept; bits of free background."""
    columns = stated(captions)
    right = [attributes_right(reading, columns)["all"] for reading in readings]
    before, rows = right[0], []
    for name, after, reading in zip(PARTS, right, readings, strict=True):
        rows.append(
            {
                "name": name,
                "alignment": after.double().mean().item(),
                "mended": after[~before].double().mean().item() if (~before).any() else None,
                "kept": after[before].double().mean().item() if before.any() else None,
                "background_entropy": free_attributes(reading, columns)["background_entropy"],
            }
        )
    return rows


def main(options: Options) -> None:
    """Measure, print and write."""
    if min(options.samples, options.batch_size) < 1 or options.block_size < 2:
        raise WadiError("--samples and --batch-size must be at least 1, and --block-size at least 2")
    if not 0 <= options.timestep < 1000:
        raise WadiError(f"--timestep: must be from 0 to 999, but is {options.timestep}")
    judge = Judge.load(assets_folder() / "judge.safetensors")
    adapter = options.adapter or student_folder()
    student = load_for_steps(teacher_folder(), adapter, 1, device=options.device)
    teacher = load_for_steps(teacher_folder(), None, 25, device=options.device)
    student.set_progress_bar_config(disable=True)
    captions = evaluation_captions("selection", options.samples)
    readings: list[list[Reading]] = [[] for _ in PARTS]
    for first in tqdm(range(0, len(captions), options.batch_size), unit="batch"):
        texts = [caption.text for caption in captions[first : first + options.batch_size]]
        for kept, made in zip(readings, pictures(student, teacher, texts, first, options), strict=True):
            kept.append(judge.read(made))
    rows = figures([Reading.cat(kept) for kept in readings], captions)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = f"{options.samples} captions, timestep {options.timestep}, squares of {options.block_size}, "
    header += f"{device}, torch {torch.__version__}, {date.today()}"
    write_json(options.out, {"header": header, "rows": rows})
    for row in rows:
        print("  ".join(f"{name} {_shown(value)}" for name, value in row.items()))


def _shown(value: str | float | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
