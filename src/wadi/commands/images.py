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
from wadi.onestep.pictures import KINDS, picture_output, save_pictures
from wadi.onestep.pipeline import load_for_steps
from wadi.outputs import Output
from wadi.tasks.editing import Sampling
from wadi.tasks.high_resolution import tell_larger

READ = ("model", "adapter", "subject_adapter", "embedding", "vae", "controlnet", "image", "mask")
"""Options of these commands that name what is read."""


@dataclass(kw_only=True)
class ImageOptions:
    """Options of every command that makes images."""

    prompt: str
    """What the images show."""
    seed: int = 0
    """Image i starts from the noise of seed + i, however many are made."""
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """How many images."""
    out: Path
    """A .png or .jpg file, which shows everything side by side; or a folder, for a file each."""
    model: str | None = None
    """Exported pipeline, or the teacher of --adapter: folder or hub id."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    num_inference_steps: int = 1
    """More than 1 is for a multi-step model, to compare: without --model the teacher that comes with wadi."""
    guidance_scale: float = 1.0
    """Guidance scale of a multi-step model (the built-in teacher's is 2); one step is not guided."""
    negative_prompt: str | None = None
    """Negative prompt, for a multi-step model only."""
    height: int | None = None
    """In pixels; the model's own if not given."""
    width: int | None = None
    """In pixels; the model's own if not given."""
    batch_size: int = 8
    """Images made at once."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks; one step itself is always float32."""
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

    def sampling(self, strength: float) -> Sampling:
        """How an image is made of another one, with so much of it changed."""
        return Sampling(strength, self.num_inference_steps, self.guidance_scale, self.negative_prompt)

    def finish(self, images: list[Image.Image], seconds: float, sheet: Image.Image | None = None) -> None:
        """Write the images, in a file the sheet that shows them if there is one, and tell."""
        save_pictures([sheet] if sheet is not None and self.is_file else images, self.seed, self.output)
        steps = "one step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        plural = "s" * (len(images) > 1)
        print(f"{self.out}: {len(images)} image{plural}, {steps} each, {seconds:.2f} s")
