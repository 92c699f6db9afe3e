"""The options of a distillation, in groups. The command line has them as flags without the groups' names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from wadi.device import DTYPES, Precision
from wadi.distill.options import Options, option
from wadi.errors import WadiError
from wadi.files import explain_os_errors, write_text

Method = Literal["lorad", "lora", "full"]
"""What is trained of a network; see `wadi.distill.methods`."""


@dataclass(frozen=True)
class ModelOptions(Options):
    """The teacher and the prompts."""

    preset: str = option("none", often=True, changeable=True)
    """Name of the preset that the other options started from. It is compared with the teacher."""

    pretrained_model_name_or_path: str | None = option(None, often=True)
    """Teacher: the folder of a diffusers pipeline, a hub id, or one .safetensors file in the original layout
    (as Civitai has them). docs/distilling.md lists the kinds."""

    teacher_config: str | None = option(None)
    """For a teacher in one file: a diffusers folder or hub id of the same kind of model. Its configurations
    and tokenizers are used, and its networks if the file lacks them. The default is a model on the hub."""

    teacher_lora: str | None = option(None, often=True)
    """LoRA file that is fused into the teacher, with the names of diffusers or of kohya's scripts."""

    teacher_lora_scale: float = option(1.0)
    """Number that the change of the LoRA is multiplied by."""

    resolution: int | None = option(None, at_least=1)
    """Pixels a side of the images, for teachers that make images of any size (FLUX.1, FLUX.2-klein, Z-Image,
    Qwen-Image). The default is that of their pipelines, 1024."""

    prompts: str | None = option(None, often=True)
    """Prompts: a .txt file (one a line), a .jsonl, .csv, .tsv, .json or .parquet file, or a `datasets` id."""

    caption_column: str = option("text")
    """Column (or key) of the prompts in tables and data sets."""

    dataset_split: str = option("train")
    """Split to read when the prompts are a `datasets` id."""

    truncate_prompts: bool = option(False)
    """Cut prompts that are longer than the tokenizer takes, instead of stopping."""

    embeddings_dir: str | None = option(None, changeable=True)
    """Folder that keeps the encoded prompts. The default is $WADI_CACHE/prompts or ~/.cache/wadi/prompts."""

    embeddings_limit: float = option(10.0, above=0)
    """GiB that the encoded prompts may take. If all prompts fit, they are encoded before the training and
    kept on the disk. If not, those that the run draws are encoded during the training, a little ahead of it,
    and kept in the memory of each process."""

    text_encoder_device: Literal["auto", "gpu", "cpu"] = option("auto")
    """Where the text encoders work: "cpu", "gpu", or "auto". With "auto" they work on the GPU, except for
    text encoders above 2 GiB that encode during the training."""

    @property
    def teacher(self) -> tuple[str | None, str | None, str | None, float]:
        """The arguments of `wadi.teachers.prepare_teacher`."""
        file = self.pretrained_model_name_or_path, self.teacher_config
        return *file, self.teacher_lora, self.teacher_lora_scale


@dataclass(frozen=True)
class StudentOptions(Options):
    """The student."""

    rank: int = option(256, "student_rank", often=True, at_least=1)
    """Rank of the student's LoRaD adapter."""

    method: Method = option("lorad", "student_method")  # noqa: RUF009
    """What is trained of the student: "lorad"; or, to compare with, "lora" on the same layers at the same
    rank, or "full" for every weight. The run folder of these two has pipeline/ and no adapter/."""

    adapter: str | None = option(None, "student_adapter", often=True)
    """Adapter folder that the student starts from. An adapter of another rank is approximated as closely as
    the new rank allows. Layers that the adapter does not have start as the teacher's."""

    alpha_T_squared: float | None = option(None, above=0, below=1)  # noqa: N815
    """alpha_T^2 of the student's first step, if it is not the scheduler's (authors' PixArt: 0.0047)."""

    steps: Literal[1, 2, 4] = option(1, "student_steps", often=True)
    """Most steps that the student can take; with 4, it makes images in 1, 2, 3 or 4."""

    ema_decay: float = option(0.999, at_least=0, below=1)
    """Decay of the moving average of the student's weights, which is what is exported. The decay of update n
    is min(decay, (1 + n) / (10 + n))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and self.method != "lorad":
            raise WadiError(f"--student-adapter: is a LoRaD adapter, but --student-method is {self.method}")


@dataclass(frozen=True)
class FakeOptions(Options):
    """The fake model, which learns what the student makes."""

    rank: int = option(32, "fake_rank", often=True, at_least=1)
    """Rank of the fake model's adapter. Give it the student's rank and --fake-updates 2: all images of a
    prompt become alike if the fake model learns too slowly."""

    layers: Literal["attention", "student"] = option("attention", "fake_layers", often=True)
    """Layers of the fake model's adapter: the paper's smaller selection, or the student's own."""

    updates: int = option(1, "fake_updates", often=True, at_least=1)
    """Updates of the fake model per update of the student."""

    method: Method = option("lorad", "fake_method")  # noqa: RUF009
    """What is trained of the fake model."""

    guidance_scale: float = option(1.0, "fake_guidance_scale", at_least=0)
    """Classifier-free guidance of the fake model in the distillation gradient. 1 is none; the paper has
    1.5."""

    weighting: Literal["alpha_squared", "none"] = option("alpha_squared", "fake_weighting")
    """Loss of the fake model: the paper's alpha_t^2 (epsilon - n)^2, or with "none" the plain error of what
    the network predicts, which is how its teacher was trained."""

    null_prompt_probability: float = option(0.0, at_least=0, at_most=1)
    """Probability that an update of the fake model gets the empty prompt for its whole batch. A fake model
    with guidance needs it; the paper has 0.1."""


@dataclass(frozen=True)
class DenoisingOptions(Options):
    """The denoising term of the student's objective."""

    weight: float = option(0.0, "denoising_weight", at_least=0)
    """Weight of the denoising term: the distance to what the unguided teacher makes of the student's image at
    little noise. It cleans the texture, which the distillation gradient leaves grainy. 0 omits the term."""

    max_timestep: float = option(0.1, "denoising_max_timestep", at_least=0, at_most=1)
    """Highest timestep of the denoising term, as a fraction of all; the lowest is --min-timestep."""


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """The student's objective. Each term but the distillation gradient has a group of its own."""

    guidance_scale: float = option(1.5, often=True, at_least=0)
    """Classifier-free guidance of the teacher in the distillation gradient. 1 is none."""

    guidance_max_timestep: float = option(1.0, at_least=0, at_most=1)
    """Highest timestep, as a fraction of all, at which the teacher is guided (arXiv 2404.07724). What is
    decided at more noise, such as where things are, is then not guided."""

    guidance_scale_above: float = option(1.0, at_least=0)
    """Guidance of the teacher above --guidance-max-timestep."""

    min_timestep: float = option(0.02, at_least=0, at_most=1)
    """Lowest timestep of the distillation gradient, as a fraction of all."""

    max_timestep: float = option(0.98, at_least=0, at_most=1)
    """Highest timestep of the distillation gradient, as a fraction of all."""

    weighting: Literal["sigma_squared", "normalized"] = option("sigma_squared")
    """Weight of the distillation gradient: the paper's sigma_t^2, or DMD's normalization per sample."""

    denoising: DenoisingOptions = DenoisingOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_timestep > self.max_timestep:
            raise WadiError("--min-timestep: must not exceed --max-timestep")
        if self.min_timestep > self.guidance_max_timestep:
            raise WadiError("--min-timestep: must not exceed --guidance-max-timestep")
        if self.guidance_scale_above != 1 and self.guidance_max_timestep == 1:
            raise WadiError("--guidance-scale-above: nothing is above; set --guidance-max-timestep below 1")
        if self.denoising.weight and self.min_timestep > self.denoising.max_timestep:
            raise WadiError("--min-timestep: must not exceed --denoising-max-timestep")


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """Batches, learning rates and AdamW."""

    train_batch_size: int = option(4, often=True, changeable=True, at_least=1)
    """Images per process and micro-batch. You may change it when you resume a run. The number of images per
    step then stays the same."""

    gradient_accumulation_steps: int = option(1, often=True, changeable=True, at_least=1)
    """Micro-batches per optimizer step."""

    student_learning_rate: float = option(1e-4, often=True, above=0)
    """Learning rate of the student."""

    fake_learning_rate: float = option(1e-2, often=True, above=0)
    """Learning rate of the fake model."""

    lr_warmup_steps: int = option(0, at_least=0)
    """Steps over which both learning rates rise linearly at the start."""

    lr_decay_fraction: float = option(0.0, at_least=0, at_most=1)
    """Last fraction of the training over which both learning rates fall linearly to zero."""

    adam_beta1: float = option(0.9, at_least=0, below=1)
    """AdamW's beta1."""

    adam_beta2: float = option(0.999, at_least=0, below=1)
    """AdamW's beta2."""

    adam_weight_decay: float = option(1e-2, at_least=0)
    """AdamW's weight decay."""

    adam_epsilon: float = option(1e-8, above=0)
    """AdamW's epsilon."""

    max_grad_norm: float = option(1.0, above=0)
    """Norm to which the gradients of student and fake model are clipped, each on its own."""

    max_skipped_steps: int = option(20, changeable=True, at_least=1)
    """An update whose gradients are not finite is skipped. The training stops after so many in a row."""


@dataclass(frozen=True)
class RunOptions(Options):
    """The run: its folder, its length, its precision, what it writes."""

    output_dir: str = option("runs/distill", often=True, changeable=True)
    """Run folder. It must be new or empty, unless a run is resumed."""

    resume_from_checkpoint: str | None = option(None, often=True, changeable=True)
    """Run folder (its last checkpoint) or checkpoint folder to go on from, with that run's options."""

    seed: int = option(0, often=True, at_least=0)
    """Seed of adapters, noise, timesteps and order of prompts."""

    # another number of steps also moves where the rates begin to fall
    max_train_steps: int = option(20_000, often=True, changeable=True, at_least=1)
    """Updates of the student."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", often=True)
    """Precision of the frozen base. Adapters, images of the student and losses are always float32."""

    base_precision: Precision | None = option(None, often=True)  # noqa: RUF009
    """Storage of the base's weights that adapters turn: bf16, int8 (one scale for each row) or nf4 (needs
    bitsandbytes and a GPU). It needs less memory. The default stores them in --mixed-precision."""

    gradient_checkpointing: bool = option(False, often=True)
    """Recompute activations in the backward pass: less memory, more time."""

    compile: bool = option(False, often=True, changeable=True)
    """Compile the repeated blocks of the networks before the first step. This takes some minutes, and the
    steps then are faster and need less memory."""

    cuda_graphs: bool = option(False, changeable=True)
    """Record one iteration as a CUDA graph and replay it. At small batches this is faster, because launching
    the kernels one by one takes longer than their work."""

    shard_base: bool = option(False, changeable=True)
    """Spread the frozen base over all processes, for a base that is too large for one card. A block's weights
    are gathered while it computes. The default is a whole base in every process, which is faster."""

    allow_tf32: bool = option(False)
    """Let float32 matrix products use TF32 on Ampere and later GPUs."""

    logging_steps: int = option(10, changeable=True, at_least=1)
    """Steps between lines of metrics.jsonl. Losses leave the device only then."""

    checkpointing_steps: int = option(500, changeable=True, at_least=1)
    """Steps between checkpoints."""

    checkpoints_total_limit: int | None = option(2, changeable=True, at_least=1)
    """Checkpoints to keep. The oldest are deleted first."""

    validation_steps: int = option(500, changeable=True, at_least=0)
    """Steps between grids of sample images; 0 for none."""

    validation_prompts: tuple[str, ...] = option((), often=True, changeable=True)
    """Prompts of the sample grids, one row each. The default is the first four training prompts."""

    validation_seeds: tuple[int, ...] = option((0, 1, 2, 3), changeable=True, at_least=0)
    """Seeds of the sample grids, one column each."""

    report_to: str | None = option(None, changeable=True)
    """Tracker of Accelerate that gets the metrics too, such as tensorboard. It must be installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuda_graphs and self.mixed_precision == "fp16":
            raise WadiError("--cuda-graphs: does not go with fp16 (loss scaling); use --mixed-precision bf16")
        if self.validation_steps and not self.validation_seeds:
            raise WadiError("--validation-seeds: name at least one, or set --validation-steps 0")

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the frozen base."""
        return DTYPES[self.mixed_precision]


@dataclass(frozen=True)
class DistillConfig(Options):
    """Options of `distill`: `DistillConfig.of(prompts="prompts.txt").replace(student_rank=64).student.rank`.

    The defaults are the paper's for Stable Diffusion 1.5, except the guidance of the fake model and its
    updates on the empty prompt, which only the presets with the paper's proportions set.

    Raises:
        WadiError: a value is of the wrong type or outside its range; the message names the option.
    """

    model: ModelOptions = ModelOptions()
    student: StudentOptions = StudentOptions()
    fake: FakeOptions = FakeOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        if "full" in (self.student.method, self.fake.method) and self.run.mixed_precision != "no":
            raise WadiError(
                "--student-method, --fake-method: full trains the base's own dtype; use --mixed-precision no"
            )

    @classmethod
    def of(cls, **options: object) -> DistillConfig:
        """The defaults but for some options, by the names of their flags: `of(student_rank=64)`.

        Raises:
            WadiError: an option that does not exist, or a bad value.
        """
        return cls().replace(**options)

    def replace(self, **options: object) -> DistillConfig:
        """See `Options.replace`; the names are added to `given`."""
        new = super().replace(**options)
        object.__setattr__(new, "_given", self.given | options.keys())
        return new

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that `of` and `replace` were called with, perhaps with default values."""
        return getattr(self, "_given", frozenset())

    def fingerprint(self, inputs: Mapping[str, str | None] | None = None) -> str:
        """Hash of every option that decides the numbers. A checkpoint goes on only under the same one.

        Options with their default values do not count, so that a new option does not end older runs.

        Args:
            inputs: digests of what the options in `INPUTS` name; their paths do not count.
        """
        usual, free = DistillConfig().values(), CHANGEABLE | INPUTS.keys()
        fixed = {n: value for n, value in self.values().items() if n not in free and value != usual[n]}
        return hashlib.sha256(json.dumps(fixed | (inputs or {}), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write every option as YAML, a mapping for each group."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))  # lists where tuples are
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> DistillConfig:
        """Read what `save` wrote; absent options take their defaults.

        Raises:
            WadiError: unreadable file, unknown option, or a bad value.
        """
        with explain_os_errors(path, "read the config"):
            text = Path(path).read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise WadiError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise WadiError(f"{path}: must hold groups of options as `name: value` lines")
        try:
            return cls.from_nested(values)
        except WadiError as error:
            raise WadiError(f"{path}: {error}") from error


CHANGEABLE = frozenset(n for n, place in DistillConfig.places().items() if place.field.metadata["changeable"])
"""Options that may differ when a run is resumed. The samples of a step stay as many, however the processes
and micro-batches share them."""

GRID_PROMPTS = 4
"""Training prompts in the sample grids if `validation_prompts` names none."""

INPUTS = {
    "pretrained_model_name_or_path": "teacher",
    "teacher_config": "teacher-config",
    "teacher_lora": "teacher-lora",
    "prompts": "prompts",
    "student_adapter": "student-adapter",
}
"""Options that name files, and the short name of each on the command line. A resumed run takes another path
of the same content."""
