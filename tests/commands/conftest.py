import pytest

from tests.test_cli import run
from tests.tiny import PROMPTS


@pytest.fixture(scope="session")
def student(teacher_folder, tmp_path_factory):
    """A run of two steps: the student's folder, made by the command line itself; read only."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = "--student-rank 4 --fake-rank 4 --train-batch-size 2 --max-train-steps 2 --logging-steps 1"
    options += " --validation-seeds 0"
    arguments = ["--teacher", teacher_folder, "--prompts", folder / "prompts.txt", "--out", folder / "run"]
    assert run("distill", "--preset", "emoji", *arguments, *options.split()) == 0
    return folder / "run"
