"""`wadi distill`: turn a diffusion model into a one-step generator."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_type_hints

import docstring_parser
import tyro

from wadi import emoji
from wadi.distill.config import GROUPS, PRESETS, DistillConfig

HELP_ALL = "--help-all"

_ALIASES = {"pretrained_model_name_or_path": ("--teacher",), "output_dir": ("--out",)}
"""Short names of the two options that everyone gives."""
_HELP = {
    "preset": "Where the other options start: the defaults shown are this preset's.",
    "output_dir": "Run folder; new or empty, unless a run is resumed.",
}
"""What the command line says otherwise than `DistillConfig` does."""


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
    """The options of `wadi distill`; exits after --help and --help-all, and where tyro finds a mistake.

    Raises:
        WadiError: a value that `DistillConfig` refuses.
    """
    everything = HELP_ALL in arguments
    often = not everything and not {"-h", "--help"}.isdisjoint(arguments)
    if everything:
        arguments = [*(word for word in arguments if word != HELP_ALL), "--help"]
    groups = tyro.cli(options_type(start_of(arguments), often), prog="wadi distill", args=arguments)
    return DistillConfig(
        **{name: value for group in vars(groups).values() for name, value in vars(group).items()}
    )


def start_of(arguments: Sequence[str]) -> DistillConfig:
    """The options that --preset names: the defaults of all others."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--preset", nargs="?")
    name = first_look.parse_known_args(arguments)[0].preset
    start = PRESETS.get(name, DistillConfig())  # tyro tells about a name that is not known
    if start.preset.startswith("emoji"):  # a preset of the library cannot know where the built-in teacher is
        start = dataclasses.replace(start, prompts=str(emoji.prompts_file()))
        if start.preset != "emoji-dit":  # its teacher does not come with wadi
            start = dataclasses.replace(start, pretrained_model_name_or_path=str(emoji.teacher_folder()))
    return start


def options_type(start: DistillConfig | None = None, often: bool = False) -> type:
    """What tyro reads the options from: a dataclass of each of `GROUPS`, all of them with defaults.

    Args:
        start: holds the defaults; those of `DistillConfig` if not given.
        often: leave only the options that people set, for --help.
    """
    start = DistillConfig() if start is None else start
    hints: dict[str, Any] = get_type_hints(DistillConfig) | {"preset": Literal[("none", *PRESETS)]}
    said = docstring_parser.parse_from_object(DistillConfig).params
    helps = {option.arg_name: " ".join((option.description or "").split()) for option in said} | _HELP
    groups: dict[str, list[tuple[str, Any, Any]]] = {group: [] for group in GROUPS}
    for option in dataclasses.fields(DistillConfig):
        name = option.name
        marks = [tyro.conf.arg(prefix_name=False, help=helps[name], aliases=_ALIASES.get(name))]
        if often and not option.metadata["often"]:
            marks.append(tyro.conf.Suppress)
        groups[option.metadata["group"]].append(
            (name, Annotated[(hints[name], *marks)], getattr(start, name))
        )
    parts = []
    for group, options in groups.items():
        part = dataclasses.make_dataclass(group.title().replace(" ", ""), options, frozen=True)
        part.__doc__ = ""
        named = Annotated[part, tyro.conf.arg(name=group)]
        parts.append((group.replace(" ", "_"), named, dataclasses.field(default_factory=part)))
    whole = dataclasses.make_dataclass("Options", parts, frozen=True)
    whole.__doc__ = "Turn a diffusion model into a one-step generator."
    if often:
        whole.__doc__ += f" These are the options that people set; {HELP_ALL} shows all of them."
    return whole
