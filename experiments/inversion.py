"""Relations that no caption names, learned from exemplars as a new word; the judge reads pairs never seen.

    python experiments/inversion.py --device cuda    # table, JSON and picture of docs/uses/inversion.md

Where several values of an option are given, those are taken that do best on other held-out pairs than are
reported on. All words train in one batch, each as it would alone (`learn_words`).
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image

from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import Caption, sample_captions, stated
from wadi.emoji.evaluate import generate_in_batches, pipeline_generator
from wadi.emoji.examples import (
    RELATIONS,
    relation_caption,
    relation_pairs,
    relation_right,
    relation_scenes,
)
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import Judge, attributes_right
from wadi.emoji.scenes import render, sample_scenes
from wadi.errors import WadiError
from wadi.files import replacing_file, write_json
from wadi.onestep import labelled_grid
from wadi.onestep.loading import load_pipeline
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.exemplars import Exemplars
from wadi.tasks.inversion import InvertConfig, learn_words

CHOSEN_ON = ("beside",)
"""Relations on which options are chosen."""

SUBJECTS_CHOSEN_ON = ("panda", "guitar", "star")
"""Subjects on which their learning rate is chosen."""

OWN_WORDS = {"below": "above", "right-of": "left of"}
"""What the captions of the training call the reverse: with it, the model can be asked for the relation."""

LEARNED = "learned"
WAYS = {
    LEARNED: {},
    "without steering": {"steering_weight": 0.0},
    "all noise levels alike": {"focal_alpha": 0.0},
    "high noise only": {"lowest_timestep": 600},
}
"""What of the chosen options is changed."""

ABLATED = "beside"
"""The relation that is learned in all `WAYS`; the others in the first."""

SHOWN = 3
"""Pairs of each relation in the picture."""

SEED_OF_CHOICE = 100


@dataclass
class Options:
    """Learn relations as words, and let the judge read pictures of unseen pairs."""

    relations: tuple[str, ...] = tuple(RELATIONS)
    """Which."""
    seeds: int = 2
    """Of exemplars, of the training and of the pictures."""
    exemplars: int = 16
    """Pictures that a word is learned from."""
    max_train_steps: int = 400
    """Updates."""
    train_batch_size: int = 16
    """Pictures an update."""
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Learning rates of relations to choose from."""
    subject_rates: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Learning rates of subjects to choose from."""
    lowest: tuple[int, ...] = (0,)
    """Lowest timesteps to choose from."""
    vectors: tuple[int, ...] = (1,)
    """Numbers of embeddings of a word to choose from."""
    steering: tuple[float, ...] = (0.01,)
    """Weights of the steering loss to choose from."""
    focal: tuple[float, ...] = (0.5,)
    """Values of alpha of the sampling of timesteps to choose from."""
    subjects: tuple[str, ...] = ("penguin", "rocket", "birthday cake", "tractor", "mushroom", "ghost")
    """Emoji that are learned as a word from pictures without captions (textual inversion)."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Of `WAYS`."""
    pairs: int = 200
    """Pairs that are reported on, a picture each; 250 at most."""
    selection_pairs: int = 100
    """Pairs that options are chosen on."""
    num_inference_steps: int = 25
    """Of the teacher."""
    guidance_scale: float = 2.0
    """Of the teacher."""
    batch_size: int = 500
    """Pictures at a time."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    out: Path = Path("docs/results/inversion.json")
    """JSON file for the figures."""
    picture: Path = Path("docs/images/inversion.png")
    """Exemplars, and pictures of pairs never seen."""


@dataclass(frozen=True)
class Job:
    """A word to learn or to try: its relation or its subject, how it came about, and its options."""

    relation: str
    way: str
    seed: int
    options: tuple[tuple[str, float], ...] = ()


@dataclass
class Bench:
    """Teacher, student, judge and atlas."""

    options: Options
    teacher: StableDiffusionPipeline
    student: StableDiffusionPipeline
    judge: Judge
    atlas: torch.Tensor
    seconds: dict[bool, float] = field(default_factory=dict)
    """A picture of the teacher (False) and of the student (True), in the latest batches."""

    @classmethod
    def load(cls, options: Options) -> Bench:
        """Load everything onto the device."""
        return cls(
            options,
            load_pipeline(teacher_folder()).to(options.device),
            load_for_steps(teacher_folder(), student_folder(), 1, device=options.device),
            Judge.load(assets_folder() / "judge.safetensors").to(options.device),
            load_atlas(options.atlas),
        )

    def draw(self, relation: str, pairs: list[tuple[int, int]], seed: int) -> torch.Tensor:
        """(N, 3, 64, 64) uint8 pictures of the renderer."""
        return (255 * render(relation_scenes(relation, pairs, seed), self.atlas)).round().byte()

    def exemplars(self, job: Job, word: str) -> Exemplars:
        """Pictures of pairs that training may have shown, and their captions; or of a subject, without."""
        if job.relation in NAMES:
            return self.of_subject(job)
        pairs = relation_pairs(self.options.exemplars, job.seed, held_out=False)
        images = tuple(
            Image.fromarray(x.permute(1, 2, 0).numpy()) for x in self.draw(job.relation, pairs, job.seed)
        )
        paths = tuple(Path(f"{index:03d}.png") for index in range(len(pairs)))
        return Exemplars(paths, images, tuple(relation_caption(pair, word) for pair in pairs))

    def of_subject(self, job: Job) -> Exemplars:
        """Pictures of one emoji, each with a place, a size and a background of its own."""
        caption = Caption(emoji=(NAMES.index(job.relation),))
        generator = torch.Generator().manual_seed(job.seed)
        scenes = sample_scenes(stated([caption] * self.options.exemplars), generator)
        images = (255 * render(scenes, self.atlas)).round().byte().permute(0, 2, 3, 1).numpy()
        paths = tuple(Path(f"{index:03d}.png") for index in range(len(images)))
        return Exemplars(paths, tuple(map(Image.fromarray, images)), None)

    def learn(self, jobs: Sequence[Job]) -> dict[Job, torch.Tensor]:
        """The embedding of each job, (n, D)."""
        tasks = []
        for index, job in enumerate(jobs):
            token = f"<r{index}>"
            config = InvertConfig(
                examples=Path(job.relation),
                token=token,
                max_train_steps=self.options.max_train_steps,
                train_batch_size=self.options.train_batch_size,
                seed=job.seed,
            )
            tasks.append((self.exemplars(job, token), dataclasses.replace(config, **dict(job.options))))
        learned = learn_words(self.teacher, tasks)
        return {job: inversion.embedding for job, inversion in zip(jobs, learned, strict=True)}

    def pictures(self, prompts: list[str], seeds: list[int], student: bool) -> torch.Tensor:
        """(N, 3, 64, 64) uint8, picture i from seed i."""
        options = self.options
        generate = (
            pipeline_generator(self.student, 1, 1.0)
            if student
            else pipeline_generator(self.teacher, options.num_inference_steps, options.guidance_scale)
        )
        start = time.perf_counter()
        # generate_in_batches numbers seeds itself; here words share them
        images = generate_in_batches(
            lambda texts, own: generate(texts, [seeds[i] for i in own]), prompts, 0, options.batch_size
        )
        self.seconds[student] = (time.perf_counter() - start) / len(prompts)
        return images

    def try_words(
        self, words: dict[Job, torch.Tensor], pairs: list[tuple[int, int]], student: bool
    ) -> dict[Job, tuple[torch.Tensor, dict[str, float]]]:
        """Of each word its pictures (one a pair), and the shares with both objects, and with the relation."""
        pipeline = self.student if student else self.teacher
        tokens = {job: f"<r{index}>" for index, job in enumerate(words)}
        for job, embedding in words.items():
            pipeline.load_textual_inversion({tokens[job]: embedding})
        prompts = [relation_caption(pair, tokens[job]) for job in words for pair in pairs]
        images = self.pictures(prompts, seeds_of(words, pairs), student)
        pipeline.unload_textual_inversion()
        return {
            job: self.read(job, part, pairs)
            for job, part in zip(words, images.split(len(pairs)), strict=True)
        }

    def try_subjects(self, words: dict[Job, torch.Tensor], student: bool) -> list[dict]:
        """Of each subject's word and own name, shares of pictures with it, and with all that is said."""
        pipeline, rows = self.student if student else self.teacher, []
        for index, (job, embedding) in enumerate(words.items()):
            captions = subject_captions(job.relation, self.options.pairs)
            pipeline.load_textual_inversion({f"<r{index}>": embedding})
            for way, token in ((LEARNED, f"<r{index}>"), ("its own name", job.relation)):
                prompts = [caption.text.replace(job.relation, token) for caption in captions]
                images = self.pictures(prompts, seeds_of([job], captions), student)
                columns = {k: v.to(self.options.device) for k, v in stated(captions).items()}
                right = attributes_right(self.judge.read(images), columns)
                row = {"subject": job.relation, "way": way, "seed": job.seed}
                rows.append(row | {k: round(right[k].double().mean().item(), 4) for k in ("emoji", "all")})
            pipeline.unload_textual_inversion()
        return rows

    def read(
        self, job: Job, images: torch.Tensor, pairs: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The pictures, and what the judge finds in them."""
        right = relation_right(
            self.judge.read(images), torch.tensor(pairs, device=self.options.device), job.relation
        )
        return images, {name: value.double().mean().item() for name, value in right.items()}


def seeds_of(jobs: Sequence[Job], pairs: Sequence) -> list[int]:
    """A seed for each job's picture of each pair or caption: the same for all words of one seed."""
    return [10_000 * job.seed + i for job in jobs for i in range(len(pairs))]


def subject_captions(name: str, count: int) -> list[Caption]:
    """Captions of the test set of one object that state more than its name, with this object."""
    captions = sample_captions(4 * count, "test")
    stating = [c for c in captions if len(c.emoji) == 1 and (c.size, c.place, c.background) != (None,) * 3]
    return [dataclasses.replace(caption, emoji=(NAMES.index(name),)) for caption in stating[:count]]


def pairs_of(options: Options) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Held-out pairs to choose on, and others to report on."""
    pairs = relation_pairs(options.selection_pairs + options.pairs, "inversion", held_out=True)
    return pairs[: options.selection_pairs], pairs[options.selection_pairs :]


def choose(bench: Bench) -> tuple[tuple[tuple[str, float], ...], list[dict]]:
    """The options with the largest mean share, over relations, teacher and student; and all figures."""
    options, pairs = bench.options, pairs_of(bench.options)[0]
    names = ("learning_rate", "lowest_timestep", "num_vectors", "steering_weight", "focal_alpha")
    values = (options.rates, options.lowest, options.vectors, options.steering, options.focal)
    grid = [tuple(zip(names, setting, strict=True)) for setting in itertools.product(*values)]
    relations = [relation for relation in options.relations if relation in CHOSEN_ON] or options.relations
    if len(grid) == 1:
        return grid[0], []
    words = bench.learn([Job(r, "choice", SEED_OF_CHOICE, g) for g in grid for r in relations])
    read = [bench.try_words(words, pairs, student) for student in (False, True)]
    rows = []
    for setting in grid:
        row, shares = dict(setting), []
        for name, found in zip(("teacher", "student"), read, strict=True):
            for relation in relations:
                figures = found[Job(relation, "choice", SEED_OF_CHOICE, setting)][1]
                row[f"{name} {relation}"] = round(figures["relation"], 4)
                shares.append(figures["relation"])
        row["mean"] = round(
            statistics.mean(v for k, v in row.items() if k.split()[0] in ("teacher", "student")), 4
        )
        rows.append(row)
    best = max(range(len(grid)), key=lambda i: rows[i]["mean"])
    return grid[best], rows


def choose_subject_rate(bench: Bench) -> tuple[float, list[dict]]:
    """The learning rate with the largest mean share, over subjects, teacher and student; and all figures."""
    rates = bench.options.subject_rates
    if len(rates) == 1:
        return rates[0], []
    jobs = [
        Job(name, "choice", SEED_OF_CHOICE, (("learning_rate", rate),))
        for rate in rates
        for name in SUBJECTS_CHOSEN_ON
    ]
    words, rows = bench.learn(jobs), []
    for who, student in (("teacher", False), ("student", True)):
        learned = [row for row in bench.try_subjects(words, student) if row["way"] == LEARNED]
        for job, row in zip(jobs, learned, strict=True):
            rows.append({"subject": job.relation, "who": who, "all": row["all"]} | dict(job.options))
    means = [statistics.mean(row["all"] for row in rows if row["learning_rate"] == rate) for rate in rates]
    return rates[max(range(len(rates)), key=means.__getitem__)], rows


def random_words(bench: Bench, jobs: Sequence[Job], count: int) -> dict[Job, torch.Tensor]:
    """Embeddings of random direction and of the length of that of "and"."""
    ids = bench.teacher.tokenizer("and", add_special_tokens=False).input_ids
    own = bench.teacher.text_encoder.get_input_embeddings().weight[ids[0]].detach().cpu()
    words = {}
    for job in jobs:
        noise = torch.randn(count, len(own), generator=torch.Generator().manual_seed(job.seed))
        words[job] = noise / noise.norm(dim=1, keepdim=True) * own.norm()
    return words


def plain_words(bench: Bench, pairs: list[tuple[int, int]], student: bool) -> dict[Job, dict[str, float]]:
    """Figures of words that the model has: "and", and the opposite, if any, with the pair turned."""
    prompts, jobs = [], []
    for relation, seed in itertools.product(bench.options.relations, range(bench.options.seeds)):
        jobs.append(Job(relation, '"and"', seed))
        prompts += [relation_caption(pair, "and") for pair in pairs]
        if relation in OWN_WORDS:
            jobs.append(Job(relation, "its own words", seed))
            prompts += [relation_caption(pair[::-1], OWN_WORDS[relation]) for pair in pairs]
    images = bench.pictures(prompts, seeds_of(jobs, pairs), student)
    parts = images.split(len(pairs))
    return {job: bench.read(job, part, pairs)[1] for job, part in zip(jobs, parts, strict=True)}


def main(options: Options) -> None:
    """Choose, learn, measure; print the table, write JSON and picture."""
    if unknown := {*options.subjects} - {*NAMES}:
        raise WadiError(f"--subjects {', '.join(unknown)}: not emoji of the small world")
    if unknown := {*options.relations} - {*RELATIONS}:
        raise WadiError(f"--relations {', '.join(unknown)}: choose from {', '.join(RELATIONS)}")
    start = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    bench = Bench.load(options)
    chosen, choice = choose(bench)
    pairs = pairs_of(options)[1]
    seeds = range(options.seeds)
    jobs = [
        Job(relation, way, seed, tuple((dict(chosen) | WAYS[way]).items()))
        for relation, way, seed in itertools.product(options.relations, options.ways, seeds)
        if way == LEARNED or relation == ABLATED
    ]
    rate, subject_choice = choose_subject_rate(bench)
    subjects = [Job(name, LEARNED, 0, (("learning_rate", rate),)) for name in options.subjects]
    learned = bench.learn([*jobs, *subjects])
    words = {job: learned[job] for job in jobs}
    trained = time.perf_counter() - start
    lost = [Job(relation, "random embedding", seed) for relation in options.relations for seed in seeds]
    words |= random_words(bench, lost, dict(chosen)["num_vectors"])
    figures, shown, named = {}, {}, {}
    for name, student in (("teacher", False), ("student", True)):
        tried = bench.try_words(words, pairs, student)
        figures[name] = {job: found for job, (_, found) in tried.items()} | plain_words(bench, pairs, student)
        named[name] = bench.try_subjects({job: learned[job] for job in subjects}, student)
        shown[name] = {job.relation: images for job, (images, _) in tried.items() if shows(job)}
    drawn = [Job(relation, "drawn", seed) for relation in options.relations for seed in seeds]
    real = {job: bench.read(job, bench.draw(job.relation, pairs, 50 + job.seed), pairs)[1] for job in drawn}
    rows = summary({name: found | real for name, found in figures.items()})
    print(table(rows))
    print(subject_table(named))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = (
        f"{options.pairs} held-out pairs, {options.seeds} seeds, {device}, torch {torch.__version__}, "
        f"{date.today()}; {time.perf_counter() - start:.0f} s, of them {trained:.0f} s to choose and to learn"
    )
    settings = {k: v for k, v in vars(options).items() if k not in ("atlas", "out", "picture", "device")}
    write_json(
        options.out,
        {
            "header": header,
            "options": settings,
            "chosen": dict(chosen),
            "choice": choice,
            "chosen for subjects": {"learning_rate": rate},
            "choice for subjects": subject_choice,
            "rows": rows,
            "subjects": named,
            "summary": headlines(rows, named, bench.seconds[False] / bench.seconds[True]),
        },
    )
    save_picture(bench, pairs, shown)


def shows(job: Job) -> bool:
    """Whether a word's pictures are shown: those of the first seed."""
    return job.way == LEARNED and job.seed == 0


def summary(figures: dict[str, dict[Job, dict[str, float]]]) -> list[dict]:
    """A row for each relation and way: means over the seeds, and of the relation the standard deviation."""
    rows = {}
    for name, found in figures.items():
        for (relation, way), group in _grouped(found).items():
            row = rows.setdefault((relation, way), {"relation": relation, "way": way})
            row["shown in training"] = RELATIONS[relation].shown
            row["seeds"] = len(group)
            for what in ("objects", "relation"):
                values = [figure[what] for figure in group]
                row[f"{name} {what}"] = round(statistics.mean(values), 4)
            row[f"{name} deviation"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return list(rows.values())


def headlines(rows: list[dict], named: dict[str, list[dict]], time_ratio: float) -> list[dict]:
    """Rows for the table of all uses: subjects, and relations by whether the training showed them."""
    found = []
    learned = {who: [r["all"] for r in part if r["way"] == LEARNED] for who, part in named.items()}
    if all(learned.values()):
        means = {who: round(statistics.mean(values), 4) for who, values in learned.items()}
        use, measure = "a word for a subject", "judge finds it, and all else that is said (up)"
        found.append({"use": use, "measure": measure, **means, "time_ratio": round(time_ratio, 1)})
    for shown, use in (
        (True, "a word for a relation that no caption names"),
        (False, "a word for a relation never shown"),
    ):
        chosen = [row for row in rows if row["way"] == LEARNED and row["shown in training"] == shown]
        if chosen:
            means = {
                who: round(statistics.mean(row[f"{who} relation"] for row in chosen), 4)
                for who in ("teacher", "student")
            }
            measure = "judge finds objects and relation, pairs never seen (up)"
            found.append({"use": use, "measure": measure, **means, "time_ratio": round(time_ratio, 1)})
    return found


def _grouped(found: dict[Job, dict[str, float]]) -> dict[tuple[str, str], list[dict[str, float]]]:
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for job, figures in sorted(found.items(), key=lambda item: list(RELATIONS).index(item[0].relation)):
        groups.setdefault((job.relation, job.way), []).append(figures)
    return groups


def table(rows: list[dict]) -> str:
    """Markdown: a row for each relation and way, shares with the relation (with both objects)."""
    lines = ["| relation | word | teacher, 25 steps | student, 1 step |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = []
        for name in ("teacher", "student"):
            deviation = row[f"{name} deviation"]
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            cells.append(f"{row[f'{name} relation']:.3f}{spread} ({row[f'{name} objects']:.3f})")
        lines.append(f"| {row['relation']} | {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def subject_table(named: dict[str, list[dict]]) -> str:
    """Markdown: a row for each subject and word, shares with all that is said (with the subject)."""
    lines = ["| subject | word | teacher, 25 steps | student, 1 step |", "| --- | --- | --- | --- |"]
    for teacher, student in zip(named["teacher"], named["student"], strict=True):
        cells = [f"{row['all']:.3f} ({row['emoji']:.3f})" for row in (teacher, student)]
        lines.append(f"| {teacher['subject']} | {teacher['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save_picture(
    bench: Bench, pairs: list[tuple[int, int]], shown: dict[str, dict[str, torch.Tensor]]
) -> None:
    """A row for each relation: two exemplars, then pairs never seen, by the teacher and by the student."""
    rows = []
    for relation in bench.options.relations:
        examples = list(bench.exemplars(Job(relation, "", 0), "<R>").images[:2])
        cells = [
            Image.fromarray(picture.permute(1, 2, 0).numpy())
            for name in ("teacher", "student")
            for picture in shown[name][relation][:SHOWN]
        ]
        rows.append((RELATIONS[relation].meaning, examples + cells))
    told = [", ".join(NAMES[emoji] for emoji in pair) for pair in pairs[:SHOWN]]
    steps = f"{bench.options.num_inference_steps} steps"
    headings = ["exemplar", "exemplar", *(f"{n}: {pair}" for n in (steps, "1 step") for pair in told)]
    with replacing_file(bench.options.picture) as temporary:
        # a palette: a third of the size, and no difference to the eye
        labelled_grid(rows, headings).quantize(256).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
