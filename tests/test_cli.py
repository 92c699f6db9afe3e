"""The command line: what it says, where it says it, and its exit status."""

import os
import subprocess
import sys

import pytest
import torch

from wadi import cli
from wadi._version import __version__


def run(*arguments):
    """Exit status of `wadi`, whether it returns it or tyro exits with it."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as exit_:
        return exit_.code or 0


def test_help_is_complete_and_loads_nothing_heavy():
    code = (
        "import sys; from wadi.cli import main; main(['--help']); print({'torch', 'peft'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("\nset()\n")
    for command, (_, help_) in cli.COMMANDS.items():
        assert f"  {command} " in shown
        assert help_ in shown


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
        (["generate", "a cat", "--guidance-scale", "3"], "guidance_scale 3: a student cannot be"),
        (["generate", "a cat", "--negative-prompt", "a dog"], "negative_prompt: a student cannot"),
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


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(command, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert run("report", "x") == 130
    assert "Traceback" not in capsys.readouterr().err


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


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    def fill(command, options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more lines")

    monkeypatch.setattr(cli, "_run", fill)
    assert run("generate", "a cat") == 2
    said = capsys.readouterr().err
    assert (
        said
        == "wadi: error: the memory of the GPU is too small. CUDA out of memory. Tried to allocate 2 GiB.\n"
    )


def test_what_is_unusual_is_one_line_on_stderr(monkeypatch, capsys):
    from wadi.errors import tell

    monkeypatch.setattr(cli, "_run", lambda command, options: tell("odd, and may be right"))
    assert run("generate", "a panda") == 0
    assert capsys.readouterr().err == "wadi: warning: odd, and may be right\n"
    with pytest.warns(UserWarning, match="odd"):  # outside the command line: an ordinary warning
        tell("odd")
