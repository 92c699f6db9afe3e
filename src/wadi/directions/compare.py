"""`wadi directions`: how far the rows of each layer moved in length and in direction, beside the null."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from wadi.directions.change import (
    RowChanges,
    energies,
    energy_shares,
    moments,
    null_energies,
    null_moments,
    row_changes,
)
from wadi.directions.figures import FLOW, Figure, LayerChange, block_of
from wadi.directions.plot import save_scatter, save_spectrum
from wadi.directions.weights import Weights, check_pair, open_weights
from wadi.errors import WadiError
from wadi.files import write_json, write_text
from wadi.outputs import Output
from wadi.progress import progress

RANK_SHARES = torch.arange(51, dtype=torch.float64) / 50
"""Shares of full rank at which the share of energy is kept."""
QUOTED_RANK_SHARE = 0.3
"""Share of full rank at which the paper quotes it."""

_TYPES = {
    r"attn1\.": "self-attention",
    r"attn2\.": "cross-attention",
    r"\.ff\.": "feed-forward",
    r"(^|\.)proj_(in|out)": "projection",
    r"(time|timestep|adaln|add_embedding|resolution|aspect)": "time embedding",
    r"caption_projection": "caption projection",
    r"(down|up)samplers": "resampling",
    r"conv_shortcut": "shortcut",
    r"resnets\.\d+\.conv": "residual convolution",
    r"conv_(in|out)|pos_embed": "ends",
}


@dataclass(frozen=True)
class Group:
    """Means over the changed layers of a block, of a type, or of all; each layer has the same weight."""

    name: str
    layers: int
    unchanged: int
    """Number of layers with equal weights in both models, which are in no mean."""
    norm: Figure | None
    direction: Figure | None
    angle: Figure | None
    energy: float | None
    """Share of energy at `QUOTED_RANK_SHARE` of full rank."""
    null_energy: float | None

    def ratio(self, over: str, of: str = "norm") -> tuple[float | None, float | None]:
        """The mean `over` divided by the mean `of`, such as direction by norm; and the same of the null."""
        a, b = getattr(self, over), getattr(self, of)
        if a is None or b is None:
            return None, None
        return tuple(x / y if y else None for x, y in ((a.mean, b.mean), (a.null_mean, b.null_mean)))


@dataclass(frozen=True)
class Comparison:
    """What `compare_models` found."""

    teacher: str
    student: str
    layers: tuple[LayerChange, ...]
    """The layers in the order in which the network uses them."""
    others: int
    """Number of tensors without rows, such as biases and the scales of norms."""
    others_changed: int

    def overall(self) -> Group:
        """The means over all layers."""
        return _group("all", self.layers)

    def by(self, field: str) -> list[Group]:
        """The means over the layers of each "block" or "type", in the network's order."""
        names = dict.fromkeys(getattr(layer, field) for layer in self.layers)
        return [_group(name, [la for la in self.layers if getattr(la, field) == name]) for name in names]


def compare_models(
    teacher: str | os.PathLike, student: str | os.PathLike, base: str | os.PathLike | None = None
) -> Comparison:
    """Compare two networks of the same architecture, a layer at a time in each of torch's threads.

    Args:
        teacher: see `wadi.directions.weights.open_weights`.
        student: the same; an adapter that names no base model is taken to be for the teacher.
        base: base model of an adapter.

    Raises:
        WadiError: something cannot be read, or the architectures differ.
    """
    before = open_weights(teacher, base)
    after = open_weights(student, base, other=before)
    check_pair(before, after)
    shapes = before.shapes()
    names = layers_with_rows(shapes)
    layers = []
    total = sum(math.prod(shapes[f"{name}.weight"]) for name in names)
    with (
        progress(total=total, desc="weights", unit="", unit_scale=True, leave=False) as bar,
        _one_layer_a_thread() as run,
    ):
        for layer in run(lambda name: layer_change(name, before, after), names):
            layers.append(layer)
            bar.update(layer.rows * layer.columns)
    others = sorted(shapes.keys() - {f"{name}.weight" for name in names})
    changed = sum(not torch.equal(before.read(key), after.read(key)) for key in others)
    return Comparison(before.name, after.name, tuple(layers), len(others), changed)


def layers_with_rows(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the layers whose weight has rows, in the order in which a network uses them."""
    names = [
        key.removesuffix(".weight")
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    ]
    if not names:
        raise WadiError("neither model has a layer with rows; name a U-Net or a transformer")
    return sorted(names, key=_place)


def layer_change(name: str, before: Weights, after: Weights) -> LayerChange:
    """Compute all figures of one layer."""
    weight, target = (weights.read(f"{name}.weight").flatten(1) for weights in (before, after))
    rows, columns = weight.shape
    changes, residual = row_changes(weight, target)
    changed = not torch.equal(weight, target)
    del weight, target
    skipped = rows - len(changes.size)
    size = changes.size.square().mean().sqrt().item() if len(changes.size) else None
    energy, null = _spectra(residual, zlib.crc32(name.encode())) if changed else (None, None)
    figures = _figures(changes, columns)
    return LayerChange(
        name, block_of(name), type_of(name), rows, columns, skipped, changed, size, *figures, energy, null
    )


def output_of(
    folder: str | os.PathLike, teacher: str, student: str, base: str | None, overwrite: bool
) -> Output:
    """The rule for the folder of a comparison; check it before the models are read."""
    return Output(folder, "directions", inputs=(teacher, student, base), overwrite=overwrite)


def write_comparison(
    comparison: Comparison, folder: str | os.PathLike, overwrite: bool = False, base: str | None = None
) -> None:
    """Write directions.json, directions.csv, scatter.png and spectrum.png into a new folder, all or none.

    There are no images if nothing changed.

    Args:
        comparison: what `compare_models` returned.
        folder: folder to write; it must be new or empty.
        overwrite: replace the folder if this function wrote it and nothing else is in it.
        base: base model of an adapter, if it was read.

    Raises:
        WadiError: the folder may not or cannot be written.
    """
    with output_of(folder, comparison.teacher, comparison.student, base, overwrite).writing() as temporary:
        write_json(temporary / "directions.json", summary(comparison))
        write_text(temporary / "directions.csv", as_csv(comparison.layers))
        if any(layer.changed and layer.norm for layer in comparison.layers):
            save_scatter(temporary / "scatter.png", comparison.layers)
        if any(layer.energy for layer in comparison.layers):
            save_spectrum(
                temporary / "spectrum.png", comparison.layers, RANK_SHARES.tolist(), QUOTED_RANK_SHARE
            )


def summary(comparison: Comparison) -> dict[str, Any]:
    """All figures as JSON values."""
    everything = comparison.overall()
    ratios = {
        f"{over}_over_norm": dict(zip(("ratio", "null"), everything.ratio(over), strict=True))
        for over in ("direction", "angle")
    }
    return {
        "teacher": comparison.teacher,
        "student": comparison.student,
        "all": {**dataclasses.asdict(everything), **ratios},
        "blocks": [dataclasses.asdict(group) for group in comparison.by("block")],
        "types": [dataclasses.asdict(group) for group in comparison.by("type")],
        "others": comparison.others,
        "others_changed": comparison.others_changed,
        "rank_shares": RANK_SHARES.tolist(),
        "layers": [dataclasses.asdict(layer) for layer in comparison.layers],
    }


def as_csv(layers: Iterable[LayerChange]) -> str:
    """A line for each layer: names, shape, figures with their nulls, and energy at `QUOTED_RANK_SHARE`."""
    text = io.StringIO()
    fields = ("name", "block", "type", "rows", "columns", "rows_left_out", "changed", "size")
    parts = [field.name for field in dataclasses.fields(Figure)]
    figures = ("norm", "direction", "angle")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fields, *(f"{f}_{p}" for f in figures for p in parts), "energy_30", "null_energy_30"])
    for layer in layers:
        values = [getattr(getattr(layer, f), p, None) for f in figures for p in parts]
        energy = [_quoted(curve) for curve in (layer.energy, layer.null_energy)]
        writer.writerow([*(getattr(layer, field) for field in fields), *values, *energy])
    return text.getvalue()


def table(comparison: Comparison) -> str:
    """The groups and the ratios as lines of text, every figure beside its null."""
    groups = [*comparison.by("block"), *comparison.by("type"), comparison.overall()]
    width = max(len(group.name) for group in groups)
    row = f"{{:{width}}} {{:>6}}".format
    heads = ("norm change", "1 - cos", "angle, rad", f"energy at {QUOTED_RANK_SHARE:.0%}")
    lines = [row("", "") + "".join(f" {head:>18}" for head in heads)]
    lines.append(row("means over layers", "layers")[: width + 7] + f" {'found':>9}{'null':>9}" * len(heads))
    for group in groups:
        pairs = [(f and f.mean, f and f.null_mean) for f in (group.norm, group.direction, group.angle)]
        pairs.append((group.energy, group.null_energy))
        cells = "".join(f" {_short(a):>9}{_short(b):>9}" for a, b in pairs)
        lines.append(row(group.name, group.layers - group.unchanged) + cells)
    everything = comparison.overall()
    for over, words in (("direction", "1 - cos"), ("angle", "angle")):
        found, null = everything.ratio(over)
        lines.append(f"{words} over norm change: {_short(found)}, null {_short(null)}")
    lines.append(
        f"{everything.unchanged} of {everything.layers} layers did not change and are in no mean; "
        f"of {comparison.others} tensors without rows {comparison.others_changed} changed"
    )
    return "\n".join(line.rstrip() for line in lines)


def type_of(name: str) -> str:
    """The type of a layer, in words."""
    return next((words for pattern, words in _TYPES.items() if re.search(pattern, name)), "other")


def _figures(changes: RowChanges, columns: int) -> tuple[Figure | None, ...]:
    if not len(changes.size):
        return None, None, None
    nulls = null_moments(changes.size, columns)
    return tuple(
        Figure(*moments(getattr(changes, field)), *nulls[field]) for field in ("norm", "direction", "angle")
    )


def _spectra(residual: torch.Tensor, seed: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    lengths = residual.norm(dim=1, dtype=torch.float64)
    found = energy_shares(energies(residual), RANK_SHARES)
    null = energy_shares(null_energies(lengths, tuple(residual.shape), seed), RANK_SHARES)
    return tuple(None if s is None else tuple(round(x, 6) for x in s.tolist()) for s in (found, null))


def _group(name: str, layers: Sequence[LayerChange]) -> Group:
    changed = [layer for layer in layers if layer.changed]

    def mean(field: str) -> Figure | None:
        figures = [figure for layer in changed if (figure := getattr(layer, field)) is not None]
        if not figures:
            return None
        return Figure(
            *(sum(column) / len(figures) for column in zip(*map(dataclasses.astuple, figures), strict=True))
        )

    def share(field: str) -> float | None:
        values = [_quoted(curve) for layer in changed if (curve := getattr(layer, field)) is not None]
        return sum(values) / len(values) if values else None

    return Group(
        name,
        len(layers),
        len(layers) - len(changed),
        *map(mean, ("norm", "direction", "angle")),
        *map(share, ("energy", "null_energy")),
    )


def _quoted(curve: Sequence[float] | None) -> float | None:
    return None if curve is None else curve[round(QUOTED_RANK_SHARE * (len(RANK_SHARES) - 1))]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _place(name: str) -> tuple:
    """Sort key of layers in the order in which a network uses them; numbers are sorted as numbers."""
    numbers = (int(part) if part.isdigit() else part for part in name.split("."))
    return FLOW.get(name.split(".")[0], 0), [(isinstance(part, str), part) for part in numbers]


@contextmanager
def _one_layer_a_thread() -> Iterator[Callable]:
    """Yield a `map` with as many threads as torch had, in each of which torch uses one thread.

    Two layers at once are faster than one layer in two threads, because eigenvalues hardly run in parallel.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
