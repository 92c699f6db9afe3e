"""`wadi extract`: the LoRaD adapter between a teacher and a one-step student, which are both whole models."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import torch
from peft import inject_adapter_in_model
from torch import nn

from wadi.backbones import student_config
from wadi.device import chosen_device
from wadi.diffusion.schedule import prediction_type
from wadi.directions.figures import FLOW, LayerFigures
from wadi.directions.fit import best_angles, best_factors, explained_share, norm_change, squared_distance
from wadi.directions.plot import save_plot
from wadi.directions.weights import check_shapes
from wadi.distill.checks import check_rank, layer_sizes
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.lorad import LoRaDConfig, save_adapter
from wadi.lorad.layer import LoRaDLayer
from wadi.lorad.rotation import Factors, angles
from wadi.onestep import Student
from wadi.onestep.arguments import whole_number
from wadi.onestep.loading import load_denoiser, pipeline_folder
from wadi.onestep.scheduler import last_alpha_squared
from wadi.onestep.student import check_teacher, scheduled_steps
from wadi.outputs import Output
from wadi.progress import progress

FIGURES_FILE, PLOT_FILE = "extract.json", "extract.png"


@dataclass(frozen=True)
class OtherFigures:
    """A weight that changed and that the adapter does not change."""

    name: str
    kind: str
    """Class of its module, or "bias"."""
    change: float
    """||W' - W||_F^2"""


@dataclass(frozen=True)
class Extraction:
    """What an extracted adapter explains, and what it cannot explain."""

    r: int
    layers: tuple[LayerFigures, ...]
    others: tuple[OtherFigures, ...]

    @property
    def change(self) -> float:
        """Squared change of all weights."""
        return self.adapted_change + sum(figures.change for figures in self.others)

    @property
    def adapted_change(self) -> float:
        """Squared change of the adapted weights."""
        return sum(layer.change for layer in self.layers)

    @property
    def not_adapted(self) -> float | None:
        """Share of `change` that is in other weights than the adapted ones."""
        return sum(figures.change for figures in self.others) / self.change if self.change else None

    @property
    def explained(self) -> float | None:
        """Share of `adapted_change` that the adapter explains."""
        return self._share([layer.explained for layer in self.layers])

    @property
    def ceiling(self) -> float | None:
        """Share of `adapted_change` that the best angles, without a limit by the rank, explain."""
        return self._share([layer.ceiling for layer in self.layers])

    def not_adapted_by_kind(self) -> dict[str, float]:
        """`not_adapted` by kind of weight, the largest first."""
        kinds: dict[str, float] = {}
        for figures in self.others:
            kinds[figures.kind] = kinds.get(figures.kind, 0.0) + figures.change / self.change
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def _share(self, shares: list[float | None]) -> float | None:
        if not self.adapted_change:
            return None
        parts = zip(shares, self.layers, strict=True)
        return sum((share or 0.0) * layer.change for share, layer in parts) / self.adapted_change


def extract_adapter(
    teacher: str | os.PathLike,
    student: str | os.PathLike,
    out_folder: str | os.PathLike,
    r: int | None = None,
    max_sweeps: int = 10,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> Extraction:
    """Write the LoRaD adapter that turns a teacher into a student as nearly as rank `r` allows.

    The layers are those of `student_config`. The folder is PEFT's, with the student's alpha_T^2 if the
    teacher has another one, and with the figures as `extract.json` and `extract.png`; it is written whole or
    not at all.

    Angles are known up to 2 pi, and those of pairs near zero are noise: where a student was turned by more
    than pi, the adapter can miss a few pairs even at the student's own rank (see `wadi.directions.fit`).

    Args:
        teacher: pipeline folder or hub id.
        student: pipeline folder or hub id of the same architecture, as `wadi export` or `wadi import` writes
            it.
        out_folder: folder to write; it must be new or empty.
        r: rank; `Backbone.student_rank` if None.
        max_sweeps: most sweeps of the fit; with 0 the plain SVD of the angles is taken.
        device: device that computes; layers are sent to it one by one.
        overwrite: replace the folder if this function wrote it and nothing else is in it.

    Raises:
        WadiError: a model cannot be loaded, the teacher is a one-step student, architectures or prediction
            types differ, a weight is not finite, no layer can use the rank, there is no such device, or the
            folder may not or cannot be written.
    """
    if r is not None:
        whole_number("--rank", r, 1)
    whole_number("--max-sweeps", max_sweeps, 0)
    output = Output(out_folder, "extract", inputs=(teacher, student), overwrite=overwrite)
    output.check()
    chosen_device(device)
    network, scheduler = load_denoiser(teacher)
    check_teacher(teacher, scheduler, network)
    other, student_scheduler = load_denoiser(student)
    before, after = network.state_dict(), other.state_dict()
    check_shapes(teacher, _shapes(before), student, _shapes(after))
    alpha_T_squared = _own_alpha_T_squared(teacher, scheduler, student, student_scheduler)
    config = _adapter_config(teacher, network, r)
    extraction, factors = _extract(network, config, before, after, max_sweeps, device)
    distilled = Student.read(pipeline_folder(student))
    steps = scheduled_steps(student_scheduler) if distilled is None else distilled.steps
    record = Student.of(network, scheduler, alpha_T_squared, steps=steps)
    inject_adapter_in_model(config, network)
    _fill(network, factors)
    with output.writing() as folder:
        save_adapter(network, folder, base_model=teacher)
        record.write(folder)
        write_json(folder / FIGURES_FILE, summary(extraction))
        save_plot(folder / PLOT_FILE, extraction.layers, f"LoRaD adapter of rank {config.r}")
    return extraction


def _adapter_config(teacher: str | os.PathLike, network: nn.Module, r: int | None) -> LoRaDConfig:
    try:
        config = student_config(network, r)
    except ValueError as error:
        raise WadiError(f"{teacher}: {error}") from error
    if r is not None:
        check_rank("--rank", r, layer_sizes(network, config.target_modules).values())
    return config


def _extract(
    network: nn.Module,
    config: LoRaDConfig,
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    max_sweeps: int,
    device: str | torch.device,
) -> tuple[Extraction, dict[str, Factors]]:
    """Fit the factors of every adapted layer, and compute the figures."""
    names = [name for name, _ in network.named_modules() if name in config.target_modules]
    names.sort(key=lambda name: FLOW.get(name.split(".")[0], 0))
    layers, factors = [], {}
    for name in progress(names, desc="layers", unit="layer", leave=False):
        pair = (before[f"{name}.weight"].to(device), after[f"{name}.weight"].to(device))
        factors[name] = best_factors(*pair, config.r, max_sweeps)
        layers.append(_layer_figures(name, *pair, factors[name]))
    return Extraction(config.r, tuple(layers), _other_figures(network, names, before, after)), factors


def summary(extraction: Extraction) -> dict:
    """All figures as JSON values; shares are None if nothing changed."""
    return {
        "r": extraction.r,
        "explained": extraction.explained,
        "ceiling": extraction.ceiling,
        "not_adapted": extraction.not_adapted,
        "not_adapted_by_kind": extraction.not_adapted_by_kind(),
        "layers": [dataclasses.asdict(layer) for layer in extraction.layers],
        "others": [dataclasses.asdict(figures) for figures in extraction.others],
    }


def table(extraction: Extraction) -> str:
    """The figures as lines of text: each layer, all adapted layers together, and what is not adapted."""
    width = max(len(layer.name) for layer in extraction.layers)
    row = f"{{:{width}}} {{:>9}} {{:>9}} {{:>9}} {{:>9}} {{:>9}}".format
    lines = [row("layer", "of all", "moved", "explained", "ceiling", "norms")]
    for layer in extraction.layers:
        of_all = layer.change / extraction.change if extraction.change else None
        shares = (of_all, layer.relative_change, layer.explained, layer.ceiling, layer.norm_change)
        lines.append(row(layer.name, *map(_percent, shares)))
    adapted = None if extraction.not_adapted is None else 1 - extraction.not_adapted
    total = (_percent(adapted), "", _percent(extraction.explained), _percent(extraction.ceiling), "")
    lines.append(row("all adapted layers", *total))
    lines.append(row("not adapted", _percent(extraction.not_adapted), "", "", "", ""))
    for kind, share in extraction.not_adapted_by_kind().items():
        lines.append(row(f"  {kind}", _percent(share), "", "", "", ""))
    return "\n".join(line.rstrip() for line in lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in state.items()}


def _own_alpha_T_squared(
    teacher: str | os.PathLike, teacher_config: dict, student: str | os.PathLike, student_config: dict
) -> float | None:
    """The student's alpha_T^2, or None if it is that of the teacher's schedule."""
    types = [prediction_type(config) for config in (teacher_config, student_config)]
    if types[0] != types[1]:
        raise WadiError(
            f"{student}: predicts {types[1]}, and {teacher} predicts {types[0]}, but adapters cannot change "
            "that; name a teacher of the same prediction type"
        )
    own, new = (last_alpha_squared(config) for config in (teacher_config, student_config))
    return None if own is None or math.isclose(own, new, rel_tol=1e-5) else new


def _layer_figures(name: str, weight: torch.Tensor, target: torch.Tensor, factors: Factors) -> LayerFigures:
    change, size = squared_distance(target, weight), weight.double().square().sum().item()
    return LayerFigures(
        name=name,
        change=change,
        relative_change=math.sqrt(change / size) if size else None,
        explained=explained_share(weight, target, angles(*factors)),
        ceiling=explained_share(weight, target, best_angles(weight, target)),
        norm_change=norm_change(weight, target),
    )


def _other_figures(
    network: nn.Module, adapted: list[str], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> tuple[OtherFigures, ...]:
    """Every changed weight that is not adapted, the most changed first."""
    figures = []
    for key in before.keys() - {f"{name}.weight" for name in adapted}:
        module, _, parameter = key.rpartition(".")
        kind = "bias" if parameter == "bias" else type(network.get_submodule(module)).__name__
        if change := squared_distance(after[key], before[key]):
            figures.append(OtherFigures(key, kind, change))
    return tuple(sorted(figures, key=lambda other: (-other.change, other.name)))


def _fill(network: nn.Module, factors: dict[str, Factors]) -> None:
    for name, layer in network.named_modules():
        if isinstance(layer, LoRaDLayer):
            for parameters, values in ((layer.lorad_A, factors[name].A), (layer.lorad_B, factors[name].B)):
                parameters["default"].data = values.to(parameters["default"])
