"""The options of an evaluation, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wadi.errors import WadiError
from wadi.metrics.extractors import SPACES
from wadi.onestep.arguments import SEEDS, check_seed, finite_number, whole_number
from wadi.outputs import Output

LARGEST_RESOLUTION = 8192
"""Largest side in pixels; larger images would fill the memory."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Make images of captions, and compare them with a reference set."""

    captions: Path
    """COCO's annotations (.json), or a file of prompts: .txt, .jsonl, .csv, .tsv, .json, .parquet."""
    out: Path
    """Folder for images, settings and result; images that are there already are not made again."""
    model: str
    """Exported pipeline, teacher of --adapter, or multi-step pipeline: folder or hub id."""
    adapter: str | None = None
    """Folder or hub id of a student's adapter."""
    reference: Path | None = None
    """Folder of real images, or a file of --save-reference; without it no distances are measured. The Frechet
    distance needs 4096 images on each side (256 with --features emoji), and is omitted if there are fewer."""
    save_reference: Path | None = None
    """File (.safetensors) for the statistics of the reference folder, which the next run can read instead."""
    caption_column: str = "caption"
    """Key or column of the captions in tables."""
    num_samples: int = 30_000
    """Number of captions, with one image each."""
    choice_seed: int = 0
    """Seed of the choice among the captions."""
    num_inference_steps: int = 1
    """Number of denoising steps. With 1, and with a student, the student's scheduler is used."""
    guidance_scale: float = 1.0
    """Guidance scale of a multi-step pipeline. A student, and one step, are not guided."""
    seed: int = 0
    """Seed of the first image; the next images have the next seeds."""
    resolution: int | None = None
    """Side in pixels to which images are resized before they are saved and compared, 256 for COCO; if not
    given, they are not resized. Reference images are cropped to a square and resized in the same way."""
    resize: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Pillow's filter for resizing, with antialiasing."""
    features: str = "inception"
    """Feature space of the distances, a key of `SPACES`: Inception as in published figures, or another
    one."""
    clip_model: str | None = None
    """Folder or hub id of a CLIPModel for the CLIP score, such as laion/CLIP-ViT-g-14-laion2B-s12B-b42K."""
    spread_prompts: int = 0
    """Number of captions, the first chosen ones, of which several images are made to measure their
    diversity."""
    spread_samples: int = 8
    """Number of images of each of these captions."""
    batch_size: int = 8
    """Number of images that are made at once; it does not change their noise."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks."""
    device: str | None = None
    """Device to compute on, such as cpu or cuda:1; of several processes each has its own."""
    overwrite: bool = False
    """Replace the file of --save-reference if it exists. The run in the folder is always resumed."""

    @property
    def output(self) -> Output:
        """The rule for the folder of images."""
        inputs = (self.captions, self.model, self.adapter, self.reference, self.clip_model)
        return Output(self.out, "evaluate", inputs, resume=True)

    @property
    def reference_output(self) -> Output:
        """The rule for the file of statistics."""
        inputs, kind, option = (self.captions, self.reference), (".safetensors",), "--save-reference"
        return Output(self.save_reference or "", "evaluate", inputs, self.overwrite, kind, option=option)

    def check(self) -> None:
        """Check the options before anything is read.

        Raises:
            WadiError: a value is outside its range, there is nothing to measure, or an output may not be
                written.
        """
        for name, low in (("num_samples", 1), ("batch_size", 1), ("spread_samples", 2)):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), low)
        if self.resolution is not None:
            whole_number("--resolution", self.resolution, 1, LARGEST_RESOLUTION + 1)
        finite_number("--guidance-scale", self.guidance_scale)
        whole_number("--num-inference-steps", self.num_inference_steps, 1)
        check_seed(self.seed, self.num_samples + self.spread_prompts * self.spread_samples, "--seed")
        whole_number("--choice-seed", self.choice_seed, 0, SEEDS)
        whole_number("--spread-prompts", self.spread_prompts, 0, self.num_samples + 1)
        if self.features not in SPACES:
            raise WadiError(f"--features {self.features}: must be one of {', '.join(SPACES)}")
        if self.reference is None and self.clip_model is None and not self.spread_prompts:
            raise WadiError("nothing to measure: give --reference, --clip-model or --spread-prompts")
        if self.reference is not None and not self.reference.exists():
            raise WadiError(f"--reference {self.reference}: no such file or folder; name one that exists")
        self.output.check()
        if self.save_reference is not None:
            self.reference_output.check()
        if self.reference is not None and self.reference.resolve() in self.out.resolve().parents:
            raise WadiError(
                f"--out {self.out}: is inside {self.reference}, and its images would be taken for real ones; "
                "name another folder"
            )
