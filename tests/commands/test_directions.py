"""`wadi directions` and `wadi directions swap`."""

import numpy as np

from tests.test_cli import run
from wadi.onestep import StudentPipeline


def test_directions_of_the_student_and_a_swap(student, teacher_folder, tmp_path, capsys):
    pair = [teacher_folder, student / "adapter"]
    assert run("directions", *pair, "--out", tmp_path / "found") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path / 'found'}: directions.json, directions.csv, scatter.png, spectrum.png"
    assert (tmp_path / "found" / "spectrum.png").exists()
    assert run("directions", "swap", *pair, "--take", "norms", "--out", tmp_path / "swapped") == 0
    sources = (tmp_path / "swapped", student / "pipeline")  # an adapter that turns kept the norms
    images = [
        StudentPipeline.from_pretrained(source)("a cat", seed=3, output_type="np") for source in sources
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4
