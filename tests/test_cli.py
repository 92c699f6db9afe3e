"""The command line: what it says, where it says it, and its exit status."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.tiny import PROMPTS
from wadi import cli
from wadi._version import __version__
from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline, image_grid
from wadi.outputs import MARKER


def run(*arguments):
    """Exit status of `wadi`, whether it returns it or tyro exits with it."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as exit_:
        return exit_.code or 0


@pytest.fixture(scope="module")
def student(teacher_folder, tmp_path_factory):
    """A run of two steps: the student's folder, made by the command line itself."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = "--student-rank 4 --fake-rank 4 --train-batch-size 2 --max-train-steps 2 --logging-steps 1"
    arguments = ["--teacher", teacher_folder, "--prompts", folder / "prompts.txt", "--out", folder / "run"]
    assert run("distill", "--preset", "emoji", *arguments, *options.split()) == 0
    return folder / "run"


def test_help_is_quick_and_complete():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "wadi", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 1.5
    for command, (_, help_) in cli.COMMANDS.items():
        assert f"  {command} " in result.stdout
        assert help_ in result.stdout


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"wadi {__version__}\n"


def test_nothing_to_do_shows_the_overview(capsys):
    assert run() == 2
    assert "usage: wadi COMMAND" in capsys.readouterr().out


def test_a_group_has_help(capsys):
    assert run("emoji", "--help") == 0
    shown = capsys.readouterr().out
    assert {name for name in cli.COMMANDS if f"  {name} " in shown} == {
        name for name in cli.COMMANDS if name.startswith("emoji ")
    }


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    assert run(*command.split(), "--help") == 0
    assert f"usage: wadi {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "did you mean generate?"),
        (["xyz"], "see wadi --help"),
        (["emoji"], "train-teacher"),
        (["generate", "a cat", "--model", "no/such/folder"], "no such folder"),
        (["generate", "a cat", "-n", "0"], "--num-images"),
        (["generate", "a cat", "--guidance-scale", "3"], "guidance_scale 3: a one-step student cannot be"),
        (["generate", "a cat", "--negative-prompt", "a dog"], "negative_prompt: a one-step student cannot"),
        (["generate", "a cat", "--num-inference-steps", "4"], "num_inference_steps 4: a one-step student"),
        (["image-to-image", "nowhere.png", "--prompt", "a cat"], "nowhere.png: there is no such image"),
        (["image-to-image", "x.png", "--prompt", "a cat", "--guidance-scale", "2"], "guidance_scale 2"),
        (["image-to-image", "x.png", "--prompt", "a cat", "-n", "0"], "--num-images"),
        (["inpaint", "x.png", "y.png", "--prompt", "a cat", "--candidates", "0"], "--candidates"),
        (["inpaint", "x.png", "y.png", "--prompt", "a cat", "--negative-prompt", "b"], "negative_prompt: a"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "x"], "nowhere"),
        (["import", "nowhere.pt", "--model", "some/model", "--out", "x"], "nowhere.pt: could not read"),
        (["extract", "--teacher", "nowhere", "--student", "y", "--out", "x"], "nowhere: no such folder"),
        (["directions", "nowhere", "y"], "nowhere: no such folder"),
        (["directions", "swap", "nowhere", "y", "--take", "norms", "--out", "x"], "nowhere: no such folder"),
        (["distill", "--student-rank", "0"], "--student-rank"),
        (["distill", "--teacher", "nowhere"], "--prompts"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a cat", "--sed", "3"],
        ["generate"],
        ["distill", "--preset", "sd99"],
        ["report", "x", "--steps", "y"],
    ],
)
def test_unknown_options_are_told(arguments, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert arguments[-1] in captured.err or "required" in captured.err
    assert "Traceback" not in captured.err


def test_a_hub_id_without_network_is_one_line(capsys):
    assert run("generate", "a cat", "--model", "some/model") == 2  # the tests run with HF_HUB_OFFLINE
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("wadi: error: some/model: there is no such folder, and it could not be fetched")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_device_that_is_not_there_is_one_line(command, capsys):
    for device in (["--device", "cuda:99"], ["--device=nonsense"]):
        assert run(*command.split(), *device) == 2
        assert "is not on this machine; name one of cpu" in capsys.readouterr().err


def test_a_run_folder_stands_for_its_adapter(student, teacher_folder, tmp_path, capsys):
    arguments = ["generate", "a cat", "--model", teacher_folder, "--out"]
    assert run(*arguments, tmp_path / "a.png", "--adapter", student / "adapter") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(*arguments, tmp_path / "b.png", "--adapter", student) == 0
    assert "its adapter is used" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(command, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert run("report", "x") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_presets_set_the_defaults_that_help_shows():
    from wadi import emoji
    from wadi.distill.config import PRESETS

    options = cli._distill_options(["--preset", "emoji"])
    assert options.student_rank == PRESETS["emoji"].student_rank
    assert options.pretrained_model_name_or_path == str(emoji.teacher_folder())
    assert cli._distill_options(["--seed", "1"]).pretrained_model_name_or_path is None


def test_distill_leaves_a_student_and_a_report(student, capsys):
    assert "1 step" in (student / "report.html").read_text()
    assert run("report", student, "--steps", 2) == 0
    assert capsys.readouterr().out == f"report: {student / 'report.html'}\n"
    assert "Distilled with 2 updates" in (student / "report.html").read_text()


def test_generate_writes_what_the_pipeline_makes(student, teacher_folder, tmp_path, capsys):
    pipeline = OneStepPipeline.from_pretrained(student / "pipeline")
    images = pipeline("a red cat", seed=3, num_images_per_prompt=3)
    model = ["--model", student / "pipeline", "--device", "cpu", "--seed", 3]
    assert run("generate", "a red cat", *model, "-n", 3, "--out", tmp_path / "grid.png") == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'grid.png'}: 3 pictures" in captured.out
    assert captured.out.count("\n") == 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(image_grid(images)))
    assert run("generate", "a red cat", *model, "-n", 3, "--batch-size", 2, "--out", tmp_path / "each") == 0
    each = [np.asarray(Image.open(tmp_path / "each" / f"seed-{seed:06d}.png"), int) for seed in (3, 4, 5)]
    assert all(np.abs(a - np.asarray(b, int)).max() <= 1 for a, b in zip(each, images, strict=True))
    adapter = ["--model", teacher_folder, "--adapter", student / "adapter", "--device", "cpu", "--seed", 3]
    assert run("generate", "a red cat", *adapter, "--out", tmp_path / "one.png") == 0
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "one.png")), np.asarray(pipeline("a red cat", seed=3)[0])
    )


def test_pictures_of_pictures(student, tmp_path, capsys):
    model = ["--model", student / "pipeline", "--device", "cpu", "--prompt", "a red cat", "--seed", 3]
    picture, mask = Image.effect_noise((32, 16), 80).convert("RGB"), Image.new("L", (32, 16))
    mask.paste(255, (16, 0, 32, 16))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    assert run("image-to-image", tmp_path / "picture.png", *model, "-n", 2, "--out", tmp_path / "each") == 0
    assert f"{tmp_path / 'each'}: 2 pictures, one step each" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "each").iterdir()} == {
        MARKER,
        "seed-000003.png",
        "seed-000004.png",
    }
    inputs = [tmp_path / "picture.png", tmp_path / "mask.png"]
    assert run("inpaint", *inputs, *model, "-n", 1, "--candidates", 2, "--out", tmp_path / "painted") == 0
    painted = np.asarray(Image.open(tmp_path / "painted" / "seed-000003.png"))
    middle = np.asarray(picture.crop((8, 0, 24, 16)))  # what the model's square shows of it
    assert np.array_equal(painted[:, :8], middle[:, :8])
    assert not np.array_equal(painted[:, 8:], middle[:, 8:])
    assert run("inpaint", *inputs, *model, "-n", 1, "--out", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width > 3 * 128
    capsys.readouterr()
    assert run("inpaint", *inputs, *model, "--strength", 2, "--out", tmp_path / "x.png") == 2
    assert "strength: must be more than 0 and at most 1, but is 2" in capsys.readouterr().err
    Image.new("L", (32, 16)).save(tmp_path / "black.png")
    assert run("inpaint", inputs[0], tmp_path / "black.png", *model, "--out", tmp_path / "x.png") == 2
    assert "MASK: is black all over" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [("generate",), ("image-to-image", "x.png"), ("inpaint", "x.png", "y.png"), ("control", "x.png")],
)
def test_unknown_kinds_of_pictures_are_refused_before_anything_is_read(arguments, tmp_path, capsys):
    prompt = ["a cat"] if arguments[0] == "generate" else ["--prompt", "a cat"]
    assert run(*arguments, *prompt, "--model", "nowhere", "--out", tmp_path / "x.bmpp") == 2
    assert "x.bmpp: the name of the file must end in .png, .jpg" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_replaces_its_own_folder_and_nothing_else(student, teacher_folder, tmp_path, capsys):
    arguments = ["export", student / "adapter", "--model", teacher_folder, "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    single = weights.read_bytes()
    assert run(*arguments, "--dtype", "float16") == 2
    assert weights.read_bytes() == single
    assert run(*arguments, "--dtype", "float16", "--overwrite") == 0
    assert len(weights.read_bytes()) < 0.6 * len(single)
    assert run("export", student / "adapter", "--model", tmp_path / "out", *arguments[4:], "--overwrite") == 2
    assert "which is read" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    pipeline = OneStepPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(WadiError, match="which is read"):
        pipeline.save_pretrained(tmp_path / "out", overwrite=True)
    pipeline.save_pretrained(tmp_path / "copy")
    pipeline.save_pretrained(tmp_path / "copy", overwrite=True)
    with pytest.raises(WadiError, match="give --overwrite"):
        pipeline.save_pretrained(tmp_path / "copy")


def test_export_is_the_run_s_own_pipeline(student, teacher_folder, tmp_path):
    assert run("export", student / "adapter", "--model", teacher_folder, "--out", tmp_path / "out") == 0
    ours, theirs = (
        (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (tmp_path / "out", student / "pipeline")
    )
    assert ours == theirs


def test_extract_and_import_give_the_student_back(student, teacher_folder, tmp_path, capsys):
    pair = ["--teacher", teacher_folder, "--student", student / "pipeline"]
    assert run("extract", *pair, "--out", tmp_path / "found", "--rank", 4, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["all", "adapted", "layers", *["100.00", "%"] * 3]
    assert lines[-1].endswith(f"--model {teacher_folder} --adapter {tmp_path / 'found'}")
    weights = student / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    options = ["--model", teacher_folder, "--alpha-t-squared", "None", "--out", tmp_path / "imported"]
    assert run("import", weights, *options) == 0
    said = capsys.readouterr().out
    assert f"{weights}: UNet2DConditionModel, " in said
    assert "one step: epsilon prediction, alpha_T^2 = 0.00466\n" in said
    sources = ((student / "pipeline",), (tmp_path / "imported",), (teacher_folder, tmp_path / "found"))
    images = [
        OneStepPipeline.from_pretrained(*source)("a red cat", seed=3, output_type="np") for source in sources
    ]
    assert np.array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() < 1e-3


def test_directions_of_the_student_and_a_swap(student, teacher_folder, tmp_path, capsys):
    pair = [teacher_folder, student / "adapter"]
    assert run("directions", *pair, "--out", tmp_path / "found") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path / 'found'}: directions.json, directions.csv, scatter.png, spectrum.png"
    assert (tmp_path / "found" / "spectrum.png").exists()
    assert run("directions", "swap", *pair, "--take", "norms", "--out", tmp_path / "swapped") == 0
    sources = (tmp_path / "swapped", student / "pipeline")  # an adapter that turns kept the norms
    images = [
        OneStepPipeline.from_pretrained(source)("a cat", seed=3, output_type="np") for source in sources
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4


def test_completion_knows_commands_and_options(tmp_path, capsys):
    assert run("completion", "bash") == 0
    script = tmp_path / "wadi.bash"
    script.write_text(capsys.readouterr().out)
    ask = (
        f"source {script}; "
        "for words in 'wadi gen' 'wadi distill --student-r' 'wadi emoji train-v' 'wadi directions --b' "
        "'wadi directions sw' 'wadi directions swap --ta'; do "
        "COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _tyro_wadi; echo ${COMPREPLY[@]}; done"
    )
    answer = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout
    assert answer.split() == ["generate", "--student-rank", "train-vae", "--base", "swap", "--take"]


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "--help"]])
def test_reader_that_leaves_early_gets_no_traceback(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "wadi", *arguments], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_unusual_is_one_line_on_stderr(monkeypatch, capsys):
    from wadi.errors import tell

    monkeypatch.setattr(cli, "_run", lambda command, options: tell("odd, and may be right"))
    assert run("generate", "a panda") == 0
    assert capsys.readouterr().err == "wadi: warning: odd, and may be right\n"
    with pytest.warns(UserWarning, match="odd"):  # outside the command line: an ordinary warning
        tell("odd")
