"""What the commands that make images share: files, folders, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import run
from wadi.outputs import MARKER


def test_pictures_of_pictures(student, tmp_path, capsys):
    model = ["--model", student / "pipeline", "--device", "cpu", "--prompt", "a red cat", "--seed", 3]
    picture, mask = Image.effect_noise((32, 16), 80).convert("RGB"), Image.new("L", (32, 16))
    mask.paste(255, (16, 0, 32, 16))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    assert run("image-to-image", tmp_path / "picture.png", *model, "-n", 2, "--out", tmp_path / "each") == 0
    assert f"{tmp_path / 'each'}: 2 images, one step each" in capsys.readouterr().out
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
