"""Any diffusers text-to-image pipeline, in one step or a few."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin

from wadi.errors import WadiError, tell
from wadi.onestep.adapters import Adapters, as_list, merge_adapters
from wadi.onestep.arguments import (
    finite_number,
    generators_of,
    output_kind,
    prompt_list,
    size_arguments,
    whole_number,
)
from wadi.onestep.components import Dtype
from wadi.onestep.embedding import as_learned, load_embedding
from wadi.onestep.fast import FastPath
from wadi.onestep.loading import (
    guidance_arguments,
    load_pipeline,
    load_vae,
    prompt_reader,
    stock_arguments,
)
from wadi.onestep.output import tell_odd_output
from wadi.onestep.saving import save_pipeline
from wadi.onestep.scheduler import (
    check_places,
    gives_sigmas,
    seed_steps,
    stepping_in_float32,
    student_scheduler,
)
from wadi.onestep.student import FusedLoRA, Student, network_of, scheduled_steps
from wadi.outputs import Output


class StudentPipeline:
    """A stock diffusers pipeline with a student, which makes images in one step, or in a few.

        pipeline = StudentPipeline.from_pretrained("runs/emoji/pipeline")
        images = pipeline("a big panda on a red background", seed=3, num_images_per_prompt=8)

    In float32 the images are, bit for bit, those of the stock pipeline called with as many steps,
    ``guidance_scale=1.0`` (or its own way to say so, `guidance_arguments`) and the same generators. One thing
    differs: most stock pipelines of flows draw the noise between two steps from torch's global generator, and
    here it comes from the generators of the images. In half precision x0 is still formed in float32.

    Args:
        pipeline: any loaded text-to-image pipeline with a `unet` or `transformer`. It is left as it is; the
            modules are shared.
        alpha_T_squared: see `student_scheduler`.
        resolution: usual side of the images in pixels, for a network that makes images of any size; ``None``
            for the stock pipeline's own default.
        steps: where the student takes the most steps that it can; see `student_scheduler`. ``None`` takes
            those of the pipeline's scheduler if it is a student's with betas, or else one step.

    Attributes:
        pipeline: the stock pipeline, with the student's scheduler in place.
        alpha_T_squared, resolution: as given.
        steps: as given, or as found.
        fast: the fast path after `compile`, else ``None``.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        alpha_T_squared: float | None = None,
        resolution: int | None = None,
        steps: Sequence[float] | None = None,
    ) -> None:
        steps = scheduled_steps(pipeline.scheduler) if steps is None else steps
        own = steps, gives_sigmas(type(pipeline))
        scheduler = student_scheduler(pipeline.scheduler, alpha_T_squared, *own)
        check_places(scheduler, *own)
        self.pipeline = copy.copy(pipeline)
        self.pipeline.scheduler = stepping_in_float32(scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        if resolution is not None:
            self.pipeline.default_sample_size = resolution // pipeline.vae_scale_factor
        self.alpha_T_squared, self.resolution, self.steps = alpha_T_squared, resolution, tuple(steps)
        self.fast: FastPath | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter: Adapters = None,
        torch_dtype: Dtype | None = None,
        device: str | torch.device | None = None,
        vae: str | os.PathLike | None = None,
        fast: bool = False,
    ) -> StudentPipeline:
        """Load an exported pipeline, or a teacher with a student's adapter merged into it.

        Args:
            pretrained_model_name_or_path: folder or hub id of a diffusers pipeline.
            adapter: folder or hub id of a PEFT adapter of its U-Net or transformer, or several, such as a
                student's and a subject's: see `merge_adapters`. They are merged, so a step costs what the
                teacher's does. A student's `student.json` holds its own alpha_T^2.
            torch_dtype: dtype of all modules; "auto" for that of each module's files, float32 when ``None``.
            device: where to put the modules; ``None`` leaves them on the CPU.
            vae: folder or hub id of another autoencoder, such as a small and quick `AutoencoderTiny`
                ("madebyollin/taesd").
            fast: call `compile`.

        Raises:
            WadiError: something is missing, is not safetensors, or does not fit.

        Warns:
            WadiWarning: neither the pipeline nor an adapter says that it is a student.
        """
        pipeline = load_pipeline(pretrained_model_name_or_path, torch_dtype)
        student = merge_adapters(pipeline, adapter)
        if student is None:
            tell(
                f"{pretrained_model_name_or_path}: nothing says that this is a one-step model, and one step "
                "of a multi-step model gives noise; name a student's adapter or an exported student"
            )
        if vae is not None:
            pipeline.vae = load_vae(os.fspath(vae), pipeline, pipeline.vae.dtype)
        if device is not None:
            pipeline.to(device)
        made = cls(pipeline) if student is None else cls.of(pipeline, student)
        return made.compile() if fast else made

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, student: Student) -> StudentPipeline:
        """The pipeline of a student whose weights a stock pipeline holds."""
        return cls(pipeline, student.alpha_T_squared, student.resolution, student.steps)

    def compile(self, mode: str | None = None, batch_size: int | None = None) -> StudentPipeline:
        """Make all later calls fast: compiled, captured as one CUDA graph, embeddings of prompts kept.

        Images of float32 differ from the plain ones by rounding (at most 1 of 255). The first call of each
        shape compiles and captures it (minutes for Stable Diffusion on a GPU, less where torch has it in its
        cache): `fast.warm_up` does so ahead, `fast.warmup_seconds` tells what it took. The U-Net and the VAE
        are changed in place; call `save_pretrained` before.

        Args:
            mode: "default", "max-autotune-no-cudagraphs" or "eager"; see `FastPath`. Without a GPU ``None``
                compiles nothing: only embeddings are kept and projections fused.
            batch_size: images made at once; ``None`` for those of a call.

        Returns:
            This pipeline.

        Raises:
            WadiError: not a Stable Diffusion pipeline, or its adapter is not merged.
        """
        self.fast = FastPath(self.pipeline, mode, batch_size)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make ``len(prompts) * num_images_per_prompt`` images, prompt by prompt.

        A `WadiWarning` tells of images that the safety checker flagged, that have a single colour, or that
        hold values that are not numbers.

        Args:
            prompt: one prompt or several.
            seed: image i starts from noise of its own generator, seeded ``seed + i``: it does not depend on
                how many are made at once. The generators are on the CPU: every device gets the same noise.
            generator: instead of `seed`, as in diffusers: one, or one per image.
            num_images_per_prompt: images of each prompt, at least 1.
            height: pixels; the model's own when ``None``, also where `width` is given. See `image_size`.
            width: likewise.
            output_type: "pil", "np" (N, height, width, 3 in [0, 1]), "pt" (N, 3, height, width) or "latent".
            num_inference_steps: from 1 to the most that the student was distilled for.
            guidance_scale: only 1.0: a student has its guidance built in.
            negative_prompt: only ``None``, for the same reason.
            **kwargs: passed to the pipeline (a ControlNet's image, ...); none after `compile`.

        Returns:
            A list of PIL images, or one array or tensor.

        Raises:
            WadiError: guidance or more steps are asked for, a prompt is longer than the tokenizer takes or no
                text, or a size, a seed or a number is not possible.
        """
        steps = self.check_steps(num_inference_steps)
        refuse_guidance(guidance_scale, negative_prompt)
        prompts = as_learned(self.pipeline, prompt_list(prompt))
        images = len(prompts) * whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        sides = size_arguments(self.pipeline, height, width, from_image="image" in kwargs)
        generator = generators_of(seed, generator, images)
        output_type = output_kind(output_type)
        self._check_lengths(prompts if self.fast is None else self.fast.new_prompts(prompts))
        options = stock_arguments(self.pipeline) | kwargs
        if self.fast is not None:
            if steps > 1:
                raise WadiError(
                    f"num_inference_steps {steps}: the fast path does one step; do without compile()"
                )
            if options:
                raise WadiError(f"{', '.join(options)}: not known to the fast path; do without compile()")
            repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
            return self.fast(repeated, generator, **sides, output_type=output_type)
        seed_steps(self.pipeline, generator)
        output = self.pipeline(
            prompt=prompts,
            num_inference_steps=steps,
            num_images_per_prompt=int(num_images_per_prompt),
            generator=generator,
            output_type=output_type,
            **guidance_arguments(self.pipeline),
            **sides,
            **options,
        )
        if output_type != "latent":
            tell_odd_output(output)
        return output.images

    def check_steps(self, num_inference_steps: int) -> int:
        """Return the number of steps, or raise a WadiError if the student cannot take so many."""
        steps, most = whole_number("num_inference_steps", num_inference_steps, 1), len(self.steps)
        if steps > most:
            raise WadiError(
                f"num_inference_steps {steps}: {_takes(most)}; ask for fewer, or use the multi-step teacher"
            )
        return steps

    def load_embedding(self, path: str | os.PathLike) -> str:
        """Teach the pipeline a word that was learned by textual inversion; returns it. See `load_embedding`.

        Raises:
            WadiError: as there, or `compile` came before, whose kept embeddings of prompts may lack the word.
        """
        if self.fast is not None:
            raise WadiError(f"{path}: load embeddings before compile()")
        return load_embedding(self.pipeline, path)

    def save_pretrained(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the whole pipeline as a folder of stock classes, whole or not at all.

        `StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)` makes images of it
        without wadi. See `save_pipeline` for which files are copied as they are. Its `student.json` (see
        `Student`) says what it is.

        Args:
            folder: new or empty.
            overwrite: replace the folder if this method or `wadi export` wrote it, nothing else is in it, and
                the pipeline was not loaded from it.

        Raises:
            WadiError: the folder may not or cannot be written, or `compile` has changed the modules.
        """
        origin = self.pipeline.config.get("_name_or_path")
        self.write(Output(folder, "export", inputs=(origin or None,), overwrite=overwrite))

    def write(self, output: Output, max_shard_size: str | None = None) -> None:
        """`save_pretrained` for a command that has an `Output` of its own; see `save_pipeline` for shards."""
        output.check()
        if self.fast is not None:
            raise WadiError(f"{output.path}: a compiled pipeline cannot be saved; save it before compile()")
        stock = copy.copy(self.pipeline)
        own = self.steps, gives_sigmas(type(stock))
        stock.scheduler = student_scheduler(self.pipeline.scheduler, None, *own)
        if "is_distilled" in stock.config:  # FLUX.2-klein: its default call is then not guided
            stock.register_to_config(is_distilled=True)
        with output.writing() as temporary:
            save_pipeline(stock, temporary, max_shard_size)
            lora = FusedLoRA.in_folder(stock.name_or_path)
            own = self.alpha_T_squared, self.resolution, lora, self.steps
            Student.of(network_of(stock), stock.scheduler, *own).write(temporary)

    def _check_lengths(self, prompts: list[str]) -> None:
        """The stock pipelines cut long prompts and go on; here that is a mistake to tell."""
        if not prompts:
            return
        tokenizer, limit = prompt_reader(self.pipeline)
        for prompt in prompts:
            whole = prompt
            if isinstance(self.pipeline, TextualInversionLoaderMixin):
                whole = self.pipeline.maybe_convert_prompt(prompt, tokenizer)
            length = len(tokenizer(whole, truncation=False, verbose=False).input_ids)
            if length > limit:
                raise WadiError(
                    f"prompt: {prompt[:40]!r}... has {length} tokens and the model takes {limit}; shorten it"
                )


def refuse_guidance(guidance_scale: float = 1.0, negative_prompt: str | Sequence[str] | None = None) -> None:
    """Tell, in a sentence, that a student cannot do what guidance is for.

    Its guidance was built in by distillation: it never saw an empty or a negative prompt beside its own, and
    what its two predictions differ by points nowhere (docs/uses/editing.md has what comes of forcing it).

    Args:
        guidance_scale: only 1.0.
        negative_prompt: only ``None``.

    Raises:
        WadiError: another value; it names the option, why, and what to do instead.
    """
    if finite_number("guidance_scale", guidance_scale) != 1.0:
        raise WadiError(
            f"guidance_scale {guidance_scale:g}: a student cannot be guided, guidance was built in "
            "by distillation; omit it (1.0), distil with another --guidance-scale, or use the "
            "multi-step teacher"
        )
    if negative_prompt is not None:
        raise WadiError(
            "negative_prompt: a student cannot be guided away from anything, guidance was built "
            "in by distillation; say in the prompt what shall be there instead, or use the multi-step teacher"
        )


def load_for_steps(
    model: str | os.PathLike,
    adapter: Adapters = None,
    num_inference_steps: int = 1,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    guidance_scale: float = 1.0,
) -> DiffusionPipeline:
    """The stock pipeline for so many steps: a student's for one and for as many as it takes, or a teacher's.

    Args:
        model: folder or hub id.
        adapter: folder or hub id of a student's adapter, merged; or of several adapters, of which the first
            is the student's.
        num_inference_steps: 1 sets the scheduler of one step. More are for a student that takes them, or for
            a teacher without adapters; a teacher with a subject's alone is loaded by
            `wadi.tasks.dreambooth.load_with_adapters`.
        torch_dtype: of all modules; float32 when ``None``.
        device: where it works.
        guidance_scale: of its calls; only 1.0 for one step, and for a student.

    Raises:
        WadiError: more steps than the student takes, or several with another adapter, or guidance of a
            student; and as `load_pipeline` and `StudentPipeline.from_pretrained`.
    """
    adapters = as_list(adapter)
    if num_inference_steps == 1:
        refuse_guidance(guidance_scale)
        return StudentPipeline.from_pretrained(model, adapter, torch_dtype, device=device).pipeline
    pipeline = load_pipeline(model, torch_dtype).to(device)
    student = merge_adapters(pipeline, adapters)
    if student is None and not adapters:
        whole_number("--num-inference-steps", num_inference_steps, 1, _timesteps(pipeline) + 1)
        return pipeline
    most = 1 if student is None else len(student.steps)
    if num_inference_steps > most:
        instead = "omit the adapter for" if adapters else "name"
        raise WadiError(
            f"{adapters[0] if adapters else model}: {_takes(most)}, not {num_inference_steps}; {instead} the "
            "multi-step teacher, or ask for fewer steps"
        )
    refuse_guidance(guidance_scale)
    return StudentPipeline.of(pipeline, student).pipeline


def _takes(most: int) -> str:
    return "a one-step student takes 1 step" if most == 1 else f"this student takes 1 to {most} steps"


def _timesteps(pipeline: DiffusionPipeline) -> int:
    """Timesteps of a pipeline's schedule: it takes no more steps."""
    return pipeline.scheduler.config.get("num_train_timesteps", 1000)
