"""The tables and plots of docs/evidence.md, from one JSON file for every training.

    python experiments/evidence.py                         # write tables and plots
    python experiments/evidence.py --check                 # only tell whether the page is what the files give
    python experiments/evidence.py --only rates methods    # while other suites are not run yet

Tables stand between `<!-- table: NAME -->` and `<!-- /table -->`; all else on the page is written by hand.
Files are docs/results/ablation/SUITE/NAME.json, which experiments/ablation.py leaves. A suite without a place
on the page and a place without a suite are mistakes; so are runs in one table that cannot be compared.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evidence_plots as plots
import numpy as np
import tyro
from tables import find_tables, markdown, with_tables

from wadi.errors import WadiError
from wadi.files import read_json, write_text

METHODS = ("lorad", "lora", "dora", "oft", "full")
"""Order in tables; others follow."""
BASELINE = "lorad"
"""The method that others are compared with."""
LEVEL = 0.95
DIGITS = {"frechet_distance": 2, "precision": 3, "recall": 3, "alignment": 3}
"""Decimals of figures in tables; entropies and what is not named have 2."""
HEADINGS = {
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "alignment": "alignment",
    "background_entropy": "free background, bits",
    "place_entropy": "free place, bits",
    "size_entropy": "free size, bits",
    "order_entropy": "free order, bits",
}
MAIN = ("frechet_distance", "precision", "recall", "alignment", "background_entropy")
RULE = (
    "chosen: the lowest Fréchet distance (mean over seeds) of the learning rates all of whose runs finished"
)
"""What `choose_rate` does, in words."""


# --- one training ---


@dataclass(frozen=True)
class Run:
    """What one training left."""

    path: Path
    suite: str
    name: str
    label: str
    teacher: str
    prompts: str
    config: dict[str, Any]
    trainable_parameters: int
    fake_parameters: int
    network_parameters: int
    curve: list[dict[str, Any]]
    figures: dict[str, Any] | None
    environment: dict[str, str]
    directions: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether it has figures."""
        return self.figures is not None

    @property
    def rate(self) -> float:
        """Learning rate of the student."""
        return self.config["student_learning_rate"]

    @property
    def share(self) -> float:
        """Of the network's parameters, how many are trained."""
        return self.trainable_parameters / self.network_parameters


_COUNTS = ("trainable_parameters", "fake_parameters", "network_parameters")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("suite", "name", "label", "teacher", "prompts", "status"), str),
    **dict.fromkeys(_COUNTS, int),
    **dict.fromkeys(("config", "environment"), dict),
    "curve": list,
    "figures": (dict, type(None)),
}
_CONFIG = (
    *("student_learning_rate", "student_rank", "fake_rank", "fake_updates", "guidance_scale"),
    *("fake_guidance_scale", "train_batch_size", "max_train_steps", "seed"),
)
_CHOICES = {
    "teacher": ("unet", "dit"),
    "prompts": ("selection", "test"),
    "status": ("finished", "not finite"),
}
_CURVE = ("step", "samples", "frechet_distance", "alignment")
_FIGURES = ("samples", *MAIN[:4])
_MOVED = ("norm", "null_norm", "angle", "null_angle", "energy", "null_energy")
_SWAPS = ("with_teacher_norms", "with_teacher_directions")
_ENTROPIES = ("background_entropy", "place_entropy", "size_entropy", "order_entropy")


def read_run(path: str | os.PathLike) -> Run:
    """Read the file of one training.

    Entropies may be null: no picture of a collapsed student may count.

    Raises:
        WadiError: the file is no JSON, lacks something, holds a number that is not finite, or says that it is
            another run than its folder and name say.
    """
    path, data = Path(path), read_json(path)
    if not isinstance(data, dict):
        raise WadiError(f"{path}: must hold one run, an object")
    _check_finite(path, data, "")
    for name, kind in _FIELDS.items():
        if name not in data:
            raise WadiError(f"{path}: {name} is missing")
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise WadiError(f"{path}: {name} must not be {data[name]!r}")
    for name, choices in _CHOICES.items():
        if data[name] not in choices:
            raise WadiError(f"{path}: {name} is {data[name]!r}, not one of {', '.join(choices)}")
    _check_numbers(path, "config", data["config"], _CONFIG)
    for name in ("student_method", "fake_method"):
        if not isinstance(data["config"].get(name), str):
            raise WadiError(f"{path}: config.{name} is missing")
    for i, point in enumerate(data["curve"]):
        _check_numbers(path, f"curve[{i}]", point, _CURVE)
    if (data["figures"] is None) != (data["status"] == "not finite"):
        given = "null" if data["figures"] is None else "given"
        raise WadiError(f"{path}: status is {data['status']!r}, but figures are {given}")
    if data["figures"] is not None:
        _check_numbers(path, "figures", data["figures"], _FIGURES)
        _check_numbers(path, "figures", data["figures"], _ENTROPIES, or_null=True)
    for name, expected in (("suite", path.parent.name), ("name", path.stem)):
        if data[name] != expected:
            raise WadiError(f"{path}: {name} is {data[name]!r}, its place says {expected!r}")
    if min(data[name] for name in _COUNTS) < 0 or not data["network_parameters"]:
        raise WadiError(f"{path}: numbers of parameters must be positive")
    if (moved := data.get("directions")) is not None:
        _check_numbers(path, "directions", moved, _MOVED)
        for name in _SWAPS:
            _check_numbers(path, f"directions.{name}", moved.get(name), ("frechet_distance", "alignment"))
    fields = {name: data[name] for name in Run.__dataclass_fields__ if name not in ("path", "directions")}
    return Run(path, **fields, directions=moved)


def _check_finite(path: Path, value: Any, where: str) -> None:
    """Python reads NaN and Infinity, which are no JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise WadiError(f"{path}: {where or 'the value'} is {value}, not a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        _check_finite(
            path, part, f"{where}[{key}]" if isinstance(value, list) else f"{where}.{key}".strip(".")
        )


def _check_numbers(path: Path, where: str, found: Any, names: Iterable[str], or_null: bool = False) -> None:
    if not isinstance(found, dict):
        raise WadiError(f"{path}: {where} must be an object")
    for name in names:
        if name not in found:
            raise WadiError(f"{path}: {where}.{name} is missing")
        value = found[name]
        if value is None and or_null:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise WadiError(f"{path}: {where}.{name} is {value!r}, not a number")


def read_suite(folder: Path) -> list[Run]:
    """All runs of a suite, by name.

    Raises:
        WadiError: there are none, or one of the files is not as it should be.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise WadiError(
            f"{folder}: holds no runs (*.json); run experiments/ablation.py --suites {folder.name}"
        )
    return [read_run(path) for path in paths]


# --- what may be compared ---


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone: one row of a table."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Of what is the same in all."""
        return self.runs[0]

    @property
    def finished(self) -> list[Run]:
        """Those with figures."""
        return [run for run in self.runs if run.finished]

    @property
    def count(self) -> str:
        """How many finished, and which did not."""
        lost = [str(run.config["seed"]) for run in self.runs if not run.finished]
        if not lost:
            return str(len(self.runs))
        return f"{len(self.finished)} of {len(self.runs)}, not finite: seed {', '.join(lost)}"

    def values(self, name: str) -> list[float]:
        """A figure of every finished run; empty if one of them does not have it."""
        values = [run.figures[name] for run in self.finished if run.figures is not None]
        return [] if None in values else values

    def estimate(self, name: str) -> Estimate | None:
        """Mean and interval of a figure."""
        values = self.values(name)
        return estimate(values) if values else None


def grouped(runs: Iterable[Run], key: Callable[[Run], Hashable] = lambda run: run.label) -> list[Group]:
    """Put runs together that differ in their seed alone, in the order in which they come.

    Raises:
        WadiError: runs of one key differ in another option, or have the same seed.
    """
    found: dict[Hashable, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    for members in found.values():
        members.sort(key=lambda run: run.config["seed"])
        first, seeds = members[0], {}
        for run in members:
            for name in sorted({*first.config, *run.config} - {"seed"}):
                if run.config.get(name) != first.config.get(name):
                    raise WadiError(
                        f"{run.path}: differs from {first.name} in {name}, not in its seed alone; "
                        "give it another label"
                    )
            other = seeds.setdefault(run.config["seed"], run)
            if other is not run:
                raise WadiError(f"{run.path}: has the seed of {other.name}; remove one of them")
    return [Group(members[0].label, tuple(members)) for members in found.values()]


def check_alike(
    runs: Sequence[Run], options: Iterable[str] = ("max_train_steps", "train_batch_size")
) -> None:
    """Refuse to put runs in one table that cannot be compared.

    Frechet distances of fewer pictures are higher; fewer updates make another student.

    Raises:
        WadiError: runs were judged on other captions, by another number of pictures, or differ in `options`.
    """
    columns = {"prompts": [run.prompts for run in runs]}
    columns |= {f"config.{name}": [run.config.get(name) for run in runs] for name in options}
    columns["figures.samples"] = [run.figures["samples"] if run.figures else None for run in runs]
    for name, values in columns.items():
        usual = statistics.mode([value for value in values if value is not None] or [None])
        for run, value in zip(runs, values, strict=True):
            if value != usual and (run.finished or name != "figures.samples"):
                raise WadiError(f"{run.path}: {name} is {value}, of other runs of its table {usual}")


def by_method(runs: Iterable[Run]) -> list[Run]:
    """In the order of `METHODS`, then by rank and learning rate."""

    def place(run: Run) -> tuple:
        method = run.config["student_method"]
        known = METHODS.index(method) if method in METHODS else len(METHODS)
        return known, method, run.config["student_rank"], run.rate, run.config["seed"], run.name

    return sorted(runs, key=place)


# --- statistics ---


@dataclass(frozen=True)
class Estimate:
    """A mean and half of its confidence interval, which a single value does not have."""

    mean: float
    half: float | None
    count: int


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


def student_t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, for one degree of freedom or more, not only whole numbers of them.

    With t = sqrt(freedom) tan(angle) the distribution function is an integral of cos(angle)^(freedom - 1),
    smooth up to any angle below pi / 2.
    """
    if not 0 < probability < 1 or not freedom >= 1:
        raise ValueError(f"no quantile {probability} for {freedom} degrees of freedom")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, freedom)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def below(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        values = np.cos(angle * (_NODES + 1) / 2) ** (freedom - 1)
        return 0.5 + scale * angle / 2 * float(_WEIGHTS @ values)

    high = 1.0
    while below(high) < probability:
        high *= 2
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return (low + high) / 2


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean and confidence interval by Student's t."""
    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return Estimate(mean, None, count)
    error = statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, student_t_quantile((1 + level) / 2, count - 1) * error, count)


def difference(values: Sequence[float], others: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of `values` less that of `others`, with Welch's interval: the two may scatter unequally.

    Runs of one seed share prompts and noise, but are not taken as pairs: a run that diverged would take its
    partner with it. Where shared noise makes figures alike, the interval is too wide, not too narrow.
    """
    mean, count = statistics.fmean(values) - statistics.fmean(others), min(len(values), len(others))
    if count < 2:
        return Estimate(mean, None, count)
    parts = [(statistics.variance(each) / len(each), len(each) - 1) for each in (values, others)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate(mean, 0.0, count)
    freedom = variance**2 / sum(part**2 / rest for part, rest in parts)
    return Estimate(mean, student_t_quantile((1 + level) / 2, freedom) * math.sqrt(variance), count)


def choose_rate(distances: Mapping[float, Sequence[float | None]]) -> float:
    """The learning rate with the lowest mean Frechet distance, of those all of whose runs finished.

    Args:
        distances: of each rate its runs' Frechet distances, None for a run that did not finish.

    Raises:
        WadiError: no rate is left.
    """
    means = {
        rate: statistics.fmean(value for value in values if value is not None)
        for rate, values in distances.items()
        if values and None not in values
    }
    if not means:
        raise WadiError(f"none of the learning rates {', '.join(map(rate_text, distances))} gave figures")
    return min(means, key=lambda rate: (means[rate], rate))


def chosen_rates(runs: Iterable[Run]) -> dict[str, float]:
    """What `choose_rate` says of each label.

    Raises:
        WadiError: a method has no rate that gave figures.
    """
    found: dict[str, dict[float, list[float | None]]] = {}
    for run in runs:
        value = None if run.figures is None else run.figures["frechet_distance"]
        found.setdefault(run.label, {}).setdefault(run.rate, []).append(value)
    chosen = {}
    for label, distances in found.items():
        try:
            chosen[label] = choose_rate(distances)
        except WadiError as error:
            raise WadiError(f"{label}: {error}") from None
    return chosen


# --- words ---


def rate_text(rate: float) -> str:
    """0.0003 as 3e-4."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def spaced(number: int) -> str:
    """10000 as 10 000."""
    return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)


def with_interval(found: Estimate | None, name: str) -> str:
    """A mean and half of its interval."""
    if found is None:
        return "-"
    digits = DIGITS.get(name, 2)
    if found.half is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits + 1}f} ± {found.half:.{digits + 1}f}"


def with_range(group: Group, name: str) -> str:
    """A mean, and the lowest and highest of several seeds."""
    values, digits = group.values(name), DIGITS.get(name, 2)
    if not values:
        return "-" if group.finished else "not finite"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(found: Estimate, name: str) -> str:
    """A difference with its interval and in words."""
    digits = DIGITS.get(name, 2) + 1  # of two means that are alike
    if found.half is None:
        return f"{found.mean:+.{digits}f}, no interval of one seed"
    words = "no difference shown"
    if abs(found.mean) > found.half:
        words = "higher" if found.mean > 0 else "lower"
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}, {words}"


def described(runs: Sequence[Run]) -> str:
    """What all runs of a table have in common, and where they ran."""
    parts = [f"{runs[0].prompts} captions".capitalize()]
    if counts := sorted({run.figures["samples"] for run in runs if run.figures is not None}):
        parts.append(f"{spaced(counts[0])} images of each student")
    updates = sorted({run.config["max_train_steps"] for run in runs})
    batches = sorted({run.config["train_batch_size"] for run in runs})
    parts.append(f"{_span(updates)} updates of {_span(batches)} samples")
    return f"{', '.join(parts)}. {machine([run.environment for run in runs])}"


def machine(environments: Iterable[Mapping[str, str]]) -> str:
    """Devices, versions, dates and commits."""
    found = list(environments)

    def all_of(name: str) -> list[str]:
        return sorted({str(each[name]) for each in found if each.get(name)})

    dates = all_of("date")
    parts = [" and ".join(all_of("device")), *(f"torch {version}" for version in all_of("torch"))]
    parts += [dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"] if dates else []
    parts += [f"commit {' and '.join(commits)}"] if (commits := all_of("commit")) else []
    return f"{', '.join(part for part in parts if part)}."


def _span(values: Sequence[int]) -> str:
    return spaced(values[0]) if len(values) == 1 else f"{spaced(values[0])} to {spaced(values[-1])}"


def _parameters(count: int, total: int) -> list[str]:
    return [spaced(count), f"{100 * count / total:.1f} %"]


# --- tables ---


def rates_table(runs: Sequence[Run]) -> str:
    """Every learning rate of every method, the chosen one marked."""
    check_alike(runs)
    groups, chosen = grouped(by_method(runs), lambda run: (run.label, run.rate)), chosen_rates(runs)
    tried: dict[str, list[float]] = {}
    for group in groups:
        tried.setdefault(group.label, []).append(group.first.rate)
    rows = []
    for group in groups:
        label, rate = group.label, group.first.rate
        note = ""
        if rate == chosen[label]:
            edge = {min(tried[label]): ", the lowest tried", max(tried[label]): ", the highest tried"}
            note = f"**chosen**{edge.get(rate, '')}"
        figures = [with_range(group, name) for name in ("frechet_distance", "alignment")]
        rows.append([label, rate_text(rate), *figures, note])
    numbers = {label: len(rates) for label, rates in tried.items()}
    count = f"{next(iter(numbers.values()))} of each method"
    if len(set(numbers.values())) > 1:
        count = "not as many of each: " + ", ".join(f"{label} {number}" for label, number in numbers.items())
    table = markdown(("method", "learning rate", "Fréchet distance", "alignment", ""), rows)
    return f"{table}\n\nLearning rates tried: {count}; {RULE}. {described(runs)}"


def methods_table(runs: Sequence[Run]) -> str:
    """Every method with its intervals, and its differences from `BASELINE`."""
    check_alike(runs)
    groups = grouped(by_method(runs))
    rows = []
    for group in groups:
        first = group.first
        facts = [*_parameters(first.trainable_parameters, first.network_parameters), rate_text(first.rate)]
        cells = [with_interval(group.estimate(name), name) for name in MAIN]
        rows.append([group.label, *facts, group.count, *cells])
    headings = ("method", "trained", "of network", "rate", "seeds", *(HEADINGS[name] for name in MAIN))
    note = f"Means over seeds ± {100 * LEVEL:.0f} % confidence intervals (Student's t). {described(runs)}"
    return "\n\n".join((markdown(headings, rows), note, differences_table(groups)))


def read_next(folder: Path) -> list[Run]:
    """The runs at the next learning rate, and those of the same methods at the chosen one beside them.

    Raises:
        WadiError: as `read_suite`.
    """
    runs = read_suite(folder)
    methods = {run.config["student_method"] for run in runs}
    beside = read_suite(folder.with_name(folder.name.replace("next", "methods")))
    chosen = [run for run in beside if run.config["student_method"] in methods]
    return [dataclasses.replace(run, label=f"{run.label}, {rate_text(run.rate)}") for run in (*chosen, *runs)]


def next_table(runs: Sequence[Run]) -> str:
    """Methods at their chosen and at their next rate; differences from `BASELINE` at each of its two."""
    groups = grouped(by_method(runs))
    tables = [methods_table(runs)]
    bases = _baselines(groups)
    others = [group for group in groups if group not in bases]
    tables += [differences_table([base, *others]) for base in bases[1:]]
    return "\n\n".join(tables)


def _baselines(groups: Sequence[Group]) -> list[Group]:
    """Groups of the method that others are compared with.

    Raises:
        WadiError: there is none.
    """
    found = [group for group in groups if group.first.config["student_method"] == BASELINE]
    if not found:
        raise WadiError(
            f"{groups[0].first.path.parent}: no run of {BASELINE}, which others are compared with"
        )
    return found


def differences_table(groups: Sequence[Group]) -> str:
    """Every method less the baseline, with Welch's intervals."""
    base = _baselines(groups)[0]
    rows = []
    for group in groups:
        if group is not base:
            pairs = [(name, group.values(name), base.values(name)) for name in MAIN]
            cells = [verdict(difference(a, b), name) if a and b else "-" for name, a, b in pairs]
            rows.append([f"{group.label} less {base.label}", *cells])
    note = (
        f"Differences of means ± {100 * LEVEL:.0f} % intervals (Welch's t, each for itself). "
        '"No difference shown": the interval holds 0.'
    )
    return f"{markdown(('', *(HEADINGS[name] for name in MAIN)), rows)}\n\n{note}"


def directions_table(runs: Sequence[Run]) -> str:
    """How far norms and directions of rows moved, beside a random change, and what both swaps make."""
    known = [run for run in runs if run.directions is not None]
    if not known:
        raise WadiError(f"{runs[0].path.parent}: no run says how far its weights moved")
    check_alike(known)
    rows = []
    for group in grouped(by_method(known)):
        moved = {name: statistics.fmean(run.directions[name] for run in group.runs) for name in _MOVED}
        own = statistics.fmean(group.values("frechet_distance"))
        swapped = [
            statistics.fmean(run.directions[name]["frechet_distance"] for run in group.runs)
            for name in _SWAPS
        ]
        pairs = [f"{moved[name]:.1e} ({moved[f'null_{name}']:.1e})" for name in ("norm", "angle")]
        # a method that keeps norms, rounding aside, has no ratio
        keeps = moved["norm"] < 0.01 * moved["null_norm"]
        ratios = [
            "-" if keeps and not null else f"{moved[f'{null}angle'] / moved[f'{null}norm']:.1f}"
            for null in ("", "null_")
        ]
        energy = f"{100 * moved['energy']:.1f} % ({100 * moved['null_energy']:.1f} %)"
        distances = [f"{value:.2f}" for value in (own, *swapped)]
        rows.append([group.label, group.count, *pairs, f"{ratios[0]} ({ratios[1]})", energy, *distances])
    headings = (
        *("method", "seeds", "norm change", "angle, rad", "angle over norm", "energy in 30 % of the rank"),
        *("Fréchet distance", "with the teacher's norms", "with its directions"),
    )
    note = (
        "Means over rows of the layers that adapters have, and over seeds; in brackets the same of a random "
        f"change of the same size. {described(known)}"
    )
    return f"{markdown(headings, rows)}\n\n{note}"


def ranks_table(runs: Sequence[Run]) -> str:
    """Figures against the number of trained parameters."""
    check_alike(runs)
    names = ("frechet_distance", "alignment", "background_entropy")
    rows = [
        [
            group.label,
            str(group.first.config["student_rank"]),
            *_parameters(group.first.trainable_parameters, group.first.network_parameters),
            group.count,
            *(with_range(group, name) for name in names),
        ]
        for group in _by_rank(runs)
    ]
    headings = ("method", "rank", "trained", "of network", "seeds", *(HEADINGS[name] for name in names))
    return f"{markdown(headings, rows)}\n\n{_ranges(_by_rank(runs))}"


def _by_rank(runs: Sequence[Run]) -> list[Group]:
    return grouped(by_method(runs), lambda run: (run.label, run.config["student_rank"]))


def fake_table(runs: Sequence[Run]) -> str:
    """Fake models by method, rank and updates."""
    check_alike(runs)
    names = ("frechet_distance", "alignment", "background_entropy", "place_entropy")
    rows = [
        [
            group.label,
            *_parameters(group.first.fake_parameters, group.first.network_parameters),
            group.count,
            *(with_range(group, name) for name in names),
        ]
        for group in _by_fake(runs)
    ]
    headings = ("fake model", "trained", "of network", "seeds", *(HEADINGS[name] for name in names))
    return f"{markdown(headings, rows)}\n\n{_ranges(_by_fake(runs))}"


def _by_fake(runs: Sequence[Run]) -> list[Group]:
    def place(run: Run) -> tuple:
        method = run.config["fake_method"]
        known = METHODS.index(method) if method in METHODS else len(METHODS)
        return known, method, run.fake_parameters, run.config["fake_updates"], run.name

    return grouped(sorted(runs, key=place))


def guidance_table(runs: Sequence[Run]) -> str:
    """Figures against the guidance of the teacher and of the fake model."""
    check_alike(runs)
    scales = ("fake_guidance_scale", "guidance_scale")
    ordered = sorted(runs, key=lambda run: [run.config[name] for name in scales])
    groups = grouped(ordered, lambda run: tuple(run.config[name] for name in scales))
    rows = [
        [f"{group.first.config[name]:g}" for name in reversed(scales)]
        + [group.count, *(with_range(group, name) for name in MAIN)]
        for group in groups
    ]
    headings = ("guidance of teacher", "of fake model", "seeds", *(HEADINGS[name] for name in MAIN))
    return f"{markdown(headings, rows)}\n\n{_ranges(groups)}"


def students_table(runs: Sequence[Run]) -> str:
    """Students by their label, which may have been trained for longer than others."""
    check_alike(runs, ())
    names, groups = (*MAIN, *_ENTROPIES[1:]), grouped(runs)
    rows = [
        [
            group.label,
            f"{spaced(group.first.config['max_train_steps'])} x {group.first.config['train_batch_size']}",
            group.count,
            *(with_range(group, name) for name in names),
        ]
        for group in groups
    ]
    headings = ("student", "updates x batch", "seeds", *(HEADINGS[name] for name in names))
    return f"{markdown(headings, rows)}\n\n{_ranges(groups)}"


def _ranges(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    several = len(runs) > len(groups)
    return f"{'Means over seeds (lowest to highest). ' if several else ''}{described(runs)}"


# --- time and memory ---


def read_cost(path: Path) -> dict[str, Any]:
    """Read the file of the suite cost.

    Raises:
        WadiError: it is not as it should be.
    """
    data = read_json(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise WadiError(f"{path}: rows is missing")
    _check_finite(path, data, "")
    for i, row in enumerate(rows):
        _check_numbers(path, f"rows[{i}]", row, ("ms_per_step", "trainable_parameters"))
        _check_numbers(path, f"rows[{i}]", row, ("peak_gib",), or_null=True)
        for name in ("label", "graph"):
            if name not in row:
                raise WadiError(f"{path}: rows[{i}].{name} is missing")
    return data


def cost_table(data: Mapping[str, Any]) -> str:
    """Time and memory of an update of each method."""
    rows = [
        [
            row["label"],
            spaced(row["trainable_parameters"]),
            f"{row['ms_per_step']:.1f}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
            "yes" if row["graph"] else "no",
        ]
        for row in data["rows"]
    ]
    table = markdown(("method", "trained", "ms an update", "peak, GiB", "CUDA graph"), rows)
    header = data.get("header") or machine([data.get("environment", {})])
    return f"{table}\n\n{header}"


# --- the page ---


@dataclass(frozen=True)
class Picture:
    """A plot under a table."""

    name: str
    words: str
    draw: Callable[[Path, Any], None]


@dataclass(frozen=True)
class Table:
    """Where a table's data are, and what makes it of them."""

    source: str
    read: Callable[[Path], Any]
    build: Callable[[Any], str]
    pictures: tuple[Picture, ...] = field(default=())
    required: bool = True  # whether its data need a place on the page; not where another table has them too


def _draw_rates(path: Path, runs: Sequence[Run]) -> None:
    groups = grouped(by_method(runs), lambda run: (run.label, run.rate))
    plots.save_rates(path, groups, chosen_rates(runs))


def _draw_curves(path: Path, runs: Sequence[Run]) -> None:
    plots.save_curves(path, grouped(by_method(runs)))


def _draw_methods(path: Path, runs: Sequence[Run]) -> None:
    plots.save_methods(path, grouped(by_method(runs)))


def _draw_ranks(path: Path, runs: Sequence[Run]) -> None:
    plots.save_ranks(path, _by_rank(runs))


# --- what one prediction of the teacher mends ---


def read_grain(path: Path) -> dict[str, Any]:
    """Read a file of experiments/grain.py.

    Raises:
        WadiError: it is not as it should be.
    """
    data = read_json(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or "header" not in data:
        raise WadiError(f"{path}: rows or header is missing")
    _check_finite(path, data, "")
    for i, row in enumerate(rows):
        _check_numbers(path, f"rows[{i}]", row, ("alignment", "background_entropy"))
        _check_numbers(path, f"rows[{i}]", row, ("mended", "kept"), or_null=True)
        if "name" not in row:
            raise WadiError(f"{path}: rows[{i}].name is missing")
    return data


def grain_table(data: Mapping[str, Any]) -> str:
    """Alignment as it is and cleaned, and which pictures changed sides."""

    def share(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    first, *others = data["rows"]
    rows = [[first["name"], share(first["alignment"], 3), "", "", f"{first['background_entropy']:.2f}"]]
    for row in others:
        shares = (share(row["mended"], 2), share(row["kept"], 4))
        rows.append([row["name"], share(row["alignment"], 3), *shares, f"{row['background_entropy']:.2f}"])
    headings = ("images", "alignment", "wrong ones mended", "right ones kept", "free background, bits")
    return f"{markdown(headings, rows)}\n\n{data['header']}."


def _draw_fake(path: Path, runs: Sequence[Run]) -> None:
    plots.save_fake(path, _by_fake(runs))


def _suite(name: str, build: Callable[[Sequence[Run]], str], *pictures: tuple[str, str, Callable]) -> Table:
    prefix = "dit-" if name.startswith("dit-") else ""
    made = (Picture(f"evidence-{prefix}{stem}.png", words, draw) for stem, words, draw in pictures)
    return Table(name, read_suite, build, tuple(made))


_RATES = ("rates", "Fréchet distance and alignment against learning rate, a line per method.", _draw_rates)
_DOTS = ("methods", "Every seed of every method, with means and intervals.", _draw_methods)
_CURVES = ("curves", "Figures on the way of the training, means and ranges over seeds.", _draw_curves)
_RANKS = ("ranks", "Fréchet distance and alignment against share of parameters trained.", _draw_ranks)
_FAKE = ("fake", "Free background against Fréchet distance, a line per fake model.", _draw_fake)

TABLES: dict[str, Table] = {
    **{name: _suite(name, rates_table, _RATES) for name in ("rates", "dit-rates")},
    **{name: _suite(name, methods_table, _DOTS, _CURVES) for name in ("methods", "dit-methods")},
    **{
        name: Table(
            name,
            read_next,
            next_table,
            (Picture(f"evidence-{name}.png", "Every seed of every method at both rates.", _draw_methods),),
        )
        for name in ("next", "dit-next")
    },
    "directions": Table("methods", read_suite, directions_table, required=False),
    "dit-directions": Table("dit-methods", read_suite, directions_table, required=False),
    "ranks": _suite("ranks", ranks_table, _RANKS),
    "fake": _suite("fake", fake_table, _FAKE),
    "guidance": _suite("guidance", guidance_table),
    **{name: _suite(name, students_table) for name in ("gap", "denoising", "long")},
    **{name: Table(f"{name}.json", read_cost, cost_table) for name in ("cost", "dit-cost")},
    **{name: Table(f"{name}.json", read_grain, grain_table) for name in ("grain", "grain-before")},
}
"""Tables by the name in their marker. Another table is another function and a line here."""


def wanted_tables(places: Iterable[str], options: Options) -> list[str]:
    """The tables to make.

    Raises:
        WadiError: data without a place on the page, or a place without data.
    """
    data, known = options.data, {table.source for table in TABLES.values()}
    found = (
        {each.name for each in data.iterdir() if each.is_dir() or each.suffix == ".json"}
        if data.is_dir()
        else ()
    )
    if strange := sorted(set(found) - known):
        raise WadiError(f"{data / strange[0]}: no table is made of it; add one to TABLES")
    names = [
        name
        for name, table in TABLES.items()
        if name in places or (table.required and (data / table.source).exists())
    ]
    if options.only:
        if unknown := sorted(set(options.only) - set(TABLES)):
            raise WadiError(f"--only: no table {unknown[0]!r}; known are {', '.join(TABLES)}")
        names = [name for name in TABLES if name in options.only]
    for name in names:
        source = data / TABLES[name].source
        if not source.exists():
            raise WadiError(f"{source}: is missing, but {options.page} has the table {name}")
        if name not in places:
            raise WadiError(f"{options.page}: no <!-- table: {name} --> for {source}")
    return names


@dataclass
class Options:
    """Write the tables and plots of docs/evidence.md."""

    page: Path = Path("docs/evidence.md")
    """Where the tables stand."""
    data: Path = Path("docs/results/ablation")
    """Folder of the results, a folder a suite in it."""
    pictures: Path = Path("docs/images")
    """Folder of the plots."""
    only: tuple[str, ...] = ()
    """Only these tables, in place of all that have data or a place on the page."""
    check: bool = False
    """Write nothing; exit with status 1 if the tables are not what the files give."""


def main(options: Options) -> int:
    """Write the page, or compare it.

    Returns:
        0, or 1 if `--check` found a difference.
    """
    try:
        page = options.page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WadiError(f"{options.page}: could not read the page: {error}") from error
    places = find_tables(page, options.page, TABLES)
    names = wanted_tables(places, options)
    data = {name: TABLES[name].read(options.data / TABLES[name].source) for name in names}
    blocks = {name: _block(TABLES[name], data[name], options) for name in names}
    if options.check:
        return _compare(page, places, blocks, options)
    for name in names:
        for picture in TABLES[name].pictures:
            picture.draw(options.pictures / picture.name, data[name])
    write_text(options.page, with_tables(page, places, blocks))
    print(f"{options.page}: {', '.join(names)}")
    return 0


def _block(table: Table, data: Any, options: Options) -> str:
    folder = Path(os.path.relpath(options.pictures, options.page.parent)).as_posix()
    pictures = [f"![{picture.words}]({folder}/{picture.name})" for picture in table.pictures]
    return "\n\n".join([table.build(data), *pictures]) + "\n"


def _compare(
    page: str, places: Mapping[str, tuple[int, int]], blocks: Mapping[str, str], options: Options
) -> int:
    other = [name for name, block in blocks.items() if page[slice(*places[name])] != block]
    pictures = [options.pictures / each.name for name in blocks for each in TABLES[name].pictures]
    lacking = [str(path) for path in pictures if not path.exists()]
    if other:
        print(f"{options.page}: not what the files give: {', '.join(other)}", file=sys.stderr)
    if lacking:
        print(f"missing: {', '.join(lacking)}", file=sys.stderr)
    if other or lacking:
        print("run python experiments/evidence.py", file=sys.stderr)
    return int(bool(other or lacking))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except WadiError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
