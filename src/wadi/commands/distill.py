"""`wadi distill`: turn a diffusion model into a generator of one step or a few."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import docstring_parser
import tyro

from wadi import emoji
from wadi.distill.config import DistillConfig
from wadi.distill.presets import FITS, PRESETS
from wadi.errors import tell

HELP_ALL = "--help-all"

_ALIASES = {"pretrained_model_name_or_path": ("--teacher",), "output_dir": ("--out",)}
"""Short names of the two options that everyone gives."""
_HELP = {
    "preset": "Where the other options start: the defaults shown are this preset's.",
    "output_dir": "Run folder; new or empty, unless a run is resumed.",
}
"""What the command line says otherwise than `DistillConfig` does."""
_DESCRIPTION = """Turn a diffusion model into a generator of one step, or of a few.

--prompts is required, except with the emoji presets. --teacher is required with --preset none, emoji-dit and
emoji-flow; the presets of published models name theirs on the hub.

wadi distill --preset sd15 --teacher FOLDER --prompts prompts.txt --out runs/mine

The fake model is a second adapter, which learns what the student's images look like. The main loss of the
student comes from its difference to the teacher."""
_TITLES = {"fake": "fake model"}
"""Groups that the help calls otherwise."""


def distill(config: DistillConfig, plan: bool = False) -> None:
    """Distil, and write the report; with `plan`, print what the run needs, and stop."""
    from accelerate import PartialState
    from torch import OutOfMemoryError

    from wadi.distill.report import report as write
    from wadi.distill.run import distill as run_distillation
    from wadi.distill.run import plan as print_plan

    if plan:
        print_plan(config)
        return
    run = run_distillation(config)
    if not PartialState().is_main_process:
        return
    adapter = f"{run / 'adapter'} (PEFT)" if (run / "adapter").exists() else ""
    if not (run / "pipeline").exists():
        print(f"student: {adapter}; no pipeline/ and no report, because the teacher is quantized")
        return
    print(f"student: {run / 'pipeline'} (diffusers){', ' if adapter else ''}{adapter}")
    try:
        print(f"report: {write(run)}")
    except OutOfMemoryError:  # the run itself has all its files
        tell(f"{run}: the memory is too small for the images of the report; elsewhere, run wadi report {run}")


def parse(arguments: Sequence[str]) -> tuple[DistillConfig, bool]:
    """The options of `wadi distill`; exits after --help and --help-all, and where tyro finds a mistake.

    Returns:
        The options, and whether --plan is among them.

    Raises:
        WadiError: a value that `DistillConfig` refuses.
    """
    everything = HELP_ALL in arguments
    often = not everything and not {"-h", "--help"}.isdisjoint(arguments)
    if everything:
        arguments = [*(word for word in arguments if word != HELP_ALL), "--help"]
    start = start_of(arguments)
    groups = tyro.cli(options_type(start, often), prog="wadi distill", args=arguments)
    parts = vars(groups)
    plan = parts.pop("plan")
    values = {name: value for group in parts.values() for name, value in vars(group).items()}
    words = {word.split("=")[0].replace("-", "_") for word in arguments}
    given = [name for name in values if not words.isdisjoint(_flags(name))]
    return start.replace(**{name: values[name] for name in given}), plan


def _flags(name: str) -> list[str]:
    """The flags of an option, with underscores for all dashes."""
    own = [f"__{name}", f"__no_{name}", *_ALIASES.get(name, ())]
    return [flag.replace("-", "_") for flag in own]


def start_of(arguments: Sequence[str]) -> DistillConfig:
    """The options that --preset names: the defaults of all others."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--preset", nargs="?")
    name = first_look.parse_known_args(arguments)[0].preset
    start = PRESETS.get(name, DistillConfig())  # tyro tells about a name that is not known
    preset = start.model.preset
    if preset.startswith("emoji"):  # a preset of the library cannot know where the built-in teacher is
        start = start.replace(prompts=str(emoji.prompts_file()))
        if FITS[preset] == FITS["emoji"]:  # the teachers of the others do not come with wadi
            start = start.replace(pretrained_model_name_or_path=str(emoji.teacher_folder()))
    return start


def options_type(start: DistillConfig | None = None, often: bool = False) -> type:
    """What tyro reads the options from: a dataclass of each group of `DistillConfig`, with flat names.

    Args:
        start: holds the defaults; those of `DistillConfig` if not given.
        often: leave only the options that people set, for --help.
    """
    defaults = (DistillConfig() if start is None else start).values()
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, place in DistillConfig.places().items():
        hint = Literal[("none", *PRESETS)] if name == "preset" else place.hint
        said = _HELP.get(name, _described(place.group)[place.field.name])
        marks = [tyro.conf.arg(prefix_name=False, help=said, aliases=_ALIASES.get(name))]
        if often and not place.field.metadata["often"]:
            marks.append(tyro.conf.Suppress)
        groups.setdefault(place.path[0], []).append((name, Annotated[(hint, *marks)], defaults[name]))
    parts = []
    for group, options in groups.items():
        part = dataclasses.make_dataclass(group.title(), options, frozen=True)
        part.__doc__ = ""
        named = Annotated[part, tyro.conf.arg(name=_TITLES.get(group, group))]
        parts.append((group, named, dataclasses.field(default_factory=part)))
    told = "Print parameters, memory and time of the run, estimated without loading weights, and stop."
    flag = Annotated[bool, tyro.conf.arg(help=told), tyro.conf.FlagCreatePairsOff]
    parts.append(("plan", flag, False))
    whole = dataclasses.make_dataclass("Flags", parts, frozen=True)
    whole.__doc__ = _DESCRIPTION
    if often:
        whole.__doc__ += f" These are the options that people set; {HELP_ALL} shows all of them."
    return whole


@functools.cache
def _described(group: type) -> dict[str, str]:
    """The docstring of each option of a group, in one line."""
    found = docstring_parser.parse_from_object(group).params
    return {option.arg_name: " ".join((option.description or "").split()) for option in found}
