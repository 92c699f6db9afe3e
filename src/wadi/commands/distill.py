"""`wadi distill`: turn a diffusion model into a one-step generator."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from wadi import emoji
from wadi.distill.config import PRESETS, DistillConfig


def distill(config: DistillConfig) -> None:
    """Distil, and write the report."""
    from accelerate import PartialState

    from wadi.distill.report import report as write
    from wadi.distill.run import distill as run_distillation

    run = run_distillation(config)
    if PartialState().is_main_process:
        adapter = f", {run / 'adapter'} (PEFT)" if (run / "adapter").exists() else ""
        print(f"student: {run / 'pipeline'} (diffusers){adapter}")
        print(f"report: {write(run)}")


def parse(arguments: Sequence[str]) -> DistillConfig:
    """The options of `wadi distill`; exits after --help, and where tyro finds a mistake.

    Raises:
        WadiError: a value that `DistillConfig` refuses.
    """
    default = options_of(arguments)
    options = tyro.cli(type(default), default=default, prog="wadi distill", args=arguments)
    return DistillConfig(**dataclasses.asdict(options))


def options_type() -> type:
    """What tyro reads the options from, for completion."""
    return type(options_of([]))


def options_of(arguments: Sequence[str]) -> Any:
    """`DistillConfig` with --preset and short names for the two options that everyone gives.

    Returns:
        An instance that holds the preset's values: the defaults of all other options.
    """
    teacher = tyro.conf.arg(
        aliases=["--teacher"], help="Teacher: a Stable Diffusion or PixArt-alpha folder, or a hub id."
    )
    out = tyro.conf.arg(aliases=["--out"], help="Run folder; new or empty, unless a run is resumed.")
    preset = tyro.conf.arg(help="Where the other options start: the defaults shown are this preset's.")
    fields = [
        ("pretrained_model_name_or_path", Annotated[str | None, teacher], None),
        ("output_dir", Annotated[str, out], DistillConfig.output_dir),
        ("preset", Annotated[Literal[("none", *PRESETS)], preset], "none"),
    ]
    options = dataclasses.make_dataclass("Options", fields, bases=(DistillConfig,), frozen=True)
    options.__doc__ = "Turn a diffusion model into a one-step generator."
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--preset", nargs="?")
    name = first_look.parse_known_args(arguments)[0].preset
    name = name if name in PRESETS else "none"  # tyro tells about the mistake
    start = PRESETS.get(name, DistillConfig())
    if name.startswith("emoji"):  # a preset of the library cannot know where the built-in teacher is
        built_in = {"pretrained_model_name_or_path": emoji.teacher_folder(), "prompts": emoji.prompts_file()}
        if name == "emoji-dit":  # its teacher does not come with wadi
            del built_in["pretrained_model_name_or_path"]
        start = dataclasses.replace(start, **{field: str(path) for field, path in built_in.items()})
    return options(**dataclasses.asdict(start))
