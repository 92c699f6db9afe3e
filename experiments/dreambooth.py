"""A new subject from six pictures: LoRaD against LoRA, on the teacher and on its one-step student.

    python experiments/dreambooth.py                     # what is in docs/results/dreambooth is not run again
    python experiments/dreambooth.py --results new       # everything anew, on a GPU
    python experiments/dreambooth.py --draw glyphs.safetensors        # where the emoji font is, for
    python experiments/dreambooth.py --glyphs glyphs.safetensors      # a machine without it
    python experiments/dreambooth.py --distill-on hedgehog --device cpu    # only: the student distilled on
    python experiments/dreambooth.py --alone hedgehog --device cpu --max-train-steps 150 \
        --train-batch-size 8 \
        --num-class-images 100 --subject-samples 60 --samples 60    # only: one short training
    python experiments/dreambooth.py --table            # the tables of docs/uses/dreambooth.md, from the JSON

Learning rates are chosen on one subject, as many tried for each method, and three other subjects are
reported. Both adapters have the same layers and number of parameters, see the same pictures, class pictures,
noise and number of updates. What an image shows is read by the judge, and by a recogniser of the subject
that was fitted to drawn scenes and refuses blots (`wadi.emoji.subject`). Each training leaves its figures,
and the machine that it ran on, in a JSON file in --results, and adapter and images in --runs. What is in
--results is not run again.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DiffusionPipeline
from PIL import Image
from tables import find_tables, markdown, with_tables

from wadi.backbones import student_config
from wadi.distill import PRESETS, distill
from wadi.emoji import assets_folder, prompts_file, student_folder, teacher_folder
from wadi.emoji.captions import stated
from wadi.emoji.dreambooth import LEARNING_RATES, TRAIN_TEXT_ENCODER
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, pipeline_generator
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.judge import Judge, attributes_right
from wadi.emoji.subject import (
    UNSEEN_WORDS,
    Recogniser,
    blots,
    distillation_prompts,
    draw_subjects,
    drawn_scenes,
    example_images,
    subject_captions,
    subject_figures,
    unseen_captions,
)
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.files import (
    explain_os_errors,
    load_tensors,
    read_json,
    replacing_file,
    save_tensors,
    write_json,
    write_text,
)
from wadi.metrics import feature_statistics, frechet_distance
from wadi.onestep import labelled_grid, load_pipeline
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.dreambooth import (
    DreamBooth,
    DreamBoothConfig,
    class_images,
    class_prompts,
    load_with_adapters,
    save,
)

CHOSEN_ON = "crab"
"""The subject on which learning rates are chosen."""
SUBJECTS = {"crab": "🦀", "hedgehog": "🦔", "flamingo": "🦩", "teapot": "🫖"}
KNOWN_DECOYS = "🐌🧸🐿🥜🐹🍟🦐"
"""Emoji that neither teacher nor judge know, among what the recogniser learns to refuse."""
NEW_DECOYS = "🦥🎃🦫🌰🦝🦞🦢🏺"
"""The same, which only test it."""
NEW_WORDS = ("fep", "glimp", "toma", "vrk", "yuzb", "lok")
"""Words that the student does not know either, of which it makes blots that only test the recogniser."""
RATES = {
    "lorad": ((1e-3, False), (3e-3, False), (1e-2, False), (3e-2, False), (1e-2, True)),
    "lora": ((3e-4, False), (1e-3, False), (3e-3, False), (1e-2, False), (3e-3, True)),
}
"""Learning rates that are tried, and whether the text encoder has an adapter too."""
NAMES = {"lorad": "LoRaD", "lora": "LoRA"}
STEPS, GUIDANCE_SCALE = 25, 2.0
SHOWN = ("a big zwx on a purple background", "a small zwx on the right on a yellow background")
WAYS = {
    "teacher": "teacher, 25 steps",
    "student": "student, 1 step: subject stacked on it",
    "student_subject_first": "student, 1 step: subject merged first",
}
"""How a picture is made."""
COLUMNS = ("subject recognised", "and as stated", "other prompts right", "Fréchet distance")
"""Of the tables' figures."""
RECOGNISED = {
    "subject": "the subject",
    "the_72": "the 72 known emoji",
    "new_decoys": "8 other unknown emoji",
    "new_words": "the student's images of 6 unseen words",
    "blurred": "the subject, blurred",
    "shuffled": "the subject, shuffled",
}
"""What a recogniser is tested on."""
DISTILLED = {"student": "subject stacked on the student", "distilled": "student distilled on"}
"""The two that --distill-on compares."""


@dataclass
class Options:
    """Teach subjects with both adapters and measure."""

    glyphs: Path | None = None
    """File of --draw; drawn from the font if not given."""
    draw: Path | None = None
    """Only draw the glyphs into this file."""
    only_rates: bool = False
    """Stop when the learning rates are chosen."""
    table: bool = False
    """Only write the tables of --page, from --out."""
    distill_on: tuple[str, ...] = ()
    """Only: teach these subjects with LoRaD and distil the shipped student on with the customised teacher."""
    alone: tuple[str, ...] = ()
    """Only: teach these subjects with LoRaD, and read the images of teacher and student."""
    teacher_before: bool = False
    """Measure the shipped teacher before any subject too: minutes on a CPU."""
    seeds: tuple[int, ...] = (1, 2)
    """Of the final trainings; rates are chosen with seed 0."""
    rank: int = 8
    """Of LoRaD; LoRA has the rank with as many parameters."""
    max_train_steps: int = 300
    """Updates."""
    train_batch_size: int = 16
    """Pictures of the subject an update, and as many class pictures."""
    num_class_images: int = 200
    """Class pictures."""
    distill_train_steps: int = 150
    """Updates of the subject's training with --distill-on, which a CPU can do."""
    distill_steps: int = 60
    """Updates of the student with --distill-on."""
    distill_batch_size: int = 16
    """Samples of each."""
    subject_samples: int = 150
    """Captions of the subject."""
    samples: int = 300
    """Other captions, of the test set."""
    scenes: int = 200
    """Drawn scenes of the subject that its recogniser is fitted to; of each other emoji a tenth."""
    workers: int = 12
    """Trainings at once."""
    runs: Path = Path("runs/dreambooth/experiment")
    """Folder of adapters and pictures."""
    results: Path = Path("docs/results/dreambooth")
    """Folder of the figures of single trainings."""
    out: Path = Path("docs/results/dreambooth.json")
    """JSON file for the figures."""
    picture: Path = Path("docs/images/dreambooth.jpg")
    """Pictures of the final trainings, JPEG."""
    page: Path = Path("docs/uses/dreambooth.md")
    """Page that has the tables."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""

    def decides(self) -> dict[str, Any]:
        """Options that decide the figures of a training."""
        places = (
            "glyphs",
            "draw",
            "only_rates",
            "table",
            "teacher_before",
            "alone",
            "distill_on",
            "distill_train_steps",
            "distill_steps",
            "distill_batch_size",
            "seeds",
            "workers",
            "runs",
            "results",
            "out",
            "picture",
            "page",
            "device",
        )
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in places}


@dataclass(frozen=True)
class Run:
    """One training."""

    subject: str
    method: str
    learning_rate: float
    train_text_encoder: bool
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        text = "-text" if self.train_text_encoder else ""
        return f"{self.subject}-{self.method}-{self.learning_rate:.0e}{text}-seed{self.seed}"


# --- glyphs ---


def draw_glyphs() -> dict[str, torch.Tensor]:
    """All emoji that the experiment needs, each uint8 (N, 4, 96, 96)."""
    return {
        "atlas": load_atlas(),
        "subjects": draw_subjects(list(SUBJECTS.values())),
        "known_decoys": draw_subjects(list(KNOWN_DECOYS)),
        "new_decoys": draw_subjects(list(NEW_DECOYS)),
    }


def read_glyphs(options: Options) -> dict[str, torch.Tensor]:
    """From the file, or drawn; on the device, float32 in [0, 1]."""
    glyphs = draw_glyphs() if options.glyphs is None else load_tensors(options.glyphs)
    return {name: tensor.to(options.device).float() / 255 for name, tensor in glyphs.items()}


def blots_of(words: tuple[str, ...], count: int, options: Options) -> torch.Tensor:
    """(N, 3, 64, 64) float32 in [0, 1]: what the student makes of words that it does not know."""
    student = load_for_steps(teacher_folder(), student_folder(), 1, device=options.device)
    texts = unseen_captions(count, words)
    made = generate_in_batches(_generator(student, 1), texts, seed=0, batch_size=100)
    return made.to(options.device).float() / 255


def make_recogniser(subject: str, glyphs: dict[str, torch.Tensor], options: Options) -> Recogniser:
    """Fitted to drawn scenes of the subject, of the 72 and of some decoys, and to the student's blots."""
    judge = Judge.load(assets_folder() / "judge.safetensors").to(options.device)
    own = glyphs["subjects"][[list(SUBJECTS).index(subject)]]
    others = torch.cat([glyphs["atlas"], glyphs["known_decoys"]])
    shown, _ = drawn_scenes(own, options.scenes, seed=1)
    few = max(1, options.scenes // 10)
    unseen = blemish(blots_of(UNSEEN_WORDS, few, options), torch.Generator(options.device).manual_seed(7))
    return Recogniser(judge, shown, torch.cat([drawn_scenes(others, few, seed=2)[0], unseen]))


def recogniser_figures(
    recogniser: Recogniser, subject: str, glyphs: dict[str, torch.Tensor], options: Options
) -> dict[str, float]:
    """On images that it was not fitted to: what it finds, and what it takes for the subject."""
    own = glyphs["subjects"][[list(SUBJECTS).index(subject)]]
    few = max(1, options.scenes // 10)

    def drawn(shown: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        return drawn_scenes(shown, count, seed=seed, blemished=False)[0]

    real = drawn(own, options.scenes, 3)
    none = blots(recogniser.judge, real, torch.Generator(real.device).manual_seed(8)).split(len(real))
    shown = {
        "subject": real,
        "the_72": drawn(glyphs["atlas"], few, 4),
        "new_decoys": drawn(glyphs["new_decoys"], few, 5),
        "new_words": blots_of(NEW_WORDS, few, options),
        "blurred": none[0],
        "shuffled": torch.cat(none[1:]),
    }
    return {name: recogniser(images).double().mean().item() for name, images in shown.items()}


# --- one training ---


def config_of(run: Run, options: Options) -> DreamBoothConfig:
    """Options of a training; the rank is the one with as many parameters as LoRaD's."""
    unet = load_pipeline(teacher_folder(), without=("text_encoder", "vae")).unet
    names = set(student_config(unet).target_modules)
    sizes = [(m.out_features, m.in_features) for name, m in unet.named_modules() if name in names]
    wanted = options.rank * sum(out + into // 2 for out, into in sizes)
    rank = options.rank if run.method == "lorad" else round(wanted / sum(out + into for out, into in sizes))
    return DreamBoothConfig(
        instance_data_dir=Path(run.subject),
        output_dir=options.runs / run.name,
        pretrained_model_name_or_path=str(teacher_folder()),
        prior_prompts=prompts_file(),
        num_class_images=options.num_class_images,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=STEPS,
        method=run.method,
        rank=rank,
        train_text_encoder=run.train_text_encoder,
        learning_rate=run.learning_rate,
        train_batch_size=options.train_batch_size,
        max_train_steps=options.max_train_steps,
        seed=run.seed,
        device=options.device,
    )


def painted_before(options: Options, run: Run) -> tuple[DiffusionPipeline, list[Image.Image], list[str]]:
    """The teacher, its class pictures and their prompts, which all trainings share."""
    config = dataclasses.replace(config_of(run, options), seed=0)
    pipeline = load_pipeline(teacher_folder()).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = class_prompts(config)
    return pipeline, class_images(pipeline, prompts, config, options.runs / "class"), prompts


def train(run: Run, options: Options, glyphs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One training, saved in its folder of --runs; returns what its JSON says of it beside the figures."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.device == "cpu":
        torch.set_num_threads(1)
    config = config_of(run, options)
    pipeline, painted, prompts = painted_before(options, run)
    pictures = example_images(glyphs["subjects"][list(SUBJECTS).index(run.subject)].cpu(), seed=run.seed)
    start = time.perf_counter()
    training = DreamBooth(config, pipeline, pictures, painted, prompts)
    training.train()
    seconds = time.perf_counter() - start
    save(training, config.output_dir)
    return {
        "header": header(options),
        **dataclasses.asdict(run),
        "options": options.decides(),
        "rank": config.rank,
        "parameters": sum(p.numel() for p in training.parameters.values()),
        "seconds": seconds,
    }


def header(options: Options) -> str:
    """The machine, PyTorch and day of a measurement."""
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    return f"{device}, torch {torch.__version__}, {date.today()}"


def train_and_measure(run: Run, options: Options, final: bool) -> None:
    """One training, its figures as JSON and a few pictures as safetensors."""
    glyphs = read_glyphs(options)
    facts = train(run, options, glyphs)
    recogniser, figures, shown = make_recogniser(run.subject, glyphs, options), {}, {}
    for way, steps, made in customised(options.runs / run.name, run, options, final):
        figures[way] = read(paint(made, steps, options), recogniser)
        shown[way] = generate_in_batches(_generator(made, steps), list(SHOWN), seed=0, batch_size=2)
    save_tensors(options.runs / f"{run.name}.safetensors", shown)
    write_json(options.results / f"{run.name}.json", {**facts, "figures": figures})


def customised(folder: Path, run: Run, options: Options, final: bool):
    """Way, steps and pipeline of everything that one adapter makes pictures with."""
    adapter, student = folder / "adapter", student_folder()
    yield "teacher", STEPS, load_with_adapters(str(teacher_folder()), [adapter], device=options.device)
    yield "student", 1, load_for_steps(teacher_folder(), [student, adapter], device=options.device)
    if final and run.method == "lora":  # LoRaD's angles add: there is no order
        pipeline = load_for_steps(teacher_folder(), [adapter, student], device=options.device)
        yield "student_subject_first", 1, pipeline


def alone(run: Run, options: Options) -> dict[str, Any]:
    """One training, read by the recogniser, and how good that is; as JSON."""
    glyphs = read_glyphs(options)
    facts = train(run, options, glyphs)
    recogniser, folder = make_recogniser(run.subject, glyphs, options), options.runs / run.name
    facts["recogniser"] = recogniser_figures(recogniser, run.subject, glyphs, options)
    facts["figures"] = {
        way: read(paint(made, steps, options), recogniser)
        for way, steps, made in customised(folder, run, options, final=False)
    }
    write_json(options.results / "alone" / f"{run.subject}.json", _rounded(facts))
    return facts


def distill_on(run: Run, options: Options) -> dict[str, Any]:
    """One training and the student distilled on with it, against the same adapter only stacked; as JSON."""
    options = dataclasses.replace(options, max_train_steps=options.distill_train_steps)
    glyphs = read_glyphs(options)
    facts = train(run, options, glyphs)
    recogniser, folder = make_recogniser(run.subject, glyphs, options), options.runs / run.name
    start = time.perf_counter()
    exported = distilled(folder, options)
    facts |= {"distill_steps": options.distill_steps, "distill_batch_size": options.distill_batch_size}
    facts["distill_seconds"] = time.perf_counter() - start
    made = {
        "student": load_for_steps(
            teacher_folder(), [student_folder(), folder / "adapter"], device=options.device
        ),
        "distilled": load_for_steps(exported, device=options.device),
    }
    facts["figures"] = {way: read(paint(one, 1, options), recogniser) for way, one in made.items()}
    shown = {way: generate_in_batches(_generator(one, 1), [*SHOWN] * 2, 0, 4) for way, one in made.items()}
    rows = [(SHOWN[i], [_image(shown[way][i + j]) for way in DISTILLED for j in (0, 2)]) for i in (0, 1)]
    headings = ["stacked", "", "distilled on", ""]
    with replacing_file(options.picture.with_stem(f"{options.picture.stem}-{run.subject}")) as temporary:
        labelled_grid(rows, headings).save(temporary, format="JPEG", quality=90)
    write_json(options.results / "distilled-on" / f"{run.subject}.json", facts)
    return facts


def distilled(folder: Path, options: Options) -> Path:
    """Train the shipped student on with the customised model as its teacher, on as many captions of each."""
    write_text(folder / "prompts.txt", "\n".join(distillation_prompts()) + "\n")
    config = PRESETS["emoji"].replace(
        pretrained_model_name_or_path=str(folder / "pipeline"),
        prompts=str(folder / "prompts.txt"),
        student_adapter=str(student_folder()),
        embeddings_dir=str(folder / "embeddings"),
        output_dir=str(folder / "distilled"),
        train_batch_size=options.distill_batch_size,
        max_train_steps=options.distill_steps,
        # gentler than the preset: the student works already, and its fake model begins anew
        student_learning_rate=1e-3,
        ema_decay=max(0.0, 1 - 3 / options.distill_steps),
        validation_steps=0,
        allow_tf32=True,
        cuda_graphs=options.device != "cpu",
        seed=0,
    )
    return distill(config) / "pipeline"


def _generator(pipeline: DiffusionPipeline, steps: int):
    return pipeline_generator(pipeline, steps, 1.0 if steps == 1 else GUIDANCE_SCALE)


@dataclass(frozen=True)
class Painted:
    """Pictures (N, 3, 64, 64) uint8 of captions of the subject and of others, and what these state."""

    subject: torch.Tensor
    subject_columns: dict[str, torch.Tensor]
    others: torch.Tensor
    others_columns: dict[str, torch.Tensor]


def paint(pipeline: DiffusionPipeline, steps: int, options: Options) -> Painted:
    """What is measured of a pipeline."""
    generate = _generator(pipeline, steps)
    texts, columns = subject_captions(options.subject_samples, "test")
    subject = generate_in_batches(generate, texts, seed=0, batch_size=100)
    captions = evaluation_captions("test", options.samples)
    others = generate_in_batches(generate, [c.text for c in captions], seed=0, batch_size=100)
    of_others = {name: column.to(options.device) for name, column in stated(captions).items()}
    return Painted(subject, columns, others, of_others)


def read(painted: Painted, recogniser: Recogniser) -> dict[str, float]:
    """Figures of captions of the subject, and of others."""
    figures = subject_figures(recogniser, painted.subject, painted.subject_columns)
    reading = recogniser.judge.read(painted.others)
    right = attributes_right(reading, painted.others_columns)["all"]
    figures["others"] = right.double().mean().item()
    figures["subject_elsewhere"] = recogniser(painted.others).double().mean().item()
    if len(painted.others) >= 256:  # of 128 features
        reference = load_tensors(assets_folder() / "reference.safetensors")
        figures["others_frechet_distance"] = frechet_distance(reference, feature_statistics(reading.features))
    return figures


# --- all of them ---


def run_all(runs: list[Run], options: Options, final: bool) -> list[dict[str, Any]]:
    """Results of all runs; those that are missing are made, several at once."""
    paths = [options.results / f"{run.name}.json" for run in runs]
    missing = [run for run, path in zip(runs, paths, strict=True) if not path.exists()]
    if missing:
        painted_before(options, missing[0])
    if options.workers == 1:
        for run in missing:
            train_and_measure(run, options, final)
    elif missing:
        workers = min(options.workers, len(missing))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(train_and_measure, run, options, final) for run in missing]:
                done.result()
    results = [read_json(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result["options"] != _as_read(options.decides()):
            raise WadiError(f"{path}: was made with other options; remove it, or name other --results")
    return results


def _as_read(value: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def score(result: dict[str, Any]) -> float:
    """What a learning rate is chosen by: the subject, and all else, on teacher and stacked student alike."""
    ways = [result["figures"][way] for way in ("teacher", "student")]
    return statistics.mean(way[name] for way in ways for name in ("all", "others"))


def choose(options: Options) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Results of all learning rates, and for each method the one with the best score."""
    trials = [
        Run(CHOSEN_ON, method, rate, text, 0) for method, rates in RATES.items() for rate, text in rates
    ]
    tried = run_all(trials, options, final=False)
    best = {m: max((r for r in tried if r["method"] == m), key=score) for m in RATES}
    keys = ("learning_rate", "train_text_encoder")
    return tried, {method: {key: result[key] for key in keys} for method, result in best.items()}


def baselines(options: Options) -> dict[str, Any]:
    """The shipped student before any subject, perhaps the teacher, and how good the recognisers are; kept."""
    path = options.results / "before.json"
    if path.exists():
        found = read_json(path)
        if found["options"] != _as_read(options.decides()):
            raise WadiError(f"{path}: was made with other options; remove it, or name other --results")
        return found
    glyphs = read_glyphs(options)
    recognisers = {name: make_recogniser(name, glyphs, options) for name in SUBJECTS if name != CHOSEN_ON}
    found = {"header": header(options), "options": _as_read(options.decides())}
    found["recognisers"] = {
        subject: recogniser_figures(recogniser, subject, glyphs, options)
        for subject, recogniser in recognisers.items()
    }
    ways = {"student": (1, student_folder())} | ({"teacher": (STEPS, None)} if options.teacher_before else {})
    for way, (steps, adapter) in ways.items():
        pipeline = load_for_steps(teacher_folder(), adapter, steps, device=options.device)
        painted = paint(pipeline, steps, options)
        found[way] = {subject: read(painted, recogniser) for subject, recogniser in recognisers.items()}
    write_json(path, found)
    return found


def main(options: Options) -> None:
    """Train, measure, write JSON, picture and tables."""
    if options.draw is not None:
        save_tensors(options.draw, draw_glyphs())
        return
    if options.table:
        write_page(options.page, read_json(options.out))
        return
    if any(count < 1 for count in (options.workers, options.scenes, options.subject_samples)):
        raise WadiError("--workers, --scenes, --subject-samples: must be at least 1")
    for option, subjects in (("--distill-on", options.distill_on), ("--alone", options.alone)):
        if unknown := set(subjects) - set(SUBJECTS):
            raise WadiError(f"{option} {min(unknown)}: known are {', '.join(SUBJECTS)}")
    if options.alone:
        rate = {"learning_rate": LEARNING_RATES["lorad"], "train_text_encoder": TRAIN_TEXT_ENCODER}
        runs = [Run(subject, "lorad", **rate, seed=options.seeds[0]) for subject in options.alone]
        print(alone_table([alone(run, options) for run in runs]))
        return
    tried, chosen = choose(options)
    if options.only_rates:
        print(rates_table(tried, chosen))
        return
    if options.distill_on:
        runs = [
            Run(subject, "lorad", **chosen["lorad"], seed=options.seeds[0]) for subject in options.distill_on
        ]
        print(distilled_table([distill_on(run, options) for run in runs]))
        return
    finals = [
        Run(subject, method, **chosen[method], seed=seed)
        for seed in options.seeds
        for subject in SUBJECTS
        if subject != CHOSEN_ON
        for method in RATES
    ]
    results, before = run_all(finals, options, final=True), baselines(options)
    whole: dict[str, Any] = {
        "header": "; ".join(sorted({r["header"] for r in tried + results})),
        "options": _as_read(options.decides()),
        "seeds": list(options.seeds),
        "before": before,
        "learning_rates": tried,
        "chosen": chosen,
        "runs": results,
        "distilled_on": [read_json(p) for p in sorted((options.results / "distilled-on").glob("*.json"))],
        "alone": [read_json(path) for path in sorted((options.results / "alone").glob("*.json"))],
    }
    whole["summary"] = summary(whole["alone"])
    for row in (before, *whole["learning_rates"], *whole["runs"]):
        row.pop("options", None)
    write_json(options.out, _rounded(whole))
    save_picture(finals, options)
    write_page(options.page, read_json(options.out))


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for the overview of all uses: means of `alone`; on the student the subject is stacked."""
    rows = []
    own = [r["figures"] for r in results]
    for measure, key in (("subject recognised (up)", "recognised"), ("other prompts right (up)", "others")):
        teacher, student = (statistics.mean(f[way][key] for f in own) for way in ("teacher", "student"))
        use = "a new subject from six images, stacked on the student"
        row = {"use": use, "measure": measure, "teacher": teacher, "student": student}
        rows.append(row | {"time_ratio": None})
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k == "learning_rate" or k in RATES else _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def save_picture(finals: list[Run], options: Options) -> None:
    """A row for each subject and prompt of `SHOWN`, of the first seed; nothing where pictures are missing."""
    finals = [run for run in finals if run.seed == options.seeds[0]]
    missing = [run.name for run in finals if not (options.runs / f"{run.name}.safetensors").exists()]
    if missing:
        print(
            f"{options.picture} stays: {options.runs} lacks the pictures of {', '.join(missing)}",
            file=sys.stderr,
        )
        return
    subjects, rows = read_glyphs(options)["subjects"].cpu(), []
    for subject in (name for name in SUBJECTS if name != CHOSEN_ON):
        one = [run for run in finals if run.subject == subject]
        shown = {run.method: load_tensors(options.runs / f"{run.name}.safetensors") for run in one}
        real = example_images(subjects[list(SUBJECTS).index(subject)], seed=options.seeds[0])
        for i, prompt in enumerate(SHOWN):
            made = [shown[m][way][i] for way in ("teacher", "student") for m in RATES]
            rows.append((prompt, [*real[2 * i : 2 * i + 2], *map(_image, made)]))
    headings = ["of the", "six pictures"]
    for way in ("25 steps", "1 step"):
        headings += [f"{NAMES[m]}, {way}" for m in RATES]
    with replacing_file(options.picture) as temporary:
        labelled_grid(rows, headings).save(temporary, format="JPEG", quality=90, optimize=True)


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


# --- tables ---


def write_page(page: Path, whole: dict[str, Any]) -> None:
    """Put the tables into their places in a page."""
    with explain_os_errors(page, "read the page"):
        text = page.read_text(encoding="utf-8")
    blocks = tables(whole)
    places = find_tables(text, page, tuple(blocks))
    if lacking := sorted(set(blocks) - set(places)):
        raise WadiError(f"{page}: has no <!-- table: {lacking[0]} -->; put it where the table shall stand")
    write_text(page, with_tables(text, places, {name: f"{block}\n" for name, block in blocks.items()}))


def tables(whole: dict[str, Any]) -> dict[str, str]:
    """Markdown of each table by the name in its marker."""
    seeds = ", ".join(map(str, whole["seeds"]))
    machine = f"{whole['header']}; seed {seeds}."
    return {
        "means": f"{means_table(whole)}\n\n{machine} The rows before: {whole['before']['header']}.",
        "subjects": f"{subjects_table(whole['runs'])}\n\n{machine}",
        "alone": alone_table(whole["alone"]),
        "distilled-on": distilled_table(whole["distilled_on"]),
        "rates": f"{rates_table(whole['learning_rates'], whole['chosen'])}\n\n{whole['header']}; seed 0.",
    }


def means_table(whole: dict[str, Any]) -> str:
    """Markdown: means over subjects and seeds with lowest and highest, of everything that makes pictures."""
    rows = []
    for way in (way for way in ("teacher", "student") if way in whole["before"]):
        name = f"{WAYS[way].split(':')[0]}, before"
        rows.append([name, "none", *_cells(list(whole["before"][way].values()))])
    for way, name in WAYS.items():
        for method in RATES:
            own = [r["figures"][way] for r in whole["runs"] if r["method"] == method and way in r["figures"]]
            if own:
                rows.append([name, NAMES[method], *_cells(own)])
    return markdown(("", "adapter", *COLUMNS), rows)


def subjects_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the share of pictures in which each subject is recognised, and of other prompts right."""
    rows = []
    for r in runs:
        both = [
            r["figures"][way][name] for name in ("recognised", "others") for way in ("teacher", "student")
        ]
        rows.append([r["subject"], NAMES[r["method"]], *(f"{value:.3f}" for value in both)])
    headings = ("recognised, teacher", "student", "other prompts right, teacher", "student")
    return markdown(("subject", "adapter", *headings), rows)


def alone_table(results: list[dict[str, Any]]) -> str:
    """Markdown: one adapter on teacher and student, and what the recogniser takes for the subject."""
    parts = []
    for r in results:
        rows = [[WAYS[way], *_cells([figures])] for way, figures in r["figures"].items()]
        o = r["options"]
        how = f"{o['max_train_steps']} updates of {o['train_batch_size']} + {o['train_batch_size']}; "
        how += f"{o['subject_samples']} images of the subject, {o['samples']} of other prompts"
        parts.append(markdown(("", *COLUMNS), rows))
        parts.append(f"{r['header']}; {r['subject']}, {NAMES[r['method']]}, seed {r['seed']}; {how}.")
        row = [r["subject"], *(f"{r['recogniser'][kind]:.3f}" for kind in RECOGNISED)]
        parts.append(markdown(("recogniser of", *RECOGNISED.values()), [row]))
    return "\n\n".join(parts) or "Not measured."


def distilled_table(results: list[dict[str, Any]]) -> str:
    """Markdown: one adapter, stacked on the student and distilled into it."""
    parts = []
    for r in results:
        rows = [[name, *_cells([r["figures"][way]])] for way, name in DISTILLED.items()]
        how = f"{r['options']['max_train_steps']} updates of the subject; "
        how += f"{r['distill_steps']} of the student, of {r['distill_batch_size']} samples each"
        parts.append(markdown(("1 step", *COLUMNS), rows))
        parts.append(f"{r['header']}; {r['subject']}, {NAMES[r['method']]}, seed {r['seed']}; {how}.")
    return "\n\n".join(parts) or "Not measured."


def rates_table(tried: list[dict[str, Any]], chosen: dict[str, dict[str, Any]]) -> str:
    """Markdown: what was tried on the subject that is not reported; in bold what was chosen."""
    rows = []
    for r in tried:
        mark = "**" if chosen[r["method"]].items() <= r.items() else ""
        both = [r["figures"][way][name] for name in ("all", "others") for way in ("teacher", "student")]
        text = "yes" if r["train_text_encoder"] else "no"
        figures = [f"{value:.3f}" for value in [*both, score(r)]]
        rows.append([NAMES[r["method"]], f"{mark}{r['learning_rate']:g}{mark}", text, *figures])
    headings = ("subject, teacher", "student", "others, teacher", "student", "score")
    return markdown(("adapter", "rate", "text encoder", *headings), rows)


def _cells(rows: list[dict[str, float]]) -> list[str]:
    cells = []
    for key, digits in (("recognised", 3), ("all", 3), ("others", 3), ("others_frechet_distance", 2)):
        values = [row.get(key, float("nan")) for row in rows]
        cell = f"{statistics.mean(values):.{digits}f}"
        if max(values) > min(values):
            cell += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
        cells.append(cell)
    return cells


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
