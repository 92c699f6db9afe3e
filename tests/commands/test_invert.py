"""`wadi invert` from end to end, with any model and with what comes with wadi."""

import pytest
import torch
from PIL import Image

from tests.test_cli import run
from wadi.commands import invert
from wadi.files import load_tensors, read_json
from wadi.onestep.grids import READABLE
from wadi.outputs import MARKER
from wadi.tasks.inversion import Inversion
from wadi.tasks.inversion_sheet import new_prompts


@pytest.fixture
def folder(tmp_path):
    """Two pictures with captions whose words a tokenizer of bytes has as one token."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, caption in (("a", "o <R> x"), ("b", "u <R> y")):
        Image.new("RGB", (16, 16), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


QUICK = ["--max-train-steps", "2", "--train-batch-size", "2", "--num-inference-steps", "2"]
OWN_WORDS = ["--initializer-token", "a", "--prepositions", "i", "j"]


def test_a_word_of_any_stable_diffusion_and_its_files(folder, teacher_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("invert", folder, "--model", teacher_folder, "--out", out, *QUICK, *OWN_WORDS) == 0
    shown = capsys.readouterr().out
    assert f"{out / 'learned_embeds.safetensors'}: <R>, relation, 2 updates" in shown
    assert f'wadi generate "o <R> y" --embedding {out}' in shown
    assert load_tensors(out / "learned_embeds.safetensors")["<R>"].shape == (1, 16)
    facts = read_json(out / "inversion.json")
    assert (facts["updates"], facts["options"]["focal_alpha"]) == (2, 0.5)
    # exemplars, and two new pairs; no student
    assert Image.open(out / "pictures.png").height > 3 * READABLE


def test_the_built_in_teacher_learns_and_its_student_uses_the_word(folder, tmp_path):
    (folder / "a.txt").write_text("a panda <R> a rocket")
    (folder / "b.txt").write_text("an owl <R> an egg")
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    prompts = ["--prompts", "a cat <R> a dog"]
    assert run("invert", folder, "--out", out, *QUICK, *prompts) == 0
    height = Image.open(out / "pictures.png").height
    assert 3 * READABLE < height < 4 * READABLE  # exemplars, 2 steps, 1 step
    made = []
    for options in ([], ["--embedding", out]):
        assert run("generate", "a cat <R> a dog", "--out", picture, *options) == 0
        made.append(Image.open(picture).tobytes())
    assert made[0] != made[1]


def test_ctrl_c_writes_the_word_as_it_is(folder, teacher_folder, tmp_path, monkeypatch, capsys):
    def interrupted(config):
        return Inversion("<R>", torch.ones(1, 16), "relation", ("o <R> x",), losses, True)

    monkeypatch.setattr(invert, "learn", interrupted)
    out, losses = tmp_path / "out", (0.5, 0.25)
    assert run("invert", folder, "--model", teacher_folder, "--out", out) == 130
    assert "interrupted: <R> is written as it was then" in capsys.readouterr().out
    assert read_json(out / "inversion.json")["denoising_loss_of_the_last_updates"] == 0.375
    assert {path.name for path in out.iterdir()} == {"inversion.json", "learned_embeds.safetensors", MARKER}
    losses = ()
    assert run("invert", folder, "--model", teacher_folder, "--out", tmp_path / "none") == 130
    assert not (tmp_path / "none").exists()


def test_mistakes_are_told_in_a_line(folder, teacher_folder, tmp_path, capsys):
    model = ["--model", teacher_folder]
    cases = [
        ([tmp_path / "nowhere", *model], "no such folder"),
        ([folder, "--out", folder, *model], "which is read"),
        ([folder, *model, "--num-inference-steps", "0"], "--num-inference-steps 0"),
        ([folder, *model, "--out", tmp_path / "out"], "--prepositions: this model has no English"),
    ]
    for arguments, message in cases:
        assert run("invert", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_new_pairs_are_not_those_of_the_captions():
    def prompts(kind, *captions):
        return new_prompts(Inversion("<R>", torch.zeros(1, 2), kind, captions, (), False))

    assert prompts("relation", "a <R> b", "c <R> d") == ["a <R> d", "c <R> b"]
    assert prompts("relation", "a <R> b", "b <R> a", "c <R> c") == ["b <R> c", "c <R> b", "a <R> c"]
    assert prompts("relation", "a <R> b") == ["a <R> b"]
    assert prompts("subject", "a <R>", "a <R>", "b <R>") == ["a <R>", "b <R>"]
