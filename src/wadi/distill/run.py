"""`distill`: everything from a teacher and prompts to a run folder with a one-step student."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator

from wadi.distill.backbone import Backbone, load_backbone
from wadi.distill.cache import EmbeddingCache, cache_output
from wadi.distill.checkpoint import checkpoint_batch, latest_checkpoint
from wadi.distill.config import CHANGEABLE, DistillConfig
from wadi.distill.methods import merged_state
from wadi.distill.processes import hosts_group, together
from wadi.distill.prompts import Prompt, PromptEmbeddings, check_length, encode_prompts, read_prompts
from wadi.distill.trainer import Trainer, make_accelerator, truncate_metrics
from wadi.errors import WadiError
from wadi.files import read_json, write_json
from wadi.lorad.io import save_adapter
from wadi.onestep import OneStepPipeline, load_pipeline, write_alpha_T_squared
from wadi.outputs import Output

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
        config, backbone, prompts = _load(config, checkpoint, accelerator)
    for main in (True, False):  # the others find everything on the disk
        with together(hosts):
            if accelerator.is_main_process == main:
                embeddings = _encode(config, backbone, prompts)
    trainer = Trainer(config, backbone, embeddings, accelerator)
    with together(hosts):
        _begin(trainer, run, checkpoint)
    if not trainer.train():
        accelerator.end_training()
        accelerator.print(f"Saved. Go on with: wadi distill --resume-from-checkpoint {run}")
        raise SystemExit(130)
    with together(hosts):
        if accelerator.is_main_process:
            export(trainer, run)
    accelerator.end_training()
    return run


def export(trainer: Trainer, run: Path) -> None:
    """Write the averaged student: adapter/ in PEFT format (LoRaD), pipeline/ merged into the teacher."""
    config = trainer.config
    student = trainer.accelerator.unwrap_model(trainer.student)
    if config.student_method != "lorad":
        pipeline = load_pipeline(config.pretrained_model_name_or_path)
        network = getattr(pipeline, trainer.backbone.network_name)
        with trainer.ema_weights():
            network.load_state_dict(merged_state(student, network.state_dict()))
        OneStepPipeline(pipeline, config.alpha_T_squared).write(part(run, "pipeline"))
        return
    with part(run, "adapter").writing() as folder:
        save_adapter(student, folder, state_dict=trainer.ema_state())
        if config.alpha_T_squared is not None:
            write_alpha_T_squared(folder, config.alpha_T_squared)
    pipeline = OneStepPipeline.from_pretrained(config.pretrained_model_name_or_path, run / "adapter")
    pipeline.write(part(run, "pipeline"))


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

    Of a resumed run, `CHANGEABLE` options may be given anew; others must be its own or the defaults.
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
    paths = {
        name: str(Path(value).absolute()) if Path(value).exists() else value
        for name in ("pretrained_model_name_or_path", "prompts", "student_adapter")
        if (value := getattr(config, name))
    }
    return dataclasses.replace(config, output_dir=str(run), **paths), None


def _resume(config: DistillConfig) -> tuple[DistillConfig, Path | None]:
    given = Path(config.resume_from_checkpoint).absolute()
    checkpoint = given if given.parent.name == "checkpoints" else latest_checkpoint(given / "checkpoints")
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    if not (run / "config.yaml").is_file():
        raise WadiError(f"{given}: not a run folder (no config.yaml) nor one of its checkpoints")
    saved, defaults = DistillConfig.load(run / "config.yaml"), DistillConfig()
    changed = {}
    for field in dataclasses.fields(DistillConfig):
        value = getattr(config, field.name)
        if field.name in ("output_dir", "resume_from_checkpoint") or value == getattr(defaults, field.name):
            continue
        if field.name in CHANGEABLE:
            changed[field.name] = value
        elif value != getattr(saved, field.name):
            raise WadiError(
                f"--{field.name.replace('_', '-')}: the run was started with {getattr(saved, field.name)}, "
                f"it cannot go on with {value}; leave the option away or start a new run"
            )
    for name in ("adapter", "pipeline"):
        part(run, name).check()
    config = dataclasses.replace(saved, output_dir=str(run), **changed)
    _check_cache(config)
    return config, checkpoint


def _check_cache(config: DistillConfig) -> None:
    if config.embeddings_dir is not None:
        inputs = (config.pretrained_model_name_or_path, config.prompts, config.student_adapter)
        cache_output(config.embeddings_dir, *inputs).check()


def _load(
    config: DistillConfig, checkpoint: Path | None, accelerator: Accelerator
) -> tuple[DistillConfig, Backbone, list[Prompt]]:
    """Prompts and teacher, and the config with what the run and its prompts decide."""
    batch = _samples_a_step(Path(config.output_dir), checkpoint)
    if batch is not None:
        config = share_batch(config, batch, accelerator.num_processes)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise WadiError("--mixed-precision: fp16 needs a GPU; use no or bf16")
    prompts = read_prompts(config.prompts, config.caption_column, config.dataset_split)
    backbone = load_backbone(config.pretrained_model_name_or_path, config.dtype, accelerator.device)
    if not config.validation_prompts:
        config = dataclasses.replace(config, validation_prompts=tuple(p.text for p in prompts[:GRID_PROMPTS]))
    return config, backbone, prompts


def _begin(trainer: Trainer, run: Path, checkpoint: Path | None) -> None:
    """Open the run folder, go to the checkpoint, start the trackers."""
    accelerator, config = trainer.accelerator, trainer.config
    if accelerator.is_main_process:
        _open_run(run, config, trainer.batch)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    if accelerator.is_main_process:
        truncate_metrics(run / "metrics.jsonl", trainer.global_step)
    if config.report_to:
        accelerator.init_trackers(
            "wadi",
            {k: v if isinstance(v, (int, float)) else str(v) for k, v in dataclasses.asdict(config).items()},
        )


def _encode(config: DistillConfig, backbone: Backbone, prompts: list[Prompt]) -> PromptEmbeddings:
    text = backbone.text
    check_length(prompts, text.tokenizer, config.prompts, config.truncate_prompts, text.limit)
    grid = [Prompt(prompt, line) for line, prompt in enumerate(config.validation_prompts, 1)]
    check_length(grid, text.tokenizer, "--validation-prompts", config.truncate_prompts, text.limit)
    cache = EmbeddingCache(text, config.embeddings_dir)
    return encode_prompts(text, [prompt.text for prompt in prompts], list(config.validation_prompts), cache)


def _open_run(run: Path, config: DistillConfig, batch: int) -> None:
    if not (run / "config.yaml").exists():
        run_output(config).open()
    # config.yaml last: with it the run can be resumed
    write_json(run / "samples.json", {"a_step": batch})
    config.save(run / "config.yaml")


def _samples_a_step(run: Path, checkpoint: Path | None) -> int | None:
    """What a resumed run trains with, also where it was interrupted before its first checkpoint."""
    if checkpoint is not None:
        return checkpoint_batch(checkpoint)
    path = run / "samples.json"
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or type(value.get("a_step")) is not int or value["a_step"] < 1:
        raise WadiError(f'{path}: not of the form {{"a_step": 4}}; write it again, or start a new run')
    return value["a_step"]
