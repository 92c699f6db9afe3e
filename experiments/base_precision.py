"""What a smaller frozen base costs: the same training on a base in float32, bf16, int8 and nf4, side by side.

    python experiments/base_precision.py                    # on a GPU; the emoji U-Net, three seeds, minutes
    python experiments/base_precision.py --dit runs/dit     # and a transformer of wadi emoji train-teacher
    python experiments/base_precision.py --table            # the table of what is there; trains nothing
    python experiments/base_precision.py --device cpu --max-train-steps 2 --num-samples 64    # does it run?

Students differ in what their base is stored in, and in their seed. Each is judged as it would be used: its
adapter on the teacher in float32. bf16 and int8 are stored as `wadi distill` stores them. nf4 is rounded as
bitsandbytes rounds it (blocks of 64), but held in float32, so that this needs no bitsandbytes; two remedies
for it are tried. Each student leaves one JSON file; what is there is not trained again.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ablation
import torch
import tyro
from evidence import estimate
from tables import markdown
from torch import nn
from tqdm import tqdm

from wadi.backbones import student_config
from wadi.backbones.storage import store_base
from wadi.distill.roles import build_roles, trainable
from wadi.emoji import teacher_folder
from wadi.errors import WadiError
from wadi.files import read_json, write_json
from wadi.lorad.small import SmallLinear

FIGURES = {
    "frechet_distance": "distance",
    "alignment": "alignment",
    "background_entropy": "background",
    "place_entropy": "place",
    "size_entropy": "size",
    "order_entropy": "order of two",
}
"""Columns of the table: name of a figure, and its heading."""
_BELOW = (-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor((*_BELOW, *_ABOVE))
"""The sixteen values of nf4 (QLoRA, arXiv 2305.14314)."""
LAST = 0.2
"""Share of the updates, at the end, that a remedy for nf4 makes on the base in float32."""


@dataclass
class Options:
    """Train students on bases that are stored in different precisions, and judge them on the full base."""

    bases: tuple[str, ...] = ()
    """Names of `BASES`; all of them if not given."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One student of each base for each."""
    out: Path = Path("docs/results/base-precision")
    """Folder of the results, a folder a teacher in it."""
    dit: Path | None = None
    """Folder of a transformer teacher, which is tried too."""
    max_train_steps: int = 1200
    """Updates of every student."""
    train_batch_size: int = 64
    """Samples an update."""
    num_samples: int = 5000
    """Images that each student is judged by."""
    together: int = 9
    """Students trained at once."""
    table: bool = False
    """Train nothing, only print the table."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""


# --- the bases ---


def nf4_rounded(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """A weight as nf4 holds it: in blocks of numbers that lie one after the other, each with its largest.

    Args:
        weight: any shape, float32.
        block: numbers that share a scale.
    """
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = NF4.to(weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(blocks / torch.where(scale > 0, scale, 1), between)]
    return (nearest * scale).flatten()[: len(flat)].view(weight.shape)


def _round_nf4(network: nn.Module, names: Collection[str]) -> None:
    for name in names:
        weight = network.get_submodule(name).weight
        weight.data.copy_(nf4_rounded(weight.data))


def _nf4_within(network: nn.Module, names: Collection[str]) -> None:
    """The first and the last block in int8, the others in nf4."""
    ends = outer(names)
    _round_nf4(network, [name for name in names if name not in ends])
    _stored("int8", network, ends)


def outer(names: Collection[str]) -> list[str]:
    """Those of layers that belong to the first or to the last block of the network, as these are named."""
    found = [re.match(r"(up_blocks|transformer_blocks)\.(\d+)\.", name) for name in names]
    last = max(((match[1], int(match[2])) for match in found if match), key=lambda place: place[1])
    ends = ("down_blocks.0.", "transformer_blocks.0.", f"{last[0]}.{last[1]}.")
    return [name for name in names if name.startswith(ends)]


def _stored(precision: str, network: nn.Module, names: Collection[str]) -> None:
    store_base(network, names, precision, next(network.parameters()).device)


BASES: dict[str, Callable[[nn.Module, Collection[str]], None]] = {
    "float32": lambda network, names: None,
    "bf16": partial(_stored, "bf16"),
    "int8": partial(_stored, "int8"),
    "nf4": _round_nf4,
    "nf4, first and last block int8": _nf4_within,
    "nf4, then float32": _round_nf4,
}
"""What is done to the layers of a copy of the teacher."""


def weight_error(network: nn.Module, full: nn.Module, names: Collection[str]) -> float:
    """The norm of what storing has changed of the layers' weights over that of the weights."""
    change = size = 0.0
    for name in names:
        layer, exact = network.get_submodule(name), full.get_submodule(name).weight.double()
        weight = layer.wide_weight() if isinstance(layer, SmallLinear) else layer.weight
        change += (weight.double() - exact).square().sum().item()
        size += exact.square().sum().item()
    return (change / size) ** 0.5


# --- the students ---


class Student(ablation.Student):
    """One student on one base."""

    def __init__(
        self, base: str, seed: int, teacher: str, world: ablation.World, full: nn.Module, options: Options
    ) -> None:
        self.base, self.full = base, full
        self.names = list(student_config(full).target_modules)
        common = ablation.Options(
            out=options.out,
            max_train_steps=options.max_train_steps,
            train_batch_size=options.train_batch_size,
            num_samples=options.num_samples,
            curve_samples=min(500, options.num_samples),
            device=options.device,
        )
        super().__init__(run_of(base, seed, teacher), world, common)

    def advance(self) -> None:
        """One update; the last ones on the full base where that is the remedy."""
        last = self.step == round((1 - LAST) * self.config.run.max_train_steps)
        if last and self.base.endswith("then float32"):
            # in place, on the stream of the updates: a captured one reads the same memory
            with torch.no_grad(), self.trainer.on_stream():
                for name in self.names:
                    exact = self.full.get_submodule(name).weight
                    self.world.backbone.network.get_submodule(name).weight.copy_(exact)
        super().advance()

    def result(self) -> dict[str, Any]:
        """That of the training, and the figures of the averaged adapter on the full base."""
        result = super().result() | {"base": self.base, "exported": None}
        result["weight_error"] = weight_error(self.world.backbone.network, self.full, self.names)
        if self.finite:
            config = student_config(self.full, self.config.student.rank)
            network, state = build_roles(self.full, config, config, seed=0).student, self.trainer.ema_state()
            for name, parameter in trainable(network).items():
                parameter.data.copy_(state[name])
            generate = partial(self._one_step, network)
            result["exported"] = self.world.judged(generate, self.run.prompts, self.options.num_samples)
        return result


def run_of(base: str, seed: int, teacher: str) -> ablation.Run:
    """The name of a student and of its file."""
    suite = "dit-base" if teacher == "dit" else "base"
    return ablation.Run(suite, f"{re.sub('[, ]+', '-', base)}-seed{seed}", base, {}, seed)


def world_on(world: ablation.World, base: str) -> ablation.World:
    """The same world with the teacher stored otherwise."""
    own = copy.copy(world)
    own.backbone = copy.copy(world.backbone)
    own.backbone.network = copy.deepcopy(world.backbone.network)
    BASES[base](own.backbone.network, list(student_config(own.backbone.network).target_modules))
    return own


def train(teacher: str, folder: Path, options: Options) -> None:
    """Train the students of one teacher that are missing, some at once."""
    wanted = [(base, seed) for seed in options.seeds for base in options.bases or BASES]
    missing = [each for each in wanted if not run_of(*each, teacher).path(options.out).exists()]
    print(f"{teacher}: {len(wanted)} students, {len(missing)} to train", flush=True)
    if not missing:
        return
    world = ablation.World(folder, options.device, options.num_samples)
    with tqdm(total=len(missing) * options.max_train_steps, unit="update") as bar:
        for first in range(0, len(missing), options.together):
            students = [
                Student(base, seed, teacher, world_on(world, base), world.backbone.network, options)
                for base, seed in missing[first : first + options.together]
            ]
            while waiting := [student for student in students if not student.done]:
                for student in waiting:
                    student.advance()
                for student in waiting:  # the host is never more than a round ahead
                    student.trainer.synchronize()
                bar.update(len(waiting))
            for student in students:
                write_json(student.run.path(options.out), student.result())
                bar.write(f"{teacher} {student.run.name}", file=sys.stderr)


# --- the table ---


def table(out: Path, teacher: str) -> str:
    """A row for each base of one teacher: mean and 95 % interval over its students, on the full base."""
    found: dict[str, list[dict[str, Any]]] = {base: [] for base in BASES}
    for path in sorted(out.glob(f"{run_of('float32', 0, teacher).suite}/*.json")):
        result = read_json(path)
        found[result["base"]].append(result)
    rows = []
    for base, results in found.items():
        if not results:
            continue
        judged = [result["exported"] for result in results if result["exported"] is not None]
        error = f"{results[0]['weight_error']:.4f}"
        cells = [_shown([each[name] for each in judged if each[name] is not None]) for name in FIGURES]
        rows.append([base, f"{len(judged)} of {len(results)}", error, *cells])
    return markdown(["base", "students that are finite", "error of the weights", *FIGURES.values()], rows)


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    value = estimate(values)
    return f"{value.mean:.3f}" if value.half is None else f"{value.mean:.3f} ± {value.half:.3f}"


def main(options: Options) -> None:
    """Train what is missing, and print the tables.

    Raises:
        WadiError: an unknown base, or a number that is too small.
    """
    if unknown := set(options.bases) - BASES.keys():
        raise WadiError(f"--bases: {min(unknown)!r} is unknown; use some of {', '.join(BASES)}")
    for name in ("max_train_steps", "train_batch_size", "num_samples", "together"):
        if (value := getattr(options, name)) < 1:
            raise WadiError(f"--{name.replace('_', '-')}: must be at least 1, but is {value}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    teachers = {"unet": teacher_folder()} | ({"dit": options.dit} if options.dit else {})
    for teacher, folder in teachers.items():
        if not options.table:
            train(teacher, folder, options)
        print(f"\n{teacher}\n\n{table(options.out, teacher)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
