"""`report.html`: what a run did, in one file that a stranger understands."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from matplotlib.figure import Figure as Plot
from PIL import Image

from wadi.device import chosen_device
from wadi.distill.config import DistillConfig
from wadi.errors import WadiError
from wadi.files import explain_os_errors, read_json, write_json, write_text
from wadi.onestep import OneStepPipeline, load_pipeline
from wadi.onestep.loading import stock_arguments

FIGURES_FILE = "figures.json"
GRIDS_SHOWN = 4
"""Sample grids in the report, evenly spread over the run."""
WIDEST = 384
"""Pixels: wider pictures are scaled down before they are embedded."""


@dataclass(frozen=True)
class Figure:
    """One row of the table of figures."""

    name: str
    before: float
    after: float
    teacher: float | None
    better: Literal["higher", "lower"]
    meaning: str
    """One sentence for someone who has never heard of it."""


@dataclass(frozen=True)
class Comparison:
    """The same prompts and the same noise, three times; pictures are indexed by prompt, then by seed."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    before: Sequence[Sequence[Image.Image]]
    after: Sequence[Sequence[Image.Image]]
    teacher: Sequence[Sequence[Image.Image]]
    student_seconds: float
    """Seconds per picture in one step, measured on these pictures."""
    teacher_seconds: float
    """Seconds per picture of the teacher in `steps` steps."""


def before_after(
    teacher: DiffusionPipeline,
    student: OneStepPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 1.5,
) -> Comparison:
    """Make the pictures of the report: teacher in 1 step, student in 1 step, teacher in `steps` DDIM steps.

    All three start from the same noise. `teacher` is left as it is.
    """
    # with the student's alpha_T, as training started: the teacher's own may be zero
    alpha_T_squared = float(student.pipeline.scheduler.alphas_cumprod[-1])
    one_step_teacher = OneStepPipeline(teacher, alpha_T_squared or None)
    many_steps = OneStepPipeline(teacher, alpha_T_squared or None).pipeline  # a copy, the modules are shared
    many_steps.scheduler = _ddim(teacher)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def in_one_step(pipeline: OneStepPipeline, prompt: str) -> list[Image.Image]:
        return pipeline(prompt, generator=generators(), num_images_per_prompt=len(seeds))

    def in_many_steps(prompt: str) -> list[Image.Image]:
        return many_steps(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=len(seeds),
            generator=generators(),
            **stock_arguments(teacher),
        ).images

    before = [in_one_step(one_step_teacher, prompt) for prompt in prompts]  # warms up, too
    start = time.perf_counter()
    after = [in_one_step(student, prompt) for prompt in prompts]
    middle = time.perf_counter()
    reference = [in_many_steps(prompt) for prompt in prompts]
    end = time.perf_counter()
    count = len(prompts) * len(seeds)
    return Comparison(
        prompts=prompts,
        seeds=seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        before=before,
        after=after,
        teacher=reference,
        student_seconds=(middle - start) / count,
        teacher_seconds=(end - middle) / count,
    )


def _ddim(teacher: DiffusionPipeline) -> DDIMScheduler:
    """DDIM from the last timestep; where epsilon says nothing of x0 there (alpha_T = 0), from before it."""
    ddim = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    if ddim.config.prediction_type == "epsilon" and ddim.alphas_cumprod[-1] <= 0:
        return DDIMScheduler.from_config(ddim.config, timestep_spacing="leading")
    return ddim


def report(run_folder: str | Path, steps: int = 25, guidance_scale: float | None = None) -> Path:
    """Make the pictures of a finished run and write its `report.html`.

    Args:
        run_folder: what `distill` returned.
        steps: DDIM steps of the teacher's pictures.
        guidance_scale: guidance of the teacher's pictures; that of the distillation's end when ``None``.

    Returns:
        The path of the report.

    Raises:
        WadiError: the folder is not a finished run, or its teacher is gone.
    """
    run = Path(run_folder)
    config = DistillConfig.load(run / "config.yaml")
    if not (run / "pipeline").is_dir():
        raise WadiError(
            f"{run}: has no pipeline/ yet; go on with wadi distill --resume-from-checkpoint {run}"
        )
    device = chosen_device()
    teacher = load_pipeline(config.pretrained_model_name_or_path).to(device)
    student = OneStepPipeline.from_pretrained(run / "pipeline", device=device)
    guidance_scale = config.last_guidance_scale if guidance_scale is None else guidance_scale
    pictures = before_after(
        teacher, student, config.validation_prompts, config.validation_seeds, steps, guidance_scale
    )
    return write_report(run, pictures)


def write_report(
    run_folder: str | Path, pictures: Comparison, figures: Sequence[Figure] | None = None
) -> Path:
    """Write the self-contained `report.html` of a run.

    Args:
        run_folder: holds `config.yaml`, `metrics.jsonl`, and `samples/` if the run made any.
        pictures: from `before_after`.
        figures: measurements; kept in the run's `figures.json`, from which a later report takes them.

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
        figures = _read_figures(run / FIGURES_FILE)
    metrics = _read_metrics(run / "metrics.jsonl")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wadi.distill", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"embed": _embed, "number": _number, "duration": _duration}
    html = environment.get_template("report.html.j2").render(
        pictures=pictures,
        figures=figures or (),
        grids=_spread(sorted((run / "samples").glob("step-*.png"))),
        curves=_curves(metrics),
        steps=metrics[-1]["step"],
        seconds=metrics[-1]["seconds"],
        command=command_line(config),
        config=dataclasses.asdict(config),
        folder=run.name,
    )
    write_text(run / "report.html", html)
    return run / "report.html"


def command_line(config: DistillConfig) -> str:
    """The `wadi distill` command with every option of `config` that is not at its default."""
    words = ["wadi", "distill"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "resume_from_checkpoint":
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return shlex.join(words)


def _read_figures(path: Path) -> list[Figure]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(map(_is_figure, rows)):
        names = ", ".join(field.name for field in dataclasses.fields(Figure))
        raise WadiError(f"{path}: not a list of figures, each with {names}; write it again or delete it")
    return [Figure(**row) for row in rows]


def _is_figure(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(Figure)}:
        return False
    numbers = [row["before"], row["after"], 0 if row["teacher"] is None else row["teacher"]]
    texts = [row["name"], row["meaning"]]
    return (
        all(map(_is_number, numbers))
        and all(isinstance(text, str) for text in texts)
        and row["better"] in ("higher", "lower")
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
        if not known or not all(map(_is_number, row.values())):
            raise WadiError(f"{path}: line {line} is not a step's numbers; remove the line")
    return rows


def _spread(paths: list[Path]) -> list[tuple[int, Image.Image]]:
    """Step and picture of at most `GRIDS_SHOWN` sample grids, first and last among them."""
    last = min(GRIDS_SHOWN, len(paths)) - 1
    chosen = [paths[round(i * (len(paths) - 1) / max(last, 1))] for i in range(last + 1)]
    return [(int(path.stem.removeprefix("step-")), Image.open(path)) for path in chosen]


def _curves(metrics: list[dict[str, float]]) -> str:
    """Loss curves as SVG: every logged value, and an exponential average over a tenth of the run."""
    names = [("student_loss", "Student", "#2563eb"), ("fake_loss", "Fake model", "#d97706")]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "wadi"}):
        plot = Plot(figsize=(9, 2.6), layout="constrained")
        for axes, (name, title, colour) in zip(plot.subplots(1, 2), names, strict=True):
            rows = [row for row in metrics if name in row]  # a skipped step has no losses
            steps, losses = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(losses), color=colour, linewidth=2)
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        stream = io.StringIO()
        plot.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _smooth(values: Sequence[float]) -> list[float]:
    keep = max(0.0, 1 - 10 / max(len(values), 1))
    average, smooth = next(iter(values), 0.0), []
    for value in values:
        average = keep * average + (1 - keep) * value
        smooth.append(average)
    return smooth


def _embed(image: Image.Image, widest: int = WIDEST) -> str:
    """A data URL: PNG for small pictures, JPEG for photographs' sizes."""
    image = image.convert("RGB")
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    stream, kind = io.BytesIO(), "PNG" if image.width < 256 else "JPEG"
    image.save(stream, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


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
