"""Every command, by its own options: what it may not replace is refused before anything is loaded or made."""

import contextlib
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.test_outputs import contents
from wadi import cli
from wadi.distill.config import DistillConfig
from wadi.outputs import Output

OUTPUTS = {"checkpoints", "out", "output_dir", "embeddings_dir", "save_reference"}
"""Options that name what is written."""
INPUTS = {
    *(
        "adapter",
        "adapters",
        "atlas",
        "captions",
        "embedding",
        "examples",
        "focus_on",
        "font",
        "image",
        "init",
    ),
    *(
        "instance_data_dir",
        "mask",
        "pipeline",
        "prior_prompts",
        "reference",
        "run",
        "source",
        "teacher",
        "vae",
        "weights",
    ),
}
"""Other options of the type Path. A new option belongs to one of the two, and then to the tests below."""

ARGUMENTS = {
    "generate": ("a cat", "--model", "model"),
    "control": ("image.png", "--prompt", "a cat", "--model", "model", "--controlnet", "model"),
    "image-to-image": ("image.png", "--prompt", "a cat", "--model", "model"),
    "inpaint": ("image.png", "image.png", "--prompt", "a cat", "--model", "model"),
    "distill": ("--teacher", "model", "--prompts", "prompts.txt"),
    "demo": (),
    "export": ("model", "--model", "model"),
    "average": ("model", "model"),
    "convert": ("model",),
    "import": ("weights.safetensors", "--model", "model"),
    "extract": ("--teacher", "model", "--student", "model"),
    "evaluate": ("--captions", "prompts.txt", "--model", "model", "--spread-prompts", 1),
    "directions": ("model", "model"),
    "directions swap": ("model", "model", "--take", "norms"),
    "dreambooth": ("model", "--model", "model", "--class-prompt", "a dog"),
    "invert": ("model", "--model", "model"),
    "prompts encode": ("--teacher", "model", "--prompts", "prompts.txt"),
    "emoji atlas": ("--font", "prompts.txt"),
    "emoji train-vae": ("--atlas", "weights.safetensors"),
    "emoji train-teacher": ("--vae", "model", "--atlas", "weights.safetensors"),
    "emoji train-controlnet": ("--teacher", "model", "--atlas", "weights.safetensors"),
    "emoji train-judge": ("--atlas", "weights.safetensors"),
    "emoji prompts": ("--num-prompts", 20, "--focus-on", "weights.safetensors"),
    "emoji relation-examples": ("--atlas", "weights.safetensors"),
    "emoji evaluate": ("--pipeline", "model"),
    "emoji subject-examples": ("--character", "🦩", "--font", "prompts.txt"),
}
"""Of each command that writes: what it must be given beside the output. None of it can be loaded."""
GOES_ON = {
    "distill": "--resume-from-checkpoint",
    "demo": "--resume-from-checkpoint",
    "dreambooth": "--resume",
}
"""Commands that replace no folder of theirs, and the option with which they go on in one."""
FILES = {"emoji atlas": "o.safetensors", "emoji prompts": "o.txt", "emoji evaluate": "o.json"}
IMAGES = ("generate", "control", "image-to-image", "inpaint")


def options_of(command):
    """Name and type of every option of a command."""
    if command == "distill":
        return {name: place.hint for name, place in DistillConfig.places().items()}
    function = cli._load(cli.COMMANDS[command][0])
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    found = {}
    for parameter in parameters:
        if dataclasses.is_dataclass(parameter.annotation):
            found |= {field.name: field.type for field in dataclasses.fields(parameter.annotation)}
        else:
            found[parameter.name] = parameter.annotation
    return found


def flag_of(command):
    """The option that names what the command writes, if it has one."""
    names = options_of(command).keys() & (OUTPUTS - {"save_reference", "checkpoints"})
    if command == "prompts encode" or "output_dir" not in names:
        return next((f"--{name.replace('_', '-')}" for name in names), None)
    return "--out"


WRITING = sorted(ARGUMENTS)
FOLDERS = [command for command in WRITING if command not in FILES]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Inputs that exist, none of which can be loaded, and a folder of the user's."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("mine")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "weights.safetensors").write_text("none")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    return tmp_path


def said(capsys, command, *options):
    """What `wadi` says on stderr when it refuses."""
    capsys.readouterr()
    arguments = [*command.split(), *map(str, ARGUMENTS[command]), *map(str, options)]
    assert cli.main(arguments) == 2, command
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("wadi: error: ")
    return line


def test_no_command_and_no_option_is_forgotten():
    for command in cli.COMMANDS:
        options = options_of(command)
        paths = {name for name, kind in options.items() if "Path" in str(kind)}
        assert paths <= OUTPUTS | INPUTS, (command, paths - OUTPUTS - INPUTS)
        suspicious = {name for name in options if re.search(r"(^|_)(out|output|save|write|dir)(_|$)", name)}
        assert suspicious <= OUTPUTS | INPUTS | {"output_type"}, command
        assert (flag_of(command) is not None) == (command in ARGUMENTS), command
        if command in ARGUMENTS and command not in (*GOES_ON, "prompts encode"):
            assert "overwrite" in options, command


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_the_user_s_is_refused_and_untouched(command, place, capsys):
    before = contents(place)
    line = said(capsys, command, flag_of(command), "foreign")
    assert f"foreign: is not empty, and wadi {written_by(command)} did not write it" in line
    if "overwrite" in options_of(command):
        assert "is not empty" in said(capsys, command, flag_of(command), "foreign", "--overwrite")
    assert contents(place) == before


@pytest.mark.parametrize("command", WRITING)
def test_the_current_folder_is_refused(command, place, capsys):
    before = contents(place)
    for out in (".", "foreign/..", place):
        assert "is or holds" in said(capsys, command, flag_of(command), out)
    assert contents(place) == before


@pytest.mark.parametrize("command", [command for command in WRITING if command != "demo"])
def test_every_input_is_refused_as_output(command, place, capsys):
    before = contents(place)
    for name in {"model", "prompts.txt", "weights.safetensors", "image.png"} & set(ARGUMENTS[command]):
        for out in (name, f"model/../{name}"):
            assert f"is or holds {name}, which is read" in said(capsys, command, flag_of(command), out)
    assert contents(place) == before


@pytest.mark.parametrize("command", [command for command in FOLDERS if command not in IMAGES])
def test_a_file_s_name_is_no_folder(command, place, capsys):
    before = contents(place)
    assert "omit the .safetensors" in said(capsys, command, flag_of(command), "x.safetensors")
    assert contents(place) == before


@pytest.mark.parametrize("command", [*FILES, *IMAGES])
def test_an_existing_file_is_refused(command, place, capsys):
    path = place / FILES.get(command, "o.png")
    path.write_text("mine")
    assert f"{path.name}: exists; give --overwrite" in said(capsys, command, flag_of(command), path.name)
    assert path.read_text() == "mine"
    wrong = "o.docx"
    assert "must end in" in said(capsys, command, flag_of(command), wrong)


def written_by(command):
    return "distill" if command == "demo" else command


@pytest.mark.parametrize(
    "command", [command for command in FOLDERS if command not in ("evaluate", "prompts encode")]
)
def test_its_own_folder_is_replaced_only_with_overwrite(command, place, capsys):
    with Output("own", written_by(command)).writing() as folder:
        (folder / "weights").write_text("old")
    before = contents(place)
    line = said(capsys, command, flag_of(command), "own")
    assert f"own: was written by wadi {written_by(command)} before" in line
    assert GOES_ON.get(command, "--overwrite") in line
    if command in GOES_ON:
        return
    # now the command comes to its inputs, which cannot be loaded
    with contextlib.suppress(OSError, ValueError):
        assert "own: " not in said(capsys, command, flag_of(command), "own", "--overwrite")
    assert contents(place) == before
    (place / "own" / "letter.txt").write_text("mine")
    line = said(capsys, command, flag_of(command), "own", "--overwrite")
    assert "own: holds letter.txt, which" in line


def test_examples_and_prompts_are_really_replaced(place, capsys):
    for command, out, written in (
        ("emoji subject-examples", "hedgehog", "hedgehog/0.png"),
        ("emoji prompts", "p.txt", "p.txt"),
    ):
        arguments = [*command.split(), "--out", out]
        arguments += ["--num-prompts", "20"] if command == "emoji prompts" else []
        assert cli.main(arguments) == 0
        (place / written).write_text("spoiled")
        assert cli.main(arguments) == 2
        assert (place / written).read_text() == "spoiled"
        assert cli.main([*arguments, "--overwrite"]) == 0
        assert (place / written).read_bytes() != b"spoiled"


def test_the_statistics_of_a_reference_are_kept(place, capsys):
    Path("statistics.safetensors").write_text("mine")
    options = ("--out", "evaluation", "--reference", "foreign", "--save-reference", "statistics.safetensors")
    assert "statistics.safetensors: exists; give --overwrite" in said(capsys, "evaluate", *options)
    assert Path("statistics.safetensors").read_text() == "mine"
    options = ("--out", "foreign/evaluation", "--reference", "foreign")
    assert "taken for real ones" in said(capsys, "evaluate", *options)
    assert not Path("foreign/evaluation").exists()
