"""The command line: parse, call a room, print.

Options are the parameters of a command's function, or the fields of its config dataclass; tyro turns them
into flags and help. A room is imported only when its command runs, so that ``wadi --help`` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from wadi._version import __version__
from wadi.errors import WadiError, WadiWarning

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("wadi.pictures:generate", "make pictures in one step"),
    "control": (
        "wadi.pictures:control",
        "make pictures that keep to the edges of a picture, or to a condition map",
    ),
    "image-to-image": ("wadi.pictures:image_to_image", "make a picture of a picture, in one step"),
    "inpaint": ("wadi.pictures:inpaint", "repaint a part of a picture, in one step"),
    "distill": ("wadi.cli:distill", "turn a diffusion model into a one-step generator"),
    "demo": ("wadi.demo:demo", "distil the built-in teacher here and now, and show the result"),
    "export": ("wadi.cli:export", "merge a student into a folder that plain diffusers loads"),
    "average": ("wadi.cli:average", "make one student of several that were trained on from the same one"),
    "import": ("wadi.cli:import_", "make such a folder of the weights that the paper's authors published"),
    "extract": ("wadi.cli:extract", "find the adapter between a teacher and a one-step student"),
    "evaluate": (
        "wadi.metrics.evaluate:evaluate",
        "score pictures of captions against real ones",
    ),
    "directions": (
        "wadi.cli:directions",
        "tell how far lengths and directions of weights moved",
    ),
    "directions swap": (
        "wadi.cli:directions_swap",
        "write the student with its teacher's row norms, or row directions",
    ),
    "dreambooth": ("wadi.customise:dreambooth", "teach a model a new subject from a few pictures"),
    "invert": ("wadi.invert:run", "learn what pictures share as a new word: a subject, or a relation"),
    "report": ("wadi.cli:report", "write the report of a run again"),
    "prompts encode": (
        "wadi.distill.prompts:encode_to_disk",
        "encode training prompts once, and keep them on the disk",
    ),
    "emoji atlas": ("wadi.emoji.glyphs:save_atlas", "draw the emoji from the font"),
    "emoji train-vae": ("wadi.emoji.train_vae:train_vae", "train the autoencoder of the built-in teacher"),
    "emoji train-teacher": ("wadi.emoji.train_teacher:train_teacher", "train its denoiser and text encoder"),
    "emoji train-controlnet": (
        "wadi.emoji.train_controlnet:train_controlnet",
        "train a ControlNet for it",
    ),
    "emoji train-judge": ("wadi.emoji.train_judge:train_judge", "train the network that reads pictures"),
    "emoji prompts": ("wadi.emoji.captions:write_prompts", "write captions to distil on"),
    "emoji relation-examples": (
        "wadi.emoji.examples:relation_examples",
        "draw pictures of a relation that no caption names, to learn it from",
    ),
    "emoji evaluate": ("wadi.emoji.evaluate:evaluate", "score a teacher or a student with the judge"),
    "emoji subject-examples": (
        "wadi.emoji.subject:subject_examples",
        "write six pictures of an emoji that the teacher never saw",
    ),
    "completion": ("wadi.cli:completion", "print a completion script for bash, zsh or tcsh"),
}
"""Words of a command -> its function, and one line of help. A function takes options or one config dataclass;
a dictionary that it returns is printed."""

_EXAMPLES = """\
  wadi generate "a big panda on a red background" --seed 3 -n 8 --out pandas.png
  wadi distill --preset sd15 --teacher ./stable-diffusion-v1-5 --prompts prompts.txt --out runs/sd15
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after a mistake of the user (told in one line, without a traceback), or 130 after Ctrl-C.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as of `wadi --help | head`; what Python flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"wadi {__version__}")
        return 0
    try:
        if arguments[1:] in (["-h"], ["--help"]) and _under(arguments[0]) and arguments[0] not in COMMANDS:
            print(_group_overview(arguments[0]))
            return 0
        command, options = _command(arguments)
        with warnings.catch_warnings():
            _be_quiet()
            _print_result(_run(command, options))
    except WadiError as error:
        print(f"wadi: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wadi: interrupted", file=sys.stderr)
        return 130
    return 0


def export(
    adapter: tyro.conf.Positional[str],
    out: Path,
    model: str | None = None,
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Merge a student's adapter into its teacher; plain diffusers loads the folder, without wadi.

    Args:
        adapter: Folder or hub id of the student's adapter.
        out: Folder to write; new or empty.
        model: Folder or hub id of the teacher; the one that comes with wadi if not given.
        subject_adapter: Adapter of wadi dreambooth, merged too; may be given several times.
        dtype: Of the written weights.
        overwrite: Replace the folder if wadi export wrote it and nothing else is in it.
    """
    import torch

    from wadi import emoji
    from wadi.onestep import export_pipeline

    _hide_loading_bars()
    adapters = [adapter, *subject_adapter]
    export_pipeline(model or emoji.teacher_folder(), adapters, out, getattr(torch, dtype), overwrite)
    print(f"{out}: load it with diffusers, num_inference_steps=1, guidance_scale=1.0")


def average(
    adapters: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    weights: tuple[float, ...] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write the mean of several students' adapters, as an adapter of the same size.

    The students must have been trained on from one student (--student-adapter), with other seeds or options:
    the mean is then often better than each of them. Students without such an ancestor have other factors for
    like angles, and the mean of those means nothing.

    Args:
        adapters: Folders or hub ids of two or more students' adapters of one teacher.
        out: Adapter folder to write; new or empty.
        weights: One for each adapter, divided by their sum; all equal if not given.
        dtype: Of the written adapter.
        overwrite: Replace the folder if wadi average wrote it and nothing else is in it.
    """
    import torch

    from wadi.onestep.average import average_students

    average_students(adapters, out, weights, getattr(torch, dtype), overwrite)
    print(f"{out}: wadi generate --adapter {out}")


def import_(
    weights: tyro.conf.Positional[Path],
    model: str,
    out: Path,
    alpha_T_squared: Annotated[float | None, tyro.conf.arg(aliases=["--alpha-t-squared"])] = 0.0047,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Make a one-step folder that plain diffusers loads of weights that the paper's authors published.

    The file holds a whole U-Net (SD 1.5, SD 2.1-base) or PixArt transformer, or the angles that the authors'
    training script saves (theta_a, theta_b); of angles an adapter folder is made. Every key is accounted for.

    Args:
        weights: A .safetensors file, or one of torch.save (.pt, .bin), which is read without running code.
        model: The base model that the student was distilled from: folder or hub id.
        out: Folder to write; new or empty.
        alpha_T_squared: Of the student, 0.0047 for all that were published; None for the base model's own.
        dtype: Of the written weights.
        overwrite: Replace the folder if wadi import wrote it and nothing else is in it.
    """
    import torch
    from diffusers import LCMScheduler

    from wadi.onestep import import_weights

    _hide_loading_bars()
    released = import_weights(weights, model, out, alpha_T_squared, getattr(torch, dtype), overwrite)
    print(f"{weights}: {released.kind}, {len(released.tensors)} tensors")
    if released.ignored:
        print(f"not used: {', '.join(released.ignored)}")
    if (out / "model_index.json").exists():
        schedule = LCMScheduler.from_pretrained(out, subfolder="scheduler")
        alpha_T_squared = float(schedule.alphas_cumprod[-1])
        print(f"one step: {schedule.config.prediction_type} prediction, alpha_T^2 = {alpha_T_squared:.4g}")
        print(f"{out}: load it with diffusers, num_inference_steps=1, guidance_scale=1.0")
    else:
        print(f"{out}: an adapter; wadi generate --model {model} --adapter {out}")


def extract(
    teacher: str,
    student: str,
    out: Path,
    rank: int | None = None,
    max_sweeps: int = 10,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Find the LoRaD adapter that turns a teacher into its one-step student, as nearly as the rank allows.

    Prints a table: of each adapted layer its share of the whole change ||W' - W||^2, how far it moved
    (||W' - W|| / ||W||), the shares of its change that the adapter explains and that any rotation could
    (ceiling), and how far the norms of its rows moved; then what is in weights that are not adapted. The same
    is in extract.json and extract.png of the adapter folder.

    Args:
        teacher: Pipeline folder or hub id.
        student: Pipeline folder or hub id, as wadi export and wadi import write it.
        out: Adapter folder to write; new or empty.
        rank: Of the adapter; 256 for a U-Net and 128 for PixArt if not given.
        max_sweeps: Of the fit; 0 takes the singular value decomposition of the angles as it is.
        device: Such as cpu or cuda:1; a GPU if there is one.
        overwrite: Replace the folder if wadi extract wrote it and nothing else is in it.
    """
    from wadi.device import chosen_device
    from wadi.directions.extract import extract_adapter, table

    _hide_loading_bars()
    device = chosen_device(device)
    print(table(extract_adapter(teacher, student, out, rank, max_sweeps, device, overwrite)))
    print(f"{out}: wadi generate --model {teacher} --adapter {out}")


def directions(
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")],
    student: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDENT")],
    base: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare the weights of a student with its teacher's: how far rows moved in length and in direction.

    Prints means by block and by type of layer, every figure beside its null: the same figure for a random
    change of the same size, which in rows of hundreds of numbers is nearly all direction too. With --out also
    layer by layer as directions.json and directions.csv, and the plots scatter.png and spectrum.png. Weights
    are read a layer at a time. See also wadi directions swap.

    Args:
        teacher: Pipeline folder or hub id, folder of a U-Net or transformer, or safetensors file.
        student: The same, or the folder of a PEFT adapter.
        base: What an adapter was made for, if it names nothing; the teacher if not given.
        out: Folder to write; new or empty.
        overwrite: Replace the folder if wadi directions wrote it and nothing else is in it.
    """
    from wadi.directions.compare import compare_models, output_of, table, write_comparison

    _hide_loading_bars()
    if out is not None:
        output_of(out, teacher, student, base, overwrite).check()
    comparison = compare_models(teacher, student, base)
    print(table(comparison))
    if out is not None:
        write_comparison(comparison, out, overwrite, base)
        print(f"{out}: directions.json, directions.csv, scatter.png, spectrum.png")


def directions_swap(
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")],
    student: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDENT")],
    take: Literal["norms", "directions"],
    out: Path,
    base: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write the student with the norms, or the directions, of the rows of its teacher: a pipeline folder.

    What has no rows, such as biases, stays the student's. Evaluate teacher, student and both swaps, and see
    which of the two the student's pictures need.

    Args:
        teacher: Pipeline folder or hub id.
        student: Pipeline folder or hub id, safetensors file, or adapter folder. Of the last two the rest of
            the pipeline is the teacher's.
        take: What of the teacher's.
        out: Folder to write; new or empty.
        base: What an adapter was made for, if it names nothing; the teacher if not given.
        dtype: Of the written weights.
        overwrite: Replace the folder if wadi directions swap wrote it and nothing else is in it.
    """
    import torch

    from wadi.directions.swap import swap_rows

    _hide_loading_bars()
    swap_rows(teacher, student, take, out, base, getattr(torch, dtype), overwrite)
    print(f"{out}: the student with the {take} of its teacher; load it with diffusers")


def report(run: tyro.conf.Positional[Path], steps: int = 25, guidance_scale: float | None = None) -> None:
    """Write the report of a finished run again.

    Args:
        run: Run folder of wadi distill.
        steps: Of the teacher's pictures.
        guidance_scale: Of the teacher's pictures, throughout; that of the distillation's end if not given.
    """
    from wadi.distill.report import report as write

    _hide_loading_bars()
    print(f"report: {write(run, steps, guidance_scale)}")


def distill(options: Any) -> None:
    """Distil, and write the report."""
    from accelerate import PartialState

    from wadi.distill import DistillConfig
    from wadi.distill import distill as run_distillation
    from wadi.distill.report import report as write

    _hide_loading_bars()
    names = [field.name for field in dataclasses.fields(DistillConfig)]
    run = run_distillation(DistillConfig(**{name: getattr(options, name) for name in names}))
    if PartialState().is_main_process:
        adapter = f", {run / 'adapter'} (PEFT)" if (run / "adapter").exists() else ""
        print(f"student: {run / 'pipeline'} (diffusers){adapter}")
        print(f"report: {write(run)}")


def _distill_options(arguments: Sequence[str]) -> Any:
    """`DistillConfig` with --preset and short names for the two options that everyone gives.

    Returns:
        An instance that holds the preset's values: the defaults of all other options.
    """
    from wadi import emoji
    from wadi.distill.config import PRESETS, DistillConfig

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


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]) -> None:
    """Print a completion script: eval "$(wadi completion bash)", or save it where your shell looks for them.

    Args:
        shell: Which shell.
    """
    tree: dict[str, Any] = {}
    groups: dict[str, list[Any]] = {}
    for command in COMMANDS:
        first, *rest = command.split()
        if rest:
            function = _load(COMMANDS[command][0])
            choice = Annotated[Any, tyro.conf.subcommand(rest[0], constructor=function)]
            groups.setdefault(first, []).append(choice)
        else:
            tree[first] = _distill_options([]).__class__ if first == "distill" else _load(COMMANDS[first][0])
    for group, choices in groups.items():
        if group in tree:
            tree[group] = _with_commands(tree[group], choices)
            continue
        # tyro has no group of one: its command stands for it
        alone = _load(COMMANDS[_under(group)[0]][0])
        tree[group] = Union[tuple(choices)] if len(choices) > 1 else alone  # noqa: UP007
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    arguments = ["--tyro-print-completion", shell]
    try:
        tyro.extras.subcommand_cli_from_dict(tree, prog="wadi", args=arguments, config=config)
    except ImportError as error:  # tyro writes those of bash and zsh itself
        raise WadiError(f"completion {shell}: needs shtab; pip install shtab") from error


def _with_commands(function: Callable[..., Any], choices: Sequence[Any]) -> Callable[..., Any]:
    """For completion only: a command that has its own options, and commands below it."""

    def both(**options: Any) -> None:
        """Never called."""

    # tyro wants a name for "none of them" and completes it too: -h is one that does no harm
    none = Annotated[None, tyro.conf.subcommand("-h")]
    below = inspect.Parameter(
        "command",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Union[(*choices, none)],
        default=None,
    )
    # evaluated here, because they are strings in this module
    own = inspect.signature(function, eval_str=True).parameters.values()
    both.__signature__ = inspect.Signature([*own, below])  # type: ignore[attr-defined]
    both.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, below)}
    return both


def _under(group: str) -> list[str]:
    """The commands of two words that begin with `group`."""
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def _lines_of_help(commands: Iterable[str], width: int) -> str:
    return "\n".join(f"  {name:{width}}{COMMANDS[name][1]}" for name in commands)


def _group_overview(group: str) -> str:
    names = _under(group)
    commands = _lines_of_help(names, max(map(len, names)) + 4)
    return f"usage: wadi {group} COMMAND [OPTIONS]\n\ncommands:\n{commands}"


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 4
    commands = _lines_of_help(COMMANDS, width)
    return (
        "usage: wadi COMMAND [OPTIONS]\n\n"
        "One-step pictures from diffusion models, by learning how their weights turn (WaDi).\n\n"
        f"commands:\n{commands}\n\n"
        f"options:\n  {'--help':{width}}this overview; after a command, its options\n"
        f"  {'--version':{width}}the version\n\n"
        f"examples:\n{_EXAMPLES}"
    ).rstrip()


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split into the words of a command and its options."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    if under := _under(arguments[0]):
        raise WadiError(f"{arguments[0]}: name one of its commands: {', '.join(n.split()[1] for n in under)}")
    near = difflib.get_close_matches(arguments[0], [name.split()[0] for name in COMMANDS], 1)
    hint = f"did you mean {near[0]}?" if near else "see wadi --help"
    raise WadiError(f"{arguments[0]}: no such command; {hint}")


def _run(command: str, options: list[str]) -> Any:
    _check_device(options)
    function = _load(COMMANDS[command][0])
    if command == "distill":
        default = _distill_options(options)
        return function(tyro.cli(type(default), default=default, prog="wadi distill", args=options))
    return tyro.cli(function, prog=f"wadi {command}", args=options, config=(tyro.conf.OmitArgPrefixes,))


def _check_device(options: list[str]) -> None:
    """For all commands that have --device, before one of them loads anything."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--device", nargs="?")
    name = look.parse_known_args(options)[0].device
    if name not in (None, "None"):
        from wadi.device import chosen_device

        chosen_device(name)


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if module != __name__:
        _hide_loading_bars()
    return function


def _print_result(result: Any) -> None:
    if isinstance(result, dict) and result:
        width = max(map(len, result))
        for name, value in result.items():
            figure = f"{value:.4f}" if isinstance(value, float) else f"{value}"
            print(f"{name.replace('_', ' '):{width}}  {figure:>10}")


def _be_quiet() -> None:
    """Leave the terminal to our own lines; errors of the libraries still show."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", WadiWarning)
    warnings.showwarning = _show_warning
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    print(f"wadi: warning: {message}", file=sys.stderr)


def _hide_loading_bars() -> None:
    """Hide the libraries' bars for files on the disk; those of downloads stay."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
