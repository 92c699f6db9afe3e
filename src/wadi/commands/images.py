"""What the commands that make images share: `wadi generate`, `control`, `image-to-image` and `inpaint`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from PIL import Image

from wadi import emoji
from wadi.commands.teacher_file import TeacherFile
from wadi.device import chosen_device
from wadi.onestep import refuse_guidance
from wadi.onestep.arguments import check_seed, finite_number, whole_number
from wadi.onestep.grids import KINDS, image_output, save_images
from wadi.onestep.pipeline import load_for_steps
from wadi.outputs import Output
from wadi.tasks.editing import STRENGTH, Sampling
from wadi.tasks.high_resolution import tell_larger

READ = ("model", "adapter", "subject_adapter", "embedding", "vae", "controlnet", "image", "mask")
"""Options of these commands that name files or models to read."""


@dataclass(kw_only=True)
class ImageOptions:
    """Options of every command that makes images."""

    prompt: str
    """Prompt of the images."""
    seed: int = 0
    """Seed of the first image. Image i starts from the noise of seed + i, however many images are made."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Number of images."""
    out: Path
    """A .png or .jpg file, which shows everything side by side; or a folder, with a file for each image."""
    model: str | None = None
    """Exported pipeline, or the teacher of --adapter: folder, hub id, or single .safetensors file."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    teacher_file: TeacherFile = field(default_factory=TeacherFile)
    num_inference_steps: int = 1
    """Number of steps. More than 1 is for a student that takes them, or for a multi-step model, to compare;
    without --model and --adapter that is the teacher that comes with wadi."""
    guidance_scale: float = 1.0
    """Guidance scale of a multi-step model, which is 2 for the built-in teacher. One step is not guided."""
    negative_prompt: str | None = None
    """Negative prompt of a multi-step model."""
    height: int | None = None
    """Height in pixels; the model's own if not given."""
    width: int | None = None
    """Width in pixels; the model's own if not given."""
    batch_size: int = 8
    """Number of images that are made at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks; the step itself is always computed in float32."""
    device: str | None = None
    """Device to compute on, such as cpu or cuda:1; if not given, a GPU if there is one."""
    overwrite: bool = False
    """Replace the output file; or the folder, if the same command wrote it and nothing else is in it."""

    command: ClassVar[str]
    """The command, in the words of the command line."""

    @property
    def is_file(self) -> bool:
        """Whether `out` is one file, not a folder."""
        suffix = self.out.suffix.lower()
        return suffix in KINDS or (suffix != "" and not self.out.is_dir())

    @property
    def output(self) -> Output:
        """The rule for the output file or folder."""
        inputs: list[str | Path | None] = [*self.teacher_file.inputs]
        for name in READ:
            value = getattr(self, name, None)
            inputs += value if isinstance(value, tuple) else [value]
        if self.is_file:
            return image_output(self.out, self.command, inputs, self.overwrite)
        return Output(self.out, self.command, inputs, self.overwrite)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the networks."""
        return getattr(torch, self.dtype)

    @property
    def chosen_device(self) -> str:
        """The device to compute on.

        Raises:
            WadiError: there is no such device.
        """
        return chosen_device(self.device)

    def check(self) -> None:
        """Check the options before anything is loaded or made.

        Raises:
            WadiError: a number or seed outside its range, an output that may not be written, or guidance of
                one step.
        """
        for name in ("num_images", "batch_size", "num_inference_steps"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        finite_number("--guidance-scale", self.guidance_scale)
        check_seed(self.seed, self.num_images, "--seed")
        self.output.check()
        if self.num_inference_steps == 1:
            refuse_guidance(self.guidance_scale, self.negative_prompt)

    def load(self) -> DiffusionPipeline:
        """Load the named model, or what comes with wadi: the student for one step, the teacher for several.

        Raises:
            WadiError: more steps than the student takes, or the model cannot be loaded.
        """
        adapter = self.adapter
        if self.model is None and adapter is None and self.num_inference_steps == 1:
            adapter = str(emoji.student_folder())
        pipeline = load_for_steps(
            self.teacher_file.folder(self.model or emoji.teacher_folder()),
            adapter,
            self.num_inference_steps,
            self.torch_dtype,
            self.chosen_device,
            self.guidance_scale,
        )
        tell_larger(pipeline, self.height, self.width)
        return pipeline

    def sampling(self, strength: float = STRENGTH) -> Sampling:
        """The options of sampling, with a strength for images that are made of other images."""
        return Sampling(strength, self.num_inference_steps, self.guidance_scale, self.negative_prompt)

    def finish(self, images: list[Image.Image], seconds: float, sheet: Image.Image | None = None) -> None:
        """Write the images, or the sheet into a file if there is one, and print what was written."""
        save_images([sheet] if sheet is not None and self.is_file else images, self.seed, self.output)
        steps = "one step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        plural = "s" * (len(images) > 1)
        print(f"{self.out}: {len(images)} image{plural}, {steps} each, {seconds:.2f} s")
