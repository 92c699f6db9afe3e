"""The commands that make pictures: `wadi generate`, `control`, `image-to-image` and `inpaint`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.Image import Resampling

from wadi import emoji
from wadi.device import chosen_device
from wadi.errors import WadiError, tell
from wadi.images import open_mask
from wadi.onestep import OneStepPipeline, image_grid, refuse_guidance
from wadi.onestep.arguments import check_seed, finite_number, image_size, whole_number
from wadi.onestep.embedding import holds_word
from wadi.onestep.pictures import KINDS, picture_output, write_picture
from wadi.onestep.pipeline import load_for_steps
from wadi.outputs import Output
from wadi.tasks import control as steering
from wadi.tasks import editing, growth, redilated
from wadi.tasks.high_resolution import tell_larger

READ = ("model", "adapter", "subject_adapter", "embedding", "vae", "controlnet", "image", "mask")
"""Options of these commands that name what is read."""


@dataclass(kw_only=True)
class Common:
    """Options of every command that makes pictures."""

    prompt: str
    """What the pictures show."""
    seed: int = 0
    """Picture i starts from the noise of seed + i, however many are made."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """How many pictures."""
    out: Path
    """A .png or .jpg file, which shows everything side by side; or a folder, for a file each."""
    model: str | None = None
    """Exported pipeline, or the teacher of --adapter: folder or hub id."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    num_inference_steps: int = 1
    """More than 1 is for a multi-step model, to compare: without --model the teacher that comes with wadi."""
    guidance_scale: float = 1.0
    """Of a multi-step model (the built-in teacher's is 2); one step is not guided."""
    negative_prompt: str | None = None
    """Of a multi-step model."""
    height: int | None = None
    """In pixels; the model's own if not given."""
    width: int | None = None
    """In pixels; the model's own if not given."""
    batch_size: int = 8
    """Pictures made at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the networks; one step itself is always float32."""
    device: str | None = None
    """Such as cpu or cuda:1; a GPU if there is one."""
    overwrite: bool = False
    """Replace the file; or the folder, if the same command wrote it and nothing else is in it."""

    command: ClassVar[str]
    """Who writes: its words on the command line."""

    @property
    def is_file(self) -> bool:
        """Whether `out` is one file, not a folder."""
        suffix = self.out.suffix.lower()
        return suffix in KINDS or (suffix != "" and not self.out.is_dir())

    @property
    def output(self) -> Output:
        """Where the images go."""
        inputs: list[str | Path | None] = []
        for name in READ:
            value = getattr(self, name, None)
            inputs += value if isinstance(value, tuple) else [value]
        if self.is_file:
            return picture_output(self.out, self.command, inputs, self.overwrite)
        return Output(self.out, self.command, inputs, self.overwrite)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype)

    @property
    def chosen_device(self) -> str:
        """The device."""
        return chosen_device(self.device)

    def check(self) -> None:
        """Tell what cannot be before anything is loaded or made.

        Raises:
            WadiError: a number or seed out of its range, no place to write to, or guidance of one step.
        """
        for name in ("num_images", "batch_size", "num_inference_steps"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        finite_number("--guidance-scale", self.guidance_scale)
        self.check_seeds(self.num_images)
        self.output.check()
        if self.num_inference_steps == 1:
            refuse_guidance(1, self.guidance_scale, self.negative_prompt)

    def check_seeds(self, images: int) -> None:
        """Raise a WadiError if --seed, or that of the last of so many images, is not possible."""
        check_seed(self.seed, images, "--seed")

    def load(self) -> DiffusionPipeline:
        """What the options name, or what comes with wadi: the student for one step, the teacher for several.

        Raises:
            WadiError: several steps of a student's adapter, or nothing that can be loaded.
        """
        adapter = self.adapter
        if adapter is not None and self.num_inference_steps > 1:
            raise WadiError("--num-inference-steps: the student of --adapter takes 1 step; omit one of them")
        if self.model is None and adapter is None and self.num_inference_steps == 1:
            adapter = str(emoji.student_folder())
        pipeline = load_for_steps(
            self.model or emoji.teacher_folder(),
            adapter,
            self.num_inference_steps,
            self.torch_dtype,
            self.chosen_device,
        )
        tell_larger(pipeline, self.height, self.width)
        return pipeline

    def finish(self, images: list[Image.Image], seconds: float, sheet: Image.Image | None = None) -> None:
        """Write the pictures, in a file the sheet that shows them if there is one, and tell."""
        save_pictures([sheet] if sheet is not None and self.is_file else images, self.seed, self.output)
        steps = "one step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        plural = "s" * (len(images) > 1)
        print(f"{self.out}: {len(images)} picture{plural}, {steps} each, {seconds:.2f} s")


def save_pictures(images: Sequence[Image.Image], seed: int, output: Output) -> None:
    """Write images as one file, several as a grid, or as files of a new folder."""
    if output.suffixes:
        write_picture(images[0] if len(images) == 1 else image_grid(images), output)
        return
    with output.writing() as folder:
        for i, image in enumerate(images):
            write_picture(image, picture_output(folder / f"seed-{seed + i:06d}.png", output.command))


# --- generate ---


@dataclass(kw_only=True)
class GenerateConfig(Common):
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
    with _stretched(pipeline, height, width) if config.redilate else contextlib.nullcontext():
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


def _stretched(
    pipeline: OneStepPipeline, height: int | None, width: int | None
) -> contextlib.AbstractContextManager:
    """The U-Net re-dilated for pictures larger than its own; nothing for others, and for transformers."""
    factors = growth(pipeline.pipeline, height, width)
    return redilated(pipeline.pipeline.unet, factors) if max(factors) > 1 else contextlib.nullcontext()


# --- control ---


@dataclass(kw_only=True)
class ControlConfig(Common):
    """Options of `control`."""

    command = "control"

    image: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
    """The picture, or the map itself. What does not fit the shape of the result is cut off."""
    condition: tyro.conf.UseAppendAction[tuple[Literal["canny", "map"], ...]] = ()
    """canny finds the edges of the picture; map: the picture is the condition map."""
    controlnet: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or hub id of a ControlNetModel of the model, or of its teacher."""
    conditioning_scale: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """How much of what the ControlNet adds is added: 0 nothing, 1 all. If not given, 1; for one step with the
    ControlNet that comes with wadi, 0.5."""
    low: float = 100
    """Lower threshold of edges, of gradients in 8-bit steps."""
    high: float = 200
    """Upper threshold of edges."""
    out: Path = Path("control.png")
    """A .png or .jpg file, which shows picture, condition and results side by side; or a folder, for a file
    each."""

    @property
    def controlnets(self) -> tuple[str, ...]:
        """Those of the options, or the one that comes with wadi, for the model that does."""
        if self.controlnet:
            return self.controlnet
        if self.model is not None:
            raise WadiError(
                f"--controlnet: name one of {self.model}; the ControlNet that comes with wadi is for its own"
            )
        return (str(emoji.controlnet_folder()),)


def control(config: ControlConfig) -> None:
    """Make pictures in one step that keep to the edges of a picture, or to a condition map.

    A ControlNet that was trained on the multi-step teacher steers the student. Without --model, --adapter and
    --controlnet, the three that come with wadi.

    Several ControlNets add up: repeat --controlnet, and name one picture for all or one for each; so with
    --condition and --conditioning-scale.
    """
    config.check()
    names, room = config.controlnets, steering
    pictures = [room.open_picture(path) for path in room.one_for_each("IMAGE", config.image, len(names))]
    kinds = room.one_for_each("--condition", config.condition or ("canny",), len(names))
    usual = 1.0 if config.controlnet or config.num_inference_steps > 1 else emoji.CONTROLNET_SCALE
    for value in config.conditioning_scale:
        finite_number("--conditioning-scale", value)
    scales = room.one_for_each("--conditioning-scale", config.conditioning_scale or (usual,), len(names))
    pipeline = config.load()
    size = image_size(pipeline, config.height, config.width)[::-1]
    maps = [
        room.condition_map(picture, kind, size, config.low, config.high)
        for picture, kind in zip(pictures, kinds, strict=True)
    ]
    controlnets = [room.load_controlnet(name, pipeline, config.torch_dtype) for name in names]
    start = time.perf_counter()
    images = room.steer(
        room.with_controlnets(pipeline, controlnets),
        config.prompt,
        maps,
        scales,
        config.seed,
        config.num_images,
        config.batch_size,
        config.num_inference_steps,
        config.guidance_scale,
        config.negative_prompt,
    )
    config.finish(images, time.perf_counter() - start, room.sheet(pictures, kinds, maps, images))


# --- image to image, inpainting ---


@dataclass(kw_only=True)
class ImageToImageConfig(Common):
    """Options of `image_to_image`."""

    command = "image-to-image"

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The picture. What does not fit the shape of the result is cut off."""
    strength: float = 0.6
    """How much changes, more than 0 and at most 1: at 1 little is kept of the picture, at 0.3 its objects
    stay too."""
    out: Path = Path("image-to-image.png")
    """A .png or .jpg file, which shows picture and results side by side; or a folder, for a file each."""


def image_to_image(config: ImageToImageConfig) -> None:
    """Make pictures in one step that show the prompt, with the ground and the places of a picture.

    The picture is noised as far as --strength says, and the student asked for what it shows. Without --model
    and --adapter, the student that comes with wadi.
    """
    config.check()
    picture = steering.open_picture(config.image)
    pipeline = config.load()
    picture = editing.fitted(pipeline, picture, config.height, config.width)
    sampling = _sampling(config, config.strength)
    start = time.perf_counter()
    images = editing.variations(
        pipeline, config.prompt, picture, sampling, config.seed, config.num_images, config.batch_size
    )
    config.finish(images, time.perf_counter() - start, editing.sheet({"picture": picture}, images))


@dataclass(kw_only=True)
class InpaintConfig(Common):
    """Options of `inpaint`."""

    command = "inpaint"

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The picture. What does not fit the shape of the result is cut off."""
    mask: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MASK")]
    """An image of the same size: white is repainted, black is kept. If it is partly transparent: what is
    drawn in one colour is repainted, or the hole that is cut into an image."""
    strength: float = 0.9
    """How much changes within the mask, more than 0 and at most 1. Lower, such as 0.8, keeps to the place and
    the ground of what was there; for an object where nothing was, stay at 0.9 or above."""
    candidates: int | None = None
    """Of so many repaintings the one whose edges show least is kept; 8 in one step, 1 in several, if not
    given. Picture i is made of the noises from seed + i * candidates on."""
    out: Path = Path("inpaint.png")
    """A .png or .jpg file, which shows picture, mask and results side by side; or a folder, for a file
    each."""


def inpaint(config: InpaintConfig) -> None:
    """Repaint the white part of a mask in one step; the rest of the picture stays as it is, to the bit.

    Without --model and --adapter, with the student that comes with wadi.
    """
    config.check()
    candidates = config.candidates
    if candidates is None:
        candidates = editing.CANDIDATES if config.num_inference_steps == 1 else 1
    if candidates < 1:
        raise WadiError("--candidates: must be at least 1")
    config.check_seeds(config.num_images * candidates)
    picture = steering.open_picture(config.image)
    shape = editing.binary_mask(open_mask(config.mask), picture)
    pipeline = config.load()
    picture = editing.fitted(pipeline, picture, config.height, config.width)
    shape = editing.fitted(pipeline, shape, config.height, config.width, Resampling.NEAREST)
    sampling = _sampling(config, config.strength)
    start = time.perf_counter()
    images = editing.repaintings(
        pipeline,
        config.prompt,
        picture,
        shape,
        sampling,
        config.seed,
        config.num_images,
        candidates,
        config.batch_size,
    )
    seconds = time.perf_counter() - start
    config.finish(images, seconds, editing.sheet({"picture": picture, "mask": shape}, images))


def _sampling(config: Common, strength: float) -> editing.Sampling:
    return editing.Sampling(
        strength, config.num_inference_steps, config.guidance_scale, config.negative_prompt
    )
