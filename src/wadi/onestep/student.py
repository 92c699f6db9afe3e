"""What a student is: the record `student.json` beside its weights; how students are recognised."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from wadi.diffusion.schedule import PREDICTIONS, prediction_type
from wadi.errors import WadiError, tell
from wadi.files import read_json, write_json
from wadi.lorad.small import plain_state
from wadi.onestep.scheduler import ONE_STEP, STEP_COUNTS, TIMESTEP_SCALING, fractions

STUDENT_FILE = "student.json"
TEACHER_FILE = "teacher.json"
"""In a folder that `wadi.teachers` made: which LoRA is fused into it."""
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers that only models which were distilled to few steps come with."""
STUDENT_PREDICTIONS = tuple(name for names in PREDICTIONS.values() for name in names if name != "sample")
"""What the network of a student may predict."""


@dataclass(frozen=True)
class FusedLoRA:
    """The LoRA that is fused into a teacher.

    Attributes:
        digest: SHA-256 of its file, as `files_digest` computes it.
        scale: what its change is multiplied by.
    """

    digest: str
    scale: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """The entry `lora` of `teacher.json` and of a student's base."""
        return {"digest": self.digest, "scale": self.scale}

    @classmethod
    def of(cls, record: Any) -> FusedLoRA | None:
        """What `as_json` wrote; ``None`` where the entry is absent, null or not of this form."""
        if not isinstance(record, dict) or not isinstance(record.get("digest"), str):
            return None
        scale = record.get("scale")
        return cls(record["digest"], float(scale)) if isinstance(scale, (int, float)) else None

    @classmethod
    def in_folder(cls, folder: str | os.PathLike | None) -> FusedLoRA | None:
        """The LoRA in a pipeline folder of `wadi.teachers` or of a student; ``None`` for other folders.

        Raises:
            WadiError: its `teacher.json` or `student.json` is broken.
        """
        if not folder:
            return None
        if (student := Student.read(folder)) is not None:
            return student.lora
        file = Path(folder) / TEACHER_FILE
        record = read_json(file) if file.is_file() else {}
        return cls.of(record.get("lora")) if isinstance(record, dict) else None

    def __str__(self) -> str:
        return f"the LoRA {self.digest[:12]} at scale {self.scale:g}"


@dataclass(frozen=True)
class Student:
    """The record of a student: `student.json` in its adapter folder or its exported pipeline.

        {"prediction": "epsilon", "steps": [1.0], "alpha_T_squared": null,
         "resolution": null, "base": {"class": "UNet2DConditionModel", "shapes": "<sha256>"}}

    Attributes:
        prediction: what the network predicts, one of `STUDENT_PREDICTIONS`.
        base_class: class of the network that was distilled.
        base_shapes: `shapes_fingerprint` of the network's saved tensors, without adapters.
        alpha_T_squared: of the first step, in (0, 1); ``None`` for the value of the base's own noise
            schedule, and for every flow.
        steps: where the network is called if it takes the most steps that it can, the first at pure noise:
            fractions of the timesteps, or a flow's sigmas; see `steps_of`.
        resolution: pixels a side of the images that it was trained on; ``None`` for the base's own size.
        lora: the LoRA that was fused into the base, if any. `base` in the file then has an entry for it.
    """

    prediction: str
    base_class: str
    base_shapes: str
    alpha_T_squared: float | None = None  # noqa: N815
    steps: tuple[float, ...] = ONE_STEP
    resolution: int | None = None
    lora: FusedLoRA | None = None

    @classmethod
    def of(
        cls,
        network: nn.Module,
        scheduler: SchedulerMixin | Mapping[str, Any],
        alpha_T_squared: float | None = None,
        resolution: int | None = None,
        lora: FusedLoRA | None = None,
        steps: Sequence[float] = ONE_STEP,
    ) -> Student:
        """Describe the student of a base.

        Args:
            network: the base's U-Net or transformer, without adapters in it.
            scheduler: the base's scheduler, or its configuration.
            alpha_T_squared: of the student, where it is not the schedule's own.
            resolution: of its images in pixels, where it is not the base's own.
            lora: the LoRA that is fused into the base, if any.
            steps: where its steps are.
        """
        base = type(network).__name__, shapes_fingerprint(_shapes(network))
        return cls(prediction_type(scheduler), *base, alpha_T_squared, tuple(steps), resolution, lora)

    def write(self, folder: str | os.PathLike) -> None:
        """Write `student.json` into a folder.

        Raises:
            WadiError: the file cannot be written.
        """
        base: dict[str, Any] = {"class": self.base_class, "shapes": self.base_shapes}
        if self.lora is not None:
            base["lora"] = self.lora.as_json()
        record = {"prediction": self.prediction, "steps": list(self.steps)}
        record |= {"alpha_T_squared": self.alpha_T_squared, "resolution": self.resolution, "base": base}
        write_json(Path(folder) / STUDENT_FILE, record)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Student | None:
        """Read the record in a folder; ``None`` where there is none.

        Raises:
            WadiError: the file is broken, or describes steps that wadi does not run.
        """
        path = Path(folder) / STUDENT_FILE
        if not path.is_file():
            return None
        value = read_json(path)
        if problem := _problem(value):
            raise WadiError(f"{path}: {problem}; fetch the student again, or write the file by hand")
        base, lora = value["base"], FusedLoRA.of(value["base"].get("lora"))
        own = value["alpha_T_squared"], tuple(value["steps"]), value.get("resolution"), lora
        return cls(value["prediction"], base["class"], base["shapes"], *own)

    def check_base(
        self, folder: str | os.PathLike, shapes: Mapping[str, Sequence[int]], base: str | os.PathLike
    ) -> None:
        """Raise unless the student was distilled from a network with these tensors.

        Args:
            folder: the student's, for the message.
            shapes: of the network's saved tensors, by name.
            base: the model that holds the network, for the message.

        Raises:
            WadiError: the tensors have other names or shapes.
        """
        if shapes_fingerprint(shapes) != self.base_shapes:
            raise WadiError(
                f"{folder}: the adapter was made for another base model ({self.base_class}, of other layers "
                f"or sizes) than {base}; name the model that it was distilled from"
            )

    def check_fits(
        self,
        folder: str | os.PathLike,
        network: nn.Module,
        scheduler: SchedulerMixin | Mapping[str, Any],
        base: str | os.PathLike,
    ) -> None:
        """Raise unless the student was distilled from this network, or from one of the same kind.

        Args:
            folder: the student's, for the message.
            network: the U-Net or transformer, without adapters.
            scheduler: of the model that holds it, or its configuration.
            base: that model, for the message.

        Raises:
            WadiError: the network has other tensors, or the model predicts something else.
        """
        self.check_base(folder, _shapes(network), base)
        if (found := prediction_type(scheduler)) != self.prediction:
            raise WadiError(
                f"{folder}: the student predicts {self.prediction}, and {base} predicts {found}; "
                "name the model that it was distilled from"
            )

    def tell_other_lora(self, folder: str | os.PathLike, base: str | os.PathLike | None) -> None:
        """Tell if another LoRA is fused into a base than into the one that the student was distilled from.

        Args:
            folder: the student's, for the message.
            base: the folder of the base, if it has one.
        """
        found = FusedLoRA.in_folder(base)
        if found != self.lora:
            tell(
                f"{folder}: the student was distilled from a teacher with {self.lora or 'no LoRA'}, but "
                f"{base or 'the pipeline'} has {found or 'no LoRA'}; give the same --teacher-lora and "
                "--teacher-lora-scale as wadi distill got"
            )


def shapes_fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of the sorted names and shapes of a network's saved tensors."""
    facts = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in plain_state(network).items()}


def is_student(scheduler: SchedulerMixin | Mapping[str, Any]) -> bool:
    """Whether a scheduler is an `LCMScheduler` of `student_scheduler`, or was made of its configuration.

    The scheduler of a flow's student cannot be told from a multi-step model's: FLUX.1-schnell has the same.
    Only `student.json` says that a flow is a student.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    return config.get("timestep_scaling") == TIMESTEP_SCALING


def scheduled_steps(scheduler: SchedulerMixin | Mapping[str, Any]) -> tuple[float, ...]:
    """Where a student with betas takes its steps, by its scheduler; one step for any other scheduler."""
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    return fractions(config["original_inference_steps"]) if is_student(scheduler) else ONE_STEP


def student_of(pipeline: DiffusionPipeline) -> Student | None:
    """What a loaded pipeline is, by its folder's `student.json` or by its scheduler; ``None`` for a teacher.

    Raises:
        WadiError: its `student.json` is broken, or its scheduler is for another prediction or number of
            steps.
    """
    folder = pipeline.name_or_path
    if folder and (found := Student.read(folder)):
        if (own := prediction_type(pipeline.scheduler)) != found.prediction:
            raise WadiError(
                f"{folder}: its {STUDENT_FILE} says that the student predicts {found.prediction}, and its "
                f"scheduler is for {own}; fetch or export the student again"
            )
        if is_student(pipeline.scheduler) and scheduled_steps(pipeline.scheduler) != found.steps:
            raise WadiError(
                f"{folder}: its {STUDENT_FILE} says that the student takes {len(found.steps)} steps at most, "
                f"and its scheduler is for {len(scheduled_steps(pipeline.scheduler))}; fetch or export the "
                "student again"
            )
        return found
    if is_student(pipeline.scheduler):
        steps = scheduled_steps(pipeline.scheduler)
        return Student.of(network_of(pipeline), pipeline.scheduler, steps=steps)
    return None


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The U-Net or transformer of a pipeline; ``None`` where it has neither."""
    return pipeline.unet if hasattr(pipeline, "unet") else getattr(pipeline, "transformer", None)


def check_teacher(
    name: str | os.PathLike, scheduler: SchedulerMixin | Mapping[str, Any], network: nn.Module
) -> None:
    """Refuse a student where a multi-step model is needed; tell of models for a few steps.

    Args:
        name: of the model, as the user gave it.
        scheduler: the model's, or its configuration.
        network: the model's U-Net or transformer.

    Raises:
        WadiError: the model is a student.
    """
    # also where the name is that of a run, or of a model on the hub
    origin = getattr(network, "config", {}).get("_name_or_path")
    folders = [Path(name), *([Path(origin).parent] if origin else [])]
    if is_student(scheduler) or any(Student.read(folder) for folder in folders):
        raise WadiError(f"{name}: is a student already; name the multi-step model that it was distilled from")
    kind = scheduler.get("_class_name") if isinstance(scheduler, Mapping) else type(scheduler).__name__
    signs = []
    if kind in FEW_STEP_SCHEDULERS:
        signs.append(f"its scheduler is {kind}")
    if getattr(network, "config", {}).get("time_cond_proj_dim") is not None:
        signs.append("its U-Net takes the guidance as an input (time_cond_proj_dim)")
    if signs:
        tell(
            f"{name}: seems to be distilled to a few steps already ({' and '.join(signs)}); a multi-step "
            "model is meant here, so check that this is the model you want"
        )


def _are_steps(value: Any, predicted: str) -> bool:
    """Whether these are the steps of a student; only those of a flow lie where its schedule has them."""
    if not isinstance(value, list) or len(value) not in STEP_COUNTS:
        return False
    if predicted != "flow_prediction":
        return value == list(fractions(len(value)))
    numbers = all(type(step) in (int, float) for step in value)
    return numbers and value[0] == 1 and all(a > b > 0 for a, b in pairwise(value))


def _problem(value: Any) -> str | None:
    """What is wrong with the content of `student.json`, or None."""
    if not isinstance(value, dict):
        return "does not hold an object"
    if (predicted := value.get("prediction")) not in STUDENT_PREDICTIONS:
        return f"prediction is {predicted!r} and must be one of {', '.join(STUDENT_PREDICTIONS)}"
    if not _are_steps(value.get("steps"), predicted):
        return (
            f"steps are {value.get('steps')}, and wadi runs students of 1, 2 or 4 steps, of which the first "
            "is at 1.0"
        )
    alpha = value.get("alpha_T_squared", 0)
    if alpha is not None and not (isinstance(alpha, float) and 0 < alpha < 1):
        return "alpha_T_squared must be null or a number between 0 and 1"
    if alpha is not None and predicted == "flow_prediction":
        return "alpha_T_squared must be null for a student that predicts a flow"
    side = value.get("resolution")
    if side is not None and not (type(side) is int and side > 0):
        return "resolution must be null or the side of the images in pixels"
    base = value.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("class"), str):
        return "base must name the class of the network"
    if not re.fullmatch(r"[0-9a-f]{64}", str(base.get("shapes"))):
        return "base must hold the SHA-256 of the network's shapes"
    if base.get("lora") is not None and FusedLoRA.of(base["lora"]) is None:
        return "lora of base must hold a digest and a scale"
    return None
