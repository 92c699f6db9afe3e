"""`wadi generate`: make images with a student."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wadi import emoji
from wadi.commands.images import ImageOptions
from wadi.errors import WadiError, tell
from wadi.onestep import StudentPipeline, refuse_guidance
from wadi.onestep.embedding import holds_word
from wadi.tasks.high_resolution import stretched, tell_larger


@dataclass(kw_only=True)
class GenerateConfig(ImageOptions):
    """Options of `generate`."""

    command = "generate"

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What the images show."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of images."""
    out: Path = Path("wadi.png")
    """A .png or .jpg file, where several images form a grid; or a folder, with one file for each image."""
    num_inference_steps: int = 1
    """Number of steps, at most those that the student was distilled for (--student-steps)."""
    guidance_scale: float = 1.0
    """Must be 1: distillation has built the guidance into a student."""
    negative_prompt: str | None = None
    """Must be omitted, for the same reason."""
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter of wadi dreambooth, merged after the student's; may be given several times."""
    embedding: tuple[Path, ...] = ()
    """Learned words that the prompt uses: .safetensors files, or folders that wadi invert wrote."""
    redilate: bool = True
    """If images are larger than the model's own size, stretch the inner convolutions of its U-Net, so that
    objects do not repeat (ScaleCrafter)."""
    fast: bool = False
    """On a GPU, compile the networks and replay them as one CUDA graph. Compiling may take minutes, so use it
    for many images. Without a GPU nothing is compiled."""
    vae: str | None = None
    """Folder or hub id of another autoencoder, such as the small and fast madebyollin/taesd."""


def generate(config: GenerateConfig) -> None:
    """Make images of a prompt in one step or a few. Without --model and --adapter, the built-in student makes
    them."""
    refuse_guidance(config.guidance_scale, config.negative_prompt)
    config.check()
    pipeline, batch_size, images = _student(config), config.batch_size, []
    steps = pipeline.check_steps(config.num_inference_steps)
    if config.fast and steps > 1:
        raise WadiError(f"--fast: makes images in 1 step, not {steps}; omit it, or ask for 1 step")
    height, width = config.height, config.width
    options = {"height": height, "width": width, "num_inference_steps": steps}
    tell_larger(pipeline.pipeline, height, width)
    with stretched(pipeline.pipeline, height, width) if config.redilate else contextlib.nullcontext():
        if config.fast:
            batch_size = min(batch_size, config.num_images)
            pipeline.compile(batch_size=batch_size)
            print(f"ready after {pipeline.fast.warm_up(batch_size, height, width):.2f} s", flush=True)
        start = time.perf_counter()
        for first in range(0, config.num_images, batch_size):
            count, own = min(batch_size, config.num_images - first), config.seed + first
            images += pipeline(config.prompt, own, num_images_per_prompt=count, **options)
        seconds = time.perf_counter() - start
    config.finish(images, seconds)


def _student(config: GenerateConfig) -> StudentPipeline:
    """The student that the options name, or the built-in one, with the subject adapters and learned words."""
    adapter = config.adapter
    if config.model is None and adapter is None:
        adapter = str(emoji.student_folder())
    pipeline = StudentPipeline.from_pretrained(
        config.teacher_file.folder(config.model or emoji.teacher_folder()),
        adapter=[*([] if adapter is None else [adapter]), *config.subject_adapter],
        torch_dtype=config.torch_dtype,
        device=config.chosen_device,
        vae=config.vae,
    )
    for path in config.embedding:
        word = pipeline.load_embedding(path)
        print(f"{path}: learned word {word}")
        if not holds_word(pipeline.pipeline, config.prompt, word):
            tell(
                f"--embedding {path}: the prompt does not contain the word {word}, so the word has no effect"
            )
    return pipeline
