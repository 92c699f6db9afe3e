"""What the commands that make images share: `wadi generate`, `control`, `image-to-image` and `inpaint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from PIL import Image

from wadi import emoji
from wadi.device import chosen_device
from wadi.errors import WadiError
from wadi.onestep import refuse_guidance
from wadi.onestep.arguments import check_seed, finite_number, whole_number
from wadi.onestep.grids import KINDS, image_output, save_images
from wadi.onestep.pipeline import load_for_steps
from wadi.outputs import Output
from wadi.tasks.editing import Sampling
from wadi.tasks.high_resolution import tell_larger

READ = ("model", "adapter", "subject_adapter", "embedding", "vae", "controlnet", "image", "mask")
"""Options of these commands that name files to read."""


@dataclass(kw_only=True)
class ImageOptions:
    """Options of every command that makes images."""

    prompt: str
    """What the images show."""
    seed: int = 0
    """Image i starts from the noise of seed + i, whatever the number of images."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Number of images."""
    out: Path
    """A .png or .jpg file, which shows everything side by side; or a folder, with one file for each image."""
    model: str | None = None
    """Folder or hub id of an exported student, or of the teacher of --adapter."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    num_inference_steps: int = 1
    """1 for a student. More steps are for a multi-step model: --model, or else the built-in teacher."""
    guidance_scale: float = 1.0
    """Guidance scale of a multi-step model, 2 for the built-in teacher. A student needs 1."""
    negative_prompt: str | None = None
    """Negative prompt. Only a multi-step model takes one."""
    height: int | None = None
    """Height of the images in pixels. If omitted, the model's own."""
    width: int | None = None
    """Width of the images in pixels. If omitted, the model's own."""
    batch_size: int = 8
    """Number of images that are made at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks. The step itself is always computed in float32."""
    device: str | None = None
    """Device, such as cpu or cuda:1. If omitted, a GPU if there is one."""
    overwrite: bool = False
    """Replace the file. A folder is replaced only if the same command wrote it and nothing else is in it."""

    command: ClassVar[str]
    """The words of the command on the command line."""

    @property
    def is_file(self) -> bool:
        """Whether `out` is one file, not a folder."""
        suffix = self.out.suffix.lower()
        return suffix in KINDS or (suffix != "" and not self.out.is_dir())

    @property
    def output(self) -> Output:
        """The file or folder that the images are written to."""
        inputs: list[str | Path | None] = []
        for name in READ:
            value = getattr(self, name, None)
            inputs += value if isinstance(value, tuple) else [value]
        if self.is_file:
            return image_output(self.out, self.command, inputs, self.overwrite)
        return Output(self.out, self.command, inputs, self.overwrite)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return getattr(torch, self.dtype)

    @property
    def chosen_device(self) -> str:
        """`device`, or the default device of this machine."""
        return chosen_device(self.device)

    def check(self) -> None:
        """Refuse impossible options before anything is loaded or made.

        Raises:
            WadiError: a number or a seed is out of its range, --out cannot be written, or one step is guided.
        """
        for name in ("num_images", "batch_size", "num_inference_steps"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        finite_number("--guidance-scale", self.guidance_scale)
        self.check_seeds(self.num_images)
        self.output.check()
        if self.num_inference_steps == 1:
            refuse_guidance(1, self.guidance_scale, self.negative_prompt)

    def check_seeds(self, images: int) -> None:
        """Raise a WadiError if --seed, or the seed of the last of so many images, is out of range."""
        check_seed(self.seed, images, "--seed")

    def load(self) -> DiffusionPipeline:
        """Load the model that the options name, or the built-in student (one step) or teacher (more steps).

        Raises:
            WadiError: several steps are asked of a student's adapter, or the model cannot be loaded.
        """
        adapter = self.adapter
        if adapter is not None and self.num_inference_steps > 1:
            raise WadiError(
                "--num-inference-steps: the student of --adapter takes 1 step; omit one of the two"
            )
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

    def sampling(self, strength: float) -> Sampling:
        """How an image is made from another one; `strength` says how much of it changes, at most 1."""
        return Sampling(strength, self.num_inference_steps, self.guidance_scale, self.negative_prompt)

    def finish(self, images: list[Image.Image], seconds: float, sheet: Image.Image | None = None) -> None:
        """Write the images, or the `sheet` if there is one and `out` is a file, and print a line."""
        save_images([sheet] if sheet is not None and self.is_file else images, self.seed, self.output)
        steps = "one step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        plural = "s" * (len(images) > 1)
        print(f"{self.out}: {len(images)} image{plural}, {steps} each, {seconds:.2f} s")
