"""Which adapter makes the better one-step student, and what decides it: many distillations side by side.

    python experiments/ablation.py --list                               # the runs of a suite
    python experiments/ablation.py --suites rates                       # on a GPU; selection captions
    python experiments/ablation.py --suites methods ranks fake guidance # with the rates that `rates` chose
    python experiments/ablation.py --suites next                        # adapters at the rate above that
    python experiments/ablation.py --suites dit-rates dit-methods --dit runs/dit   # wadi emoji train-teacher
    python experiments/ablation.py --suites gap                         # objectives beyond the paper's
    python experiments/ablation.py --suites cost                       # one at a time: time and memory a step
    python experiments/ablation.py --device cpu --max-train-steps 2 --num-samples 256    # does it run?

Every run distils the same teacher on the same prompts with the same number of updates and is judged on the
same captions and noise; runs differ in what `runs_of` names, and in their seed. Several students are trained
at once on one device: as one network where they can be (experiments/stacked.py), else each on a CUDA stream
of its own, with iterations captured as graphs. Each run leaves one JSON file, written when it is complete;
what is there is not run again. `experiments/evidence.py` makes the tables and plots of docs/evidence.md from
them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from evidence import choose_rate
from stacked import Stack, stack_key
from torch import nn
from tqdm import tqdm

from wadi.backbones import Backbone, load_backbone, student_config
from wadi.backbones.condition import Condition, pick
from wadi.directions.change import (
    energies,
    energy_shares,
    null_energies,
    null_moments,
    row_changes,
    with_norms_of,
)
from wadi.distill import PRESETS, DistillConfig, Trainer, make_accelerator
from wadi.distill.methods import merged_state
from wadi.emoji import assets_folder, prompts_file, teacher_folder
from wadi.emoji.captions import stated
from wadi.emoji.evaluate import evaluation_captions, reading_figures
from wadi.emoji.judge import Judge
from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, write_json
from wadi.onestep.fast import to_bytes
from wadi.prompts import PromptEmbeddings, read_prompts
from wadi.prompts.cache import Embeddings

RATES = {
    "lorad": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "full": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
}
"""Learning rates of the student that are tried, as many for each method."""
NAMES = {"lorad": "LoRaD", "lora": "LoRA", "full": "full fine-tuning"}
SEEDS = (1, 2, 3, 4, 5)
"""Of the final runs; rates are chosen with seed 0."""
SHARE = 0.10
"""Of the network's parameters, that every adapter trains."""
SHARES = (0.01, 0.025, 0.05, 0.10, 0.20)
CURVE = (0.1, 0.25, 0.5, 0.75)
"""Where in the training the averaged student is judged, beside the end."""


@dataclass
class Options:
    """Train students side by side and judge them."""

    suites: tuple[str, ...] = ("rates",)
    """Which runs: see --list."""
    names: tuple[str, ...] = ()
    """Only these runs of the suites."""
    out: Path = Path("docs/results/ablation")
    """Folder of the results, a folder a suite in it."""
    dit: Path | None = None
    """Folder of the transformer teacher, for suites that begin with dit-."""
    max_train_steps: int = 1000
    """Updates of every student."""
    train_batch_size: int = 64
    """Samples an update."""
    num_samples: int = 10_000
    """Pictures of the final figures."""
    curve_samples: int = 2000
    """Pictures of the figures on the way."""
    together: int = 12
    """Students trained at once."""
    stack: bool = True
    """Train as one network those students that can be."""
    share: tuple[int, int] = (0, 1)
    """This process's share of the runs, as (i, n): every n-th from the i-th, for several devices."""
    seconds: float = math.inf
    """Begin no further run after this long."""
    compile: bool = False
    """As of `wadi distill`."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    list: bool = False
    """Only name the runs."""


@dataclass(frozen=True)
class Run:
    """One training: what it is called, and its options beside the common ones."""

    suite: str
    name: str
    label: str
    changes: dict[str, Any]
    seed: int = 0
    prompts: str = "test"

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return "dit" if self.suite.startswith("dit-") else "unet"

    def path(self, out: Path) -> Path:
        """Where its result is."""
        return out / self.suite / f"{self.name}.json"


# --- the runs ---


def student(method: str, rate: float, rank: int) -> dict[str, Any]:
    """Options of a student."""
    return {"student_method": method, "student_learning_rate": rate, "student_rank": rank}


def runs_of(suite: str, ranks: Ranks, rates: dict[str, float]) -> list[Run]:
    """The runs of one suite.

    Args:
        suite: one of `SUITES`.
        ranks: of the suite's teacher.
        rates: the chosen learning rate of each method, where the suite needs them.
    """
    kind = suite.removeprefix("dit-")
    if kind == "rates":
        return [
            Run(suite, f"{m}-{rate:.0e}", NAMES[m], student(m, rate, ranks.equal(m, SHARE)), 0, "selection")
            for m, tried in RATES.items()
            for rate in tried
        ]
    if kind == "methods":
        return [
            Run(suite, f"{m}-seed{seed}", NAMES[m], student(m, rates[m], ranks.equal(m, SHARE)), seed)
            for seed in SEEDS
            for m in RATES
        ]
    if kind == "next":
        above = {m: _above(m, rates[m]) for m in ("lorad", "lora")}
        return [
            Run(suite, f"{m}-seed{seed}", NAMES[m], student(m, rate, ranks.equal(m, SHARE)), seed)
            for seed in SEEDS
            for m, rate in above.items()
        ]
    if kind == "ranks":
        return [
            Run(suite, f"{m}-{100 * share:g}-seed{seed}", NAMES[m], student(m, rates[m], rank), seed)
            for seed in SEEDS[:2]
            for m in ("lorad", "lora")
            for share in SHARES
            for rank in [ranks.equal(m, share)]
        ]
    own = student("lorad", rates["lorad"], ranks.equal("lorad", SHARE))
    if kind == "gap":
        return [
            Run(suite, name, label, own | changes, 0, "selection") for name, label, changes in _gap(ranks)
        ]
    return [
        Run(suite, name, label, changes | own, seed)
        for seed in SEEDS[:2]
        for name, label, changes in (_fakes(ranks, seed) if kind == "fake" else _guidance(seed))
    ]


def _above(method: str, rate: float) -> float:
    """The learning rate that was tried above this one.

    Raises:
        WadiError: there is none.
    """
    higher = [each for each in RATES[method] if each > rate]
    if not higher:
        raise WadiError(f"{NAMES[method]}: {rate:.0e} is the highest rate tried; add a higher one to RATES")
    return min(higher)


def _fakes(ranks: Ranks, seed: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Fake models by method, size and updates; the paper's proportions first."""
    small = {"fake_method": "lorad", "fake_layers": "attention", "fake_rank": 4}
    equal = ranks.equal("lorad", SHARE)
    kinds = [
        ("attention-r4", "LoRaD r4, attention", small),
        *((f"lorad-r{r}", f"LoRaD r{r}", {"fake_rank": r}) for r in (4, equal, 2 * equal)),
        ("lora", "LoRA", {"fake_rank": ranks.equal("lora", SHARE), **_other("lora", 1e-3)}),
        ("full", "all weights", _other("full", 1e-4)),
    ]
    for name, label, changes in kinds:
        for updates in (1, 2, 4):
            plural = "s" if updates > 1 else ""
            yield (
                f"{name}-x{updates}-seed{seed}",
                f"{label}, {updates} update{plural}",
                changes | {"fake_updates": updates},
            )
    yield (
        f"attention-r4-rate-1e-02-x1-seed{seed}",
        "LoRaD r4, attention, rate 1e-2, 1 update",
        small | {"fake_learning_rate": 1e-2, "fake_updates": 1},
    )


def _other(method: str, rate: float) -> dict[str, Any]:
    """A fake model that is not LoRaD; its rate was not tuned."""
    return {"fake_method": method, "fake_learning_rate": rate}


def _guidance(seed: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for teacher, fake in ((1, 1), (1.25, 1), (1.5, 1), (2, 1), (3, 1), (1.5, 1.5), (2, 2), (3, 3)):
        # a fake model that is guided needs to know the empty prompt
        changes = {"null_prompt_probability": 0.1 if fake != 1 else 0.0}
        changes |= {"guidance_scale": float(teacher), "fake_guidance_scale": float(fake)}
        yield f"{teacher:g}-{fake:g}-seed{seed}", f"{teacher:g} / {fake:g}", changes


def _gap(ranks: Ranks) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Objectives and rates beside those of the shipped student, one or two changes each."""
    large = 2 * ranks.equal("lorad", SHARE)
    yield "base", "chosen rate", {}
    yield "rate-3e-3", "rate 3e-3", {"student_learning_rate": 3e-3}
    yield "lowest", "lowest timestep 0.3", {"min_timestep": 0.3}
    yield "large-fake", "fake model of twice the rank", {"fake_rank": large}
    for rate in (1e-3, 1e-2):
        yield f"fake-rate-{rate:.0e}", f"fake model's rate {rate:.0e}", {"fake_learning_rate": rate}
    for rate in (1e-3, 3e-3):
        changes = {"student_learning_rate": rate, "fake_rank": large, "fake_updates": 4}
        label = f"fake model of twice the rank, 4 updates, rate {rate:.0e}"
        yield f"large-fake-x4-{rate:.0e}", label, changes
    yield (
        "guidance-2-x4",
        "fake model of twice the rank, 4 updates, rate 3e-03, guidance 2",
        {"student_learning_rate": 3e-3, "fake_rank": large, "fake_updates": 4, "guidance_scale": 2.0},
    )
    yield from _strong(large)


def _strong(large: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """With the fake model that kept up best, what else helps."""
    strong = {"fake_rank": large, "fake_learning_rate": 1e-2}
    yield "strong", "strong fake model (twice the rank, rate 1e-2)", strong
    strong |= {"student_learning_rate": 3e-3}
    for name, label, changes in (
        ("rate-3e-3", "rate 3e-3", {}),
        ("rate-6e-3", "rate 6e-3", {"student_learning_rate": 6e-3}),
        ("guidance-2", "rate 3e-3, guidance 2", {"guidance_scale": 2.0}),
        ("guidance-3", "rate 3e-3, guidance 3", {"guidance_scale": 3.0}),
        ("beta1-0.5", "rate 3e-3, beta1 0.5", {"adam_beta1": 0.5}),
        ("lowest", "rate 3e-3, lowest timestep 0.3", {"min_timestep": 0.3}),
        ("highest-0.9", "rate 3e-3, highest timestep 0.9", {"max_timestep": 0.9}),
        ("highest-0.8", "rate 3e-3, highest timestep 0.8", {"max_timestep": 0.8}),
        *_intervals(),
        ("x4", "rate 3e-3, 4 updates", {"fake_updates": 4}),
        ("x4-rate-6e-3", "rate 6e-3, 4 updates", {"fake_updates": 4, "student_learning_rate": 6e-3}),
        ("x4-guidance-3", "rate 3e-3, 4 updates, guidance 3", {"fake_updates": 4, "guidance_scale": 3.0}),
        ("normalized", "rate 3e-3, DMD's weighting", {"weighting": "normalized"}),
        ("unweighted-fake", "rate 3e-3, fake model's loss unweighted", {"fake_weighting": "none"}),
    ):
        yield f"strong-{name}", f"strong fake model, {label}", strong | changes


def _intervals() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """More guidance where the object is decided than where its place is."""
    for scale, highest, above in (
        (2, 0.7, 1.5),
        (3, 0.7, 1.5),
        (3, 0.7, 1),
        (3, 0.5, 1.5),
        (5, 0.5, 1.5),
        (3, 0.85, 1.5),
    ):
        changes = {"guidance_scale": scale, "guidance_max_timestep": highest, "guidance_scale_above": above}
        label = f"rate 3e-3, guidance {scale} up to timestep {highest}, then {above}"
        yield f"interval-{scale}-{highest:g}-{above:g}", label, changes


SUITES = (
    "rates",
    "methods",
    "next",
    "ranks",
    "fake",
    "guidance",
    "gap",
    "dit-rates",
    "dit-methods",
    "dit-next",
    "cost",
    "dit-cost",
)


class Ranks:
    """Ranks at which adapters of a network have a share of its parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.total = sum(p.numel() for p in network.parameters())
        names = set(student_config(network).target_modules)
        self.layers = [module for name, module in network.named_modules() if name in names]

    def equal(self, method: str, share: float) -> int:
        """The rank whose number of parameters is nearest to `share` of all."""
        if method == "full":
            return 1
        weight = 0.5 if method == "lorad" else 1.0
        a_rank = sum(layer.out_features + weight * layer.in_features for layer in self.layers)
        return max(1, round(share * self.total / a_rank))


def chosen_rates(out: Path, suite: str) -> dict[str, float]:
    """Of each method the learning rate with the lowest Frechet distance on the selection captions.

    Raises:
        WadiError: a result of the suite is missing.
    """
    best = {}
    for method, tried in RATES.items():
        distances = {}
        for rate in tried:
            path = out / suite / f"{method}-{rate:.0e}.json"
            if not path.exists():
                raise WadiError(f"{path}: is missing; run the suite {suite} first")
            figures = read_json(path)["figures"]
            distances[rate] = [figures["frechet_distance"] if figures else None]
        best[method] = choose_rate(distances)
    return best


def is_done(run: Run, options: Options) -> bool:
    """Whether the result of a run is there; one at a learning rate that is not chosen any more is not.

    Raises:
        WadiError: it is there, but of another number of updates, batch or pictures.
    """
    path = run.path(options.out)
    if not path.exists():
        return False
    result = read_json(path)
    if result["config"]["student_learning_rate"] != run.changes["student_learning_rate"]:
        return False
    found = {**result["config"], "num_samples": (result["figures"] or {}).get("samples", options.num_samples)}
    for name in ("max_train_steps", "train_batch_size", "num_samples"):
        if found[name] != getattr(options, name):
            option = name.replace("_", "-")
            raise WadiError(
                f"{path}: was made with --{option} {found[name]}, not {getattr(options, name)}; "
                "remove it, or name another --out"
            )
    return True


# --- what all runs of one teacher share ---

Generate = Callable[[torch.Tensor, Condition], torch.Tensor]
"""Noise (N, C, H, W) and N prompts to latents (N, C, H, W)."""


class World:
    """A teacher, its prompts, and what judges its students."""

    def __init__(self, folder: Path, device: str, num_samples: int) -> None:
        self.device = torch.device(device)
        self.backbone: Backbone = load_backbone(folder, torch.float32, self.device)
        texts = [prompt.text for prompt in read_prompts(str(prompts_file()))]
        self.captions = {name: evaluation_captions(name, num_samples) for name in ("selection", "test")}
        lists = [[""], texts, *([c.text for c in each] for each in self.captions.values())]
        encoded = self.backbone.text.encode([text for each in lists for text in each])
        parts, first = [], 0
        for each in lists:
            parts.append(pick(encoded, slice(first, first + len(each))))
            first += len(each)
        self.prompts = PromptEmbeddings(Embeddings([parts[1]]), parts[0], {})
        self.conditions: dict[str, Condition] = dict(zip(self.captions, parts[2:], strict=True))
        self.judge = Judge.load(assets_folder() / "judge.safetensors").to(self.device)
        self.reference = load_tensors(assets_folder() / "reference.safetensors")
        self.backbone.pipeline.vae.to(self.device)

    @cached_property
    def noise(self) -> torch.Tensor:
        """(N, C, H, W): picture i has seed i, as in `wadi emoji evaluate`."""
        shape, count = self.backbone.latent_shape, len(self.captions["test"])
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
        return torch.stack(draws)

    @torch.no_grad()
    def judged(self, generate: Generate, prompts: str, count: int, batch: int = 500) -> dict[str, float]:
        """Figures of a one-step generator on the first `count` captions."""
        vae, readings, conditions = self.backbone.pipeline.vae, [], self.conditions[prompts]
        for first in range(0, count, batch):
            part = slice(first, min(first + batch, count))
            condition = {k: v.to(self.device) for k, v in pick(conditions, part).items()}
            x0 = generate(self.noise[part].to(self.device), condition)
            pixels = vae.decode(x0 / vae.config.scaling_factor, return_dict=False)[0]
            readings.append(self.judge.read(to_bytes(pixels).permute(0, 3, 1, 2)))
        captions = self.captions[prompts][:count]
        columns = {name: column.to(self.device) for name, column in stated(captions).items()}
        figures = reading_figures(type(readings[0]).cat(readings), columns, self.reference)
        return {name: _rounded(value) for name, value in figures.items()}


# --- one training among others ---


def run_config(run: Run, options: Options) -> DistillConfig:
    """All options of a run."""
    preset = PRESETS["emoji-dit" if run.teacher == "dit" else "emoji"]
    common = {
        "train_batch_size": options.train_batch_size,
        "max_train_steps": options.max_train_steps,
    }
    common |= {"cuda_graphs": options.device.startswith("cuda"), "allow_tf32": True, "ema_decay": 0.99}
    common |= {"compile": options.compile}
    # a fake model as large as the student, and as fast
    common |= {"fake_rank": preset.student.rank, "fake_learning_rate": 3e-3}
    return preset.replace(**(common | run.changes), seed=run.seed)


class Student:
    """One run: its trainer, and what it has shown so far."""

    def __init__(self, run: Run, world: World, options: Options) -> None:
        self.run, self.world, self.options = run, world, options
        self.config = run_config(run, options)
        self.trainer = Trainer(self.config, world.backbone, world.prompts, make_accelerator(self.config))
        self.curve: list[dict] = []
        self.losses: list[dict] = []
        self.step, self.finite = 0, True
        self.points = {max(1, round(share * self.config.run.max_train_steps)) for share in CURVE}

    def advance(self) -> None:
        """One update."""
        self.look(self.trainer.step(self.step))

    def look(self, losses: dict[str, torch.Tensor]) -> None:
        """After an update: now and then, look at the losses and at what the average can do."""
        self.step += 1
        if self.step % 100 == 0 or self.step in self.points or self.done:
            values = torch.stack(list(losses.values())).tolist()
            row = {"step": self.step, **dict(zip(losses, values, strict=True))}
            in_a_row = self.trainer.skipped[1].item()
            limit = self.config.optimizer.max_skipped_steps
            self.finite = all(map(math.isfinite, values)) and in_a_row < limit
            if self.finite:
                self.losses.append({k: _rounded(v) for k, v in row.items() if not k.endswith("norm")})
        if self.step in self.points and self.finite:
            self.curve.append({"step": self.step} | self.judged(self.options.curve_samples))

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train, or nothing that could be."""
        return self.step >= self.config.run.max_train_steps or not self.finite

    def judged(self, count: int) -> dict[str, float]:
        """Figures of the average now."""
        with self.trainer.on_stream(), self.trainer.ema_weights():
            return self.world.judged(self.trainer.generate, self.run.prompts, count)

    @torch.no_grad()
    def moved(self) -> dict[str, Any]:
        """How far the averaged student's weights moved; what it makes with its teacher's norms or directions.

        As `wadi directions` and `wadi directions swap` do it with files. How far is over the layers that
        adapters have, whatever the method; swapped is every tensor with rows.
        """
        world, trainer = self.world, self.trainer
        network = world.backbone.network
        before = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        with trainer.on_stream(), trainer.ema_weights():
            after = merged_state(trainer.student, before)
        names = [f"{name}.weight" for name in sorted(student_config(network).target_modules)]
        figures: dict[str, Any] = weights_moved([(before[name], after[name]) for name in names])
        own = copy.deepcopy(network)
        for take in ("norms", "directions"):
            own.load_state_dict({name: _swapped(before[name], after[name], take) for name in before})
            figures[f"with_teacher_{take}"] = world.judged(
                partial(self._one_step, own), self.run.prompts, self.options.num_samples
            )
        return figures

    def _one_step(self, network: nn.Module, z: torch.Tensor, condition: Condition) -> torch.Tensor:
        schedule = self.trainer.generator.schedule
        t = schedule.last.expand(len(z))
        return schedule.x0(self.world.backbone.predict(network, z, t, condition), z, t)

    def result(self) -> dict[str, Any]:
        """Everything of the run, as docs/evidence.md needs it."""
        trainer = self.trainer
        values = self.config.values()
        config = {name: values[name] for name in REPORTED}
        defaults = DistillConfig().values()
        for name in REPORTED_IF_SET:
            if values[name] != defaults[name]:
                config[name] = values[name]
        return {
            "suite": self.run.suite,
            "name": self.run.name,
            "label": self.run.label,
            "teacher": self.run.teacher,
            "config": config,
            "trainable_parameters": sum(p.numel() for p in trainer.student_parameters.values()),
            "fake_parameters": sum(p.numel() for p in trainer.fake_parameters.values()),
            "network_parameters": sum(p.numel() for p in self.world.backbone.network.parameters()),
            "prompts": self.run.prompts,
            "curve": self.curve,
            "figures": self.judged(self.options.num_samples) if self.finite else None,
            "directions": self.moved() if self.finite and self.run.suite.endswith("methods") else None,
            "losses": self.losses,
            "status": "finished" if self.finite else "not finite",
            "environment": environment(self.world.device),
        }


def weights_moved(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Means over rows of norm change, angle and 1 - cos, and over layers of the energy in 30 % of the rank.

    Beside each the same of isotropic changes of the same sizes; see `wadi.directions.change`.
    """
    sums: dict[str, float] = defaultdict(float)
    moved: dict[str, list[float]] = {"energy": [], "null_energy": []}
    rows, share = 0, torch.tensor([0.3])
    for weight, target in pairs:
        changes, residual = row_changes(weight, target)
        null, count = null_moments(changes.size, weight.shape[1]), len(changes.norm)
        rows += count
        for name in ("norm", "direction", "angle"):
            sums[name] += getattr(changes, name).sum().item()
            sums[f"null_{name}"] += null[name].mean * count
        lengths = residual.double().norm(dim=1)
        for name, energy in (
            ("energy", energies(residual)),
            ("null_energy", null_energies(lengths, tuple(residual.shape))),
        ):
            found = energy_shares(energy, share)  # None of a layer that did not move
            moved[name] += [] if found is None else [found.item()]
    means = {name: value / rows for name, value in sums.items()}
    means |= {name: sum(values) / len(values) if values else math.nan for name, values in moved.items()}
    return {name: _rounded(value) for name, value in means.items()}


def _swapped(before: torch.Tensor, after: torch.Tensor, take: str) -> torch.Tensor:
    if before.ndim < 2:
        return after
    return with_norms_of(after, before) if take == "norms" else with_norms_of(before, after)


REPORTED = (
    "student_method",
    "student_rank",
    "student_learning_rate",
    "fake_method",
    "fake_rank",
    "fake_layers",
    "fake_updates",
    "fake_learning_rate",
    "guidance_scale",
    "fake_guidance_scale",
    "null_prompt_probability",
    "weighting",
    "fake_weighting",
    "min_timestep",
    "max_timestep",
    "train_batch_size",
    "max_train_steps",
    "ema_decay",
    "lr_decay_fraction",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "seed",
)
"""Options that every result names."""
REPORTED_IF_SET = (
    "guidance_max_timestep",
    "guidance_scale_above",
    "denoising_weight",
    "denoising_max_timestep",
)
"""Options that a result names where they are not at their defaults."""


def _rounded(value: float) -> float | None:
    """Five digits; JSON has no NaN."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions, date and, in a checkout, the commit of a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"device": name, "torch": torch.__version__, "date": str(date.today())}
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.check_output(describe, text=True).strip()
    return found


def train_together(runs: list[Run], world: World, options: Options) -> None:
    """Train runs side by side and write each as it is complete; first those that can be one network."""
    start = time.monotonic()
    with tqdm(total=len(runs) * options.max_train_steps, unit="update", smoothing=0.02) as bar:

        def late(waiting: int) -> bool:
            over = time.monotonic() - start > options.seconds
            if over and waiting:
                bar.write(f"{waiting} runs were not begun: the time was over", file=sys.stderr)
            return over

        for stack in stacks(runs, options):
            if late(len(stack)):
                return
            _train_stack(stack, world, options, bar)
        alone = [run for run in runs if not options.stack or run_key(run, options) is None]
        _train_streams(alone, world, options, bar, late)


def run_key(run: Run, options: Options) -> Hashable | None:
    """As `stacked.stack_key`: runs with equal keys can be trained as one network."""
    return stack_key(run_config(run, options))


def stacks(runs: list[Run], options: Options) -> list[list[Run]]:
    """Runs that are trained as one network, at most `together`; each method and rank side by side."""
    if not options.stack:
        return []
    alike: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if (key := run_key(run, options)) is not None:
            alike[key].append(run)
    found = []
    for members in alike.values():
        count = math.ceil(len(members) / options.together)
        size = math.ceil(len(members) / count)
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def _train_stack(runs: list[Run], world: World, options: Options, bar: tqdm) -> None:
    students = [Student(run, world, options) for run in runs]
    owner = {id(student.trainer): student for student in students}
    stack = Stack([student.trainer for student in students])
    for step in range(options.max_train_steps):
        for trainer, losses in stack.step(step):
            owner[id(trainer)].look(losses)
        bar.update(len(students))
        if step % 8 == 0:  # the host is never far ahead
            students[0].trainer.synchronize()
    del stack  # with its graph's memory
    for student in students:
        _write(student, options, bar)


def _train_streams(
    runs: list[Run], world: World, options: Options, bar: tqdm, late: Callable[[int], bool]
) -> None:
    """Begin one run as soon as another is done."""
    waiting, active = deque(runs), []
    while waiting or active:
        over = late(0)
        while waiting and len(active) < options.together and not over:
            active.append(Student(waiting.popleft(), world, options))
        if not active:
            late(len(waiting))
            return
        events = []
        for each in active:
            each.advance()
            events.append(each.trainer.stream.record_event() if each.trainer.stream else None)
        bar.update(len(active))
        for done in [each for each in active if each.done]:
            _write(done, options, bar)
            active.remove(done)
            del done.trainer  # with its graph's memory
        for event in filter(None, events):  # the host is never more than a round ahead
            event.synchronize()


def _write(student: Student, options: Options, bar: tqdm) -> None:
    result = student.result()
    write_json(student.run.path(options.out), result)
    bar.write(f"{student.run.suite} {student.run.name}: {_told(result)}", file=sys.stderr)


def _told(result: dict[str, Any]) -> str:
    figures, names = result["figures"], ("frechet_distance", "alignment", "background_entropy")
    return ", ".join(f"{name} {figures[name]}" for name in names) if figures else result["status"]


# --- what a step costs ---


def cost(suite: str, world: World, options: Options) -> list[dict[str, Any]]:
    """Milliseconds and peak memory of one update of each method, one at a time."""
    ranks, rows = Ranks(world.backbone.network), []
    for method in RATES:
        run = Run(suite, method, NAMES[method], student(method, 1e-6, ranks.equal(method, SHARE)))
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        each = Student(run, world, options)
        each.trainer.step(0)
        each.trainer.synchronize()
        times = []
        for step in range(1, 21):
            begin = time.perf_counter()
            each.trainer.step(step)
            each.trainer.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else None
        rows.append(
            {
                "label": run.label,
                "method": method,
                "teacher": run.teacher,
                "ms_per_step": _rounded(statistics.median(times)),
                "peak_gib": None if peak is None else _rounded(peak),
                "trainable_parameters": sum(p.numel() for p in each.trainer.student_parameters.values()),
                "graph": world.device.type == "cuda",
            }
        )
        del each
    return rows


def main(options: Options) -> None:
    """Train what is missing."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for suite in options.suites:
        if suite not in SUITES:
            raise WadiError(f"--suites: {suite!r} is unknown; use some of {', '.join(SUITES)}")
        if suite.startswith("dit-") and options.dit is None:
            raise WadiError(f"--dit: the suite {suite} needs the folder of a transformer teacher")
    for teacher in ("unet", "dit"):
        suites = [suite for suite in options.suites if suite.startswith("dit-") == (teacher == "dit")]
        if suites:
            _teach(suites, options.dit if teacher == "dit" else teacher_folder(), options)


def _teach(suites: list[str], folder: Path, options: Options) -> None:
    world = World(folder, options.device, max(options.num_samples, options.curve_samples))
    ranks, runs = Ranks(world.backbone.network), []
    for suite in suites:
        if suite.endswith("cost"):
            rows = cost(suite, world, options)
            where = options.out / f"{suite}.json"
            write_json(where, {"environment": environment(world.device), "rows": rows})
            continue
        prefix = "dit-" if suite.startswith("dit-") else ""
        rates = {} if suite.endswith("rates") else chosen_rates(options.out, f"{prefix}rates")
        runs += runs_of(suite, ranks, rates)
    runs = [run for run in runs if not options.names or run.name in options.names]
    runs = runs[options.share[0] :: options.share[1]]
    missing = [run for run in runs if not is_done(run, options)]
    print(f"{folder.name}: {len(runs)} runs, {len(missing)} to do", flush=True)
    if options.list:
        for run in runs:
            print(f"{run.suite} {run.name} {'done' if run not in missing else run.changes}")
        return
    train_together(missing, world, options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
