"""The command line: the table of commands, and the choice of the one that runs. See `wadi.commands`.

Options are the parameters of a command's function, or the fields of its config dataclass; tyro turns them
into flags and help. A command is imported only when it runs, so that ``wadi --help`` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, Union

import tyro

from wadi._version import __version__
from wadi.errors import WadiError, WadiWarning

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("wadi.commands.generate:generate", "make images of a prompt in one step or a few"),
    "control": (
        "wadi.commands.control:control",
        "make images that keep to the edges of an image, or to a condition map",
    ),
    "image-to-image": (
        "wadi.commands.image_to_image:image_to_image",
        "make images of a prompt that start from an image",
    ),
    "inpaint": ("wadi.commands.inpaint:inpaint", "repaint a part of an image"),
    "distill": ("wadi.commands.distill:distill", "train a student of one step or a few"),
    "demo": (
        "wadi.commands.demo:demo",
        "train a student of the built-in teacher in minutes, and write a report",
    ),
    "export": ("wadi.commands.export:export", "merge a student into a folder that plain diffusers loads"),
    "average": (
        "wadi.commands.average:average",
        "write the mean of students that were trained further from the same student",
    ),
    "import": (
        "wadi.commands.import_:import_",
        "convert weights that the paper's authors published to a diffusers folder",
    ),
    "convert": (
        "wadi.commands.convert:convert",
        "write .bin and .ckpt files as safetensors, without running code",
    ),
    "extract": (
        "wadi.commands.extract:extract",
        "find the adapter that turns a teacher into its student",
    ),
    "evaluate": (
        "wadi.commands.evaluate:evaluate",
        "make images of captions, and score them against real images",
    ),
    "directions": (
        "wadi.commands.directions:directions",
        "measure how far the lengths and directions of weights moved",
    ),
    "directions swap": (
        "wadi.commands.directions_swap:directions_swap",
        "write a student with its teacher's row norms, or row directions",
    ),
    "dreambooth": ("wadi.commands.dreambooth:dreambooth", "teach a model a new subject from a few images"),
    "invert": (
        "wadi.commands.invert:invert",
        "learn a new word for what images share: a subject, or a relation",
    ),
    "report": ("wadi.commands.report:report", "write the report of a finished run again"),
    "prompts encode": (
        "wadi.commands.prompts_encode:prompts_encode",
        "encode training prompts once, and keep them on the disk",
    ),
    "emoji atlas": ("wadi.emoji.glyphs:save_atlas", "draw the emoji from the font"),
    "emoji train-vae": ("wadi.emoji.train_vae:train_vae", "train the autoencoder of the built-in teacher"),
    "emoji train-teacher": (
        "wadi.emoji.train_teacher:train_teacher",
        "train the denoiser and the text encoder of the built-in teacher",
    ),
    "emoji train-controlnet": (
        "wadi.emoji.train_controlnet:train_controlnet",
        "train a ControlNet for the built-in teacher",
    ),
    "emoji train-judge": (
        "wadi.emoji.train_judge:train_judge",
        "train the judge, a network that reads what images show",
    ),
    "emoji prompts": (
        "wadi.emoji.captions:write_prompts",
        "write captions, as training prompts for a student",
    ),
    "emoji relation-examples": (
        "wadi.emoji.examples:relation_examples",
        "draw images of a relation that no caption names, for wadi invert",
    ),
    "emoji evaluate": (
        "wadi.emoji.evaluate:evaluate",
        "score the built-in teacher, or its student, with the judge",
    ),
    "emoji subject-examples": (
        "wadi.emoji.subject:subject_examples",
        "write six images of an emoji that the teacher never saw, for wadi dreambooth",
    ),
    "completion": ("wadi.cli:completion", "print a completion script for bash, zsh or tcsh"),
}
"""The words of a command -> its function, and one line of help. A function takes options or one config
dataclass. If it returns a dictionary, that is printed."""

_EXAMPLES = """\
  wadi generate "a big panda on a red background" --seed 3 -n 8 --out pandas.png
  wadi distill --preset sd15 --teacher ./stable-diffusion-v1-5 --prompts prompts.txt --out runs/sd15
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 after a mistake of the user, which is reported in one line without a traceback; 130 after Ctrl-C.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # for example `wadi --help | head`; what Python flushes at exit goes nowhere
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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does not import
            raise
        print(
            f"wadi: error: the memory of the GPU is too small. {str(error).splitlines()[0]}", file=sys.stderr
        )
        return 2
    return 0


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]) -> None:
    """Print a completion script. Run it with eval "$(wadi completion bash)", or save it where your shell
    looks for completion scripts.

    Args:
        shell: Your shell.
    """
    from wadi.commands.distill import options_type

    tree: dict[str, Any] = {}
    groups: dict[str, list[Any]] = {}
    for command in COMMANDS:
        first, *rest = command.split()
        if rest:
            function = _load(COMMANDS[command][0])
            choice = Annotated[Any, tyro.conf.subcommand(rest[0], constructor=function)]
            groups.setdefault(first, []).append(choice)
        else:
            tree[first] = options_type() if first == "distill" else _load(COMMANDS[first][0])
    for group, choices in groups.items():
        if group in tree:
            tree[group] = _with_commands(tree[group], choices)
            continue
        # tyro has no group of one command: the command stands for the group
        alone = _load(COMMANDS[_under(group)[0]][0])
        tree[group] = Union[tuple(choices)] if len(choices) > 1 else alone  # noqa: UP007
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    arguments = ["--tyro-print-completion", shell]
    try:
        tyro.extras.subcommand_cli_from_dict(tree, prog="wadi", args=arguments, config=config)
    except ImportError as error:  # tyro writes the scripts for bash and zsh itself
        raise WadiError(f"completion {shell}: needs the package shtab; pip install shtab") from error


def _with_commands(function: Callable[..., Any], choices: Sequence[Any]) -> Callable[..., Any]:
    """For completion only: a command that has its own options, and commands below it."""

    def both(**options: Any) -> None:
        """Never called."""

    # tyro needs a name for "none of the commands" and completes it too: -h does no harm
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
        "Train and use diffusion models of one step or a few (WaDi). A teacher is a multi-step model, which\n"
        "makes images of prompts. Its student makes them in one step, or in up to 4 if it was trained for\n"
        "that. Commands that make images use the built-in models if you name none; distill needs a teacher\n"
        "and prompts.\n\n"
        f"commands:\n{commands}\n\n"
        f"options:\n  {'--help':{width}}show this overview; after a command, its options\n"
        f"  {'--version':{width}}show the version\n\n"
        f"examples:\n{_EXAMPLES}"
    ).rstrip()


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the arguments into the words of a command and its options."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    if under := _under(arguments[0]):
        raise WadiError(f"{arguments[0]}: add one of its commands: {', '.join(n.split()[1] for n in under)}")
    near = difflib.get_close_matches(arguments[0], [name.split()[0] for name in COMMANDS], 1)
    hint = f"did you mean {near[0]}?" if near else "see wadi --help"
    raise WadiError(f"{arguments[0]}: there is no such command; {hint}")


def _run(command: str, options: list[str]) -> Any:
    _check_device(options)
    function = _load(COMMANDS[command][0])
    if command == "distill":
        from wadi.commands.distill import parse

        return function(*parse(options))
    return tyro.cli(function, prog=f"wadi {command}", args=options, config=(tyro.conf.OmitArgPrefixes,))


def _check_device(options: list[str]) -> None:
    """Check --device before the command loads anything."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--device", nargs="?")
    name = look.parse_known_args(options)[0].device
    if name not in (None, "None"):
        from wadi.device import chosen_device

        chosen_device(name)


def _load(target: str) -> Callable[..., Any]:
    """The function of a command. It hides the libraries' progress bars only when it is called, because the
    libraries take seconds to import and help does not need them."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if module == __name__:
        return function

    @functools.wraps(function)
    def without_bars(*args: Any, **kwargs: Any) -> Any:
        _hide_loading_bars()
        return function(*args, **kwargs)

    return without_bars


def _print_result(result: Any) -> None:
    if isinstance(result, dict) and result:
        width = max(map(len, result))
        for name, value in result.items():
            figure = f"{value:.4f}" if isinstance(value, float) else f"{value}"
            print(f"{name.replace('_', ' '):{width}}  {figure:>10}")


def _be_quiet() -> None:
    """Keep the libraries' warnings off the terminal; their errors are still shown."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", WadiWarning)
    warnings.showwarning = _show_warning
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    print(f"wadi: warning: {message}", file=sys.stderr)


def _hide_loading_bars() -> None:
    """Hide the libraries' progress bars for files on the disk; those for downloads stay."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
