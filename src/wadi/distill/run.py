"""`distill`: everything from a teacher and prompts to a run folder with a one-step student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from wadi.backbones import Backbone, load_backbone
from wadi.backbones.storage import quantized_in_files
from wadi.distill.cache import EmbeddingCache, cache_output
from wadi.distill.checkpoint import checkpoint_batch, latest_checkpoint, read_state
from wadi.distill.checks import check_preset
from wadi.distill.config import CHANGEABLE, INPUTS, DistillConfig
from wadi.distill.loop import train, truncate_metrics
from wadi.distill.methods import merged_state
from wadi.distill.processes import hosts_group, make_accelerator, together
from wadi.distill.prompts import Prompt, PromptEmbeddings, check_length, encode_prompts, read_prompts
from wadi.distill.trackers import start_trackers
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError, tell
from wadi.files import read_json, write_json
from wadi.identity import adapter_digest, model_digest, refuse_other_inputs, texts_digest
from wadi.lorad.io import save_adapter
from wadi.onestep import OneStepPipeline, Student, load_pipeline
from wadi.onestep.adapters import adapter_folder, student_with
from wadi.onestep.student import check_teacher
from wadi.outputs import Output

RUN_FILE = "run.json"
GRID_PROMPTS = 4
"""Training prompts in the sample grids where the config names none."""


def distill(config: DistillConfig) -> Path:
    """Distil a teacher into a one-step student.

    The run folder holds config.yaml, metrics.jsonl, samples/, checkpoints/, adapter/ (the averaged student,
    PEFT format) and pipeline/ (merged, diffusers format).

    Returns:
        The run folder.

    Raises:
        WadiError: any mistake of the user or failure of the surroundings, in one line.
        SystemExit: code 130, after Ctrl-C; the run can be resumed. Code 2, where another process has failed,
            which tells.
    """
    config, checkpoint = resolve(config)
    run = Path(config.output_dir)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    accelerator = make_accelerator(config)
    hosts = hosts_group(accelerator)
    with together(hosts):
        config, backbone, prompts, inputs = _load(config, checkpoint, accelerator)
    for main in (True, False):  # the others find everything on the disk
        with together(hosts):
            if accelerator.is_main_process == main:
                embeddings = _encode(config, backbone, prompts)
    trainer = Trainer(config, backbone, embeddings, accelerator, inputs)
    with together(hosts):
        _begin(trainer, run, checkpoint, inputs)
    if not train(trainer):
        accelerator.end_training()
        accelerator.print(f"Saved. Go on with: wadi distill --resume-from-checkpoint {run}")
        raise SystemExit(130)
    with together(hosts):
        if accelerator.is_main_process:
            export(trainer, run)
    accelerator.end_training()
    return run


def export(trainer: Trainer, run: Path) -> None:
    """Write the averaged student: adapter/ in PEFT format (LoRaD), pipeline/ merged into the teacher.

    Of a teacher that was quantized already there is no pipeline/: merging would round it once more.
    """
    config = trainer.config
    student = trainer.accelerator.unwrap_model(trainer.student)
    if config.student_method != "lorad":
        pipeline = load_pipeline(config.pretrained_model_name_or_path)
        network = getattr(pipeline, trainer.backbone.network_name)
        with trainer.ema_weights():
            network.load_state_dict(merged_state(student, network.state_dict()))
        OneStepPipeline(pipeline, config.alpha_T_squared).write(part(run, "pipeline"))
        return
    backbone, teacher = trainer.backbone, config.pretrained_model_name_or_path
    with part(run, "adapter").writing() as folder:
        save_adapter(student, folder, state_dict=trainer.ema_state(), base_model=teacher)
        Student.of(backbone.network, backbone.pipeline.scheduler, config.alpha_T_squared).write(folder)
    if not quantized_in_files(backbone.network):
        OneStepPipeline.from_pretrained(teacher, run / "adapter").write(part(run, "pipeline"))


def part(run: Path, name: str) -> Output:
    """A folder in a run folder: one that a finished run wrote is replaced when the run goes on."""
    return Output(run / name, "distill", overwrite=True)


def run_output(config: DistillConfig) -> Output:
    """The rule for the run folder of a new run."""
    inputs = (config.pretrained_model_name_or_path, config.prompts, config.student_adapter)
    go_on = f"go on with wadi distill --resume-from-checkpoint {config.output_dir}"
    return Output(config.output_dir, "distill", inputs, instead=go_on)


def share_batch(config: DistillConfig, batch: int, processes: int) -> DistillConfig:
    """Options with which `processes` take `batch` samples a step: fewer at once, or more micro-batches.

    Raises:
        WadiError: the processes cannot share the samples equally.
    """
    size, count = config.train_batch_size, config.gradient_accumulation_steps
    if size * count * processes == batch:
        return config
    if batch % processes:
        raise WadiError(
            f"{config.resume_from_checkpoint or config.output_dir}: was trained with {batch} samples a step, "
            f"which {processes} processes cannot share equally; start a number that divides {batch}"
        )
    own = batch // processes
    size = max(d for d in range(1, min(size, own) + 1) if own % d == 0)
    return dataclasses.replace(config, train_batch_size=size, gradient_accumulation_steps=own // size)


def resolve(config: DistillConfig) -> tuple[DistillConfig, Path | None]:
    """Make paths absolute; where a run is resumed, take its options and find its checkpoint.

    Of a resumed run, `CHANGEABLE` options may be given anew, and those in `INPUTS` if their content is the
    run's own; others must be its own or the defaults.
    Samples a step stay as many: see `share_batch`.

    Returns:
        The config to train with, and the checkpoint to load, if any.

    Raises:
        WadiError: a required option is missing, the run folder is in use, or the run cannot be resumed.
    """
    if config.resume_from_checkpoint is not None:
        return _resume(config)
    for name in ("pretrained_model_name_or_path", "prompts"):
        if getattr(config, name) is None:
            raise WadiError(f"--{name.replace('_', '-')}: is required")
    run = Path(config.output_dir).absolute()
    run_output(config).check()
    _check_cache(config)
    paths = {name: _absolute(value) for name in INPUTS if (value := getattr(config, name))}
    return dataclasses.replace(config, output_dir=str(run), **paths), None


def _absolute(name: str) -> str:
    """The path of what exists here; another name, such as a hub id, as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _resume(config: DistillConfig) -> tuple[DistillConfig, Path | None]:
    given = Path(config.resume_from_checkpoint).absolute()
    checkpoint = given if given.parent.name == "checkpoints" else latest_checkpoint(given / "checkpoints")
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    if not (run / "config.yaml").is_file():
        raise WadiError(f"{given}: not a run folder (no config.yaml) nor one of its checkpoints")
    if checkpoint is not None:
        read_state(checkpoint)  # another format is refused before options that are not known any more
    saved, defaults = DistillConfig.load(run / "config.yaml"), DistillConfig()
    changed = {}
    for field in dataclasses.fields(DistillConfig):
        value = getattr(config, field.name)
        if field.name in ("output_dir", "resume_from_checkpoint") or value == getattr(defaults, field.name):
            continue
        if field.name in CHANGEABLE:
            changed[field.name] = value
        elif field.name in INPUTS:
            changed[field.name] = _absolute(value)
        elif value != getattr(saved, field.name):
            raise WadiError(
                f"--{field.name.replace('_', '-')}: the run was started with {getattr(saved, field.name)}, "
                f"it cannot go on with {value}; omit the option or start a new run"
            )
    for name in ("adapter", "pipeline"):
        part(run, name).check()
    resumed = dataclasses.replace(saved, output_dir=str(run), **changed)
    for name, option in INPUTS.items():
        path = Path(getattr(resumed, name) or run)
        if path.is_absolute() and not path.exists():
            raise WadiError(f"{path}: is not there; where it was moved, name its new place with --{option}")
    _check_cache(resumed)
    return resumed, checkpoint


def _check_cache(config: DistillConfig) -> None:
    if config.embeddings_dir is not None:
        inputs = (config.pretrained_model_name_or_path, config.prompts, config.student_adapter)
        cache_output(config.embeddings_dir, *inputs).check()


def _load(
    config: DistillConfig, checkpoint: Path | None, accelerator: Accelerator
) -> tuple[DistillConfig, Backbone, list[Prompt], dict[str, str | None]]:
    """The config with what the run and its prompts decide, teacher, prompts, and digests of the inputs."""
    run = Path(config.output_dir)
    batch = _samples_a_step(run, checkpoint)
    if batch is not None:
        config = share_batch(config, batch, accelerator.num_processes)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise WadiError("--mixed-precision: fp16 needs a GPU; use no or bf16")
    prompts = read_prompts(config.prompts, config.caption_column, config.dataset_split)
    inputs = _digests(config, prompts)
    if (started := _read_run(run)) is not None:
        refuse_other_inputs(run, started, inputs, INPUTS)
    backbone = load_backbone(config.pretrained_model_name_or_path, config.dtype, accelerator.device)
    check_teacher(config.pretrained_model_name_or_path, backbone.pipeline.scheduler, backbone.network)
    if quantized_in_files(backbone.network):
        tell(
            f"{config.pretrained_model_name_or_path}: is quantized, so the run ends with adapter/ and not "
            "with pipeline/; merge the adapter into the model in full precision with wadi export"
        )
    check_preset(config, backbone.pipeline)
    if config.student_adapter is not None:
        student_with(backbone.pipeline, [adapter_folder(config.student_adapter)])
    if not config.validation_prompts:
        config = dataclasses.replace(config, validation_prompts=tuple(p.text for p in prompts[:GRID_PROMPTS]))
    return config, backbone, prompts, inputs


def _digests(config: DistillConfig, prompts: list[Prompt]) -> dict[str, str | None]:
    """What the options in `INPUTS` name, by content."""
    adapter = config.student_adapter
    return {
        "pretrained_model_name_or_path": model_digest(config.pretrained_model_name_or_path),
        "prompts": texts_digest(prompt.text for prompt in prompts),
        "student_adapter": None if adapter is None else adapter_digest(adapter),
    }


def _begin(trainer: Trainer, run: Path, checkpoint: Path | None, inputs: dict[str, str | None]) -> None:
    """Open the run folder, go to the checkpoint, start the trackers."""
    accelerator, config = trainer.accelerator, trainer.config
    if accelerator.is_main_process:
        _open_run(run, config, trainer.batch, inputs)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    if accelerator.is_main_process:
        truncate_metrics(run / "metrics.jsonl", trainer.global_step)
    start_trackers(accelerator, config)


def _encode(config: DistillConfig, backbone: Backbone, prompts: list[Prompt]) -> PromptEmbeddings:
    text = backbone.text
    check_length(prompts, text.tokenizer, config.prompts, config.truncate_prompts, text.limit)
    grid = [Prompt(prompt, line) for line, prompt in enumerate(config.validation_prompts, 1)]
    check_length(grid, text.tokenizer, "--validation-prompts", config.truncate_prompts, text.limit)
    cache = EmbeddingCache(text, config.embeddings_dir)
    return encode_prompts(text, [prompt.text for prompt in prompts], list(config.validation_prompts), cache)


def _open_run(run: Path, config: DistillConfig, batch: int, inputs: dict[str, str | None]) -> None:
    if not (run / "config.yaml").exists():
        run_output(config).open()
    # config.yaml last: with it the run can be resumed
    write_json(run / RUN_FILE, {"samples_a_step": batch, **inputs})
    config.save(run / "config.yaml")


def _samples_a_step(run: Path, checkpoint: Path | None) -> int | None:
    """What a resumed run trains with, also where it was interrupted before its first checkpoint."""
    if checkpoint is not None:
        return checkpoint_batch(checkpoint)
    value = _read_run(run)
    return None if value is None else value["samples_a_step"]


def _read_run(run: Path) -> dict[str, Any] | None:
    """The record of a run that was begun: samples a step, and digests of its inputs; None for a new run."""
    path = run / RUN_FILE
    if not path.exists():
        return None
    value = read_json(path)
    samples = value.get("samples_a_step") if isinstance(value, dict) else None
    if type(samples) is not int or samples < 1 or not value.keys() >= INPUTS.keys():
        raise WadiError(
            f"{path}: is damaged, it must hold samples_a_step, {', '.join(INPUTS)}; start a new run"
        )
    return value
