"""`wadi generate`: make images in one step."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wadi import emoji
from wadi.commands.images import ImageOptions
from wadi.errors import tell
from wadi.onestep import OneStepPipeline, refuse_guidance
from wadi.onestep.embedding import holds_word
from wadi.tasks.high_resolution import stretched, tell_larger


@dataclass(kw_only=True)
class GenerateConfig(ImageOptions):
    """Options of `generate`."""

    command = "generate"

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What the pictures show."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """How many pictures."""
    out: Path = Path("wadi.png")
    """A .png or .jpg file, which shows several pictures as a grid; or a folder, for a file each."""
    num_inference_steps: int = 1
    """Only 1; it is here to say so."""
    guidance_scale: float = 1.0
    """Only 1; guidance was built into a one-step student by distillation."""
    negative_prompt: str | None = None
    """None, for the same reason."""
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter of wadi dreambooth, stacked on the student; may be given several times."""
    embedding: tuple[Path, ...] = ()
    """Files, or folders of wadi invert, of learned words that the prompt uses."""
    redilate: bool = True
    """Stretch the inner convolutions of a U-Net for pictures larger than the model's own, so that objects do
    not repeat (ScaleCrafter)."""
    fast: bool = False
    """On a GPU, compile the networks and replay them as one CUDA graph; compiling may take minutes, so it
    pays for many pictures. Elsewhere nothing is compiled."""
    vae: str | None = None
    """Another autoencoder, folder or hub id, such as the small and quick madebyollin/taesd."""


def generate(config: GenerateConfig) -> None:
    """Make pictures in one step; without --model and --adapter, with the student that comes with wadi."""
    refuse_guidance(config.num_inference_steps, config.guidance_scale, config.negative_prompt)
    config.check()
    pipeline, batch_size, images = _student(config), config.batch_size, []
    height, width = config.height, config.width
    tell_larger(pipeline.pipeline, height, width)
    with stretched(pipeline.pipeline, height, width) if config.redilate else contextlib.nullcontext():
        if config.fast:
            batch_size = min(batch_size, config.num_images)
            pipeline.compile(batch_size=batch_size)
            print(f"ready after {pipeline.fast.warm_up(batch_size, height, width):.2f} s", flush=True)
        start = time.perf_counter()
        for first in range(0, config.num_images, batch_size):
            count, own = min(batch_size, config.num_images - first), config.seed + first
            images += pipeline(config.prompt, own, num_images_per_prompt=count, height=height, width=width)
        seconds = time.perf_counter() - start
    config.finish(images, seconds)


def _student(config: GenerateConfig) -> OneStepPipeline:
    """What the options name, or the student that comes with wadi, with what is stacked on it."""
    adapter = config.adapter
    if config.model is None and adapter is None:
        adapter = str(emoji.student_folder())
    pipeline = OneStepPipeline.from_pretrained(
        config.model or emoji.teacher_folder(),
        adapter=[*([] if adapter is None else [adapter]), *config.subject_adapter],
        torch_dtype=config.torch_dtype,
        device=config.chosen_device,
        vae=config.vae,
    )
    for path in config.embedding:
        word = pipeline.load_embedding(path)
        print(f"{path}: the word {word}")
        if not holds_word(pipeline.pipeline, config.prompt, word):
            tell(f"--embedding {path}: the prompt does not have the word {word}, so it changes nothing")
    return pipeline
