"""`distill`: from a teacher and prompts to a run folder with a student."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import inject_adapter_in_model

from wadi.backbones import Backbone, load_backbone, student_config
from wadi.backbones.storage import quantized_in_files
from wadi.device import chosen_device
from wadi.distill.checkpoint import checkpoint_batch, latest_checkpoint, read_state
from wadi.distill.checks import check_preset, check_preset_name
from wadi.distill.config import CHANGEABLE, GRID_PROMPTS, INPUTS, DistillConfig
from wadi.distill.loop import train, truncate_metrics
from wadi.distill.methods import merged_state
from wadi.distill.plan import announce, peak_line, print_plan
from wadi.distill.processes import hosts_group, make_accelerator, together
from wadi.distill.prompts import prepare_prompts, tell_time
from wadi.distill.roles import view
from wadi.distill.student import student_steps
from wadi.distill.trackers import start_trackers
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError, tell
from wadi.files import read_json, write_json
from wadi.identity import adapter_digest, refuse_other_inputs, texts_digest
from wadi.lorad.io import save_adapter
from wadi.onestep import Student, StudentPipeline, load_pipeline
from wadi.onestep.adapters import adapter_folder, student_with
from wadi.onestep.student import FusedLoRA, check_teacher
from wadi.outputs import Output
from wadi.prompts import Prompt, read_prompts
from wadi.prompts.cache import cache_output
from wadi.teachers import prepare_teacher, teacher_digests

RUN_FILE = "run.json"


def distill(config: DistillConfig) -> Path:
    """Distil a teacher into a student of one step, or of a few.

    The run folder holds config.yaml, metrics.jsonl, samples/, checkpoints/, adapter/ (the averaged student,
    PEFT format) and pipeline/ (merged, diffusers format).

    Returns:
        The run folder.

    Raises:
        WadiError: a mistake of the user, or a failure of disk, device or network; one line tells which.
        SystemExit: code 130 after Ctrl-C; the run can then be resumed. Code 2 if another process has failed;
            that process prints the error.
    """
    config, checkpoint = resolve(config)
    run = Path(config.run.output_dir)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.allow_tf32
    accelerator = make_accelerator(config)
    hosts, device = hosts_group(accelerator), accelerator.device
    for main in (True, False):  # the others find everything on the disk
        with together(hosts):
            if accelerator.is_main_process == main:
                teacher = prepare_teacher(*config.model.teacher)
    on_gpu = device.type == "cuda" and accelerator.is_main_process
    planned = announce(config, device, teacher, accelerator.num_processes) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with together(hosts):
        config, backbone, prompts, inputs = _load(config, checkpoint, accelerator, teacher)
    for main in (True, False):
        with together(hosts):
            if accelerator.is_main_process == main:
                encoded = prepare_prompts(config, backbone.text, prompts, accelerator)
    with together(hosts):
        # only now: a text encoder may be as large. A base that will be spread may be too large for one device
        backbone.place("cpu" if config.run.shard_base else device, config.run.base_precision)
    with contextlib.closing(encoded.embeddings):
        trainer = Trainer(config, backbone, encoded, accelerator, inputs)
        with together(hosts):
            _begin(trainer, run, checkpoint, inputs)
        finished = train(trainer)
        trainer.close()
        tell_time(encoded, accelerator)
    if not finished:
        accelerator.end_training()
        accelerator.print(f"Saved. Go on with: wadi distill --resume-from-checkpoint {run}")
        raise SystemExit(130)
    with together(hosts):
        if accelerator.is_main_process:
            export(trainer, run)
    accelerator.end_training()
    if planned is not None:
        print(peak_line(planned, torch.cuda.max_memory_allocated(device)))
    return run


def plan(config: DistillConfig) -> None:
    """Print what a run needs, without loading weights or writing anything.

    Raises:
        WadiError: a required option is missing, the teacher's configurations are missing or cannot be used,
            or an option does not fit the teacher.
    """
    if config.run.resume_from_checkpoint is not None:
        config, _ = _resume(config)
    elif config.model.pretrained_model_name_or_path is None:
        raise WadiError(f"--{INPUTS['pretrained_model_name_or_path']}: is required")
    check_preset_name(config.model.preset)
    print_plan(config, torch.device(chosen_device()))


def export(trainer: Trainer, run: Path) -> None:
    """Write the averaged student: adapter/ in PEFT format (LoRaD), pipeline/ merged into the teacher.

    The pipeline is in float32 after a training in float32, and else has the dtypes of the teacher's files. A
    teacher that was quantized already gets none, because merging would round it again.
    """
    backbone, student = trainer.backbone, trainer.student
    options, name = trainer.config.student, trainer.config.model.pretrained_model_name_or_path
    teacher = backbone.text.folder or name
    steps = student_steps(trainer.config, backbone)
    dtype = torch.float32 if trainer.config.run.mixed_precision == "no" else "auto"
    own = options.alpha_T_squared, trainer.config.model.resolution
    if options.method != "lorad":
        pipeline = load_pipeline(teacher, dtype)
        network = getattr(pipeline, backbone.network_name)
        with trainer.ema_weights():
            network.load_state_dict(merged_state(student, network.state_dict()))
        StudentPipeline(pipeline, *own, steps).write(part(run, "pipeline"))
        return
    if trainer.config.run.shard_base:  # the adapter's names and shapes, of which the average has the values
        shapes = student_config(backbone.network, options.rank)
        student = inject_adapter_in_model(shapes, view(backbone.network))
    with part(run, "adapter").writing() as folder:
        save_adapter(student, folder, state_dict=trainer.ema_state(), base_model=name)
        lora = FusedLoRA.in_folder(backbone.text.folder)
        record = Student.of(backbone.network, backbone.pipeline.scheduler, *own, lora, steps)
        record.write(folder)
    if not quantized_in_files(backbone.network):
        pipeline = StudentPipeline.from_pretrained(teacher, run / "adapter", torch_dtype=dtype)
        pipeline.write(part(run, "pipeline"))


def part(run: Path, name: str) -> Output:
    """A folder in a run folder. When a finished run is trained on, it replaces the folder that it wrote."""
    return Output(run / name, "distill", overwrite=True)


def run_output(config: DistillConfig) -> Output:
    """The rule for the run folder of a new run."""
    go_on = f"go on with wadi distill --resume-from-checkpoint {config.run.output_dir}"
    return Output(config.run.output_dir, "distill", _inputs(config), instead=go_on)


def _inputs(config: DistillConfig) -> tuple[str | None, ...]:
    values = config.values()
    return tuple(values[name] for name in INPUTS)


def share_batch(config: DistillConfig, batch: int, processes: int) -> DistillConfig:
    """Options with which `processes` take `batch` samples per step, by smaller or more micro-batches.

    Raises:
        WadiError: the processes cannot share the samples equally.
    """
    size, count = config.optimizer.train_batch_size, config.optimizer.gradient_accumulation_steps
    if size * count * processes == batch:
        return config
    if batch % processes:
        raise WadiError(
            f"{config.run.resume_from_checkpoint or config.run.output_dir}: was trained with {batch} "
            f"samples per step, which {processes} processes cannot share equally; start a number of "
            f"processes that divides {batch}"
        )
    own = batch // processes
    size = max(d for d in range(1, min(size, own) + 1) if own % d == 0)
    return config.replace(train_batch_size=size, gradient_accumulation_steps=own // size)


def resolve(config: DistillConfig) -> tuple[DistillConfig, Path | None]:
    """Make paths absolute. If a run is resumed, take its options and find its checkpoint.

    When a run is resumed, `CHANGEABLE` options may have new values. Options in `INPUTS` may name another path
    of the same content. All other options that are given must be the run's own. The number of samples per
    step stays the same; see `share_batch`.

    Returns:
        The config to train with, and the checkpoint to load, if any.

    Raises:
        WadiError: a required option is missing, the run folder is in use, or the run cannot be resumed.
    """
    if config.run.resume_from_checkpoint is not None:
        return _resume(config)
    for name in ("pretrained_model_name_or_path", "prompts"):
        if getattr(config.model, name) is None:
            raise WadiError(f"--{INPUTS[name]}: is required")
    check_preset_name(config.model.preset)
    run = Path(config.run.output_dir).absolute()
    run_output(config).check()
    _check_cache(config)
    values = config.values()
    paths = {name: _absolute(value) for name in INPUTS if (value := values[name])}
    return config.replace(output_dir=str(run), **paths), None


def _absolute(name: str) -> str:
    """The absolute path of an existing file or folder. Other names, such as hub ids, stay as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _resume(config: DistillConfig) -> tuple[DistillConfig, Path | None]:
    given = Path(config.run.resume_from_checkpoint).absolute()
    checkpoint = given if given.parent.name == "checkpoints" else latest_checkpoint(given / "checkpoints")
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    if not (run / "config.yaml").is_file():
        raise WadiError(f"{given}: not a run folder (no config.yaml) nor one of its checkpoints")
    if checkpoint is not None:
        read_state(checkpoint)  # another format is refused before options that are not known any more
    saved = DistillConfig.load(run / "config.yaml")
    own, defaults, changed = saved.values(), DistillConfig().values(), {}
    for name, value in config.values().items():
        if name in ("output_dir", "resume_from_checkpoint"):
            continue
        if value == defaults[name] and name not in config.given:
            continue
        if name in CHANGEABLE:
            changed[name] = value
        elif name in INPUTS:
            changed[name] = None if value is None else _absolute(value)
        elif value != own[name]:
            raise WadiError(
                f"--{name.replace('_', '-')}: the run was started with {own[name]}, it cannot go on with "
                f"{value}; omit the option or start a new run"
            )
    for name in ("adapter", "pipeline"):
        part(run, name).check()
    resumed = saved.replace(output_dir=str(run), **changed)
    for value, option in zip(_inputs(resumed), INPUTS.values(), strict=True):
        path = Path(value or run)
        if path.is_absolute() and not path.exists():
            raise WadiError(f"{path}: does not exist; if it was moved, give its new path with --{option}")
    _check_cache(resumed)
    return resumed, checkpoint


def _check_cache(config: DistillConfig) -> None:
    if config.model.embeddings_dir is not None:
        cache_output(config.model.embeddings_dir, *_inputs(config)).check()


def _load(
    config: DistillConfig, checkpoint: Path | None, accelerator: Accelerator, folder: str
) -> tuple[DistillConfig, Backbone, list[Prompt], dict[str, str | None]]:
    """Load the teacher in `folder`, and the prompts. The config gets the run's batch and grid prompts."""
    run = Path(config.run.output_dir)
    batch = _samples_a_step(run, checkpoint)
    if batch is not None:
        config = share_batch(config, batch, accelerator.num_processes)
    if config.run.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise WadiError("--mixed-precision: fp16 needs a GPU; use no or bf16")
    model = config.model
    prompts = read_prompts(model.prompts, model.caption_column, model.dataset_split)
    inputs = _digests(config, prompts, folder)
    if (started := _read_run(run)) is not None:
        refuse_other_inputs(run, started, inputs, INPUTS)
    teacher = model.pretrained_model_name_or_path
    backbone = load_backbone(folder, config.run.dtype, "cpu", model.resolution)
    backbone.work_on(accelerator.device)
    backbone.check_storage(config.run.base_precision, accelerator.device)
    torch.backends.cuda.enable_cudnn_sdp(backbone.cudnn_attention)
    check_teacher(teacher, backbone.pipeline.scheduler, backbone.network)
    if quantized_in_files(backbone.network):
        tell(
            f"{teacher}: is quantized, so the run ends with adapter/ and without pipeline/; merge "
            "the adapter into the model in full precision with wadi export"
        )
    check_preset(config, backbone.pipeline)
    if config.student.adapter is not None:
        student_with(backbone.pipeline, [adapter_folder(config.student.adapter)])
    if not config.run.validation_prompts:
        config = config.replace(validation_prompts=tuple(p.text for p in prompts[:GRID_PROMPTS]))
    return config, backbone, prompts, inputs


def _digests(config: DistillConfig, prompts: list[Prompt], folder: str) -> dict[str, str | None]:
    """Digests of what the options in `INPUTS` name; `folder` is what was made of the teacher."""
    adapter = config.student.adapter
    return {
        **teacher_digests(folder, *config.model.teacher[:3]),
        "prompts": texts_digest(prompt.text for prompt in prompts),
        "student_adapter": None if adapter is None else adapter_digest(adapter),
    }


def _begin(trainer: Trainer, run: Path, checkpoint: Path | None, inputs: dict[str, str | None]) -> None:
    """Open the run folder, load the checkpoint, start the trackers."""
    accelerator, config = trainer.accelerator, trainer.config
    if accelerator.is_main_process:
        _open_run(run, config, trainer.batch, inputs)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    if accelerator.is_main_process:
        truncate_metrics(run / "metrics.jsonl", trainer.global_step)
    start_trackers(accelerator, config)


def _open_run(run: Path, config: DistillConfig, batch: int, inputs: dict[str, str | None]) -> None:
    if not (run / "config.yaml").exists():
        run_output(config).open()
    # config.yaml last: with it the run can be resumed
    write_json(run / RUN_FILE, {"samples_a_step": batch, **inputs})
    config.save(run / "config.yaml")


def _samples_a_step(run: Path, checkpoint: Path | None) -> int | None:
    """Samples per step of a resumed run, even if it has no checkpoint yet; None for a new run."""
    if checkpoint is not None:
        return checkpoint_batch(checkpoint)
    value = _read_run(run)
    return None if value is None else value["samples_a_step"]


def _read_run(run: Path) -> dict[str, Any] | None:
    """The record of a run that has begun: samples per step and digests of its inputs. None for a new run."""
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
