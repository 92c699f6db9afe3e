"""`report.html`: what a run did, in one file that a stranger understands."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from PIL import Image

from wadi.device import chosen_device
from wadi.diffusion.schedule import RectifiedFlow, schedule_class
from wadi.distill.charts import loss_curves
from wadi.distill.config import DistillConfig
from wadi.distill.figures import CLEARLY, Figure, headline, is_number, pixel_figures, read_figures
from wadi.distill.presets import PRESETS
from wadi.errors import WadiError
from wadi.files import explain_os_errors, write_json, write_text
from wadi.onestep import StudentPipeline, load_pipeline
from wadi.onestep.arguments import size_arguments
from wadi.onestep.loading import guidance_arguments, stock_arguments
from wadi.onestep.scheduler import STEP_COUNTS, last_alpha_squared
from wadi.progress import progress
from wadi.teachers import prepare_teacher

FIGURES_FILE = "figures.json"
GRIDS_SHOWN = 4
"""Sample grids in the report, evenly spread over the run."""
WIDEST, WIDEST_GRID = 768, 1600
"""Pixels: wider images and sample grids are scaled down before they are embedded."""


@dataclass(frozen=True)
class Comparison:
    """The same prompts and the same noise, three times; images are indexed by prompt, then by seed."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    before: Sequence[Sequence[Image.Image]]
    after: Sequence[Sequence[Image.Image]]
    teacher: Sequence[Sequence[Image.Image]]
    student_seconds: float
    """Seconds per image in one step, measured on these images."""
    teacher_seconds: float
    """Seconds per image of the teacher in `steps` steps."""
    sampler: str = "DDIMScheduler"
    """The scheduler of these steps."""
    pipeline_class: str = "DiffusionPipeline"
    """Class of diffusers that loads the student."""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a call of that class needs for one image as it is asked for, without guidance."""
    more_steps: Mapping[int, Sequence[Sequence[Image.Image]]] = dataclasses.field(default_factory=dict)
    """The student's images in 2 and 4 steps, by the number of steps, if it takes so many."""


def before_after(
    teacher: DiffusionPipeline,
    student: StudentPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 1.5,
) -> Comparison:
    """Make the images of the report: teacher in 1 step, student in 1 step, teacher in `steps` steps.

    A student of several steps also makes them in 2 and 4 steps. All start from the same noise. `teacher` is
    left as it is.
    """
    # with the student's alpha_T, as training started: the teacher's own may be zero
    alpha_T_squared = last_alpha_squared(student.pipeline.scheduler) or None
    in_one_step = StudentPipeline(teacher, alpha_T_squared, student.resolution)
    many_steps = copy.copy(in_one_step.pipeline)  # the modules are shared
    many_steps.scheduler = _of_many_steps(teacher)
    size = size_arguments(many_steps)
    options = guidance_arguments(teacher, guidance_scale) | stock_arguments(teacher) | size

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def in_many_steps(prompt: str, **own: Any) -> list[Image.Image]:
        return many_steps(prompt=prompt, num_inference_steps=steps, **options, **own).images

    def rows(make: Callable[..., list[Image.Image]], **own: Any) -> tuple[list[list[Image.Image]], float]:
        """Images of every prompt, and the seconds of one."""
        start, images = time.perf_counter(), []
        for prompt in prompts:
            images.append(make(prompt, generator=generators(), num_images_per_prompt=len(seeds), **own))
            bar.update()
        return images, (time.perf_counter() - start) / (len(prompts) * len(seeds))

    counts = [count for count in STEP_COUNTS if 1 < count <= len(student.steps)]
    with progress(total=(3 + len(counts)) * len(prompts), desc="images of the report", unit="prompt") as bar:
        before, _ = rows(in_one_step)
        student(prompts[0], generator=generators(), num_images_per_prompt=len(seeds))  # warms up
        after, student_seconds = rows(student)
        more_steps = {count: rows(student, num_inference_steps=count)[0] for count in counts}
        reference, teacher_seconds = rows(in_many_steps)
    return Comparison(
        prompts=prompts,
        seeds=seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        before=before,
        after=after,
        teacher=reference,
        student_seconds=student_seconds,
        teacher_seconds=teacher_seconds,
        sampler=type(many_steps.scheduler).__name__,
        pipeline_class=type(student.pipeline).__name__,
        arguments=guidance_arguments(student.pipeline) | stock_arguments(student.pipeline) | size,
        more_steps=more_steps,
    )


def _of_many_steps(teacher: DiffusionPipeline) -> SchedulerMixin:
    """DDIM from the last timestep, or from before it where epsilon says nothing of x0 there (alpha_T = 0).

    A flow keeps the scheduler that it came with.
    """
    if schedule_class(teacher.scheduler) is RectifiedFlow:
        return type(teacher.scheduler).from_config(teacher.scheduler.config)
    ddim = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    if ddim.config.prediction_type == "epsilon" and ddim.alphas_cumprod[-1] <= 0:
        return DDIMScheduler.from_config(ddim.config, timestep_spacing="leading")
    return ddim


def report(run_folder: str | Path, steps: int = 25, guidance_scale: float | None = None) -> Path:
    """Make the images of a finished run and write its `report.html`.

    Args:
        run_folder: what `distill` returned.
        steps: of the teacher's images.
        guidance_scale: guidance of the teacher's images; that of the distillation's end when ``None``.

    Returns:
        The path of the report.

    Raises:
        WadiError: the folder is not a finished run, its teacher is gone, or it names no prompts.
    """
    run = Path(run_folder)
    config = DistillConfig.load(run / "config.yaml")
    if not (run / "pipeline").is_dir():
        if (run / "adapter").is_dir():
            raise WadiError(
                f"{run}: has no pipeline/, because its teacher is quantized; merge the adapter into the "
                "model in full precision with wadi export"
            )
        raise WadiError(
            f"{run}: has no pipeline/ yet; go on with wadi distill --resume-from-checkpoint {run}"
        )
    if not config.run.validation_prompts:
        raise WadiError(f"{run / 'config.yaml'}: names no validation_prompts, of which the report has images")
    device = torch.device(chosen_device())
    dtype = config.run.dtype if device.type == "cuda" else torch.float32
    teacher = load_pipeline(prepare_teacher(*config.model.teacher), dtype)
    student = StudentPipeline.from_pretrained(run / "pipeline", torch_dtype=dtype)
    guidance_scale = config.objective.guidance_scale if guidance_scale is None else guidance_scale
    seeds = config.run.validation_seeds or DistillConfig().run.validation_seeds
    images = teacher, student, config.run.validation_prompts, seeds, steps, guidance_scale
    comparison = _in_memory(lambda: before_after(*images), (teacher, student.pipeline), device)
    return write_report(run, comparison)


def _in_memory(
    make: Callable[[], Comparison], pipelines: Sequence[DiffusionPipeline], device: torch.device
) -> Comparison:
    """Call `make` with pipelines on a device, in ever smaller parts where the memory is too small."""
    ways: list[Callable[[DiffusionPipeline], object]] = [lambda pipeline: pipeline.to(device)]
    if device.type == "cuda":
        ways.append(lambda pipeline: pipeline.enable_model_cpu_offload(device=device))
        ways.append(lambda pipeline: pipeline.enable_sequential_cpu_offload(device=device))
    for put in ways:
        try:
            for pipeline in pipelines:
                put(pipeline)
            return make()
        except torch.OutOfMemoryError:
            if put is ways[-1]:
                raise
        for pipeline in pipelines:
            pipeline.vae.enable_slicing()
        torch.cuda.empty_cache()
    raise AssertionError("the last way returns or raises")


def write_report(
    run_folder: str | Path, comparison: Comparison, figures: Sequence[Figure] | None = None
) -> Path:
    """Write the self-contained `report.html` of a run.

    Args:
        run_folder: holds `config.yaml`, `metrics.jsonl`, and `samples/` if the run made any.
        comparison: from `before_after`; what can be measured of their pixels is measured here.
        figures: more measurements; kept in the run's `figures.json`, from which a later report takes them.

    Returns:
        The path of the report.

    Raises:
        WadiError: a file of the run is missing or cannot be read, or the report cannot be written.
    """
    run = Path(run_folder)
    config = DistillConfig.load(run / "config.yaml")
    if figures is not None:
        write_json(run / FIGURES_FILE, [dataclasses.asdict(figure) for figure in figures])
    elif (run / FIGURES_FILE).exists():
        figures = read_figures(run / FIGURES_FILE)
    figures = [*(figures or ()), *pixel_figures(comparison.before, comparison.after, comparison.teacher)]
    metrics = _read_metrics(run / "metrics.jsonl")
    skipped = int(metrics[-1].get("skipped_steps", 0))
    updates = int(metrics[-1]["step"]) - skipped
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wadi.distill", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"embed": _embed, "number": _number, "duration": _duration, "counted": _counted}
    html = environment.get_template("report.html.j2").render(
        comparison=comparison,
        figures=figures,
        headline=headline(updates, figures),
        widest_grid=WIDEST_GRID,
        clearly=f"{CLEARLY:.0%}",
        grids=_spread(_sample_grids(run / "samples", metrics[-1]["step"])),
        curves=loss_curves(metrics),
        updates=updates,
        skipped=skipped,
        seconds=metrics[-1]["seconds"],
        faster=_faster(comparison.teacher_seconds / comparison.student_seconds),
        command=_again(config, run),
        config=config.values(),
        folder=run.absolute(),
        in_python=in_python(run, comparison),
        in_shell=in_shell(run, comparison),
    )
    write_text(run / "report.html", html)
    return run / "report.html"


def command_line(config: DistillConfig) -> str:
    """The `wadi distill` command with teacher, prompts, and every option that its preset has otherwise."""
    words, start = ["wadi", "distill"], PRESETS.get(config.model.preset, DistillConfig())
    named = ("preset", "pretrained_model_name_or_path", "prompts")  # whatever the preset has
    for name, value in config.values().items():
        usual = (DistillConfig() if name in named else start).values()[name]
        if value == usual or name == "resume_from_checkpoint":
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return shlex.join(words)


def in_python(run_folder: str | Path, comparison: Comparison) -> str:
    """A script that makes the student's first image of the report anew, with diffusers alone.

    It runs in any directory, because it names the run folder by its whole path.
    """
    arguments = "".join(f", {name}={value!r}" for name, value in comparison.arguments.items())
    dtype = _dtype(run_folder)
    return f"""\
import torch
from diffusers import {comparison.pipeline_class}

pipeline = {comparison.pipeline_class}.from_pretrained(
    {str(_pipeline(run_folder))!r}, torch_dtype={dtype}
)
image = pipeline(
    prompt={comparison.prompts[0]!r},
    generator=torch.Generator().manual_seed({comparison.seeds[0]}),
    num_inference_steps=1{arguments}
).images[0]
image.save("image.png")"""


def in_shell(run_folder: str | Path, comparison: Comparison) -> str:
    """The command that makes the same image as `in_python`."""
    words = ["wadi", "generate", comparison.prompts[0], "--model", str(_pipeline(run_folder))]
    if (dtype := _dtype(run_folder)) != torch.float32:
        words += ["--dtype", str(dtype).removeprefix("torch.")]
    return shlex.join([*words, "--seed", str(comparison.seeds[0]), "-n", "1", "--out", "image.png"])


def _pipeline(run_folder: str | Path) -> Path:
    return Path(run_folder).absolute() / "pipeline"


def _dtype(run_folder: str | Path) -> torch.dtype:
    """The dtype in which the networks of a run computed."""
    return DistillConfig.load(Path(run_folder) / "config.yaml").run.dtype


def _again(config: DistillConfig, run: Path) -> str:
    """The command that repeats a run, beside it: the run's own folder is in use."""
    return command_line(config.replace(output_dir=f"{run.absolute()}-again"))


def _read_metrics(path: Path) -> list[dict[str, float]]:
    with explain_os_errors(path, "read the file"):
        content = path.read_bytes()
    try:
        rows = [json.loads(line) for line in content.decode().splitlines()]
    except ValueError as error:  # not JSON, or not text
        raise WadiError(f"{path}: not valid JSON lines ({error}); is the run still going?") from error
    if not rows:
        raise WadiError(f"{path}: is empty; the run has not logged a step yet")
    for line, row in enumerate(rows, 1):
        known = isinstance(row, dict) and row.keys() >= {"step", "seconds"}
        known = known and all(map(is_number, row.values()))
        if not known or not all(map(math.isfinite, (row["step"], row["seconds"]))):
            raise WadiError(f"{path}: line {line} is not a step's numbers; remove the line")
    return rows


def _sample_grids(folder: Path, last_step: float) -> list[tuple[int, Path]]:
    """Step and file of the grids that the run wrote, in order; later ones it has abandoned."""
    names = (path.stem.removeprefix("step-") for path in folder.glob("step-*.png"))
    steps = sorted(int(name) for name in names if name.isdecimal() and int(name) <= last_step)
    return [(step, folder / f"step-{step:06d}.png") for step in steps]


def _spread(grids: list[tuple[int, Path]]) -> list[tuple[int, Image.Image]]:
    """Step and image of at most `GRIDS_SHOWN` sample grids, first and last among them."""
    last = min(GRIDS_SHOWN, len(grids)) - 1
    chosen = [grids[round(i * (len(grids) - 1) / max(last, 1))] for i in range(last + 1)]
    images = []
    for step, path in chosen:
        with explain_os_errors(path, "read the image"), Image.open(path) as image:
            images.append((step, image.convert("RGB")))
    return images


def _embed(image: Image.Image, widest: int = WIDEST) -> str:
    """A data URL: PNG for small images, JPEG for photographs' sizes."""
    image = image.convert("RGB")
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    stream, kind = io.BytesIO(), "PNG" if image.width < 256 else "JPEG"
    image.save(stream, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _counted(count: int, what: str) -> str:
    """A number and its noun: "1 update", "4 updates"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _faster(ratio: float) -> str:
    """Words for the student's speed: "25 times faster"."""
    words = f"{max(ratio, 1 / ratio):.2g} times"
    return f"{words} {'faster' if ratio >= 1 else 'slower'}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    """Words for a length of time: "5 min 42 s"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
