"""`wadi generate`: what the pipeline makes, of a folder, an adapter or a run."""

import numpy as np
from PIL import Image

from tests.test_cli import run
from wadi.onestep import StudentPipeline, image_grid


def test_a_run_folder_stands_for_its_adapter(student, teacher_folder, tmp_path, capsys):
    arguments = ["generate", "a cat", "--model", teacher_folder, "--out"]
    assert run(*arguments, tmp_path / "a.png", "--adapter", student / "adapter") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(*arguments, tmp_path / "b.png", "--adapter", student) == 0
    assert "its adapter is used" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_generate_writes_what_the_pipeline_makes(student, teacher_folder, tmp_path, capsys):
    pipeline = StudentPipeline.from_pretrained(student / "pipeline")
    images = pipeline("a red cat", seed=3, num_images_per_prompt=3)
    model = ["--model", student / "pipeline", "--device", "cpu", "--seed", 3]
    assert run("generate", "a red cat", *model, "-n", 3, "--out", tmp_path / "grid.png") == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'grid.png'}: 3 images" in captured.out
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
